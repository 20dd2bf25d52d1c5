"""The plan: what training a dataset needs, decided from what the dataset is.

A value that is `auto` is chosen by a rule; one that is given is taken, and the others are chosen
around it. Axes are R, A, S. Source: Isensee et al., nnU-Net, Nature Methods 18 (2021),
Supplementary Note 2, but where a rule says otherwise.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipeline.data.dataset import Cases
from pipeline.data.memory import FLOAT32, RESERVE, TrainingStep, triples
from pipeline.data.statistics import ChannelFingerprint, DatasetFingerprint
from pipeline.errors import refuse, require
from transforms.augment import resolve_flip_axes

AUTO = "auto"
MAX_VOXELS = 10_000  # along an axis of the median volume
NUM_POOLINGS = 3  # of the dense U-Net: its bottleneck is at 1/8
MIN_POOLED_VOXELS = 4  # of an axis after pooling
THICK_RATIO = 3  # between the coarsest and finest spacing; above it, slices are thick
MIN_BATCH, MAX_BATCH_SHARE = 2, 0.05  # of all voxels of the dataset
CROP_SHARE = 0.75  # occupied share of the volumes below which cropping pays
MIN_BATCH_NORM = 4  # patches of a micro-batch, of all ranks, from which on batch norm is used
STEPS_PER_EPOCH, DRAWS = 250, 80  # DRAWS: how often a training case is drawn, for each patch
MIN_STEPS, MAX_STEPS = 2_000, 20_000
WARMUP_STEPS, PEER = 100, "recipe of benchmarks/peer_hippocampus.py"
RECIPE = {"base_channels": (32, "of every dataset but the phantom"), "learning_rate": (0.008, PEER)}
# of the dataset that makes itself: it is to be trained on a CPU in minutes
PHANTOM_RECIPE = {
    "base_channels": 8, "learning_rate": 0.005, "warmup_steps": 40, "steps_per_epoch": 60,
    "max_epochs": 6,
}  # fmt: skip

Choice = tuple[Any, str]  # a value, and the reason for it


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
    base_channels: int = 32  # of the network at full resolution
    norm: str = "instance"  # of the network, or batch
    learning_rate: float = 0.0  # at its peak
    steps_per_epoch: int = 1  # optimizer steps
    max_epochs: int = 1
    warmup_steps: int = 0
    reasons: Mapping[str, str] = field(default_factory=dict)  # why each value is what it is

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def estimate_bytes(self, mode: str, recompute_levels: int = 0) -> float:
        """Estimate the memory of a training step in a precision, with some reserve."""
        network = self.strides, self.base_channels, self.num_classes, self.in_channels
        step = TrainingStep(self.roi_size, self.batch_size, *network, recompute_levels, mode)
        return (1 + RESERVE) * step.estimate_bytes()

    def lines(self) -> list[str]:
        """Return a line for each value, with its reason."""
        text = json.dumps(self.as_dict())
        values = json.loads(text, parse_float=lambda n: float(f"{float(n):.5g}"))
        return [f"{k:<18} {json.dumps(values[k])}  ({why})" for k, why in self.reasons.items()]


# what a config states, a value or `auto` each, in the order in which they are decided
SETTINGS = (
    "class_names", "num_classes", "in_channels", "crop_empty_borders", "spacing", "normalization",
    "base_channels", "strides", "roi_size", "batch_size", "norm", "foreground_ratio", "flip_axes",
    "learning_rate", "steps_per_epoch", "max_epochs", "warmup_steps",
)  # fmt: skip


@dataclass
class Planner:
    """Chooses what is `auto`, each value by those that were chosen before it."""

    fingerprint: DatasetFingerprint
    dataset: Cases  # declares names of classes and channels
    # Memory that a training step in float32 may take on each rank. The plan is the same in every
    # precision, so that precisions can be compared.
    budget_bytes: float
    recompute_levels: int = 0  # of the network, that keep no activations
    num_ranks: int = 1  # that share a batch
    accumulation_steps: int = 1  # micro-batches of a step
    is_phantom: bool = False

    def make_plan(self, settings: Mapping[str, Any]) -> Plan:
        """Make a plan of a value or `auto` for each of `SETTINGS`.

        Raises:
            InputError: If a value does not fit the dataset, or the smallest patch the budget.
        """
        self.settings, self.chosen = settings, dict[str, Any]()
        reasons = {}
        for name in SETTINGS:
            value, reasons[name] = settings[name], "given"
            if value == AUTO:
                value, reasons[name] = self._choose(name)
            self.chosen[name] = value
            if name == "in_channels":
                self._require_fit()
            if name == "spacing":
                self._resample()
        return Plan(**self.chosen, ignore_value=self.dataset.ignore_value, reasons=reasons)

    def _choose(self, name: str) -> Choice:
        if self.is_phantom and name in PHANTOM_RECIPE:
            return PHANTOM_RECIPE[name], "of the phantom, which is trained in minutes"
        return RECIPE[name] if name in RECIPE else getattr(self, f"_choose_{name}")()

    def _choose_class_names(self) -> Choice:
        if self.dataset.class_names:
            return self.dataset.class_names, "declared by the dataset"
        names = [entry.name for entry in self.fingerprint.classes]
        expected = "names, since the dataset declares none and its voxels were not read"
        require(names, "class_names", expected, AUTO, "Name them, or set preflight to full.")
        return names, "label values found; the dataset declares no names"

    def _choose_num_classes(self) -> Choice:
        number = len(self.chosen["class_names"])
        return number, f"{number} class names"

    def _choose_in_channels(self) -> Choice:
        return self.fingerprint.num_channels, "channels of the images"

    def _choose_crop_empty_borders(self) -> Choice:
        if (share := self.fingerprint.occupied_share) is None:
            return False, "voxels were not read"
        return share < CROP_SHARE, f"{share:.0%} of the volumes is within their borders of zeros"

    def _choose_spacing(self) -> Choice:
        """Take the median, but along the axis of thick slices the 10th percentile."""
        spacings = np.array(self.fingerprint.spacings_mm)
        spacing, reason = np.median(spacings, axis=0), "median spacing of the images"
        shape = np.median(np.array(self.fingerprint.shapes) * spacings / spacing, axis=0)
        thick = int(spacing.argmax())
        others = [axis for axis in range(3) if axis != thick]
        is_thick = spacing[thick] > THICK_RATIO * spacing[others].max()
        if is_thick and shape[thick] * THICK_RATIO < shape[others].min():
            fine = np.percentile(spacings[:, thick], 10)
            spacing[thick] = max(fine, spacing[others].max())
            reason += f"; along axis {thick}, of thick slices, its 10th percentile"
        return [float(f"{s:.4g}") for s in spacing], reason

    def _choose_normalization(self) -> Choice:
        """Use the dataset's foreground for CT, whose units mean the same in every scan."""
        names = self.dataset.channel_names or [""] * self.fingerprint.num_channels
        channels: Sequence[Any] = self.fingerprint.channels or [None] * len(names)  # no voxels read
        chosen, reasons = zip(*map(_choose_channel, names, channels), strict=True)
        return [*chosen], "; ".join(sorted({*reasons}))

    def _choose_strides(self) -> Choice:
        given = self.settings["roi_size"]
        size = self.median.tolist() if given == AUTO else given
        return choose_strides(self.chosen["spacing"], size)

    def _choose_roi_size(self) -> Choice:
        """Take the median volume, or a part near to a cube in mm of which two patches fit."""
        step = np.prod(triples(self.chosen["strides"]), axis=0)
        smallest, budget = 2 * step, self.budget_bytes
        roi = np.maximum(np.ceil(self.median / step) * step, smallest).astype(int)
        reason = "the median volume, in multiples of what the strides divide by"
        while (needed := self._step_bytes(roi.tolist(), MIN_BATCH)) > budget:
            extent_mm = np.where(roi > smallest, roi * np.array(self.chosen["spacing"]), 0)
            expected = f"{needed:.0f} or more, for {MIN_BATCH} of the smallest patches"
            remedy = "Raise it, or lower base_channels."
            require(extent_mm.any(), "memory_budget_bytes", expected, f"{budget:.0f}", remedy)
            axis = int(extent_mm.argmax())
            roi[axis] -= step[axis]
            reason = f"the largest of which {MIN_BATCH} fit into {_gib(budget)}; "
            reason += f"the median volume has {_size(self.median, '.0f')} voxels"
        return roi.tolist(), reason

    def _choose_batch_size(self) -> Choice:
        """Take what the budgets of all ranks hold, but at most a small share of the dataset."""
        roi_size, ranks = self.chosen["roi_size"], self.num_ranks
        least = max(MIN_BATCH, ranks)
        wanted = max(int(MAX_BATCH_SHARE * self.total_voxels // math.prod(roi_size)), least)
        of_rank = range(1, math.ceil(wanted / ranks) + 1)
        by_memory = bisect.bisect_left(
            of_rank, True, key=lambda n: self._step_bytes(roi_size, n) > self.budget_bytes
        )
        each_of = "" if ranks == 1 else f" on each of {ranks} ranks"
        budget = f"{_gib(self.budget_bytes)}{each_of}"
        taken = _gib(self._step_bytes(roi_size, max(by_memory, 1)))
        if by_memory < 1:
            return ranks, f"the least; one such patch needs {taken}, more than {budget}"
        if wanted <= by_memory * ranks:
            share = f"{MAX_BATCH_SHARE:.0%} of the dataset's voxels, {least} or more"
            return wanted, f"{share}; predicted to take {taken} in float32{each_of}"
        return by_memory * ranks, f"what fits into {budget}; predicted to take {taken} in float32"

    def _choose_foreground_ratio(self) -> Choice:
        """Take nnU-Net's third where patches see most of a volume anyway, else two thirds."""
        share = min(1.0, math.prod(self.chosen["roi_size"]) / float(self.median.prod()))
        return (0.33 if share >= 0.5 else 0.67), f"a patch holds {share:.0%} of the median volume"

    def _choose_flip_axes(self) -> Choice:
        """Take all axes, but not left-right where the classes tell left from right."""
        axes = list(resolve_flip_axes("auto", self.chosen["class_names"]))
        swapped = "class names tell left from right, which mirroring along axis 0 would exchange"
        return axes, "no class name tells left from right" if 0 in axes else swapped

    def _choose_norm(self) -> Choice:
        patches = self.chosen["batch_size"]  # of all ranks, whose statistics are one on CUDA
        reason = f"a micro-batch has {patches} patches; batch from {MIN_BATCH_NORM} on"
        return ("batch" if patches >= MIN_BATCH_NORM else "instance"), reason

    def _choose_steps_per_epoch(self) -> Choice:
        steps, _ = self._num_steps()
        return min(STEPS_PER_EPOCH, steps), "steps between two looks at a run"

    def _choose_max_epochs(self) -> Choice:
        steps, reason = self._num_steps()
        return math.ceil(steps / self.chosen["steps_per_epoch"]), reason

    def _choose_warmup_steps(self) -> Choice:
        tenth = self.chosen["max_epochs"] * self.chosen["steps_per_epoch"] // 10
        return min(WARMUP_STEPS, tenth), f"{PEER}, at most a tenth of the steps"

    def _num_steps(self) -> Choice:
        """Choose how many steps draw each training case `DRAWS` times for each of its patches."""
        cases, samples = len(self.dataset.train), self.chosen["batch_size"]
        samples *= self.accumulation_steps
        patches = max(1.0, float(self.median.prod()) / math.prod(self.chosen["roi_size"]))
        steps = math.ceil(DRAWS * cases * patches / samples)
        limits = f"{MIN_STEPS:,} to {MAX_STEPS:,}"
        reason = f"{cases} cases drawn {DRAWS} times each, {patches:.3g} patches in the median "
        reason += f"volume, {samples} patches a step: {steps:,} steps; {limits} are taken"
        return min(max(steps, MIN_STEPS), MAX_STEPS), reason

    def _resample(self) -> None:
        """Find the median shape and all voxels after resampling, unless metres stand for mm."""
        fingerprint, spacing = self.fingerprint, self.chosen["spacing"]
        crop = self.chosen["crop_empty_borders"]
        shapes = np.array((crop and fingerprint.occupied_shapes) or fingerprint.shapes)
        resampled = shapes * np.array(fingerprint.spacings_mm) / np.array(spacing)
        median = np.median(resampled, axis=0)
        expected = f"mm that leave 1 to {MAX_VOXELS} voxels along each axis"
        got = f"{list(spacing)}, with which the median volume has {_size(median, '.3g')}"
        fits = (median >= 1).all() and (median <= MAX_VOXELS).all()
        require(fits, "spacing", expected, got, "Correct it.")
        resampled = np.maximum(np.rint(resampled), 1)
        self.median = np.ceil(np.median(resampled, axis=0))
        self.total_voxels = float(resampled.prod(axis=1).sum())

    def _step_bytes(self, roi_size: Sequence[int], batch_size: int) -> float:
        plan = Plan(**self.chosen | {"roi_size": roi_size, "batch_size": batch_size})
        return plan.estimate_bytes(FLOAT32, self.recompute_levels)

    def _require_fit(self) -> None:
        names, num_classes, in_channels = self.chosen.values()
        channels, dataset = self.fingerprint.num_channels, self.dataset
        least = max(len(dataset.class_names or []), len(self.fingerprint.classes))
        every = [*names, *(dataset.channel_names or [])]
        marked = ", ".join(name for name in every if name.startswith(("$", "@", "%")))
        faults = {
            f"in_channels: expected {channels}, the channels of the images, got {in_channels}. "
            "Leave it at auto.": in_channels != channels,
            f"class_names: expected {num_classes} names, background included, got {len(names)}. "
            "Name every label value.": len(names) != num_classes,
            f"class_names: expected different names, got {', '.join(names)}. Rename one.": (
                len({*names}) < len(names)
            ),
            f"{dataset.name}: expected names of classes and channels that do not begin with $, @ "
            f"or %, as references in configs do, got {marked}. Rename them.": marked,
            f"num_classes: expected {least} or more, the classes of the dataset, got "
            f"{num_classes}. Leave it at auto.": num_classes < least,
        }
        refuse(line for line, is_true in faults.items() if is_true)


def choose_strides(spacing: Sequence[float], size: Sequence[float]) -> tuple[list[list[int]], str]:
    """Pool an axis unless another one is finer by more than the square root of 2.

    Each level is then within a factor of 2 of isotropic, or nearer to it than the level above by
    the square root of 2, as far as axes are long enough. nnU-Net pools up to a factor of 2 between
    spacings, and deeper. `spacing` is in mm; `size` is that of a volume or patch in voxels.
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


def _choose_channel(name: str, channel: ChannelFingerprint | None) -> Choice:
    if name.upper() != "CT":
        return "zscore", "not CT: by each volume's own mean and deviation"
    levels = channel.foreground_percentiles if channel and channel.foreground_std else {}
    low, high = levels.get("0.5"), levels.get("99.5")
    if channel is None or low == high:
        return "percentile_zscore", "CT: by each volume, since no foreground with contrast was read"
    units = {"clip": [low, high], "mean": channel.foreground_mean, "std": channel.foreground_std}
    return units, "CT: Hounsfield units, by the foreground of all cases"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"


def _size(voxels: np.ndarray, form: str) -> str:
    return "x".join(format(n, form) for n in voxels)
