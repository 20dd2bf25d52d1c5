"""Files that are there after a crash: how bytes reach the disk, and which checkpoints count.

A write is *acknowledged* when its last call has returned. Until then a crash, of the process or of
the machine, leaves the file as it was before; from then on it leaves the new one. A checkpoint is
acknowledged by its line in `manifest.jsonl`, which is written, to the disk, after the file itself
and before any older checkpoint is removed.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import InputError

log = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl"


class WriteError(OSError):
    """A file that could not be written whole; what was there before still is.

    Args:
        path: The file.
        num_bytes: Its size.
        cause: What the system said.
    """

    def __init__(self, path: Path, num_bytes: int, cause: OSError) -> None:
        super().__init__(
            f"{path}: expected to write {num_bytes} bytes, got: {cause.strerror or cause}. "
            "Make room or choose another output_dir."
        )
        self.errno = cause.errno


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that a crash leaves the old one or the whole new one.

    A temporary file in the same directory, fsync, rename, fsync of the directory.

    Raises:
        WriteError: If the system refuses; the file is then as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        _write(temporary, content, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WriteError(path, len(content), error) from error


def save(content: Any, path: Path) -> None:
    """`torch.save`, durably.

    Raises:
        WriteError: If the system refuses; the file is then as it was.
    """
    write_durably(path, _serialized(content))


def write_json(path: Path, content: Any) -> None:
    """JSON, durably.

    Raises:
        WriteError: If the system refuses; the file is then as it was.
    """
    write_durably(path, (json.dumps(content, indent=2) + "\n").encode())


class CheckpointStore:
    """The checkpoints of a run, in a directory with a manifest of those that count.

    Args:
        directory: Made if it is not there.
        keep: Steps of which a checkpoint is kept, at least 2: the newest may turn out damaged.
    """

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        self.directory = directory
        self.keep = max(keep, 2)

    def save(self, content: Any, name: str) -> Path:
        """Write a checkpoint and acknowledge it, then remove the oldest.

        Args:
            content: Tensors and plain values; `progress` with `step` among them.
            name: File name, of no acknowledged checkpoint.

        Raises:
            WriteError: If the system refuses; the older checkpoints are then untouched.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        data, path = _serialized(content), self.directory / name
        write_durably(path, data)
        entry = {
            "file": name,
            "step": content["progress"]["step"],
            "sha256": hashlib.sha256(data).hexdigest(),
            "size": len(data),
        }
        try:
            self._acknowledge(entry)
        except OSError as error:
            raise WriteError(self.directory / MANIFEST, len(data), error) from error
        self._prune()
        return path

    def acknowledged(self) -> list[Path]:
        """Checkpoints that count and are there, oldest first."""
        return [self.directory / name for name in self._entries()]

    def newest(self) -> Path | None:
        """The newest checkpoint whose bytes are those that were acknowledged.

        A damaged one is renamed to `<name>.damaged`, with a warning, and the one before it is
        taken.

        Raises:
            InputError: If there are some, but none is whole.
        """
        entries = self._entries()
        for name, entry in reversed(entries.items()):
            path = self.directory / name
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == entry["sha256"]:
                return path
            aside = path.with_name(name + ".damaged")
            os.replace(path, aside)
            log.warning(
                "%s IS DAMAGED: expected %d bytes of SHA-256 %.12s…, got %d others. It is set "
                "aside as %s, and the checkpoint before it is used.",
                path, entry["size"], entry["sha256"], len(data), aside.name,
            )  # fmt: skip
        if entries:
            raise InputError(
                f"{self.directory}: expected a whole checkpoint, got {len(entries)} damaged. "
                "Restore one from a copy, or choose another output_dir to start over."
            )
        return None

    def _prune(self) -> None:
        """Remove all but the latest checkpoint of each of the newest `keep` steps."""
        entries = self._entries()
        latest = {entry["step"]: name for name, entry in entries.items()}
        for name in entries.keys() - set(list(latest.values())[-self.keep :]):
            (self.directory / name).unlink(missing_ok=True)

    def _acknowledge(self, entry: dict[str, Any]) -> None:
        path = self.directory / MANIFEST
        lines = path.read_bytes() if path.exists() else b""
        torn = bool(lines) and not lines.endswith(b"\n")  # by a crash in the middle of a line
        line = (b"\n" if torn else b"") + json.dumps(entry).encode() + b"\n"
        _write(path, line, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if not lines:
            _sync_directory(self.directory)

    def _entries(self) -> dict[str, dict[str, Any]]:
        """Manifest lines by file name, of files that are there, in order."""
        path = self.directory / MANIFEST
        entries: dict[str, dict[str, Any]] = {}
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # torn by a crash: not acknowledged
            if isinstance(entry, dict) and (self.directory / entry["file"]).is_file():
                entries.pop(entry["file"], None)
                entries[entry["file"]] = entry
        return entries


def _serialized(content: Any) -> memoryview:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def _write(path: Path, content: bytes | memoryview, flags: int) -> None:
    """All bytes, to the disk."""
    file = os.open(path, flags, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    finally:
        os.close(file)


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
