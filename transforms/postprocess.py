"""From the preprocessed grid back to the grid of the input file.

Linear interpolation, a slab of the volume at a time. Each voxel of the file belongs to one slab and
is computed from absolute coordinates in float64: the same value however the volume was cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_tensor
from scipy.ndimage import find_objects

CHUNK = 2**25  # values of 4 bytes that are held at once, 128 MiB, or a plane of the file
INDEX_VALUES = 32  # of these, for indices and weights of the neighbours of one voxel
# Voxels: an axis that adds less to another's coordinate over the whole volume counts as
# perpendicular to it. Headers keep affines in float32, which couples axes by up to 1e-5.
NEGLIGIBLE = 1e-3

Box = tuple[slice, ...]
Axis = tuple[np.ndarray, np.ndarray]  # lower neighbour, and weight of the upper one
# values (C, *box) float32 in a box of the file's grid, and a function that writes a tensor
# (..., *box) to its place in another (..., *shape of the file)
Piece = tuple[torch.Tensor, Callable[[torch.Tensor, torch.Tensor], None]]


class FileGrid:
    """Grid of the file that an image was preprocessed from.

    The metadata of `image` `(_, H, W, D)` hold it: `shape` in voxels, `affine` `(4, 4)` float64 to
    RAS mm, and `box`, the part that was kept when empty borders were cut off.
    """

    def __init__(self, image: MetaTensor) -> None:
        meta = image.meta
        self.shape = tuple(int(n) for n in meta["spatial_shape"])
        self.affine = np.asarray(meta["original_affine"], dtype=np.float64)
        sizes = zip(
            meta.get("crop_start", (0,) * 3), meta.get("crop_size", self.shape), strict=True
        )
        self.box: Box = tuple(slice(int(a), int(a) + int(n)) for a, n in sizes)
        self._source = np.array(image.shape[1:])
        to_source = np.linalg.inv(np.asarray(image.affine, dtype=np.float64)) @ self.affine
        self._matrix, self._offset = to_source[:3, :3], to_source[:3, 3]
        steps = np.abs(self._matrix)
        negligible = (steps * self.shape < NEGLIGIBLE) & (steps < steps.max(axis=0))
        # leaving it out has no effect at the centre of the volume
        self._offset += np.where(negligible, self._matrix, 0) @ (np.array(self.shape) - 1) / 2
        self._matrix[negligible] = 0

    def pieces(self, slab: torch.Tensor, axis: int = 0, start: int = 0) -> Iterator[Piece]:
        """Interpolate at the voxels of the file that belong to a slab.

        `slab` `(C, h, w, d)` float32 holds planes from `start` on along an axis of the preprocessed
        volume. A voxel belongs to the slab that holds both of its neighbours along this axis: slabs
        share a plane. Beyond the outermost planes, values continue as they are there.
        """
        stop = start + slab.shape[axis + 1]
        last = stop if stop == self._source[axis] else stop - 1
        reach = self._reach(axis, start, stop)
        columns, depth = (max(1, s.stop - s.start) for s in reach[1:])
        rows = max(1, CHUNK // ((len(slab) + INDEX_VALUES) * columns * depth))
        for begin in range(reach[0].start, reach[0].stop, rows):
            chunk = (slice(begin, min(begin + rows, reach[0].stop)), *reach[1:])
            axes = self._axes(chunk)
            low = axes[axis][0]
            belongs = (low >= start) & (low < last)
            if not belongs.any():
                continue
            found = zip(chunk, find_objects(belongs.view(np.uint8))[0], belongs.shape, strict=True)
            inside = tuple(  # the smallest box around what belongs
                part if size > 1 else slice(0, whole.stop - whole.start)
                for whole, part, size in found
            )
            axes = [(_cut(low, inside), _cut(weight, inside)) for low, weight in axes]
            axes[axis] = (axes[axis][0] - start, axes[axis][1])
            shape = tuple(s.stop - s.start for s in inside)
            belongs, mask = _cut(belongs, inside), None
            if not belongs.all():  # only where needed, since a masked copy is slow
                mask = torch.tensor(np.broadcast_to(belongs, shape), device=slab.device)
            pairs = zip(chunk, inside, strict=True)
            box = tuple(slice(a.start + b.start, a.start + b.stop) for a, b in pairs)
            yield _interpolate(slab, axes, shape), partial(_write, box, mask)

    def _reach(self, axis: int, start: int, stop: int) -> Box:
        """Return a box of the file, a voxel too large, that holds all that belongs to a slab."""
        seen = self._matrix @ _corners((s.start, s.stop - 1) for s in self.box)
        seen += self._offset[:, None]
        low, high = seen.min(axis=1), seen.max(axis=1)
        # the outermost slabs reach as far as the file does
        if start > 0:
            low[axis] = start
        if stop < self._source[axis]:
            high[axis] = stop
        ends = _corners(zip(low, high, strict=True)) - self._offset[:, None]
        back = np.linalg.solve(self._matrix, ends)
        return tuple(
            slice(max(s.start, int(np.floor(a)) - 1), min(s.stop, int(np.ceil(b)) + 2))
            for s, a, b in zip(self.box, back.min(axis=1), back.max(axis=1), strict=True)
        )

    def _axes(self, box: Box) -> list[Axis]:
        """Return the neighbours of a box's voxels on each axis, in arrays that broadcast to it."""
        steps = np.meshgrid(*(np.arange(s.start, s.stop) for s in box), indexing="ij", sparse=True)
        found = []
        for row, offset, planes in zip(self._matrix, self._offset, self._source, strict=True):
            along = (m * step for m, step in zip(row, steps, strict=True) if m)
            place = np.clip(sum(along, np.full((1, 1, 1), offset)), 0, planes - 1)
            low = np.floor(place).astype(np.int64)
            found.append((low, place - low))
        return found


def _write(box: Box, mask: torch.Tensor | None, values: torch.Tensor, target: torch.Tensor) -> None:
    where: tuple[Any, ...] = (..., *box)
    place, values = target[where], values.to(target.device)
    if mask is not None:
        values = torch.where(mask.to(target.device), values, place)
    place.copy_(values)


def _corners(ends: Iterable[tuple[float, float]]) -> np.ndarray:
    return np.array(list(itertools.product(*ends))).T


def _cut(values: np.ndarray, inside: Box) -> np.ndarray:
    """Cut a box from an array that broadcasts to a larger one."""
    along = zip(inside, values.shape, strict=True)
    return values[tuple(s if n > 1 else slice(None) for s, n in along)]


def _interpolate(slab: torch.Tensor, axes: Sequence[Axis], shape: tuple[int, ...]) -> torch.Tensor:
    """Return `(C, *shape)` from the neighbours of each voxel that have a weight, eight at most."""
    strides = (slab.shape[2] * slab.shape[3], slab.shape[3], 1)
    flat = slab.reshape(len(slab), -1)
    found = torch.zeros((len(slab), math.prod(shape)), device=slab.device)
    neighbours = []
    for (low, upper), stride in zip(axes, strides, strict=True):
        index, weight = (torch.as_tensor(one, device=slab.device) for one in (low * stride, upper))
        sides = [(index, (1 - weight).float())]
        if upper.any():
            sides.append((index + stride, weight.float()))
        neighbours.append(sides)
    for (i, u), (j, v), (k, w) in itertools.product(*neighbours):
        # neighbours of weight 0, and of voxels of another slab, may lie outside of this one
        near = (i + j + k).clamp_(0, flat.shape[1] - 1).expand(shape).reshape(-1)
        weight = (u * v * w).expand(shape).reshape(-1)
        found.addcmul_(flat.index_select(1, near), weight)
    return found.reshape(len(slab), *shape)


def to_original_grid(volume: torch.Tensor, image: MetaTensor) -> MetaTensor:
    """Resample `volume` `(C, H, W, D)`, on the grid of `image`, to the grid of the image's file.

    The result is `(C, *shape of the file)` float32, and 0 where empty borders were cut off: there,
    argmax of probabilities is the first class.
    """
    grid = FileGrid(image)
    values = convert_to_tensor(volume).float()
    whole = values.new_zeros((len(values), *grid.shape))
    for piece, write in grid.pieces(values):
        write(piece, whole)
    return MetaTensor(whole, affine=torch.as_tensor(grid.affine))


class ToOriginalGridd(MapTransform):
    """Turns logits into labels `pred` `(1, *shape of the file)` uint8, by their probabilities.

    Where `pred` is uint8 already, it stays; `image` becomes `(C, *shape of the file)` float32.
    """

    def __init__(self) -> None:
        super().__init__(("image", "pred"))  # clients look for a MapTransform of `pred`

    def __call__(self, data: dict) -> dict:
        """Turn one case's logits into labels."""
        image, pred = data["image"], convert_to_tensor(data["pred"])
        if pred.dtype != torch.uint8:
            probabilities = torch.softmax(pred.float(), dim=0)
            pred = to_original_grid(probabilities, image).argmax(dim=0, keepdim=True)
        original = to_original_grid(image, image)
        labels = MetaTensor(convert_to_tensor(pred, dtype=torch.uint8), affine=original.affine)
        # names the saved file; in the name of a folder, a dot begins no ending
        name = f"{data['case_id']}.nii.gz" if "case_id" in data else None
        labels.meta["filename_or_obj"] = name or image.meta.get("filename_or_obj", "")
        return {**data, "pred": labels, "image": original}
