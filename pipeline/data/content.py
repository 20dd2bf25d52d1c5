"""What a case's files hold, as one key: equal bytes have equal keys in any folder.

The hash of a file is remembered while its name, size, times and inode stay as they are. No JSON
file here holds the name of a file, since that may name a person.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from pipeline import distributed
from pipeline.data.cases import files_of
from pipeline.files import replace_file
from pipeline.progress_bar import ProgressBar
from transforms.dicom import dicom_files
from transforms.formats import list_files

HASHES = "volume_cache_hashes.json"  # in cache_dir, which other programs may use as well
MAX_THREADS = 8  # each may hold a volume in memory
MAX_FILES = 100_000  # the latest of these are remembered
SETTLED_S = 2.0  # a file changed again so soon may keep size and time: not remembered before

T = TypeVar("T")
R = TypeVar("R")


class ContentHashes:
    """SHA-256 of files, remembered in a JSON file of a folder."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._known: dict[str, str] = read_checked(directory / HASHES) or {}
        self._new: dict[str, str] = {}

    def of_case(self, case: Mapping[str, Any], contents: dict[str, bytes] | None = None) -> str:
        """Key of a case: the bytes of its image and label files, and what else it says.

        Its `case_id` and the names of its files do not count. An image is a file, a list of files
        (one per channel), or a directory, of which all files count in the order of their names.
        Files of unknown hash are put into `contents`, by path, if it is given.

        Raises:
            OSError: If a file cannot be read.
        """
        files = {
            name: [[self._hash(file, contents) for file in _list_files(path)] for path in paths]
            for name, paths in files_of(case).items()
        }
        rest = {k: v for k, v in case.items() if k not in ("case_id", "image", "label")}
        return sha256_of([files, rest])

    def save(self) -> None:
        """Remember for the next start."""
        if self._new:
            files = {**(read_checked(self.directory / HASHES) or {}), **self._new}
            write_checked(self.directory / HASHES, dict(list(files.items())[-MAX_FILES:]))
            self._new = {}

    def _hash(self, path: Path, contents: dict[str, bytes] | None) -> str:
        before = _identity(path)
        if before in self._known:
            return self._known[before]
        content = path.read_bytes()
        if contents is not None:
            contents[str(path)] = content
        digest = hashlib.sha256(content).hexdigest()
        settled = time.time() - path.stat().st_ctime > SETTLED_S
        if settled and _identity(path) == before:
            self._known[before] = self._new[before] = digest
        return digest


def contents_of(cases: Sequence[Mapping[str, Any]], cache_dir: Path) -> dict[str, str]:
    """SHA-256 of what the files of cases hold, by case id; one that cannot be read is left out."""
    hashes = ContentHashes(cache_dir)
    found: dict[str, str] = {}

    def note(case: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):
            found[case["case_id"]] = hashes.of_case(case)

    map_threads(note, cases)
    hashes.save()
    return dict(sorted(found.items()))


def map_threads(
    function: Callable[[T], R], items: Sequence[T], desc: str = "", num_threads: int | None = None
) -> list[R]:
    """Call a function of each item in several threads, with a progress bar if it has a name."""
    with ThreadPoolExecutor(num_threads or min(MAX_THREADS, distributed.own_cores())) as pool:
        results = pool.map(function, items)
        enabled = bool(desc) and distributed.is_main()
        return list(ProgressBar(results, desc=desc, total=len(items), enabled=enabled))


def sha256_of(value: Any) -> str:
    """SHA-256 of a value's JSON; of what JSON does not have, its text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def write_checked(path: Path, value: Any) -> None:
    """Write a value as JSON that `read_checked` takes from a file of this name, or nothing."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            file.write_text(json.dumps({"sha256": sha256_of([path.name, value]), "value": value}))


def read_checked(path: Path) -> Any:
    """The value in a file of `write_checked`; None unless every byte of it is as written."""
    try:
        content = json.loads(path.read_bytes())
        value = content["value"]
        return value if content["sha256"] == sha256_of([path.name, value]) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _identity(path: Path) -> str:
    facts = path.stat()
    return sha256_of([str(path), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino])


def _list_files(path: str) -> list[Path]:
    file = Path(path).absolute()
    below = sorted(one for one in file.rglob("*") if one.is_file())
    return below or dicom_files(file) or list_files(file)
