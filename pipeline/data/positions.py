"""Where a patch may be centred: voxels by class, found once per case and kept beside it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import numpy as np
import torch
from monai.transforms import ClassesToIndices

MAX_POSITIONS_PER_CLASS = 10_000  # to choose a centre from; all of a small structure's voxels
ANNOTATED = "annotated"


class CaseTensors(Protocol):
    """The tensors of a case by name: in an open file, or in memory."""

    @property
    def names(self) -> Collection[str]:
        """Of all that there are."""

    def __getitem__(self, name: str) -> Any:
        """The tensor: it has a shape, and slices."""


def sampling_positions(
    label: torch.Tensor, num_classes: int, ignore_value: int | None = None
) -> dict[str, np.ndarray]:
    """Flat voxel positions that centres are drawn from.

    Args:
        label: `(1, H, W, D)` integer.
        num_classes: Classes, background included.
        ignore_value: Label of voxels that nobody annotated; `None`: there are none.

    Returns:
        `class_1`, `class_2`, … for each class that is present, and `annotated`, of all classes,
        where some voxels are ignored: at most `MAX_POSITIONS_PER_CLASS` each, in the smallest
        unsigned integer that holds them all.

    Raises:
        ValueError: If every voxel is ignored.
    """
    find = ClassesToIndices(num_classes=num_classes, max_samples_per_class=MAX_POSITIONS_PER_CLASS)
    found = {f"class_{c}": np.asarray(p) for c, p in enumerate(find(label)) if c}
    if ignore_value is not None:
        found.pop(f"class_{ignore_value}", None)
        annotated = np.flatnonzero(np.asarray(label) != ignore_value)
        if not len(annotated):
            raise ValueError(f"expected an annotated voxel, got {ignore_value} (ignored) only.")
        if len(annotated) < label.numel():
            found[ANNOTATED] = _thinned(annotated)
    dtype = np.min_scalar_type(label.numel() - 1)
    return {name: positions.astype(dtype) for name, positions in found.items() if len(positions)}


def draw_centre(
    entry: CaseTensors, num_classes: int, foreground_ratio: float, rng: np.random.Generator
) -> np.ndarray:
    """Voxel `(3,)` that a patch is to be centred on.

    Args:
        entry: A case, with `label` and its `sampling_positions`.
        num_classes: Classes, background included.
        foreground_ratio: Probability of a voxel of a class drawn from those present; else it is
            any voxel, or any annotated one where some are ignored.
        rng: Advanced by three draws or two.
    """
    size = np.asarray(entry["label"].shape[1:])
    classes = [f"class_{c}" for c in range(1, num_classes) if f"class_{c}" in entry.names]
    if rng.random() < foreground_ratio and classes:
        name = classes[rng.integers(len(classes))]
    elif ANNOTATED in entry.names:
        name = ANNOTATED
    else:
        return rng.integers(size)
    positions = entry[name]
    drawn = int(rng.integers(positions.shape[0]))
    return np.array(np.unravel_index(int(positions[drawn : drawn + 1][0]), size))


def _thinned(positions: np.ndarray) -> np.ndarray:
    """A part of them, chosen at random: at regular steps they might all lie in one plane."""
    if len(positions) <= MAX_POSITIONS_PER_CLASS:
        return positions
    rng = np.random.Generator(np.random.PCG64(0))
    return np.sort(rng.choice(positions, MAX_POSITIONS_PER_CLASS, replace=False))
