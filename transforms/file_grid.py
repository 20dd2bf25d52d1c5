"""The way back: values on the preprocessed grid, at the voxels of the file they came from.

Linear interpolation, a block of the volume at a time. Each voxel of the file belongs to one block
and is computed from absolute coordinates in float64, so that it has the same value however the
volume was cut into blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

CHUNK = 2**25  # values that are interpolated at once; of float32 128 MiB
NOTHING = 1e-6  # voxels; an axis that adds no more to another's coordinate is square to it

Box = tuple[slice, ...]
Axis = tuple[np.ndarray, np.ndarray]  # lower neighbour, and share of the upper one


@dataclass(frozen=True)
class Piece:
    """Interpolated values in a box of the file's grid.

    Attributes:
        box: Where it is.
        values: `(C, *box)` float32.
        mask: Which voxels are meant, bool, of the box's shape; `None`: all.
    """

    box: Box
    values: torch.Tensor
    mask: torch.Tensor | None

    def write(self, values: torch.Tensor, target: torch.Tensor) -> None:
        """Put `values` `(..., *box)` to their place in `target` `(..., *shape of the file)`."""
        where: tuple[Any, ...] = (..., *self.box)
        place = target[where]
        values = values.to(target.device)
        if self.mask is not None:
            values = torch.where(self.mask.to(target.device), values, place)
        place.copy_(values)


class FileGrid:
    """Grid of the file that an image was preprocessed from.

    Args:
        image: `(_, H, W, D)` the preprocessed image, whose metadata remember the file's grid.

    Attributes:
        shape: Of the file, in voxels.
        affine: `(4, 4)` float64 of the file, to RAS mm.
        box: What was kept of it when empty borders were cut off; all of it where none were.
    """

    def __init__(self, image: MetaTensor) -> None:
        meta = image.meta
        self.shape = tuple(int(n) for n in meta["spatial_shape"])
        self.affine = np.asarray(meta["original_affine"], dtype=np.float64)
        start = [int(n) for n in meta.get("crop_start", (0, 0, 0))]
        size = [int(n) for n in meta.get("crop_size", self.shape)]
        self.box: Box = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        self._source = np.array(image.shape[1:])
        to_source = np.linalg.inv(np.asarray(image.affine, dtype=np.float64)) @ self.affine
        self._matrix, self._offset = to_source[:3, :3], to_source[:3, 3]
        self._matrix[np.abs(self._matrix) * self.shape < NOTHING] = 0

    def pieces(self, block: torch.Tensor, first: Sequence[int] = (0, 0, 0)) -> Iterator[Piece]:
        """Interpolate at the voxels of the file that belong to a block.

        A voxel belongs to the block that holds both of its neighbours on every axis; blocks that
        follow one another therefore have a plane in common. Beyond the outermost planes of the
        volume, values go on as they are there.

        Args:
            block: `(C, h, w, d)` float32, part of a volume on the preprocessed grid.
            first: Voxel of the volume that the block begins with.
        """
        start, size = np.array(first), np.array(block.shape[1:])
        box = self._reach(start, size)
        owned = self._owned(self._axes(box), start, size)
        if not owned.any():
            return
        box = _trimmed(box, owned)
        planes = [s.stop - s.start for s in box]
        rows = max(1, CHUNK // (len(block) * planes[1] * planes[2]))
        for begin in range(box[0].start, box[0].stop, rows):
            inside = (slice(begin, min(begin + rows, box[0].stop)), *box[1:])
            axes = self._axes(inside)
            owned = self._owned(axes, start, size)
            shape = tuple(s.stop - s.start for s in inside)
            mask = None if owned.all() else np.broadcast_to(owned, shape).copy()
            yield Piece(
                inside,
                _interpolate(block, start, axes, shape),
                mask if mask is None else torch.as_tensor(mask, device=block.device),
            )

    def _reach(self, start: np.ndarray, size: np.ndarray) -> Box:
        """Box of the file, a voxel too large, outside of which nothing belongs to a block."""
        corners = np.array(list(itertools.product(*((s.start, s.stop - 1) for s in self.box)))).T
        seen = self._matrix @ corners + self._offset[:, None]
        # outermost blocks reach as far as the file does
        low = np.where(start == 0, seen.min(axis=1), start)
        high = np.where(start + size == self._source, seen.max(axis=1), start + size)
        ends = np.array(list(itertools.product(*zip(low, high, strict=True)))).T
        back = np.linalg.solve(self._matrix, ends - self._offset[:, None])
        return tuple(
            slice(max(s.start, int(np.floor(a)) - 1), min(s.stop, int(np.ceil(b)) + 2))
            for s, a, b in zip(self.box, back.min(axis=1), back.max(axis=1), strict=True)
        )

    def _axes(self, box: Box) -> list[Axis]:
        """Neighbours of a box's voxels on each axis of the volume.

        Arrays broadcast to the box; of parallel grids, each is as long as one axis of it.
        """
        steps = [
            np.arange(s.start, s.stop).reshape([-1 if a == axis else 1 for a in range(3)])
            for axis, s in enumerate(box)
        ]
        found = []
        for row, offset, planes in zip(self._matrix, self._offset, self._source, strict=True):
            along = (m * step for m, step in zip(row, steps, strict=True) if m)
            place = np.clip(sum(along, np.full((1, 1, 1), offset)), 0, planes - 1)
            low = np.clip(np.floor(place), 0, max(planes - 2, 0)).astype(np.int64)
            found.append((low, place - low))
        return found

    def _owned(self, axes: Sequence[Axis], start: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Which voxels belong to a block, broadcasting as `axes` do."""
        last = np.where(self._source == 1, 1, start + size - 1)
        own = [(low >= a) & (low < b) for (low, _), a, b in zip(axes, start, last, strict=True)]
        return own[0] & own[1] & own[2]


def _trimmed(box: Box, owned: np.ndarray) -> Box:
    """The box without the planes at its ends in which nothing is owned."""
    owned = np.broadcast_to(owned, [max(s.stop - s.start, 0) for s in box])
    ends = []
    for axis, s in enumerate(box):
        others = tuple({0, 1, 2} - {axis})
        planes = np.flatnonzero(owned.any(axis=others))
        ends.append(slice(s.start + int(planes[0]), s.start + int(planes[-1]) + 1))
    return tuple(ends)


def _interpolate(
    block: torch.Tensor, start: np.ndarray, axes: Sequence[Axis], shape: tuple[int, ...]
) -> torch.Tensor:
    """`(C, *shape)` from the eight neighbours of each voxel."""
    strides = (block.shape[2] * block.shape[3], block.shape[3], 1)
    flat = block.reshape(len(block), -1)
    found = torch.zeros((len(block), int(np.prod(shape))), device=block.device)
    for corner in itertools.product((0, 1), repeat=3):
        shares = [
            share if upper else 1 - share for (_, share), upper in zip(axes, corner, strict=True)
        ]
        if not all(share.any() for share in shares):
            continue
        index = torch.zeros((), dtype=torch.int64, device=block.device)
        for (low, _), upper, a, stride in zip(axes, corner, start, strides, strict=True):
            index = index + torch.as_tensor((low + upper - a) * stride, device=block.device)
        weight = torch.ones((), device=block.device)
        for share in shares:
            weight = weight * torch.as_tensor(share, dtype=torch.float32, device=block.device)
        # a voxel that another block owns may have its neighbours outside of this one
        near = index.expand(shape).reshape(-1).clamp(0, flat.shape[1] - 1)
        found.addcmul_(flat.index_select(1, near), weight.expand(shape).reshape(-1))
    return found.reshape(len(block), *shape)
