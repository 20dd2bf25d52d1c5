"""Looks at every case of a dataset once: headers first, then voxels, many at a time."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.data import facts
from pipeline.data.content import HASHES, ContentHashes, sha256_of, write_whole
from pipeline.data.dataset import Case
from pipeline.data.facts import Facts
from pipeline.progress_bar import ProgressBar

MAX_THREADS = 8  # each holds two masks of a volume in memory

log = logging.getLogger(__name__)


def survey(
    cases: Iterable[Case],
    *,
    is_sound: Callable[[Case, Facts], bool],
    read_voxels: bool = True,
    ignore_value: int | None = None,
    cache_dir: Path | None = None,
) -> dict[str, Facts]:
    """Facts of all cases.

    Args:
        cases: To look at.
        is_sound: Whether a case's headers allow to read its voxels.
        read_voxels: If false, nothing is said of voxels, not even what is known: a plan must not
            depend on what a cache happens to hold.
        ignore_value: Label value that is no foreground.
        cache_dir: Where facts are kept, by the files' content; `None`: nowhere.

    Returns:
        By case id: `headers` (see `measure_headers`) and `voxels` (see `measure_voxels`), `None`
        where they were not read.
    """
    cases = list(cases)
    store = FactStore(cache_dir if read_voxels else None, ignore_value)
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        headers = list(pool.map(facts.measure_headers, cases))
        keys = list(pool.map(store.key, cases))
        known = [store.read(key) for key in keys]

        def measure(number: int) -> Facts:
            case, key = cases[number], keys[number]
            measured = facts.measure_voxels(case, ignore_value)
            if store.key(case) == key:  # else a file was changed meanwhile
                store.write(key, measured)
            return measured

        missing = [
            number
            for number, case in enumerate(cases)
            if read_voxels and known[number] is None and is_sound(case, headers[number])
        ]
        bar = ProgressBar(pool.map(measure, missing), desc="Checking", total=len(missing))
        for number, measured in zip(missing, bar, strict=True):
            known[number] = measured
    store.close()
    return {
        case["case_id"]: {"headers": header, "voxels": voxels}
        for case, header, voxels in zip(cases, headers, known, strict=True)
    }


class FactStore:
    """Facts on disk: a small JSON file for each case, named by the content of the case's files.

    Args:
        directory: Of the cache; `None`: nothing is kept.
        ignore_value: As the facts were measured with.
    """

    def __init__(self, directory: Path | None, ignore_value: int | None) -> None:
        self.directory = directory / "facts" if directory else Path()
        self.ignore_value = ignore_value
        self.hashes = ContentHashes(directory / HASHES) if directory else None
        self.is_writable = True

    def key(self, case: Case) -> str | None:
        """What the facts of a case are kept under; `None` if they are not kept."""
        if self.hashes is None:
            return None
        try:
            content = self.hashes.of_case(case)
        except OSError:
            return None
        return sha256_of([facts.VERSION, self.ignore_value, content])

    def read(self, key: str | None) -> Facts | None:
        """What is known of the voxels; a file that is not as it was written is as good as none."""
        if key is None:
            return None
        try:
            kept = json.loads((self.directory / f"{key}.json").read_bytes())
            return kept["facts"] if kept["sha256"] == sha256_of([key, kept["facts"]]) else None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def write(self, key: str | None, measured: Facts) -> None:
        """Keep facts, unless the voxels could not be read: the file may be mended in place."""
        if key is None or "error" in measured or not self.is_writable:
            return
        content = {"sha256": sha256_of([key, measured]), "facts": measured}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # threads that measure two cases of the same content write the same file
            write_whole(self.directory / f"{key}.json", json.dumps(content))
        except OSError as error:
            log.warning("%s: expected to keep facts there, got: %s", self.directory, error)
            self.is_writable = False

    def close(self) -> None:
        """Remember what the files' content was."""
        if self.hashes is not None:
            self.hashes.save()
