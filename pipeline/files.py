"""Files that survive a crash.

When a durable write returns, the file is on the disk; a crash before that leaves it as it was.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import printable

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORMULA = r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]"  # the latter are their full-width forms


class WriteError(OSError):
    """A file could not be written: it is as it was before, or has all of the new content."""

    def __init__(self, path: Path, num_bytes: int | str, cause: OSError) -> None:
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
    if flags == os.O_RDONLY and not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no directories
    file = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)
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


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file in UTF-8, durably; raises as `write_durably`.

    A text that a spreadsheet would take for a formula gets an apostrophe before it, which
    `read_cell` removes; control characters in a text are escaped.

    Source: OWASP, CSV Injection.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _make_cell(value) for name, value in row.items()} for row in rows)
    write_durably(path, text.getvalue().encode())


def _make_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return nan_to_none(value)
    text = printable(value, keep="")
    return "'" * bool(re.match(f"'*{FORMULA}", text)) + text


def read_cell(cell: str) -> str:
    """Return the text that `write_csv` was given for a cell, control characters escaped."""
    return cell[bool(re.match(f"'+{FORMULA}", cell)) :]


def make_directory(path: Path) -> None:
    """Make a directory and those above it, so that a crash does not take what is saved in it."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _write(path.parent, b"", os.O_RDONLY)


def save(content: Any, path: Path) -> None:
    """Call `torch.save`, durably; raises as `write_durably`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_durably(path, buffer.getbuffer())


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
        WriteError: If the system refuses; `path` is then as it was.
    """
    # ends as the other, since nibabel compresses by the ending
    temporary = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        num_bytes = temporary.stat().st_size if temporary.exists() else 0
        raise WriteError(path, f"more than {num_bytes}", error) from error
    finally:
        temporary.unlink(missing_ok=True)


def nan_to_none(value: Any) -> Any:
    """Return a value for JSON, which has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value
