"""Preprocessed cases on disk, so that the memory of a run does not grow with their number.

Each case has one safetensors file, its *entry*. Its key is made of the bytes of the case's files,
of the preprocessing, and of the versions of the code that does it, so runs that preprocess alike
share entries. Its checksum, which detects damage, is compared when it is first read in a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
import pydoc
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ReferenceResolver
from monai.data import MetaTensor
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch.utils.data import Dataset, Sampler

from pipeline import distributed
from pipeline.config.compose import Parser
from pipeline.config.keys import Config
from pipeline.data.cases import Case, add_case_id
from pipeline.data.content import HASHES, ContentHashes, map_threads, sha256_of
from pipeline.data.plan import Plan
from pipeline.errors import InputError, innermost, require, some
from pipeline.files import replace_file
from transforms import preprocess

log = logging.getLogger(__name__)

FORMAT = 3  # of an entry; a change makes all entries anew
UNHASHED = b"0" * 64  # stands for the checksum in what it is computed of
LIBRARIES = ("monai", "torch", "numpy", "nibabel")
# a folder may hold other files: what is removed from it has a name of one of these forms
ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
TEMPORARY = re.compile(rf"\.[0-9a-f]{{32}}\.({ENTRY.pattern}|{re.escape(HASHES)})")
ABANDONED_S = 3600  # after which a temporary file has no writer any more
TOUCH_S = 600  # between two notes that an entry is in use
ATTEMPTS = 3  # to make an entry that other runs keep removing
# what the way back to the file's grid needs; crop_* come from transforms.preprocess
GEOMETRY = ("affine", "original_affine", "spatial_shape", "space", "crop_start", "crop_size")
# of a config: the run's directory and its split say nothing about preprocessing
OPAQUE = ("lifecycle", "data_module", "cases", "plan")
WRITABLE = (
    "cache_dir",
    "a directory that can be written",
    " Make room, or choose another cache_dir.",
)

Preprocess = Callable[[Case], Mapping[str, Any]]


class VolumeCache:
    """A directory of preprocessed cases, shared by runs and processes.

    Args:
        directory: Made when it is first filled.
        limit_bytes: Bytes that all entries together may take, those of other runs included; what
            was used longest ago is removed, but nothing that this run needs.
        preprocessing_key: Value for JSON that differs where preprocessing differs.
    """

    def __init__(self, directory: str | Path, limit_bytes: int, preprocessing_key: Any) -> None:
        self.directory, self.limit_bytes = Path(directory), limit_bytes
        self.preprocessing_key = preprocessing_key
        self._lock = threading.Lock()
        self._needed: set[str] = set()  # keys of this run

    def fill(
        self,
        cases: Sequence[Case],
        transform: Preprocess,
        form: str = "",
        num_classes: int | None = None,
        ignore_value: int | None = None,
    ) -> CachedCases:
        """Make the entries that are missing; all ranks have to call it, and each makes a share.

        Args:
            cases: Cases that are to be there afterwards.
            transform: Makes a dictionary of a case; its arrays and tensors are kept.
            form: Tells transforms apart that do more than `preprocessing_key` says.
            num_classes: Classes, background included; `None`: label values are not checked.
            ignore_value: Label of voxels that nobody annotated.

        Raises:
            InputError: If a case cannot be read or changes meanwhile, a label value is no class,
                the cache cannot be written, the cases do not fit into `limit_bytes`, or ranks have
                different cases.
        """
        with distributed.sync_errors():
            with _refuse(*WRITABLE):
                self.directory.mkdir(parents=True, exist_ok=True)
            hashes = ContentHashes(self.directory / HASHES)
            contents = map_threads(lambda case: _content(hashes, case), cases)
            hashes.save()
            versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
            made_by = [FORMAT, versions, self.preprocessing_key, form, num_classes, ignore_value]
            keys = [sha256_of([*made_by, content]) for content in contents]
            mine = [(case["case_id"], key) for case, key in zip(cases, keys, strict=True)]
            first = distributed.broadcast_object(mine)
            others = sorted({name for name, _ in {*mine} ^ {*first}}) or ["order of the cases"]
            remedy = "Give all ranks the same dataset_dir and the same versions of "
            remedy += f"{', '.join(LIBRARIES)}."
            require(mine == first, some(others), "what rank 0 has", "something else", remedy)
            checked = torch.zeros(len(cases), dtype=torch.bool).share_memory_()
            classes = num_classes, ignore_value
            cached = CachedCases(self, cases, transform, classes, keys, contents, hashes, checked)
            self._make_missing(cached)
            self._make_room()  # other runs may have written meanwhile
        return cached

    def path(self, key: str) -> Path:
        """File of an entry."""
        return self.directory / f"{key}.safetensors"

    def write(self, key: str, content: bytes) -> None:
        """Write the file of an entry, or nothing."""
        with self._lock, _refuse(*WRITABLE):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._make_room(key, len(content))
            with replace_file(self.path(key)) as file:
                file.write_bytes(content)

    def _make_missing(self, cached: CachedCases) -> None:
        numbers = {key: number for number, key in enumerate(cached.keys)}  # equal cases share one
        self._needed.update(numbers)
        missing, mine = list(numbers), list[str]()
        while True:
            missing = [key for key in missing if key not in mine and not self._find(key)]
            self._make_room()
            by_rank = distributed.all_gather_object(missing)
            wanted = [*{key: None for keys in by_rank for key in keys}]
            if not wanted:
                return
            # one of those that miss a key makes it; if the others see another directory, a node's
            # own, they miss it still, and one of them makes it the next time
            turns = [[rank for rank, keys in enumerate(by_rank) if key in keys] for key in wanted]
            makers = [ranks[n % len(ranks)] for n, ranks in enumerate(turns)]
            mine = [k for k, rank in zip(wanted, makers, strict=True) if rank == distributed.rank()]
            if mine:
                counts = len(mine), len(cached.cases)
                log.info("Preprocessing %d of %d cases into %s", *counts, self.directory)
                map_threads(cached.make, [numbers[key] for key in mine], "Preprocessing")
            distributed.all_gather_object(None)  # all have made theirs

    def _make_room(self, key: str = "", num_bytes: int = 0) -> None:
        """Remove what was used longest ago, until an entry fits in beside the rest."""
        entries = []
        for path in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                stat = path.stat()
                if ENTRY.fullmatch(path.name) and path.stem != key:
                    entries.append((stat.st_mtime, stat.st_size, path))
                elif TEMPORARY.fullmatch(path.name) and time.time() - stat.st_mtime > ABANDONED_S:
                    path.unlink()
        sizes = [size for _, size, path in entries if path.stem in self._needed]
        sizes += [num_bytes] if num_bytes else []
        if (total := sum(sizes)) > self.limit_bytes:
            raise InputError(
                f"cache_limit_bytes: expected room for the {len(self._needed)} cases of this run, "
                f"got {self.limit_bytes} bytes where {len(sizes)} of them need {total}. Raise "
                f"cache_limit_bytes to about {-(-total * len(self._needed) // len(sizes))}."
            )
        total = sum(size for _, size, _ in entries) + num_bytes
        for _, size, path in sorted(entries):
            if total > self.limit_bytes and path.stem not in self._needed:
                log.info("Removing %s, to stay below cache_limit_bytes", path)
                with contextlib.suppress(OSError):
                    path.unlink()
                    total -= size

    def _find(self, key: str) -> bool:
        """Whether an entry is there; if so it counts as used now."""
        with contextlib.suppress(OSError):
            os.utime(self.path(key))
            return True
        return False


@dataclass(frozen=True)
class CachedCases:
    """The entries of some cases, in the order of the cases; `VolumeCache.fill` makes them."""

    cache: VolumeCache
    cases: Sequence[Case]
    transform: Preprocess
    classes: tuple[int | None, int | None]  # their number, and the label of ignored voxels
    keys: Sequence[str]
    contents: Sequence[str]
    hashes: ContentHashes
    is_checked: torch.Tensor  # bool, by case; shared with loader workers

    @contextlib.contextmanager
    def open(self, number: int) -> Iterator[dict[str, StoredTensor]]:
        """Give the tensors of a case; an entry that is damaged, or was removed, is made anew.

        The checksum is compared if that was not done before in this run.

        Raises:
            InputError: If it cannot be made anew.
        """
        path = self.cache.path(self.keys[number])
        for attempt in range(ATTEMPTS + 1):
            try:
                tensors = _open(path, verify=not self.is_checked[number])
                break
            except (OSError, SafetensorError, ValueError) as error:
                if attempt == ATTEMPTS:
                    raise
                log.warning("%s IS LOST: %s. It is made anew.", path, error)
                self.make(number)
        self.is_checked[number] = True
        yield tensors
        tensors.clear()  # unmaps the file

    def make(self, number: int) -> None:
        """Preprocess a case and write its entry.

        Raises:
            InputError: If a transform refuses the case, its files have changed since the run
                began, or the entry cannot be written.
        """
        case = self.cases[number]
        try:
            made = self.transform(case)
        except (RuntimeError, ValueError) as error:
            cause = innermost(error)
            own = isinstance(cause, InputError)
            raise cause if own else InputError(f"{case['case_id']}: {cause}") from error
        num_classes, ignore_value = self.classes
        if num_classes is not None:
            _require_classes(case["case_id"], made["label"], num_classes, ignore_value)
        is_same = _content(self.hashes, case) == self.contents[number]
        expected, remedy = "the files that the run began with", "Restore them, or start again."
        require(is_same, case["case_id"], expected, "others", remedy)
        self.cache.write(self.keys[number], _encode(made, self.keys[number]))


class StoredTensor:
    """A tensor in an open entry: its shape, and copies of slices of it."""

    def __init__(self, stored: Any, geometry: dict[str, Any] | None) -> None:
        self._stored, self._geometry = stored, geometry
        self.shape = tuple(stored.get_shape())

    def __getitem__(self, window: Any) -> torch.Tensor:
        return torch.from_numpy(self._stored[window])

    def load(self, files: str | list[str]) -> torch.Tensor:
        """Copy the whole, a MetaTensor if it was one; of several files MONAI names the first."""
        if self._geometry is None:
            return self[...]
        meta = {k: np.asarray(v) if k != "space" else v for k, v in self._geometry.items()}
        affine = torch.as_tensor(meta.pop("affine"), dtype=torch.float64)
        meta["filename_or_obj"] = files[0] if isinstance(files, list) else files
        return MetaTensor(self[...], affine=affine, meta=meta)


class CachedDataset(Dataset):
    """Whole preprocessed cases, as MONAI's CacheDataset gives them, but read when asked for.

    Args:
        data: Cases, as dictionaries with `case_id`, `image` and `label`.
        transform: Deterministic preprocessing, applied once per case.
        cache: Keeps the results.
        num_classes, ignore_value: See `VolumeCache.fill`, which also says what is raised.
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
        self.cached = cache.fill(self.data, transform, "whole", num_classes, ignore_value)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the case, file names replaced by volumes.

        Returns:
            `image` `(C, H, W, D)` float32 and `label` `(1, H, W, D)` uint8, MetaTensors with
            `affine`, `original_affine`, `spatial_shape`, `space` and `filename_or_obj`; every
            other tensor that the preprocessing made; the rest of the case as it is.
        """
        case = self.data[index]
        with self.cached.open(index) as entry:
            return case | {name: tensor.load(case.get(name, "")) for name, tensor in entry.items()}


class CaseSampler(Sampler[int]):
    """Numbers of the cases that this rank predicts; together, the ranks predict each case once."""

    def __init__(self, dataset: Sized) -> None:
        self.own = distributed.shard(range(len(dataset)))

    def __iter__(self) -> Iterator[int]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


def _require_classes(
    case_id: str, label: torch.Tensor, num_classes: int, ignore_value: int | None
) -> None:
    values = np.flatnonzero(np.bincount(np.asarray(label).ravel())).tolist()
    unknown = [str(n) for n in values if n >= num_classes and n != ignore_value]
    ignored = "" if ignore_value is None else f" and {ignore_value} (ignored)"
    expected = f"label values 0 to {num_classes - 1}{ignored}"
    remedy = "Declare the value in the dataset or correct the label."
    require(not unknown, case_id, expected, some(unknown), remedy)


def preprocessing_key(source: Config, plan: Plan) -> dict[str, Any]:
    """Describe what preprocessing does to a volume, without running the config.

    Args:
        source: The config, unevaluated.
        plan: The values that `@plan.x` stands for.

    Returns:
        The parts of the config that preprocess, with all that they refer to, and hashes of code: of
        the package `transforms`, and of other files that a `_target_` names, libraries' excepted.
    """
    parts: dict[str, Any] = {}
    waiting = ["preprocessing", "train#preprocessing", "validate#preprocessing"]
    while waiting:
        name = waiting.pop()
        if name not in parts and ReferenceResolver.split_id(name)[0] not in OPAQUE:
            parts[name] = Parser(source).get(name)
            text = json.dumps(parts[name], default=str)
            waiting += ReferenceResolver.match_refs_pattern("$" + text)
    text = json.dumps(parts, default=str)
    planned = {*re.findall(r"@plan\b\.?(\w*)", text)}  # an empty name stands for all
    values = {k: v for k, v in plan.as_dict().items() if planned & {k, ""} and k != "reasons"}
    files = {*Path(preprocess.__file__).parent.glob("*.py")}
    for target in {*re.findall(r'"_target_": "([^"]+)"', text)}:
        with contextlib.suppress(TypeError, pydoc.ErrorDuringImport):
            if target.split(".")[0] not in LIBRARIES:
                files.add(Path(inspect.getfile(pydoc.locate(target))))  # type: ignore[arg-type]
    hashes = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return {"config": parts, "plan": values, "code": hashes}


def _encode(made: Mapping[str, Any], key: str) -> bytes:
    """Make the file of an entry.

    The geometry of a MetaTensor is kept, other metadata is not: text in a header may name a person.
    """
    kept = {name: t for name, t in made.items() if isinstance(t, np.ndarray | torch.Tensor)}
    arrays = {name: np.ascontiguousarray(np.asarray(t)) for name, t in kept.items()}
    metas = {name: t.meta for name, t in kept.items() if isinstance(t, MetaTensor)}
    geometry = {n: {k: meta[k] for k in GEOMETRY if k in meta} for n, meta in metas.items()}
    facts = {"key": key, "sha256": UNHASHED.decode(), "geometry": geometry}
    # arrays and tensors become lists; `space` is an enumeration
    plain = json.dumps(facts, default=lambda value: np.asarray(value).tolist())
    content: bytes = save(arrays, {"facts": plain})
    return content.replace(UNHASHED, hashlib.sha256(content).hexdigest().encode(), 1)


def _open(path: Path, *, verify: bool) -> dict[str, StoredTensor]:
    """Open the file of an entry; a ValueError says that it is damaged."""
    if time.time() - path.stat().st_mtime > TOUCH_S:
        with contextlib.suppress(OSError):
            os.utime(path)
    file: Any = safe_open(path, framework="numpy")
    facts = json.loads((file.metadata() or {}).get("facts", "{}"))
    if facts.get("key") != path.stem:
        raise ValueError("it is not the entry of this key")
    if verify:
        unhashed = path.read_bytes().replace(facts["sha256"].encode(), UNHASHED, 1)
        if hashlib.sha256(unhashed).hexdigest() != facts["sha256"]:
            raise ValueError("its bytes have another checksum")
    names = sorted(file.keys())
    return {n: StoredTensor(file.get_slice(n), facts["geometry"].get(n)) for n in names}


def _content(hashes: ContentHashes, case: Case) -> str:
    with _refuse(case["case_id"], "files that can be read"):
        return hashes.of_case(case)


@contextlib.contextmanager
def _refuse(where: str, expected: str, remedy: str = "") -> Iterator[None]:
    """Turn an error of the system into one line."""
    try:
        yield
    except OSError as error:  # the innermost cause is what users are shown
        raise InputError(f"{where}: expected {expected}, got: {error}.{remedy}") from None
