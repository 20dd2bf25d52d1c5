"""The way back: values on the preprocessed grid, at the voxels of the file they came from.

Linear interpolation, a block of the volume at a time. Each voxel of the file belongs to one block
and is computed from absolute coordinates in float64, so that it has the same value however the
volume was cut into blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

CHUNK = 2**25  # values of 4 bytes that are held at once, 128 MiB
PLACE = 32  # of these, for where one voxel is: indices and weights of its neighbours
# Voxels: an axis that adds less to another's coordinate over the whole volume is square to it.
# Headers keep affines in float32, which couples axes by up to 1e-5; 1e-3 is, of voxels of 1 mm, the
# distance within which two grids are one (`TOLERANCE_MM`), and moves a voxel by half of that.
NOTHING = 1e-3

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
        steps = np.abs(self._matrix)
        nothing = (steps * self.shape < NOTHING) & (steps < steps.max(axis=0))
        # at the centre of the volume nothing is lost by leaving it out
        self._offset += np.where(nothing, self._matrix, 0) @ (np.array(self.shape) - 1) / 2
        self._matrix[nothing] = 0

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
        for chunk in _chunks(self._reach(start, size), len(block)):
            axes = self._axes(chunk)
            owned = self._owned(axes, start, size)
            inside = _bounds(owned, [s.stop - s.start for s in chunk])
            if inside is None:
                continue
            shape = tuple(s.stop - s.start for s in inside)
            mask = None  # as a copy costs, only where it says something
            if not all(_cut(own, inside).all() for own in owned):
                mask = np.broadcast_to(_cut(_all(owned), inside), shape).copy()
            axes = [(_cut(low, inside), _cut(share, inside)) for low, share in axes]
            starts = zip([s.start for s in chunk], inside, strict=True)
            yield Piece(
                tuple(slice(begin + s.start, begin + s.stop) for begin, s in starts),
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

    def _owned(self, axes: Sequence[Axis], start: np.ndarray, size: np.ndarray) -> list[np.ndarray]:
        """Which voxels belong to a block: those of all arrays, which broadcast as `axes` do.

        Of parallel grids, each array is of one axis; of others, there is one.
        """
        last = np.where(self._source == 1, 1, start + size - 1)
        own = [(low >= a) & (low < b) for (low, _), a, b in zip(axes, start, last, strict=True)]
        return own if all(one.size == max(one.shape) for one in own) else [_all(own)]


def _all(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return reduce(np.logical_and, arrays)


def _chunks(box: Box, num_channels: int) -> Iterator[Box]:
    """Parts of a box, for each of which `CHUNK` is enough; at the least a line of voxels."""
    columns, depth = (max(1, s.stop - s.start) for s in box[1:])
    lines = max(1, CHUNK // ((num_channels + PLACE) * depth))
    columns = min(columns, lines)
    for i in range(box[0].start, box[0].stop, lines // columns):
        for j in range(box[1].start, box[1].stop, columns):
            yield (
                slice(i, min(i + lines // columns, box[0].stop)),
                slice(j, min(j + columns, box[1].stop)),
                box[2],
            )


def _bounds(owned: Sequence[np.ndarray], shape: Sequence[int]) -> Box | None:
    """Smallest box around what is owned, of arrays as `_owned` gives; `None`: nothing is."""
    bounds = []
    for axis, n in enumerate(shape):
        others = tuple({0, 1, 2} - {axis})
        own = _all([np.asarray(one.any(axis=others)) for one in owned])
        planes = np.flatnonzero(np.broadcast_to(own, n))
        if not len(planes):
            return None
        bounds.append(slice(int(planes[0]), int(planes[-1]) + 1))
    return tuple(bounds)


def _cut(values: np.ndarray, inside: Box) -> np.ndarray:
    """Part of an array that broadcasts to a box, for what is inside of it."""
    along = zip(inside, values.shape, strict=True)
    return values[tuple(s if n > 1 else slice(None) for s, n in along)]


def _interpolate(
    block: torch.Tensor, start: np.ndarray, axes: Sequence[Axis], shape: tuple[int, ...]
) -> torch.Tensor:
    """`(C, *shape)` from the eight neighbours of each voxel."""
    strides = (block.shape[2] * block.shape[3], block.shape[3], 1)
    flat = block.reshape(len(block), -1)
    found = torch.zeros((len(block), math.prod(shape)), device=block.device)
    neighbours = [
        _neighbours(axis, first, stride, block.device)
        for axis, first, stride in zip(axes, start, strides, strict=True)
    ]
    for (i, u), (j, v), (k, w) in itertools.product(*neighbours):
        # a voxel that another block owns may have its neighbours outside of this one
        near = (i + j + k).clamp_(0, flat.shape[1] - 1).expand(shape).reshape(-1)
        weight = (u * v * w).expand(shape).reshape(-1)
        found.addcmul_(flat.index_select(1, near), weight)
    return found.reshape(len(block), *shape)


def _neighbours(
    axis: Axis, first: int, stride: int, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of the lower and the upper neighbour, if they count: place in the block, and weight."""
    low, share = axis
    index = torch.as_tensor((low - first) * stride, device=device)
    return [
        (index + shift, torch.as_tensor(weight.astype(np.float32), device=device))
        for shift, weight in ((0, 1 - share), (stride, share))
        if weight.any()
    ]
