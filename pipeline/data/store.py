"""A directory of entries that stays below a number of bytes.

A file appears under its name when it is whole, so that processes may write into one directory at
once; where two make the same entry, the later replaces the earlier with the same. An entry that is
removed while another process reads it stays readable for that process until it closes it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.data.content import HASHES
from pipeline.data.entry import encode, fault_of
from pipeline.errors import InputError

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
# a folder may have other files: what is removed from it has a name of this form
OWN = re.compile(
    rf"[0-9a-f]{{64}}\{SUFFIX}|([0-9a-f]{{64}}|{re.escape(HASHES)})\.[0-9a-f]{{32}}\.tmp"
)
ATTEMPTS = 3  # to write into a folder that somebody is deleting
ABANDONED_S = 3600  # after which a temporary file has no writer any more
TOUCH_S = 600  # between two notes that an entry is in use


class EntryStore:
    """Entries by key, of which those used longest ago make room for new ones.

    Args:
        directory: Where they are.
        limit_bytes: That they may take together.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory, self.limit_bytes = directory, limit_bytes
        self._lock = threading.Lock()
        self._needed: dict[str, int] = {}  # keys this run needs and their bytes, 0 until known
        self._total = math.inf  # bytes of all entries; infinite: to be counted

    def path(self, key: str) -> Path:
        """File of an entry."""
        return self.directory / (key + SUFFIX)

    def prepare(self) -> None:
        """Make the directory, and remove what dead writers left in it.

        Raises:
            InputError: If there can be no such directory.
        """
        with _told_to_user("a directory that can be written", "Choose another cache_dir"):
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self._own("*.tmp"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > ABANDONED_S:
                        path.unlink()

    def need(self, keys: Iterable[str]) -> None:
        """Never remove these."""
        self._needed.update(dict.fromkeys(keys, 0))

    def is_whole(self, key: str) -> bool:
        """Whether the entry is there and every byte of it right; if so it counts as used now."""
        path = self.path(key)
        try:
            fault = fault_of(path, key)
            if fault is None:
                os.utime(path)
                self._needed[key] = path.stat().st_size
                return True
            log.warning("%s IS DAMAGED: %s. It is made anew.", path, fault)
        except FileNotFoundError:
            pass
        return False

    def touch(self, key: str) -> None:
        """Note that the entry is in use."""
        path = self.path(key)
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > TOUCH_S:
                os.utime(path)

    def write(self, key: str, tensors: Mapping[str, Any]) -> None:
        """Write an entry whole, or not at all.

        Raises:
            InputError: If there is no room, on the disk or within `limit_bytes`.
        """
        pieces = encode(tensors, key)
        size = sum(map(len, pieces))
        with _told_to_user(f"to write {size} bytes", "Make room, or choose another cache_dir"):
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    return self._write(key, pieces, size)
                except FileNotFoundError:
                    if attempt == ATTEMPTS:
                        raise

    def _write(self, key: str, pieces: Iterable[bytes | memoryview], size: int) -> None:
        path = self.path(key)
        temporary = path.with_name(f"{key}.{uuid.uuid4().hex}.tmp")
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.writelines(pieces)
            with self._lock:
                self._reserve(key, size)
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def require_room(self) -> None:
        """Compare what this run needs, as far as it is known, with the limit.

        Raises:
            InputError: If it is more.
        """
        sizes = [size for size in self._needed.values() if size]
        if sum(sizes) > self.limit_bytes:
            estimate = math.ceil(sum(sizes) * len(self._needed) / len(sizes))
            raise InputError(
                f"cache_limit_bytes: expected room for the {len(self._needed)} cases of this run, "
                f"got {self.limit_bytes} bytes where {len(sizes)} of them need {sum(sizes)}. "
                f"Raise cache_limit_bytes to about {estimate}."
            )

    def evict(self, room: int = 0) -> None:
        """Remove what was used longest ago, until `room` bytes fit in beside the rest."""
        entries = sorted(self._listing())
        self._total = sum(size for _, size, _ in entries) + room
        for _, size, path in entries:
            if self._total <= self.limit_bytes:
                break
            if path.stem not in self._needed:
                log.info("Removing %s, to stay below cache_limit_bytes", path)
                with contextlib.suppress(OSError):
                    path.unlink()
                    self._total -= size

    def recount(self) -> None:
        """Count the entries before the next one is written: others may have written."""
        self._total = math.inf

    def _reserve(self, key: str, size: int) -> None:
        self._needed[key] = size
        self.require_room()
        self._total += size
        if self._total > self.limit_bytes:
            self.evict(size)

    def _listing(self) -> Iterator[tuple[int, int, Path]]:
        """Time of last use in ns, bytes and path of every entry."""
        for path in self._own("*" + SUFFIX):
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                facts = path.lstat()
                yield facts.st_mtime_ns, facts.st_size, path

    def _own(self, pattern: str) -> Iterator[Path]:
        """Files of a pattern whose names are certainly the cache's."""
        return (path for path in self.directory.glob(pattern) if OWN.fullmatch(path.name))


@contextlib.contextmanager
def _told_to_user(expected: str, remedy: str) -> Iterator[None]:
    """Inside, what the system refuses becomes one line."""
    try:
        yield
    except OSError as error:
        # from None: of a chain of causes the user is told the first, which would be the system's
        raise InputError(f"cache_dir: expected {expected}, got: {error}. {remedy}.") from None
