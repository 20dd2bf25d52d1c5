"""Post-processing of label maps: remove small components, keep the largest, fill holes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import ndimage

TOUCHING = np.ones((3, 3, 3), dtype=bool)  # voxels that share a corner are connected
CHUNK = 2**20  # voxels


class Cleanup:
    """Cleans label maps class by class, in the order of the arguments; by default it does nothing.

    Args:
        class_names: In the order of the label values, background first.
        min_volume_ml: Connected components of a class with a smaller volume become background: one
            number for all classes, or a number by class name.
        keep_largest: Names of classes of which only the largest component is kept, or `all`.
        fill_holes: Names of classes that take the background which they enclose in three
            dimensions, or `all`.

    Raises:
        ValueError: If a class is unknown, or a volume below 0.
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
        self.min_volume_ml = {
            value: min_volume_ml[names[value - 1]]
            for value in _values(names, list(min_volume_ml), "min_volume_ml")
        }
        if any(volume < 0 for volume in self.min_volume_ml.values()):
            raise ValueError(f"min_volume_ml: expected 0 or more, got {min_volume_ml}. Correct it.")
        self.keep_largest = _values(names, keep_largest, "keep_largest")
        self.fill_holes = _values(names, fill_holes, "fill_holes")

    def __call__(self, labels: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
        """Return the cleaned label map.

        Args:
            labels: `(H, W, D)` integer.
            spacing_mm: Voxel size, in array-axis order.
        """
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
    """Remove components of a class that are smaller than `least_ml`, or not its largest.

    Args:
        box: `(h, w, d)` labels that contain the class, changed in place.
        value: Label value of the class.
        voxel_ml: Volume of a voxel.
        least_ml: Smallest volume of a component that is kept.
        largest_alone: Whether only the largest component is kept.
    """
    parts, count = ndimage.label(box == value, structure=TOUCHING)
    sizes = np.zeros(count + 1, np.int64)
    for rows in _rows(parts):
        sizes += np.bincount(parts[rows].ravel(), minlength=count + 1)
    small = sizes * voxel_ml < least_ml
    if largest_alone:
        small |= np.arange(count + 1) != sizes[1:].argmax() + 1
    small[0] = False  # what is not of the class
    for rows in _rows(parts):
        box[rows][small[parts[rows]]] = 0


def _fill_holes(box: np.ndarray, value: int) -> None:
    """Give a class the background that it encloses, in `(h, w, d)` labels, in place."""
    parts, count = ndimage.label(box != value)
    enclosed = np.ones(count + 1, bool)
    enclosed[0] = False  # the class itself
    for axis, end in itertools.product(range(3), (0, -1)):
        enclosed[parts.take(end, axis)] = False
    for rows in _rows(parts):
        box[rows][enclosed[parts[rows]] & (box[rows] == 0)] = value


def _rows(parts: np.ndarray) -> Iterator[slice]:
    """Yield a few planes at a time along the first axis: NumPy makes 8-byte indices of them."""
    step = max(1, CHUNK // parts[0].size)
    for start in range(0, len(parts), step):
        yield slice(start, start + step)


def _values(names: Sequence[str], chosen: str | Sequence[str], where: str) -> list[int]:
    """Return the label values of named classes."""
    if chosen == "all":
        return list(range(1, len(names) + 1))
    if isinstance(chosen, str) or (unknown := [name for name in chosen if name not in names]):
        got = chosen if isinstance(chosen, str) else ", ".join(unknown)
        raise ValueError(f"{where}: expected classes of {', '.join(names)}, got {got}. Correct it.")
    return [names.index(name) + 1 for name in chosen]
