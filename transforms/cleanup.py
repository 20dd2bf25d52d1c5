"""Post-processing of label maps: remove small components, keep the largest, fill holes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

TOUCHING = np.ones((3, 3, 3), dtype=bool)  # voxels that share a corner are connected


class Cleanup:
    """Cleans label maps class by class, in the order of the arguments; by default it does nothing.

    Args:
        class_names: In the order of the label values, background first.
        min_volume_ml: Connected components of a class with a smaller volume become background: one
            number for all classes, or a number by class name.
        keep_largest: Names of classes of which only the largest component is kept, or `all`.
        fill_holes: Names of classes that take the background which they enclose in three
            dimensions, or `all`.

    A `ValueError` says that a class is unknown, or a volume below 0.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        min_volume_ml: float | Mapping[str, float] = 0,
        keep_largest: str | Sequence[str] = (),
        fill_holes: str | Sequence[str] = (),
    ) -> None:
        names = list(class_names)[1:]
        if not isinstance(min_volume_ml, Mapping):
            min_volume_ml = dict.fromkeys(names, min_volume_ml)
        values = _values(names, list(min_volume_ml), "min_volume_ml")
        self.min_volume_ml = dict(zip(values, min_volume_ml.values(), strict=True))
        if any(volume < 0 for volume in min_volume_ml.values()):
            raise ValueError(f"min_volume_ml: expected 0 or more, got {min_volume_ml}. Correct it.")
        self.keep_largest = _values(names, keep_largest, "keep_largest")
        self.fill_holes = _values(names, fill_holes, "fill_holes")

    def __call__(self, labels: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
        """Return the cleaned label map `(H, W, D)` of integers, of voxels of `spacing_mm`."""
        labels = labels.copy()
        voxel_ml = float(np.prod(spacing_mm)) / 1000
        least_ml = {value: least for value, least in self.min_volume_ml.items() if least > 0}
        parted = {*least_ml, *self.keep_largest}
        if not parted and not self.fill_holes:
            return labels
        # a class loses voxels, or gains some that it encloses: it stays within its box
        boxes = ndimage.find_objects(labels, max_label=max(*parted, *self.fill_holes, 0))
        within = {n: labels[box] for n, box in enumerate(boxes, 1) if box is not None}
        for value in sorted(parted & within.keys()):
            alone = value in self.keep_largest
            _remove_parts(within[value], value, voxel_ml, least_ml.get(value, 0), alone)
        for value in self.fill_holes:
            if value in within:
                _fill_holes(within[value], value)
        return labels


def _remove_parts(
    box: np.ndarray, value: int, voxel_ml: float, least_ml: float, largest_alone: bool
) -> None:
    """Remove components of a class that are too small or not its largest, in labels, in place."""
    parts, count = ndimage.label(box == value, structure=TOUCHING)
    sizes = np.zeros(count + 1, np.int64)
    for among in parts:  # NumPy makes 8-byte indices of them
        sizes += np.bincount(among.ravel(), minlength=count + 1)
    small = sizes * voxel_ml < least_ml
    if largest_alone:
        small |= np.arange(count + 1) != sizes[1:].argmax() + 1
    small[0] = False  # what is not of the class
    for plane, among in zip(box, parts, strict=True):
        plane[small[among]] = 0


def _fill_holes(box: np.ndarray, value: int) -> None:
    """Give a class the background that it encloses, in `(h, w, d)` labels, in place."""
    parts, count = ndimage.label(box != value)
    enclosed = np.ones(count + 1, bool)
    enclosed[0] = False  # the class itself
    for axis, end in itertools.product(range(3), (0, -1)):
        enclosed[parts.take(end, axis)] = False
    for plane, among in zip(box, parts, strict=True):
        plane[enclosed[among] & (plane == 0)] = value


def _values(names: Sequence[str], chosen: str | Sequence[str], where: str) -> list[int]:
    """Return the label values of named classes."""
    if chosen == "all":
        return list(range(1, len(names) + 1))
    if isinstance(chosen, str) or (unknown := [name for name in chosen if name not in names]):
        got = chosen if isinstance(chosen, str) else ", ".join(unknown)
        raise ValueError(f"{where}: expected classes of {', '.join(names)}, got {got}. Correct it.")
    return [names.index(name) + 1 for name in chosen]
