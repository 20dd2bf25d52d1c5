"""Files that survive a crash, and the checkpoints that count.

A write is *acknowledged* when its call has returned; a crash before that leaves the file as it was.
A checkpoint is acknowledged by its line in `manifest.jsonl`, which is on the disk after the
checkpoint itself and before any older one is removed. The manifest is there before any checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl"
FIRST_LINE = b'{"manifest": 1}\n'  # one that was emptied or overwritten does not have it
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteError(OSError):
    """A file could not be written: it is as it was before, or has all of the new content."""

    def __init__(self, path: Path, num_bytes: int, cause: OSError) -> None:
        remedy = "Make room" if cause.errno in NO_ROOM else "See that it can be written"
        super().__init__(
            f"{path}: expected to write {num_bytes} bytes, got: {cause.strerror or cause}. "
            f"{remedy}, or choose another output_dir."
        )
        self.errno = cause.errno


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that a crash leaves the old one or the whole new one.

    Raises:
        WriteError: If the system refuses; the file is then as it was, or whole.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        _write(temporary, content, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.replace(temporary, path)
        _write(path.parent, b"", os.O_RDONLY)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise WriteError(path, len(content), error) from error


def _write(path: Path, content: bytes | memoryview, flags: int) -> None:
    """Write all bytes, if any, and force the file or directory to the disk."""
    file = os.open(path, flags, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    finally:
        os.close(file)


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file, to the disk; one that a crash has torn keeps its own."""
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    _write(path, b"\n" * torn + line.encode() + b"\n", os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def make_directory(path: Path) -> None:
    """Make a directory and those above it, so that a crash does not take what is saved in it."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _write(path.parent, b"", os.O_RDONLY)


def save(content: Any, path: Path) -> None:
    """Call `torch.save`, durably; raises as `write_durably`."""
    write_durably(path, _serialize(content))


def _serialize(content: Any) -> memoryview:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def load(file: Path | io.BytesIO, device: torch.device | str = "cpu") -> Any:
    """Load tensors and plain values, as `save` writes them; nothing in the file is executed."""
    return torch.load(file, map_location=device, weights_only=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, durably; raises as `write_durably`."""
    write_durably(path, (json.dumps(content, indent=2) + "\n").encode())


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a file to write, which takes the place of `path` at the end if all went well.

    It is not forced to the disk: for results that can be made again.

    Raises:
        OSError: If the system refuses; the old file is then unchanged.
    """
    # ends as the other, since nibabel compresses by the ending
    temporary = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def nan_to_none(value: Any) -> Any:
    """Return a value for JSON, which has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


class CheckpointStore:
    """The checkpoints of a run, in a directory with a manifest of those that count.

    Args:
        directory: Made if it is not there.
        keep: Steps of which a checkpoint is kept, at least 2: the newest may turn out damaged.
    """

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        self.directory, self.keep = directory, max(keep, 2)

    @property
    def _manifest(self) -> Path:
        return self.directory / MANIFEST

    def save(self, content: Any, name: str) -> Path:
        """Write a checkpoint and acknowledge it, then remove the oldest.

        Args:
            content: Tensors and plain values; `progress` with `step` among them.
            name: File name, of no acknowledged checkpoint.

        Raises:
            WriteError: If the system refuses; the older checkpoints are then untouched.
        """
        data, path = _serialize(content), self.directory / name
        entry = {
            "file": name,
            "step": content["progress"]["step"],
            "sha256": hashlib.sha256(data).hexdigest(),
            "size": len(data),
        }
        try:
            make_directory(self.directory)
            if not self._manifest.exists():
                write_durably(self._manifest, FIRST_LINE)
            write_durably(path, data)
            append_line(self._manifest, json.dumps(entry))
        except WriteError:
            raise
        except OSError as error:
            raise WriteError(self._manifest, len(data), error) from error
        present = self._present()
        latest = {entry["step"]: name for name, entry in present.items()}
        for old in present.keys() - {*[*latest.values()][-self.keep :]}:
            (self.directory / old).unlink(missing_ok=True)
        return path

    def acknowledged(self) -> list[Path]:
        """Return the checkpoints that count and are there, oldest first."""
        return [self.directory / name for name in self._present()]

    def has_begun(self) -> bool:
        """Whether there ever was a checkpoint that counts, even if it was lost since.

        A single file beside a manifest of the first line alone, or of one that was cut off after
        it, was not acknowledged. A manifest without that line is damaged and may have lost lines.
        """
        if self._entries() or any(self.directory.glob("*.damaged")):
            return True
        lines = self._manifest.read_bytes() if self._manifest.exists() else b""
        is_new = lines.startswith(FIRST_LINE) and lines.count(b"\n") == 1
        return len([*self.directory.glob("*.pt")]) > is_new

    def newest(self) -> Path | None:
        """Return the newest checkpoint whose bytes are those that were acknowledged, if any.

        A damaged one is renamed to `<name>.damaged`, with a warning, and the one before is tried.
        """
        entries, present = self._entries(), self._present()
        if entries and (last := [*entries][-1]) not in present:
            log.warning("%s IS MISSING; the one before is tried", self.directory / last)
        for name, entry in reversed(present.items()):
            path = self.directory / name
            try:
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                digest = str(error)
            if digest == entry["sha256"]:
                return path
            with contextlib.suppress(OSError):
                os.replace(path, f"{path}.damaged")
            log.warning(
                "%s IS DAMAGED: expected SHA-256 %.12s…, got %.40s. It is set aside as %s.damaged, "
                "and the checkpoint before it is used.",
                path, entry["sha256"], digest, name,
            )  # fmt: skip
        return None

    def _present(self) -> dict[str, dict[str, Any]]:
        """The `_entries` whose files are there."""
        there = {path.name for path in self.directory.glob("*")}
        return {name: entry for name, entry in self._entries().items() if name in there}

    def _entries(self) -> dict[str, dict[str, Any]]:
        """Manifest lines by file name, in order; a line that a crash has torn does not count."""
        path = self._manifest
        entries: dict[str, dict[str, Any]] = {}
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                entry = json.loads(line)
                name, _, _ = entry["file"], entry["step"], entry["sha256"]
                entries.pop(name, None)
                entries[name] = entry
        return entries
