"""The rules by which a plan is made: each returns a value and, in a sentence, why.

Source: spacing, patch and batch size follow Isensee et al., nnU-Net, Nature Methods 18 (2021),
Supplementary Note 2; where a rule differs it says so. Axes are R, A, S.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.data.dataset import Cases
from pipeline.data.statistics import ChannelFingerprint, DatasetFingerprint
from pipeline.errors import InputError
from transforms.augment import resolve_flip_axes

Size = Sequence[int]
StepBytes = Callable[[Size, int], float]  # of a patch size and a batch size

NUM_POOLINGS = 3  # of the dense U-Net: its bottleneck is at 1/8
LEAST_VOXELS = 4  # of an axis after pooling
THICK_RATIO = 3  # between the coarsest and finest spacing; above it, slices are thick
MIN_BATCH, MAX_BATCH_SHARE = 2, 0.05  # of all voxels of the dataset
CROP_SHARE = 0.75  # occupied share of the volumes below which cropping pays


def names_of(dataset: Cases, fingerprint: DatasetFingerprint) -> tuple[list[str], str]:
    """Names of the classes."""
    if dataset.class_names:
        return dataset.class_names, "declared by the dataset"
    names = [entry.name for entry in fingerprint.classes]
    if not names:
        raise InputError(
            "class_names: expected names, since the dataset declares none and its voxels were not "
            "read, got auto. Name them, or set check to full."
        )
    return names, "label values found; the dataset declares no names"


def crop_of(fingerprint: DatasetFingerprint) -> tuple[bool, str]:
    """Whether cutting off empty borders pays."""
    share = fingerprint.occupied_share
    if share is None:
        return False, "voxels were not read"
    return share < CROP_SHARE, f"{share:.0%} of the volumes is within their borders of zeros"


def spacing_of(fingerprint: DatasetFingerprint) -> tuple[list[float], str]:
    """Median in mm; along the thick axis of anisotropic volumes the 10th percentile."""
    spacings = np.array(fingerprint.spacings_mm.cases)
    spacing, reason = np.median(spacings, axis=0), "median spacing of the images"
    shape = np.median(np.array(fingerprint.shapes.cases) * spacings / spacing, axis=0)
    thick = int(spacing.argmax())
    others = [axis for axis in range(3) if axis != thick]
    is_thick = spacing[thick] > THICK_RATIO * spacing[others].max()
    if is_thick and shape[thick] * THICK_RATIO < shape[others].min():
        fine = np.percentile(spacings[:, thick], 10)
        spacing[thick] = max(fine, spacing[others].max())
        reason += f"; along axis {thick}, of thick slices, its 10th percentile"
    return [float(f"{s:.4g}") for s in spacing], reason


def normalization_of(dataset: Cases, fingerprint: DatasetFingerprint) -> tuple[list[Any], str]:
    """Hounsfield units mean the same in every scan; the units of other modalities do not."""
    names = dataset.channel_names or [""] * fingerprint.num_channels
    facts: Sequence[Any] = fingerprint.channels or [None] * len(names)  # where voxels were not read
    chosen = [_normalization(name, one) for name, one in zip(names, facts, strict=True)]
    reasons = []
    if any(isinstance(one, dict) for one in chosen):
        reasons.append("CT: Hounsfield units, by the foreground of all cases")
    if "percentile_zscore" in chosen:
        reasons.append("CT: by each volume, since no foreground with contrast was read")
    if "zscore" in chosen:
        reasons.append("not CT: by each volume's own mean and deviation")
    return chosen, "; ".join(reasons)


def _normalization(name: str, facts: ChannelFingerprint | None) -> Any:
    if name.upper() != "CT":
        return "zscore"
    if facts is None or not facts.foreground_std:
        return "percentile_zscore"
    low, high = (facts.foreground_percentiles[level] for level in ("0.5", "99.5"))
    if low == high:
        return "percentile_zscore"
    return {"clip": [low, high], "mean": facts.foreground_mean, "std": facts.foreground_std}


def strides_of(spacing: Sequence[float], size: Sequence[float]) -> tuple[list[list[int]], str]:
    """Pool an axis unless another one is finer by more than the square root of 2.

    Each level is then within a factor of 2 of isotropic, or nearer to it than the level above by
    the square root of 2, as far as axes are long enough. nnU-Net pools up to a factor
    of 2 between spacings, and deeper.
    """
    spaced, left = np.array(spacing, float), np.array(size, float)
    strides: list[list[int]] = []
    while len(strides) < NUM_POOLINGS and (left >= 2 * LEAST_VOXELS).any():
        roomy = left >= 2 * LEAST_VOXELS
        stride = np.where(roomy & (spaced <= math.sqrt(2) * spaced[roomy].min()), 2, 1)
        strides.append(stride.tolist())
        spaced, left = spaced * stride, left / stride
    if not strides:
        return [[1, 1, 1]], "the volumes are too small to be pooled"
    return strides, "pooled along an axis where that brings a level nearer to isotropic"


def patch_of(
    median: np.ndarray,
    spacing: Sequence[float],
    strides: Sequence[Size],
    step_bytes: StepBytes,
    budget_bytes: float,
) -> tuple[list[int], str]:
    """The median volume, or of it as near to a cube in mm as the budget allows for two patches.

    Raises:
        InputError: If two of the smallest patches do not fit.
    """
    step = np.prod(np.array(strides), axis=0)
    smallest = 2 * step
    roi = np.maximum(np.ceil(median / step) * step, smallest).astype(int)
    smaller = [roi.tolist()]  # and smaller
    while (extent_mm := np.where(roi > smallest, roi * np.array(spacing), 0)).any():
        axis = int(extent_mm.argmax())
        roi[axis] -= step[axis]
        smaller.append(roi.tolist())

    def fits(size: Size) -> bool:
        return step_bytes(size, MIN_BATCH) <= budget_bytes

    first = bisect.bisect_left(smaller, True, key=fits)
    if first == len(smaller):
        raise InputError(
            f"memory_budget_bytes: expected {step_bytes(smaller[-1], MIN_BATCH):.0f} or more, for "
            f"{MIN_BATCH} of the smallest patches, got {budget_bytes:.0f}. Raise it, or lower "
            "base_channels."
        )
    if first == 0:
        return smaller[0], "the median volume, in multiples of what the strides divide by"
    return smaller[first], (
        f"the largest of which {MIN_BATCH} fit into {budget_bytes / 2**30:.3g} GiB; the median "
        f"volume has {'x'.join(f'{n:.0f}' for n in median)} voxels"
    )


def batch_size_of(
    roi_size: Size, total_voxels: float, step_bytes: StepBytes, budget_bytes: float, num_ranks: int
) -> tuple[int, str]:
    """What the budgets of all ranks hold, but no more than a small share of the dataset."""
    by_data = int(MAX_BATCH_SHARE * total_voxels // math.prod(roi_size))
    least = max(MIN_BATCH, num_ranks)
    wanted = max(by_data, least)
    of_rank = range(1, math.ceil(wanted / num_ranks) + 1)
    by_memory = bisect.bisect_left(
        of_rank, True, key=lambda n: step_bytes(roi_size, n) > budget_bytes
    )
    each_of = "" if num_ranks == 1 else f" on each of {num_ranks} ranks"
    budget = f"{budget_bytes / 2**30:.3g} GiB{each_of}"
    taken = step_bytes(roi_size, max(by_memory, 1)) / 2**30
    if wanted <= by_memory * num_ranks:
        share = f"{MAX_BATCH_SHARE:.0%} of the dataset's voxels, {least} or more"
        return wanted, f"{share}; predicted to take {taken:.3g} GiB in float32{each_of}"
    if by_memory < 1:
        return (
            num_ranks,
            f"the least; one such patch needs {taken:.3g} GiB, more than {budget}",
        )
    return by_memory * num_ranks, (
        f"what fits into {budget}; predicted to take {taken:.3g} GiB in float32"
    )


def foreground_ratio_of(roi_size: Size, median: np.ndarray) -> tuple[float, str]:
    """nnU-Net's third where patches see most of a volume anyway, else two thirds."""
    share = min(1.0, math.prod(roi_size) / float(median.prod()))
    return (0.33 if share >= 0.5 else 0.67), f"a patch holds {share:.0%} of the median volume"


def flip_axes_of(class_names: Sequence[str]) -> tuple[list[int], str]:
    """All axes, but not left-right where the classes tell left from right."""
    axes = list(resolve_flip_axes("auto", class_names))
    if 0 in axes:
        return axes, "no class name tells left from right"
    return axes, "class names tell left from right, which mirroring along axis 0 would exchange"
