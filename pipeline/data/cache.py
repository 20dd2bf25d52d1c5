"""Preprocessed cases on disk, so that the memory of a run does not grow with their number.

Each case has one safetensors file, its *entry*. Its key is made of the case's bytes, of the
preprocessing and of code versions; its checksum is compared when it is first read in a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import logging
import os
import pydoc
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ReferenceResolver
from monai.data import MetaTensor
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch.utils.data import Dataset

from pipeline import distributed
from pipeline.config.keys import Config
from pipeline.config.parser import Parser
from pipeline.data.cases import Case, add_case_id
from pipeline.data.content import ContentHashes, map_threads, sha256_of
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
TEMPORARY = re.compile(rf"\.[0-9a-f]{{32}}\.{ENTRY.pattern}")
ABANDONED_S = 3600  # after which a temporary file has no writer any more
# what the way back to the file's grid needs; crop_* come from transforms.preprocess
GEOMETRY = ("affine", "original_affine", "spatial_shape", "space", "crop_start", "crop_size")
# of a config: the run's directory and its split say nothing about preprocessing
OPAQUE = ("lifecycle", "data_module", "cases", "plan")
WRITABLE = "cache_dir", "a directory that can be written", " Make room, or choose another one."

Entry = tuple[dict[str, torch.Tensor], dict[str, Any]]  # tensors, and geometry of some of them


@contextlib.contextmanager
def _explain(where: str, expected: str, remedy: str = "") -> Iterator[None]:
    """Turn an error of the system into one line."""
    try:
        yield
    except OSError as error:  # the innermost cause is what users are shown
        raise InputError(f"{where}: expected {expected}, got: {error}.{remedy}") from None


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
        self.needed: set[str] = set()  # keys of this run
        self._lock = threading.Lock()

    def path(self, key: str) -> Path:
        """File of an entry."""
        return self.directory / f"{key}.safetensors"

    def find(self, key: str) -> bool:
        """Return whether an entry is there; if so it counts as used now."""
        with contextlib.suppress(OSError):
            os.utime(self.path(key))
            return True
        return False

    def write(self, key: str, content: bytes) -> None:
        """Write the file of an entry, or nothing; raises as `make_room`."""
        with self._lock, _explain(*WRITABLE):
            self.make_room(key, len(content))
            with replace_file(self.path(key)) as file:
                file.write_bytes(content)

    @_explain(*WRITABLE)
    def make_room(self, key: str = "", num_bytes: int = 0) -> None:
        """Remove what was used longest ago, until an entry fits in beside the rest.

        Raises:
            InputError: If the directory cannot be written, or is too small for this run.
        """
        entries = []
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                stat = path.stat()
                if ENTRY.fullmatch(path.name) and path.stem != key:
                    entries.append((stat.st_mtime, stat.st_size, path))
                elif TEMPORARY.fullmatch(path.name) and time.time() - stat.st_mtime > ABANDONED_S:
                    path.unlink()
        sizes = [size for _, size, path in entries if path.stem in self.needed]
        sizes += [num_bytes] if num_bytes else []
        if (total := sum(sizes)) > self.limit_bytes:
            raise InputError(
                f"cache_limit_bytes: expected room for the {len(self.needed)} cases of this run, "
                f"got {self.limit_bytes} bytes where {len(sizes)} of them need {total}. Raise "
                f"cache_limit_bytes to about {-(-total * len(self.needed) // len(sizes))}."
            )
        total = sum(size for _, size, _ in entries) + num_bytes
        for _, size, path in sorted(entries):
            if total > self.limit_bytes and path.stem not in self.needed:
                log.info("Removing %s, to stay below cache_limit_bytes", path)
                with contextlib.suppress(OSError):
                    path.unlink()
                    total -= size


class CachedDataset(Dataset):
    """Whole preprocessed cases, as MONAI's CacheDataset gives them, but read when asked for.

    All ranks have to make it at once: each preprocesses a share of the cases that are not cached.

    Args:
        data: Cases, as dictionaries with `case_id`, `image` and `label`.
        transform: Deterministic preprocessing, applied once per case; arrays and tensors are kept.
        num_classes: Classes, background included; `None`: label values are not checked.
        ignore_value: Label of voxels that nobody annotated.

    Raises:
        InputError: If a case cannot be read or changes meanwhile, a label value is no class, the
            cache cannot be written, the cases do not fit into it, or ranks have different cases.
    """

    form = "whole"  # differs where more is done than the preprocessing

    def __init__(
        self,
        data: Sequence[Case],
        transform: Callable[[Case], Mapping[str, Any]],
        cache: VolumeCache,
        num_classes: int | None = None,
        ignore_value: int | None = None,
    ) -> None:
        self.data = [add_case_id(case) for case in data]
        self.transform, self.cache = transform, cache
        self.num_classes, self.ignore_value = num_classes, ignore_value
        self.is_checked = torch.zeros(len(data), dtype=torch.bool).share_memory_()  # with workers
        with distributed.sync_errors():
            self._hashes = ContentHashes(cache.directory)
            self._contents = map_threads(self._content, self.data)
            self._hashes.save()
            versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
            how = [FORMAT, versions, cache.preprocessing_key, self.form, num_classes, ignore_value]
            self.keys = [sha256_of([*how, content]) for content in self._contents]
            self._require_same_on_all_ranks()
            self._make_missing()
            cache.make_room()  # other runs may have written meanwhile

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the case, file names replaced by volumes.

        Returns:
            `image` `(C, H, W, D)` float32 and `label` `(1, H, W, D)` uint8, MetaTensors with
            `affine`, `original_affine`, `spatial_shape`, `space` and `filename_or_obj`; every
            other tensor that the preprocessing made; the rest of the case as it is.
        """
        case = dict(self.data[index])
        tensors, geometry = self.read(index)
        for name, tensor in tensors.items():
            files, case[name] = case.get(name, ""), tensor.clone()  # the file is let go
            if name in geometry:
                meta = {k: np.asarray(v) if k != "space" else v for k, v in geometry[name].items()}
                affine = torch.as_tensor(meta.pop("affine"), dtype=torch.float64)
                meta["filename_or_obj"] = files[0] if isinstance(files, list) else files
                case[name] = MetaTensor(case[name], affine=affine, meta=meta)
        return case

    def read(self, number: int) -> Entry:
        """Map the entry of a case into memory; one that is damaged or gone is made anew.

        The checksum is compared if that was not done before in this run.

        Raises:
            InputError: If it cannot be made anew.
        """
        path = self.cache.path(self.keys[number])
        try:
            entry = _open(path, verify=not self.is_checked[number])
            self.is_checked[number] = True
        # a file that cannot be opened is a RuntimeError of safetensors
        except (OSError, RuntimeError, SafetensorError, ValueError) as error:
            log.warning("%s IS LOST: %s. It is made anew.", path, error)
            entry = self._make(number)  # whatever becomes of the file: other runs may remove it
        return entry

    def _prepare(self, case: Case) -> Mapping[str, Any]:
        return self.transform(case)

    def _make(self, number: int) -> Entry:
        case = self.data[number]
        try:
            made = self._prepare(case)
        except (RuntimeError, ValueError) as error:
            cause = innermost(error)
            own = isinstance(cause, InputError)
            raise cause if own else InputError(f"{case['case_id']}: {cause}") from error
        if self.num_classes is not None:
            allowed = {*range(self.num_classes), self.ignore_value}
            values = np.unique(np.asarray(made["label"])).tolist()
            unknown = [str(value) for value in values if value not in allowed]
            ignored = "" if self.ignore_value is None else f" and {self.ignore_value} (ignored)"
            expected = f"label values 0 to {self.num_classes - 1}{ignored}"
            remedy = "Declare the value in the dataset or correct the label."
            require(not unknown, case["case_id"], expected, some(unknown), remedy)
        is_same = self._content(case) == self._contents[number]
        expected, remedy = "the files that the run began with", "Restore them, or start again."
        require(is_same, case["case_id"], expected, "others", remedy)
        content, entry = _encode(made, self.keys[number])
        self.cache.write(self.keys[number], content)
        return entry

    def _content(self, case: Case) -> str:
        with _explain(case["case_id"], "files that can be read"):
            return self._hashes.of_case(case)

    def _require_same_on_all_ranks(self) -> None:
        mine = [(case["case_id"], key) for case, key in zip(self.data, self.keys, strict=True)]
        first = distributed.broadcast_object(mine)
        others = sorted({name for name, _ in {*mine} ^ {*first}}) or ["order of the cases"]
        remedy = "Give all ranks the same dataset_dir and the same versions of "
        remedy += f"{', '.join(LIBRARIES)}."
        require(mine == first, some(others), "what rank 0 has", "something else", remedy)

    def _make_missing(self) -> None:
        numbers = {key: number for number, key in enumerate(self.keys)}  # equal cases share one
        self.cache.needed.update(numbers)
        missing, mine = list(numbers), list[str]()
        while True:
            missing = [key for key in missing if key not in mine and not self.cache.find(key)]
            self.cache.make_room()
            by_rank = distributed.all_gather_object(missing)
            wanted = [*{key: None for keys in by_rank for key in keys}]
            if not wanted:
                return
            # one of those that miss a key makes it; if the others see another directory, a node's
            # own, they miss it still, and one of them makes it the next time
            turns = [[rank for rank, keys in enumerate(by_rank) if key in keys] for key in wanted]
            own = [ranks[n % len(ranks)] == distributed.rank() for n, ranks in enumerate(turns)]
            mine = [*itertools.compress(wanted, own)]
            if mine:
                log.info("Preprocessing %d of %d cases", len(mine), len(self.data))
                map_threads(self._make, [numbers[key] for key in mine], "Preprocessing")
            distributed.all_gather_object(None)  # all have made theirs


class CaseSampler(list[int]):
    """Numbers of the cases that this rank predicts; together, the ranks predict each case once."""

    def __init__(self, dataset: Sized) -> None:
        super().__init__(distributed.shard(range(len(dataset))))


def preprocessing_key(source: Config, plan: Plan) -> dict[str, Any]:
    """Describe what preprocessing does to a volume, without running the config.

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


def _encode(made: Mapping[str, Any], key: str) -> tuple[bytes, Entry]:
    """Make the file of an entry, without the text of headers, which may name a person."""
    kept = {name: t for name, t in made.items() if isinstance(t, np.ndarray | torch.Tensor)}
    arrays = {name: np.ascontiguousarray(np.asarray(t)) for name, t in kept.items()}
    metas = {name: t.meta for name, t in kept.items() if isinstance(t, MetaTensor)}
    geometry = {n: {k: meta[k] for k in GEOMETRY if k in meta} for n, meta in metas.items()}
    facts = {"key": key, "sha256": UNHASHED.decode(), "geometry": geometry}
    # arrays and tensors become lists; `space` is an enumeration
    plain = json.dumps(facts, default=lambda value: np.asarray(value).tolist())
    content: bytes = save(arrays, {"facts": plain})
    content = content.replace(UNHASHED, hashlib.sha256(content).hexdigest().encode(), 1)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return content, (tensors, json.loads(plain)["geometry"])


def _open(path: Path, *, verify: bool) -> Entry:
    """Map the file of an entry; a ValueError says that it is damaged."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {}).get("facts", "{}"))
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    if facts.get("key") != path.stem:
        raise ValueError("it is not the entry of this key")
    if verify:
        unhashed = path.read_bytes().replace(facts["sha256"].encode(), UNHASHED, 1)
        if hashlib.sha256(unhashed).hexdigest() != facts["sha256"]:
            raise ValueError("its bytes have another checksum")
    return tensors, facts["geometry"]
