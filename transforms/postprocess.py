"""From the preprocessed grid back to the grid of the input file.

Linear interpolation, a slab of the volume at a time. Each voxel of the file belongs to one slab and
is computed from absolute coordinates in float64: the same value however the volume was cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_tensor
from scipy.ndimage import find_objects

CHUNK = 2**25  # values of 4 bytes that are held at once, 128 MiB
INDEX_VALUES = 32  # of these, for indices and weights of the neighbours of one voxel
# Voxels: an axis that adds less to another's coordinate over the whole volume counts as
# perpendicular to it. Headers keep affines in float32, which couples axes by up to 1e-5.
NEGLIGIBLE = 1e-3

Box = tuple[slice, ...]
Axis = tuple[np.ndarray, np.ndarray]  # lower neighbour, and weight of the upper one


@dataclass(frozen=True)
class Piece:
    """Interpolated values in a box of the file's grid.

    `values` are `(C, *box)` float32; `mask`, bool of the box's shape, has voxels to write, or all.
    """

    box: Box
    values: torch.Tensor
    mask: torch.Tensor | None

    def write(self, values: torch.Tensor, target: torch.Tensor) -> None:
        """Write `values` `(..., *box)` to their place in `target` `(..., *shape of the file)`."""
        where: tuple[Any, ...] = (..., *self.box)
        place = target[where]
        values = values.to(target.device)
        if self.mask is not None:
            values = torch.where(self.mask.to(target.device), values, place)
        place.copy_(values)


class FileGrid:
    """Grid of the file that an image was preprocessed from.

    Args:
        image: `(_, H, W, D)` preprocessed; its metadata hold the file's grid: `shape` in voxels,
            `affine` `(4, 4)` float64 to RAS mm, and in `box` what is left of the borders.
    """

    def __init__(self, image: MetaTensor) -> None:
        meta = image.meta
        self.shape = tuple(int(n) for n in meta["spatial_shape"])
        self.affine = np.asarray(meta["original_affine"], dtype=np.float64)
        crop = zip(
            meta.get("crop_start", (0, 0, 0)), meta.get("crop_size", self.shape), strict=True
        )
        self.box: Box = tuple(slice(int(a), int(a) + int(n)) for a, n in crop)
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

        A voxel belongs to the slab that holds both of its neighbours along `axis`: slabs share a
        plane. Beyond the outermost planes, values continue as they are there.

        Args:
            slab: `(C, h, w, d)` float32, consecutive planes of a volume on the preprocessed grid.
            axis: Axis of the volume that the planes follow one another along.
            start: First plane.
        """
        stop = start + slab.shape[axis + 1]
        last = 1 if self._source[axis] == 1 else stop - 1
        for chunk in _split(self._reach(axis, start, stop), len(slab)):
            axes = self._axes(chunk)
            low = axes[axis][0]
            belongs = (low >= start) & (low < last)
            inside = _bounds(belongs, [s.stop - s.start for s in chunk])
            if inside is None:
                continue
            shape = tuple(s.stop - s.start for s in inside)
            mask = None  # only where needed, since a masked copy is slow
            if not _cut(belongs, inside).all():
                own = np.broadcast_to(_cut(belongs, inside), shape).copy()
                mask = torch.as_tensor(own, device=slab.device)
            axes = [(_cut(low, inside), _cut(weight, inside)) for low, weight in axes]
            axes[axis] = (axes[axis][0] - start, axes[axis][1])
            begins = zip([s.start for s in chunk], inside, strict=True)
            yield Piece(
                tuple(slice(begin + s.start, begin + s.stop) for begin, s in begins),
                _interpolate(slab, axes, shape),
                mask,
            )

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
        """Return the neighbours of a box's voxels on each axis of the volume.

        Arrays broadcast to the box; for parallel grids, each is as long as one axis of it.
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


def _corners(ends: Iterable[tuple[float, float]]) -> np.ndarray:
    return np.array(list(itertools.product(*ends))).T


def _split(box: Box, num_channels: int) -> Iterator[Box]:
    """Split a box into parts, for each of which `CHUNK` is enough; at least a line of voxels."""
    columns, depth = (max(1, s.stop - s.start) for s in box[1:])
    lines = max(1, CHUNK // ((num_channels + INDEX_VALUES) * depth))
    columns = min(columns, lines)
    for i, j in itertools.product(
        range(box[0].start, box[0].stop, lines // columns),
        range(box[1].start, box[1].stop, columns),
    ):
        ends = min(i + lines // columns, box[0].stop), min(j + columns, box[1].stop)
        yield slice(i, ends[0]), slice(j, ends[1]), box[2]


def _bounds(belongs: np.ndarray, shape: Sequence[int]) -> Box | None:
    """Return the smallest box around what is true, of an array that broadcasts to `shape`."""
    if not belongs.any():
        return None
    bounds = find_objects(belongs.astype(np.uint8))[0]
    return tuple(
        s if size > 1 else slice(0, n)
        for s, size, n in zip(bounds, belongs.shape, shape, strict=True)
    )


def _cut(values: np.ndarray, inside: Box) -> np.ndarray:
    """Cut a box from an array that broadcasts to a larger one."""
    along = zip(inside, values.shape, strict=True)
    return values[tuple(s if n > 1 else slice(None) for s, n in along)]


def _interpolate(slab: torch.Tensor, axes: Sequence[Axis], shape: tuple[int, ...]) -> torch.Tensor:
    """Return `(C, *shape)` from the eight neighbours of each voxel."""
    strides = (slab.shape[2] * slab.shape[3], slab.shape[3], 1)
    flat = slab.reshape(len(slab), -1)
    found = torch.zeros((len(slab), math.prod(shape)), device=slab.device)
    neighbours: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for (low, upper), stride in zip(axes, strides, strict=True):
        sides = ((low * stride, 1 - upper), ((low + 1) * stride, upper))
        neighbours.append(
            [
                (
                    torch.as_tensor(index).to(slab.device),
                    torch.as_tensor(weight).float().to(slab.device),
                )
                for index, weight in sides
                if weight.any()
            ]
        )
    for (i, u), (j, v), (k, w) in itertools.product(*neighbours):
        # a voxel that belongs to another slab may have its neighbours outside of this one
        near = (i + j + k).clamp_(0, flat.shape[1] - 1).expand(shape).reshape(-1)
        weight = (u * v * w).expand(shape).reshape(-1)
        found.addcmul_(flat.index_select(1, near), weight)
    return found.reshape(len(slab), *shape)


def to_original_grid(volume: torch.Tensor, image: MetaTensor) -> MetaTensor:
    """Resample `volume` to the grid that `image` had in its file.

    Where empty borders were cut off, the result is 0; for probabilities that is so in every class,
    and argmax is the first.

    Args:
        volume: `(C, H, W, D)` float, on the preprocessed grid of `image`.
        image: As for `FileGrid`.

    Returns:
        `(C, *shape of the file)` float32.
    """
    grid = FileGrid(image)
    values = convert_to_tensor(volume).float()
    whole = values.new_zeros((len(values), *grid.shape))
    for piece in grid.pieces(values):
        piece.write(piece.values, whole)
    return MetaTensor(whole, affine=torch.as_tensor(grid.affine))


class ToOriginalGridd(MapTransform):
    """Turns `pred` (logits) into labels on the grid of the input file, and `image` with it.

    Probabilities are interpolated, not labels. `pred` becomes `(1, *shape of the file)` uint8, and
    where it is uint8 already, it stays; `image` becomes `(C, *shape of the file)` float32.
    """

    def __init__(self) -> None:
        super().__init__(("image", "pred"))

    def __call__(self, data: dict) -> dict:
        """Turn one case's logits into labels."""
        image, pred = data["image"], convert_to_tensor(data["pred"])
        if pred.dtype != torch.uint8:
            probabilities = torch.softmax(pred.float(), dim=0)
            pred = to_original_grid(probabilities, image).argmax(dim=0, keepdim=True)
        affine = torch.as_tensor(image.meta["original_affine"], dtype=torch.float64)
        labels = MetaTensor(convert_to_tensor(pred, dtype=torch.uint8), affine=affine)
        # names the saved file; in the name of a folder, a dot begins no ending
        name = f"{data['case_id']}.nii.gz" if "case_id" in data else None
        labels.meta["filename_or_obj"] = name or image.meta.get("filename_or_obj", "")
        return {**data, "pred": labels, "image": to_original_grid(image, image)}
