"""Preprocessed cases on disk, so that the memory of a run does not grow with their number.

Each case is a file of its own under a key: the bytes of its image and label, the recipe of its
preprocessing, and the versions of the libraries that do it. What is there is verified once, when a
run begins, and what is missing or damaged is made; afterwards it is opened, read and closed for
each sample, so that no page of it stays with the process. The ranks of a training divide what is
to be made, and refuse to begin with different files.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from pipeline import distributed
from pipeline.data.cases import Case, add_case_id
from pipeline.data.content import HASHES, ContentHashes, sha256_of
from pipeline.data.entry import BROKEN, FORMAT, Entry, open_entry
from pipeline.data.issues import some
from pipeline.data.store import EntryStore
from pipeline.errors import InputError, innermost
from pipeline.progress_bar import ProgressBar

log = logging.getLogger(__name__)

MAX_THREADS = 8  # each holds a case in memory
ATTEMPTS = 3  # to open an entry that other processes keep removing
LIBRARIES = ("monai", "torch", "numpy", "nibabel")
MOST_NAMED = 10  # cases that differ between ranks

Preprocess = Callable[[Case], Mapping[str, Any]]


class VolumeCache:
    """A directory of preprocessed cases, shared by runs and processes.

    Args:
        directory: Made when it is first filled.
        limit_bytes: That all entries together may take, those of other recipes included; what was
            used longest ago is removed, but nothing that this run needs.
        recipe: All that decides what preprocessing makes of a file, JSON.
    """

    def __init__(self, directory: str | Path, limit_bytes: int, recipe: Mapping[str, Any]) -> None:
        self.directory, self.recipe = Path(directory), recipe
        self.store = EntryStore(self.directory, limit_bytes)

    def fill(self, cases: Sequence[Case], transform: Preprocess, **facts: Any) -> CachedCases:
        """Make the entries that are missing or damaged, several at a time.

        All ranks have to call it. Each makes a share, in the directory that it sees.

        Args:
            cases: To be there afterwards.
            transform: Makes of a case a dictionary, of which arrays and tensors are kept.
            facts: What decides what `transform` makes, beside the recipe; JSON.

        Raises:
            InputError: If a case cannot be read, the cache cannot be written, this run's cases do
                not fit into `limit_bytes`, or ranks have different cases.
        """
        with distributed.sync_errors():
            return self._filled(cases, transform, facts)

    def _filled(
        self, cases: Sequence[Case], transform: Preprocess, facts: Mapping[str, Any]
    ) -> CachedCases:
        self.store.prepare()
        hashes = ContentHashes(self.directory / HASHES)
        with ThreadPoolExecutor(min(MAX_THREADS, distributed.own_cores())) as pool:
            contents = list(pool.map(lambda case: _content(hashes, case), cases))
            hashes.save()
            versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
            made_by = [FORMAT, versions, self.recipe, facts]
            keys = [sha256_of([*made_by, content]) for content in contents]
            _require_same([case["case_id"] for case in cases], keys, versions)
            cached = CachedCases(self.store, cases, transform, keys, contents)
            self._make_missing(cached, pool)
        self.store.evict()  # once more: other processes may have written meanwhile
        return cached

    def _make_missing(self, cached: CachedCases, pool: ThreadPoolExecutor) -> None:
        numbers = {key: n for n, key in enumerate(cached.keys)}  # equal cases share an entry
        self.store.need(numbers)
        missing = [*numbers]
        while True:
            whole = pool.map(self.store.is_whole, missing)
            missing = [key for key, is_whole in zip(missing, whole, strict=True) if not is_whole]
            self.store.require_room()
            missing_everywhere = distributed.all_gather_object(missing)
            if not any(missing_everywhere):
                return
            mine = _to_make(missing_everywhere)
            if mine:
                counts = len(mine), len(cached)
                log.info("Preprocessing %d of %d cases into %s", *counts, self.directory)
                made = pool.map(cached.make, [numbers[key] for key in mine])
                list(ProgressBar(made, desc="Preprocessing", total=len(mine)))
            distributed.all_gather_object(None)  # all have made theirs
            missing = [key for key in missing if key not in {*mine}]


class CachedCases:
    """The entries of some cases, in their order; `VolumeCache.fill` makes them.

    Args:
        store: Where they are.
        cases: Whose they are.
        transform: That makes them.
        keys: Of the entries.
        contents: Of the cases, as `ContentHashes.of_case` gives them.
    """

    def __init__(
        self,
        store: EntryStore,
        cases: Sequence[Case],
        transform: Preprocess,
        keys: Sequence[str],
        contents: Sequence[str],
    ) -> None:
        self.store, self.cases, self.transform = store, cases, transform
        self.keys, self.contents = keys, contents

    def __len__(self) -> int:
        return len(self.cases)

    @contextlib.contextmanager
    def open(self, number: int) -> Iterator[Entry]:
        """Entry of a case, made anew if another process has removed it; closed at the end.

        Raises:
            InputError: If it cannot be made anew.
        """
        with contextlib.ExitStack() as stack:
            yield self._enter(number, stack)

    def make(self, number: int) -> None:
        """Preprocess a case and write its entry.

        Raises:
            InputError: If a transform refuses the case, or it cannot be written.
        """
        case = self.cases[number]
        try:
            made = self.transform(case)
        except (RuntimeError, ValueError) as error:
            cause = innermost(error)
            if isinstance(cause, InputError):
                raise cause from error
            raise InputError(f"{case['case_id']}: {cause}") from error
        kinds = (np.ndarray, torch.Tensor)
        kept = {name: value for name, value in made.items() if isinstance(value, kinds)}
        self.store.write(self.keys[number], kept)

    def _enter(self, number: int, stack: contextlib.ExitStack) -> Entry:
        key = self.keys[number]
        for _ in range(ATTEMPTS):
            self.store.touch(key)
            try:
                return stack.enter_context(open_entry(self.store.path(key), key))
            except BROKEN as error:
                log.warning("%s IS LOST: %s. It is made anew.", self.store.path(key), error)
                self._make_anew(number)
        return stack.enter_context(open_entry(self.store.path(key), key))

    def _make_anew(self, number: int) -> None:
        case = self.cases[number]
        hashes = ContentHashes(self.store.directory / HASHES)
        if _content(hashes, case) != self.contents[number]:
            raise InputError(
                f"{case['case_id']}: expected the files that the run began with, got others. "
                "Restore them, or start the run again."
            )
        self.store.recount()
        self.make(number)


class CachedDataset(Dataset):
    """Whole preprocessed cases, as MONAI's CacheDataset gives them, but read when they are asked.

    Args:
        data: Cases, as dictionaries with `case_id`, `image` and `label`.
        transform: Deterministic preprocessing, applied once per case.
        cache: Where its results are.
        num_classes: Classes, background included; `None`: label values are not compared with them.
        ignore_value: Label of voxels that nobody annotated.

    Raises:
        InputError: If a label has a value that is no class, or a case cannot be cached.
    """

    def __init__(
        self,
        data: Sequence[Case],
        transform: Preprocess,
        cache: VolumeCache,
        num_classes: int | None = None,
        ignore_value: int | None = None,
    ) -> None:
        self.data = [add_case_id(case) for case in data]

        def prepare(case: Case) -> Mapping[str, Any]:
            made = transform(case)
            if num_classes is not None:
                require_classes(case["case_id"], made["label"], num_classes, ignore_value)
            return made

        classes = {"num_classes": num_classes, "ignore_value": ignore_value}
        self.cached = cache.fill(self.data, prepare, form="whole", **classes)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The case, file names replaced by volumes.

        Returns:
            `image` `(C, H, W, D)` float32 and `label` `(1, H, W, D)` uint8, MetaTensors with
            `affine`, `original_affine`, `spatial_shape`, `space` and `filename_or_obj`; every
            other tensor that the preprocessing made; the rest of the case as it is.
        """
        case = self.data[index]
        with self.cached.open(index) as entry:
            return {**case, **{n: entry.whole(n, _filename(case, n)) for n in sorted(entry.names)}}


def require_classes(
    case_id: str, label: torch.Tensor, num_classes: int, ignore_value: int | None
) -> None:
    """Refuse label values that are no class.

    Args:
        case_id: For the message.
        label: uint8.
        num_classes: Classes, background included.
        ignore_value: Label of voxels that nobody annotated; `None`: there are none.

    Raises:
        InputError: If there is such a value.
    """
    values = np.flatnonzero(np.bincount(np.asarray(label).ravel())).tolist()
    unknown = [n for n in values if n >= num_classes and n != ignore_value]
    if unknown:
        raise InputError(
            f"{case_id}: expected label values 0 to {num_classes - 1}"
            f"{'' if ignore_value is None else f' and {ignore_value} (ignored)'}, got "
            f"{some([*map(str, unknown)])}. Declare the value in the dataset or correct the label."
        )


class CaseSampler(Sampler[int]):
    """Numbers of the cases that are this rank's to predict: together, the ranks predict each once.

    Args:
        dataset: Of all cases.
    """

    def __init__(self, dataset: Sized) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def _numbers(self) -> Sequence[int]:
        return distributed.shard(range(len(self.dataset)))


def _to_make(missing: Sequence[Sequence[str]]) -> list[str]:
    """Keys that this rank makes, of those that each rank misses.

    One of those that miss a key makes it. If the others see another directory, a node's own, they
    miss it still, and one of them makes it the next time.
    """
    missed_by: dict[str, list[int]] = {}
    for rank, keys in enumerate(missing):
        for key in keys:
            missed_by.setdefault(key, []).append(rank)
    turns = enumerate(missed_by.items())
    return [key for turn, (key, who) in turns if who[turn % len(who)] == distributed.rank()]


def _require_same(
    case_ids: Sequence[str], keys: Sequence[str], versions: Mapping[str, str]
) -> None:
    """Refuse to go on if rank 0 has others.

    Raises:
        InputError: With a line for each library, or else each case, that differs.
    """
    mine = list(zip(case_ids, keys, strict=True))
    its_versions, its = distributed.broadcast_object((versions, mine))
    faults = [
        f"{name}: expected version {its_versions[name]}, which rank 0 has, got {version}. "
        "Install the same everywhere."
        for name, version in versions.items()
        if version != its_versions[name]
    ]
    if faults:  # by which all keys differ
        raise InputError(*faults)
    if mine == its:
        return
    differing = {*mine} ^ {*its}
    names = [*dict.fromkeys(pair[0] for pair in (*its, *mine) if pair in differing)]
    faults = [
        f"{name}: expected the files that rank 0 has, got "
        f"{'others' if name in case_ids else 'none'}. Give all ranks the same dataset_dir."
        for name in names[:MOST_NAMED]
    ]
    if len(names) > MOST_NAMED:
        faults.append(f"and {len(names) - MOST_NAMED} more")
    order = "dataset_dir: expected the cases in the order of rank 0, got another."
    raise InputError(*faults or [f"{order} Give all ranks the same."])


def _content(hashes: ContentHashes, case: Case) -> str:
    try:
        return hashes.of_case(case)
    except OSError as error:
        raise InputError(
            f"{case['case_id']}: expected files that can be read, got: {error}."
        ) from None


def _filename(case: Case, name: str) -> str:
    """As MONAI's LoadImage names it: of several files the first."""
    value = case.get(name, "")
    return str(value[0] if isinstance(value, list) else value)
