"""Puts an image and its label on one grid, if their files describe the same grid differently.

Their axes may differ in order or direction, their affines in the last digits, by which MONAI's
Spacing decides where the grid of an oblique volume begins: a change of 1e-7 moved 161 of 200 by up
to 1.3 mm. A label therefore takes the image's affine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

TOLERANCE_MM = 0.001
AS_IS = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass(frozen=True)
class Alignment:
    """The position of one grid relative to another."""

    shape: tuple[int, ...]  # (H, W, D) of the first grid, its axes in the other's order
    change: np.ndarray  # argument of nibabel's apply_orientation that puts voxels into that order
    distance_mm: float  # largest distance between equal corners; infinite if the shapes differ


def align(
    shape: Sequence[int], affine: np.ndarray, onto_shape: Sequence[int], onto_affine: np.ndarray
) -> Alignment:
    """Reorder and flip the axes of a grid, `(H, W, D)` and `(4, 4)` to RAS mm, to match another."""
    as_is = compare(shape, affine, onto_shape, onto_affine)
    if as_is.distance_mm <= TOLERANCE_MM:
        return as_is  # near 45 degrees the order of axes is a matter of digits
    change = ornt_transform(io_orientation(affine), io_orientation(onto_affine))
    order = np.argsort(change[:, 0])
    moved = affine @ inv_ornt_aff(change, tuple(shape))
    return compare([shape[n] for n in order], moved, onto_shape, onto_affine, change)


def compare(
    shape: Sequence[int],
    affine: np.ndarray,
    onto_shape: Sequence[int],
    onto_affine: np.ndarray,
    change: np.ndarray = AS_IS,
) -> Alignment:
    """Compare two grids without reordering axes; the arguments are those of `align`."""
    distance = math.inf
    if tuple(shape) == tuple(onto_shape):
        corners = np.array(list(itertools.product(*[(0, n - 1) for n in shape], [1]))).T
        distance = float(np.linalg.norm((affine - onto_affine) @ corners, axis=0).max())
    return Alignment(tuple(int(n) for n in shape), change, distance)


def put_on_grid(
    voxels: np.ndarray,
    own_affine: np.ndarray,
    shape: Sequence[int],
    affine: np.ndarray,
    tolerance_mm: float = TOLERANCE_MM,
) -> np.ndarray:
    """Return voxels `(H, W, D)`, which are on a grid, in that grid's order of axes."""
    found = align(voxels.shape, own_affine, shape, affine)
    if not found.distance_mm <= tolerance_mm:
        raise ValueError(
            f"expected image and label on one grid within {tolerance_mm} mm, got shapes "
            f"{tuple(shape)} and {found.shape}, {found.distance_mm:.3f} mm apart. "
            "Resample the label or exclude the case."
        )
    return apply_orientation(voxels, found.change)
