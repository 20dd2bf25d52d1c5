"""The plan: what training a dataset needs, decided from what the dataset is.

A value that is `auto` is chosen by a rule, which returns it with the reason in a sentence; one that
is given is taken, and the others are chosen around it. Axes are R, A, S.

Source: Isensee et al., nnU-Net, Nature Methods 18 (2021), Supplementary Note 2, but where
a rule says otherwise.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from pipeline.data.dataset import Cases
from pipeline.data.memory import RESERVE, TrainingStep, triples
from pipeline.data.statistics import ChannelFingerprint, DatasetFingerprint
from pipeline.errors import InputError, require
from transforms.augment import resolve_flip_axes

AUTO = "auto"
MAX_VOXELS = 10_000  # along an axis of the median volume
NUM_POOLINGS = 3  # of the dense U-Net: its bottleneck is at 1/8
MIN_POOLED_VOXELS = 4  # of an axis after pooling
THICK_RATIO = 3  # between the coarsest and finest spacing; above it, slices are thick
MIN_BATCH, MAX_BATCH_SHARE = 2, 0.05  # of all voxels of the dataset
CROP_SHARE = 0.75  # occupied share of the volumes below which cropping pays

Size = Sequence[int]
StepBytes = Callable[[Size, int], float]  # of a patch size and a batch size


@dataclass(frozen=True)
class Plan:
    """Values that fit training to a dataset."""

    spacing: Sequence[float]  # mm that volumes are resampled to
    crop_empty_borders: bool  # whether borders of zeros are cut off first
    # for all channels, or a list of one for each: a name that `NormalizeChannelsd` takes,
    # or `clip`, `mean` and `std`
    normalization: str | Mapping[str, Any] | Sequence[Any]
    roi_size: Sequence[int]  # patch in voxels
    strides: Sequence[Any]  # pooling per level and axis
    class_names: Sequence[str]  # in the order of the label values, background first
    in_channels: int
    num_classes: int  # background included
    batch_size: int = 1  # patches in a micro-batch, of all ranks together
    foreground_ratio: float = 0.0  # share of patches that are centred on foreground
    flip_axes: Sequence[int] = ()  # that may be mirrored
    ignore_value: int | None = None  # label of voxels that do not count
    reasons: Mapping[str, str] = field(default_factory=dict)  # why each value is what it is

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return a line for each value, with its reason."""
        values = json.loads(
            json.dumps(self.as_dict()), parse_float=lambda n: float(f"{float(n):.5g}")
        )
        return [
            f"{name:<18} {json.dumps(values[name])}  ({reason})"
            for name, reason in self.reasons.items()
        ]


# what a config states, a value or `auto` each
SETTINGS = tuple(f.name for f in fields(Plan) if f.name not in ("ignore_value", "reasons"))


def make_plan(
    fingerprint: DatasetFingerprint,
    settings: Mapping[str, Any],
    *,
    dataset: Cases,
    budget_bytes: float,
    base_channels: int,
    recompute_levels: int = 0,
    num_ranks: int = 1,
) -> Plan:
    """Decide what is `auto`.

    Args:
        settings: A value or `auto` for each of `SETTINGS`.
        dataset: Declares names of classes and channels.
        budget_bytes: Memory that a training step in float32 may take on each rank. The plan is the
            same in every precision, so that precisions can be compared.
        base_channels: Of the network at full resolution.
        recompute_levels: Of the network, that keep no activations.
        num_ranks: Ranks that share a batch.

    Raises:
        InputError: If a value does not fit the dataset, or the smallest patch the budget.
    """
    chosen: dict[str, Any] = {}
    reasons: dict[str, str] = {}

    def decide(name: str, rule: Callable[[], tuple[Any, str]]) -> Any:
        given = settings[name]
        chosen[name], reasons[name] = (given, "given") if given != AUTO else rule()
        return chosen[name]

    names = decide("class_names", lambda: _choose_names(dataset, fingerprint))
    num_classes = decide("num_classes", lambda: (len(names), f"{len(names)} class names"))
    decide("in_channels", lambda: (fingerprint.num_channels, "channels of the images"))
    _require_fit(chosen, dataset, fingerprint)
    crop = decide("crop_empty_borders", lambda: _choose_crop(fingerprint))
    spacing = decide("spacing", lambda: _choose_spacing(fingerprint))
    decide("normalization", lambda: _choose_normalization(dataset, fingerprint))
    resampled = _resampled_shapes(fingerprint, spacing, crop)
    median = np.ceil(np.median(resampled, axis=0))
    limit = median.tolist() if settings["roi_size"] == AUTO else settings["roi_size"]
    strides = decide("strides", lambda: choose_strides(spacing, limit))

    def step_bytes(roi_size: Size, batch_size: int) -> float:
        network = strides, base_channels, num_classes, chosen["in_channels"], recompute_levels
        return (1 + RESERVE) * TrainingStep(roi_size, batch_size, *network).estimate_bytes()

    steps = triples(strides)
    roi = decide("roi_size", lambda: _choose_roi(median, spacing, steps, step_bytes, budget_bytes))
    total = float(resampled.prod(axis=1).sum())
    memory = step_bytes, budget_bytes, num_ranks
    decide("batch_size", lambda: _choose_batch_size(roi, total, *memory))
    decide("foreground_ratio", lambda: _choose_foreground_ratio(roi, median))
    decide("flip_axes", lambda: _choose_flip_axes(names))
    return Plan(**chosen, ignore_value=dataset.ignore_value, reasons=reasons)


def choose_strides(spacing: Sequence[float], size: Sequence[float]) -> tuple[list[list[int]], str]:
    """Pool an axis unless another one is finer by more than the square root of 2.

    Each level is then within a factor of 2 of isotropic, or nearer to it than the level above by
    the square root of 2, as far as axes are long enough. nnU-Net pools up to a factor of 2 between
    spacings, and deeper.

    Args:
        spacing: Voxel size in mm, `(3,)`.
        size: Volume or patch in voxels, `(3,)`.
    """
    spaced, left = np.array(spacing, float), np.array(size, float)
    strides: list[list[int]] = []
    while len(strides) < NUM_POOLINGS and (left >= 2 * MIN_POOLED_VOXELS).any():
        roomy = left >= 2 * MIN_POOLED_VOXELS
        stride = np.where(roomy & (spaced <= math.sqrt(2) * spaced[roomy].min()), 2, 1)
        strides.append(stride.tolist())
        spaced, left = spaced * stride, left / stride
    if not strides:
        return [[1, 1, 1]], "the volumes are too small to be pooled"
    return strides, "pooled along an axis where that brings a level nearer to isotropic"


def _choose_names(dataset: Cases, fingerprint: DatasetFingerprint) -> tuple[list[str], str]:
    if dataset.class_names:
        return dataset.class_names, "declared by the dataset"
    names = [entry.name for entry in fingerprint.classes]
    expected = "names, since the dataset declares none and its voxels were not read"
    require(names, "class_names", expected, AUTO, "Name them, or set preflight to full.")
    return names, "label values found; the dataset declares no names"


def _choose_crop(fingerprint: DatasetFingerprint) -> tuple[bool, str]:
    share = fingerprint.occupied_share
    if share is None:
        return False, "voxels were not read"
    return share < CROP_SHARE, f"{share:.0%} of the volumes is within their borders of zeros"


def _choose_spacing(fingerprint: DatasetFingerprint) -> tuple[list[float], str]:
    """Take the median in mm; along the thick axis of anisotropic volumes the 10th percentile."""
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


def _choose_normalization(dataset: Cases, fingerprint: DatasetFingerprint) -> tuple[list[Any], str]:
    """Use the dataset's foreground for CT, whose units mean the same in every scan."""
    names = dataset.channel_names or [""] * fingerprint.num_channels
    channels: Sequence[Any] = fingerprint.channels or [None] * len(names)  # voxels were not read
    chosen = [_normalization(name, one) for name, one in zip(names, channels, strict=True)]
    reasons = {
        "dict": "CT: Hounsfield units, by the foreground of all cases",
        "percentile_zscore": "CT: by each volume, since no foreground with contrast was read",
        "zscore": "not CT: by each volume's own mean and deviation",
    }
    kinds = ["dict" if isinstance(one, dict) else one for one in chosen]
    return chosen, "; ".join(reason for kind, reason in reasons.items() if kind in kinds)


def _normalization(name: str, channel: ChannelFingerprint | None) -> Any:
    if name.upper() != "CT":
        return "zscore"
    levels = channel.foreground_percentiles if channel and channel.foreground_std else {}
    low, high = levels.get("0.5"), levels.get("99.5")
    if channel is None or low == high:
        return "percentile_zscore"
    return {"clip": [low, high], "mean": channel.foreground_mean, "std": channel.foreground_std}


def _resampled_shapes(
    fingerprint: DatasetFingerprint, spacing: Sequence[float], crop: bool
) -> np.ndarray:
    """Compute the shapes of all volumes after resampling, `(N, 3)` in voxels.

    Raises:
        InputError: If the spacing leaves volumes without voxels or with too many, such as metres
            in place of mm.
    """
    shapes = np.array(((crop and fingerprint.occupied_shapes) or fingerprint.shapes).cases)
    resampled = shapes * np.array(fingerprint.spacings_mm.cases) / np.array(spacing)
    median = np.median(resampled, axis=0)
    require(
        (median >= 1).all() and (median <= MAX_VOXELS).all(), "spacing",
        f"mm that leave 1 to {MAX_VOXELS} voxels along each axis", f"{list(spacing)}, with which "
        f"the median volume has {'x'.join(f'{n:.3g}' for n in median)}", "Correct it.",
    )  # fmt: skip
    return np.maximum(np.rint(resampled), 1)


def _choose_roi(
    median: np.ndarray,
    spacing: Sequence[float],
    strides: Sequence[Size],
    step_bytes: StepBytes,
    budget_bytes: float,
) -> tuple[list[int], str]:
    """Take the median volume, or a part near to a cube in mm of which two patches fit.

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
    first = bisect.bisect_left(
        smaller, True, key=lambda size: step_bytes(size, MIN_BATCH) <= budget_bytes
    )
    needed = f"{step_bytes(smaller[-1], MIN_BATCH):.0f} or more, for {MIN_BATCH} of the smallest "
    needed, remedy = needed + "patches", "Raise it, or lower base_channels."
    is_enough = first < len(smaller)
    require(is_enough, "memory_budget_bytes", needed, f"{budget_bytes:.0f}", remedy)
    if first == 0:
        return smaller[0], "the median volume, in multiples of what the strides divide by"
    return smaller[first], (
        f"the largest of which {MIN_BATCH} fit into {budget_bytes / 2**30:.3g} GiB; the median "
        f"volume has {'x'.join(f'{n:.0f}' for n in median)} voxels"
    )


def _choose_batch_size(
    roi_size: Size, total_voxels: float, step_bytes: StepBytes, budget_bytes: float, num_ranks: int
) -> tuple[int, str]:
    """Take what the budgets of all ranks hold, but no more than a small share of the dataset."""
    least = max(MIN_BATCH, num_ranks)
    wanted = max(int(MAX_BATCH_SHARE * total_voxels // math.prod(roi_size)), least)
    of_rank = range(1, math.ceil(wanted / num_ranks) + 1)
    by_memory = bisect.bisect_left(
        of_rank, True, key=lambda n: step_bytes(roi_size, n) > budget_bytes
    )
    each_of = "" if num_ranks == 1 else f" on each of {num_ranks} ranks"
    budget = f"{budget_bytes / 2**30:.3g} GiB{each_of}"
    taken = f"{step_bytes(roi_size, max(by_memory, 1)) / 2**30:.3g} GiB"
    if by_memory < 1:
        return num_ranks, f"the least; one such patch needs {taken}, more than {budget}"
    if wanted <= by_memory * num_ranks:
        share = f"{MAX_BATCH_SHARE:.0%} of the dataset's voxels, {least} or more"
        return wanted, f"{share}; predicted to take {taken} in float32{each_of}"
    return by_memory * num_ranks, f"what fits into {budget}; predicted to take {taken} in float32"


def _choose_foreground_ratio(roi_size: Size, median: np.ndarray) -> tuple[float, str]:
    """Take nnU-Net's third where patches see most of a volume anyway, else two thirds."""
    share = min(1.0, math.prod(roi_size) / float(median.prod()))
    return (0.33 if share >= 0.5 else 0.67), f"a patch holds {share:.0%} of the median volume"


def _choose_flip_axes(class_names: Sequence[str]) -> tuple[list[int], str]:
    """Take all axes, but not left-right where the classes tell left from right."""
    axes = list(resolve_flip_axes("auto", class_names))
    swapped = "class names tell left from right, which mirroring along axis 0 would exchange"
    return axes, "no class name tells left from right" if 0 in axes else swapped


def _require_fit(
    chosen: Mapping[str, Any], dataset: Cases, fingerprint: DatasetFingerprint
) -> None:
    names, num_classes = chosen["class_names"], chosen["num_classes"]
    is_repeated = len(set(names)) < len(names)
    channels = fingerprint.num_channels
    least = max(len(dataset.class_names or []), len(fingerprint.classes))
    every = [*names, *(dataset.channel_names or [])]
    marked = ", ".join(name for name in every if name.startswith(("$", "@", "%")))
    faults = {
        f"in_channels: expected {channels}, the channels of the images, got "
        f"{chosen['in_channels']}. Leave it at auto.": chosen["in_channels"] != channels,
        f"class_names: expected {num_classes} names, background included, got {len(names)}. "
        "Name every label value.": len(names) != num_classes,
        f"class_names: expected different names, got {', '.join(names)}. Rename one.": is_repeated,
        f"{dataset.name}: expected names of classes and channels that do not begin with $, @ or %, "
        f"as references in configs do, got {marked}. Rename them.": marked,
        f"num_classes: expected {least} or more, the classes of the dataset, got {num_classes}. "
        "Leave it at auto.": num_classes < least,
    }
    if any(faults.values()):
        raise InputError(*(line for line, is_true in faults.items() if is_true))
