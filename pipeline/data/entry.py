"""One preprocessed case in one file: tensors in safetensors, geometry as JSON, a digest over all.

The format has no code in it, its header is checked against the file's length whenever it is
opened, and a slice of a tensor is read through a memory map of the file without the rest. A digest
tells a byte that changed from one that did not; who can write into the cache can also write a
digest, so that it is proof against damage, not against forgery. Forged voxels stay voxels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

FORMAT = 1  # of the file; a change of it makes every entry anew
BROKEN = (OSError, SafetensorError, ValueError)  # what opening an entry that is no entry raises
# crop_*: of transforms.borders
GEOMETRY = ("affine", "original_affine", "spatial_shape", "space", "crop_start", "crop_size")
_NO_DIGEST = "0" * 64
_CHUNK = 1 << 20


def encode(tensors: Mapping[str, Any], key: str) -> list[bytes | memoryview]:
    """The file of an entry, in pieces.

    Args:
        tensors: Arrays and tensors of any numeric dtype by name; of a MetaTensor its geometry is
            kept as well. Nothing else is: the free text of an image's header may name a person.
        key: Of the entry.
    """
    arrays = {
        name: np.ascontiguousarray(value.numpy() if isinstance(value, torch.Tensor) else value)
        for name, value in tensors.items()
    }
    geometry = {
        name: _geometry(value) for name, value in tensors.items() if isinstance(value, MetaTensor)
    }
    facts = {"key": key, "geometry": json.dumps(geometry), "sha256": _NO_DIGEST}
    content = memoryview(save(arrays, facts))
    header_end = 8 + int.from_bytes(content[:8], "little")
    digest = hashlib.sha256(content).hexdigest()
    header = bytes(content[:header_end]).replace(_NO_DIGEST.encode(), digest.encode())
    return [header, content[header_end:]]


def fault_of(path: Path, key: str) -> str | None:
    """What is wrong with the entry, every byte of it looked at; `None` for nothing.

    Raises:
        FileNotFoundError: If there is none.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # a pipe would be waited for
            return "it is not a file"
        with open_entry(path, key):
            pass
        return None if _has_its_digest(path) else "its bytes have another digest"
    except FileNotFoundError:
        raise
    except (*BROKEN, LookupError) as error:
        return str(error)


@contextlib.contextmanager
def open_entry(path: Path, key: str) -> Iterator[Entry]:
    """An entry to read from; inside, its file is mapped into memory.

    Raises:
        OSError: If it cannot be opened.
        SafetensorError: If its header is not one, or does not fit its length.
        ValueError: If it is the entry of another key.
    """
    with safe_open(path, framework="numpy") as file:
        yield Entry(file, key)


class Entry:
    """The tensors of an open entry, read as far as they are asked for.

    Args:
        file: The open file.
        key: That it must have.

    Raises:
        ValueError: If it has another.
    """

    def __init__(self, file: Any, key: str) -> None:
        facts = file.metadata() or {}
        if facts.get("key") != key or not {"geometry", "sha256"} <= facts.keys():
            raise ValueError("it is not the entry of this key")
        self._file, self._facts = file, facts
        self.names = set(file.keys())

    def __getitem__(self, name: str) -> StoredTensor:
        return StoredTensor(self._file.get_slice(name))

    def whole(self, name: str, filename: str) -> torch.Tensor:
        """A copy of a whole tensor, a MetaTensor if it was one.

        Args:
            name: Of the tensor.
            filename: That it was loaded from, for its metadata.
        """
        tensor = torch.from_numpy(self._file.get_tensor(name))
        geometry = json.loads(self._facts["geometry"]).get(name)
        if geometry is None:
            return tensor
        meta = {
            key: np.asarray(value) if isinstance(value, list) else value
            for key, value in geometry.items()
        }
        affine = torch.as_tensor(meta.pop("affine"), dtype=torch.float64)
        return MetaTensor(tensor, affine=affine, meta={**meta, "filename_or_obj": filename})


class StoredTensor:
    """A tensor in an open entry: its shape, and copies of slices of it."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored
        self.shape = tuple(stored.get_shape())

    def __getitem__(self, window: tuple[slice, ...] | slice) -> torch.Tensor:
        return torch.from_numpy(self._stored[window])

    def cut(self, origin: np.ndarray, size: np.ndarray) -> torch.Tensor:
        """Copy `(C, *size)` from a volume `(C, H, W, D)`, zero outside it.

        Args:
            origin: First voxel `(3,)`, negative outside the volume.
            size: `(3,)`; the window must have a voxel in common with the volume.
        """
        source, target = common(origin, size, self.shape[1:])
        inside = self[source]
        patch = torch.zeros((self.shape[0], *size.tolist()), dtype=inside.dtype)
        patch[target] = inside
        return patch


Window = tuple[slice, ...]


def common(origin: np.ndarray, size: np.ndarray, shape: Sequence[int]) -> tuple[Window, Window]:
    """What a window has in common with a volume, as slices of the volume and of the window.

    Args:
        origin: First voxel `(3,)`, negative outside the volume.
        size: Of the window, `(3,)`.
        shape: Of the volume, without its channels, all of which are taken.
    """
    source, target = [slice(None)], [slice(None)]
    for start, length, end in zip(origin.tolist(), size.tolist(), shape, strict=True):
        first, last = max(start, 0), min(start + length, end)
        source.append(slice(first, last))
        target.append(slice(first - start, last - start))
    return tuple(source), tuple(target)


def _geometry(tensor: MetaTensor) -> dict[str, Any]:
    """Where the voxels lie, and lay in the file: all that the way back to its grid needs."""
    known = {key: tensor.meta[key] for key in GEOMETRY if key in tensor.meta}
    return {
        key: str(value) if isinstance(value, str) else np.asarray(value).tolist()
        for key, value in known.items()
    }


def _has_its_digest(path: Path) -> bool:
    """Whether the file's SHA-256, before its digest was written into its header, is that digest.

    Both are read from one open file: another process may put a new one in its place.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        header = file.read(int.from_bytes(start, "little"))
        recorded = json.loads(header)["__metadata__"]["sha256"]
        digest = hashlib.sha256(start + header.replace(recorded.encode(), _NO_DIGEST.encode()))
        while chunk := file.read(_CHUNK):  # not mapped: pages read through a map stay resident
            digest.update(chunk)
    return digest.hexdigest() == recorded
