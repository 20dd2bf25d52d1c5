"""What may be done to a label map at the end: small parts away, the largest kept, holes filled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import ndimage

TOUCHING = np.ones((3, 3, 3), dtype=bool)  # voxels with a corner in common are of one part


class Cleanup:
    """Cleans label maps class by class, in the order of the arguments; off where nothing is named.

    Args:
        class_names: In the order of the label values, background first.
        min_volume_ml: Parts of a class that are smaller become background: one number for all
            classes, or a number by class name.
        keep_largest: Classes of which the largest part alone is kept: names, or `all`.
        fill_holes: Classes in which background that they enclose in three dimensions becomes
            theirs: names, or `all`.

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
        """The cleaned label map.

        Args:
            labels: `(H, W, D)` integer.
            spacing_mm: Voxel size, in array-axis order.
        """
        labels = labels.copy()
        voxel_ml = float(np.prod(spacing_mm)) / 1000
        for value, least in self.min_volume_ml.items():
            if least > 0:
                for part, parts, sizes in _parts(labels, value):
                    part[np.isin(parts, np.flatnonzero(sizes * voxel_ml < least) + 1)] = 0
        for value in self.keep_largest:
            for part, parts, sizes in _parts(labels, value):
                part[(parts > 0) & (parts != sizes.argmax() + 1)] = 0
        for value in self.fill_holes:
            for box in _boxes(labels, value):
                part = labels[box]
                part[ndimage.binary_fill_holes(part == value) & (part == 0)] = value
        return labels


def _values(names: Sequence[str], chosen: str | Sequence[str], where: str) -> list[int]:
    """Label values of the classes that are named."""
    if chosen == "all":
        return list(range(1, len(names) + 1))
    if isinstance(chosen, str) or (unknown := [name for name in chosen if name not in names]):
        got = chosen if isinstance(chosen, str) else ", ".join(unknown)
        raise ValueError(f"{where}: expected classes of {', '.join(names)}, got {got}. Correct it.")
    return [names.index(name) + 1 for name in chosen]


def _boxes(labels: np.ndarray, value: int) -> Iterator[tuple[slice, ...]]:
    """The box around a class, if it is there."""
    box = ndimage.find_objects(labels, max_label=value)[value - 1]
    if box is not None:
        yield box


def _parts(labels: np.ndarray, value: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of the box around a class: a view, its connected parts, and their sizes in voxels."""
    for box in _boxes(labels, value):
        parts, count = ndimage.label(labels[box] == value, structure=TOUCHING)
        yield labels[box], parts, np.bincount(parts.ravel(), minlength=count + 1)[1:]
