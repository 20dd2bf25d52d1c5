"""Preprocessed cases on disk, so that the memory of a run does not grow with their number.

Each case has one safetensors file, its *entry*. The entry's key is made of the bytes of the case's
files, of the preprocessing, and of the versions of the code that does it; so runs that preprocess
alike share entries. A sample opens its entry, reads what it needs and closes it. The checksum of an
entry is compared when it is first read in a run; it detects damage, not forgery.
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
from concurrent.futures import ThreadPoolExecutor
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
from pipeline.data.content import HASHES, ContentHashes, sha256_of
from pipeline.data.issues import some
from pipeline.data.plan import Plan
from pipeline.errors import InputError, innermost
from pipeline.files import replace_file
from pipeline.progress_bar import ProgressBar
from transforms import preprocess

log = logging.getLogger(__name__)

FORMAT = 2  # of an entry, and of what is kept beside the volumes; a change makes all entries anew
LIBRARIES = ("monai", "torch", "numpy", "nibabel")
SUFFIX = ".safetensors"
# a folder may hold other files: what is removed from it has a name of this form
ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
TEMPORARY = re.compile(  # of entries; of hashes, and of entries of older versions
    r"\.[0-9a-f]{32}\.[0-9a-f]{64}\.safetensors"
    rf"|([0-9a-f]{{64}}|{re.escape(HASHES)})\.[0-9a-f]{{32}}\.tmp"
)
ABANDONED_S = 3600  # after which a temporary file has no writer any more
TOUCH_S = 600  # between two notes that an entry is in use
MAX_THREADS = 8  # each holds a case in memory
ATTEMPTS = 3  # to make an entry that other runs keep removing
# what the way back to the file's grid needs; crop_* come from transforms.preprocess
GEOMETRY = ("affine", "original_affine", "spatial_shape", "space", "crop_start", "crop_size")

# of a config: the run's directory and its split say nothing about preprocessing
OPAQUE = ("lifecycle", "data_module", "cases", "plan")

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
        self._needed: dict[str, int] = {}  # keys that this run needs; bytes, 0 until known
        self._total = 0  # bytes of all entries, as far as is known

    def fill(self, cases: Sequence[Case], transform: Preprocess, **facts: Any) -> CachedCases:
        """Make the entries that are missing, several at a time.

        All ranks have to call it. Each makes a share, in the directory that it sees.

        Args:
            cases: Cases that are to be there afterwards.
            transform: Makes a dictionary of a case; its arrays and tensors are kept.
            facts: What decides the result of `transform` beside the key; values for JSON.

        Raises:
            InputError: If a case cannot be read or changes meanwhile, the cache cannot be written,
                the cases do not fit into `limit_bytes`, or ranks have different cases.
        """
        with distributed.sync_errors():
            with _system_errors():
                self.directory.mkdir(parents=True, exist_ok=True)
            hashes = ContentHashes(self.directory / HASHES)
            with ThreadPoolExecutor(min(MAX_THREADS, distributed.own_cores())) as pool:
                contents = list(pool.map(lambda case: _content(hashes, case), cases))
                hashes.save()
                versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
                made_by = [FORMAT, versions, self.preprocessing_key, facts]
                keys = [sha256_of([*made_by, content]) for content in contents]
                _require_same_on_all_ranks(cases, keys)
                checked = torch.zeros(len(cases), dtype=torch.bool).share_memory_()
                cached = CachedCases(self, cases, transform, keys, contents, hashes, checked)
                self._make_missing(cached, pool)
            self._evict()  # other runs may have written meanwhile
        return cached

    def path(self, key: str) -> Path:
        """File of an entry."""
        return self.directory / (key + SUFFIX)

    def write(self, key: str, tensors: Mapping[str, Any]) -> None:
        """Write an entry, or nothing.

        Raises:
            InputError: If there is no room, on the disk or within `limit_bytes`.
        """
        content = _encode(tensors, key)
        with _system_errors():
            with self._lock:
                self._needed[key] = len(content)
                self._require_room()
                self._total += len(content)
                if self._total > self.limit_bytes:
                    self._evict(len(content))
            self.directory.mkdir(parents=True, exist_ok=True)
            with replace_file(self.path(key)) as file:
                file.write_bytes(content)

    def _make_missing(self, cached: CachedCases, pool: ThreadPoolExecutor) -> None:
        numbers = {key: number for number, key in enumerate(cached.keys)}  # equal cases share one
        self._needed.update(dict.fromkeys(numbers, 0))
        self._evict()
        missing = list(numbers)
        while True:
            missing = [key for key in missing if not self._find(key)]
            self._require_room()
            missed_by: dict[str, list[int]] = {}
            for rank, keys in enumerate(distributed.all_gather_object(missing)):
                for key in keys:
                    missed_by.setdefault(key, []).append(rank)
            if not missed_by:
                return
            # one of those that miss a key makes it; if the others see another directory, a node's
            # own, they miss it still, and one of them makes it the next time
            turns = enumerate(missed_by.items())
            mine = [key for n, (key, ranks) in turns if ranks[n % len(ranks)] == distributed.rank()]
            if mine:
                counts = len(mine), len(cached.cases)
                log.info("Preprocessing %d of %d cases into %s", *counts, self.directory)
                made = pool.map(cached.make, [numbers[key] for key in mine])
                list(ProgressBar(made, desc="Preprocessing", total=len(mine)))
            distributed.all_gather_object(None)  # all have made theirs
            missing = [key for key in missing if key not in {*mine}]

    def _evict(self, room: int = 0) -> None:
        """Remove what was used longest ago, until `room` bytes fit in beside the rest."""
        entries = []
        for path in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                stat = path.stat()
                if ENTRY.fullmatch(path.name):
                    entries.append((stat.st_mtime, stat.st_size, path))
                elif TEMPORARY.fullmatch(path.name) and time.time() - stat.st_mtime > ABANDONED_S:
                    path.unlink()
        self._total = sum(size for _, size, _ in entries) + room
        for _, size, path in sorted(entries):
            if self._total > self.limit_bytes and path.stem not in self._needed:
                log.info("Removing %s, to stay below cache_limit_bytes", path)
                with contextlib.suppress(OSError):
                    path.unlink()
                    self._total -= size

    def _find(self, key: str) -> bool:
        """Whether an entry is there; if so it counts as used now."""
        try:
            os.utime(self.path(key))
            self._needed[key] = self.path(key).stat().st_size
        except OSError:
            return False
        return True

    def _require_room(self) -> None:
        sizes = [size for size in self._needed.values() if size]
        if sum(sizes) > self.limit_bytes:
            estimate = -(-sum(sizes) * len(self._needed) // len(sizes))
            raise InputError(
                f"cache_limit_bytes: expected room for the {len(self._needed)} cases of this run, "
                f"got {self.limit_bytes} bytes where {len(sizes)} of them need {sum(sizes)}. "
                f"Raise cache_limit_bytes to about {estimate}."
            )


@dataclass(frozen=True)
class CachedCases:
    """The entries of some cases, in the order of the cases; `VolumeCache.fill` makes them."""

    cache: VolumeCache
    cases: Sequence[Case]
    transform: Preprocess
    keys: Sequence[str]
    contents: Sequence[str]
    hashes: ContentHashes
    is_checked: torch.Tensor  # bool, by case; shared with loader workers

    @contextlib.contextmanager
    def open(self, number: int, *, verify: bool = True) -> Iterator[Entry]:
        """Open the entry of a case; one that is damaged, or was removed, is made anew.

        Args:
            number: Number of the case.
            verify: Whether the checksum is compared, if that was not done before in this run.

        Raises:
            InputError: If it cannot be made anew.
        """
        with contextlib.ExitStack() as stack:
            for attempt in range(ATTEMPTS + 1):
                try:
                    entry = self._open(number, stack, verify)
                    break
                except (OSError, SafetensorError, ValueError) as error:
                    if attempt == ATTEMPTS:
                        raise
                    path = self.cache.path(self.keys[number])
                    log.warning("%s IS LOST: %s. It is made anew.", path, error)
                    self.make(number)
            yield entry

    def make(self, number: int) -> None:
        """Preprocess a case and write its entry.

        Raises:
            InputError: If a transform refuses the case, its files are not those that the run began
                with, or the entry cannot be written.
        """
        case = self.cases[number]
        try:
            made = self.transform(case)
        except (RuntimeError, ValueError) as error:
            cause = innermost(error)
            if isinstance(cause, InputError):
                raise cause from error
            raise InputError(f"{case['case_id']}: {cause}") from error
        if _content(self.hashes, case) != self.contents[number]:
            raise InputError(
                f"{case['case_id']}: expected the files that the run began with, got others. "
                "Restore them, or start the run again."
            )
        kinds = (np.ndarray, torch.Tensor)
        kept = {name: value for name, value in made.items() if isinstance(value, kinds)}
        self.cache.write(self.keys[number], kept)

    def _open(self, number: int, stack: contextlib.ExitStack, verify: bool) -> Entry:
        key = self.keys[number]
        path = self.cache.path(key)
        if time.time() - path.stat().st_mtime > TOUCH_S:
            with contextlib.suppress(OSError):
                os.utime(path)
        entry = Entry(stack.enter_context(safe_open(path, framework="numpy")), key)
        if verify and not self.is_checked[number]:
            entry.verify()
            self.is_checked[number] = True
        return entry


class Entry:
    """The tensors of an open entry, read as far as they are asked for.

    Raises:
        ValueError: If the file is not the entry of `key`.
    """

    def __init__(self, file: Any, key: str) -> None:
        self._file, self._metadata = file, file.metadata() or {}
        if self._metadata.get("key") != key or "geometry" not in self._metadata:
            raise ValueError("it is not the entry of this key")
        self.names = sorted(file.keys())

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> StoredTensor:
        return StoredTensor(self._file.get_slice(name))

    def verify(self) -> None:
        """Compare the checksum; this reads everything.

        Raises:
            ValueError: If it differs.
        """
        arrays = {name: self._file.get_tensor(name) for name in self.names}
        if _checksum(arrays, self._metadata) != self._metadata.get("sha256"):
            raise ValueError("its bytes have another checksum")

    def load(self, name: str, files: str | list[str]) -> torch.Tensor:
        """Copy a whole tensor, a MetaTensor if it was one.

        Args:
            name: Name of the tensor.
            files: What it was loaded from, for its metadata: of several files MONAI names one.
        """
        tensor = torch.from_numpy(self._file.get_tensor(name))
        geometry = json.loads(self._metadata["geometry"]).get(name)
        if geometry is None:
            return tensor
        meta = {
            key: np.asarray(value) if isinstance(value, list) else value
            for key, value in geometry.items()
        }
        file = str(files[0] if isinstance(files, list) else files)
        affine = torch.as_tensor(meta.pop("affine"), dtype=torch.float64)
        return MetaTensor(tensor, affine=affine, meta={**meta, "filename_or_obj": file})


class StoredTensor:
    """A tensor in an open entry: its shape, and copies of slices of it."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored
        self.shape = tuple(stored.get_shape())

    def __getitem__(self, window: tuple[slice, ...] | slice) -> torch.Tensor:
        return torch.from_numpy(self._stored[window])


class CachedDataset(Dataset):
    """Whole preprocessed cases, as MONAI's CacheDataset gives them, but read when asked for.

    Args:
        data: Cases, as dictionaries with `case_id`, `image` and `label`.
        transform: Deterministic preprocessing, applied once per case.
        cache: Keeps the results.
        num_classes: Classes, background included; `None`: label values are not checked.
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
        """Return the case, file names replaced by volumes.

        Returns:
            `image` `(C, H, W, D)` float32 and `label` `(1, H, W, D)` uint8, MetaTensors with
            `affine`, `original_affine`, `spatial_shape`, `space` and `filename_or_obj`; every
            other tensor that the preprocessing made; the rest of the case as it is.
        """
        case = self.data[index]
        with self.cached.open(index) as entry:
            return {**case, **{name: entry.load(name, case.get(name, "")) for name in entry.names}}


class CaseSampler(Sampler[int]):
    """Numbers of the cases that this rank predicts; together, the ranks predict each case once."""

    def __init__(self, dataset: Sized) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[int]:
        return iter(distributed.shard(range(len(self.dataset))))

    def __len__(self) -> int:
        return len(distributed.shard(range(len(self.dataset))))


def require_classes(
    case_id: str, label: torch.Tensor, num_classes: int, ignore_value: int | None
) -> None:
    """Refuse label values that are no class.

    Args:
        case_id: Name for the message.
        label: Tensor of any shape, uint8.
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


def preprocessing_key(source: Config, plan: Plan) -> dict[str, Any]:
    """Describe what preprocessing does to a volume, without running the config.

    Two runs share entries if these are equal. It has the parts of the config that preprocess,
    everything that they refer to, and hashes of code: of the package `transforms`, and of each
    other file that a `_target_` names and that is not a library's.

    Args:
        source: The config, unevaluated.
        plan: The values that `@plan.x` stands for.
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
    files |= {*filter(None, map(_source_file, re.findall(r'"_target_": "([^"]+)"', text)))}
    hashes = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return {"config": parts, "plan": values, "code": hashes}


def _source_file(target: str) -> Path | None:
    """Find the file of a class or function; `None` if it is a library's."""
    try:
        found = pydoc.locate(target)
        file = inspect.getsourcefile(found)  # type: ignore[arg-type]
    except (TypeError, pydoc.ErrorDuringImport):  # a bare name is MONAI's
        return None
    module = getattr(found, "__module__", "").split(".")[0]
    return None if file is None or module in LIBRARIES else Path(file)


def _encode(tensors: Mapping[str, Any], key: str) -> bytes:
    """Make the file of an entry.

    Args:
        tensors: Arrays and tensors of any numeric dtype by name; the geometry of a MetaTensor is
            kept as well. Other metadata is not: a header's free text may name a person.
        key: Key of the entry.
    """
    arrays = {
        name: np.ascontiguousarray(value.numpy() if isinstance(value, torch.Tensor) else value)
        for name, value in tensors.items()
    }
    geometry = {
        name: {part: value.meta[part] for part in GEOMETRY if part in value.meta}
        for name, value in tensors.items()
        if isinstance(value, MetaTensor)
    }
    # arrays and tensors become lists; `space` is an enumeration
    plain = json.dumps(geometry, default=lambda value: np.asarray(value).tolist())
    metadata = {"key": key, "geometry": plain}
    content: bytes = save(arrays, {**metadata, "sha256": _checksum(arrays, metadata)})
    return content


def _checksum(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Hash everything that an entry says."""
    names = sorted(arrays)
    kinds = [[name, str(arrays[name].dtype), arrays[name].shape] for name in names]
    digest = hashlib.sha256(json.dumps([metadata["key"], metadata["geometry"], kinds]).encode())
    for name in names:
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _require_same_on_all_ranks(cases: Sequence[Case], keys: Sequence[str]) -> None:
    mine = [(case["case_id"], key) for case, key in zip(cases, keys, strict=True)]
    expected = distributed.broadcast_object(mine)
    if mine != expected:
        names = sorted({name for name, _ in {*mine} ^ {*expected}}) or ["order of the cases"]
        raise InputError(
            f"{some(names)}: expected what rank 0 has, got something else. Give all ranks the same "
            f"dataset_dir and the same versions of {', '.join(LIBRARIES)}."
        )


def _content(hashes: ContentHashes, case: Case) -> str:
    try:
        return hashes.of_case(case)
    except OSError as error:
        raise InputError(
            f"{case['case_id']}: expected files that can be read, got: {error}."
        ) from None


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """Turn what the system refuses into one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cache_dir: expected a directory that can be written, got: {error}. Make room, or "
            "choose another cache_dir."
        ) from None  # the innermost cause is what users are shown
