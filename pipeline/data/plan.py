"""What training a dataset needs, decided from what the dataset is.

Each value that a config leaves at `auto` is chosen here, with the reason in a sentence; one that a
config gives is taken as it is, and the others are chosen around it.
The rules themselves are in `rules`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipeline.data import rules
from pipeline.data.dataset import Cases
from pipeline.data.memory import step_bytes, triples
from pipeline.data.statistics import DatasetFingerprint
from pipeline.errors import InputError

AUTO = "auto"
MOST_VOXELS = 10_000  # along an axis of the median volume
Settings = Mapping[str, Any]
# what a config states, a value or `auto` each
SETTINGS = (
    "spacing", "crop_empty_borders", "normalization", "roi_size", "strides", "class_names",
    "in_channels", "num_classes", "batch_size", "foreground_ratio", "flip_axes",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Values that fit training to a dataset; axes are R, A, S.

    Attributes:
        spacing: Voxel size that volumes are resampled to, mm.
        crop_empty_borders: Whether what is zero around a volume is cut off first.
        normalization: For all channels, or a list of one for each: a name of
            `transforms.preprocess.NORMALIZATIONS`, or `clip`, `mean` and `std`.
        roi_size: Patch in voxels.
        strides: Pooling per level and axis.
        class_names: In the order of the label values, background first.
        in_channels: Image channels.
        num_classes: Classes, background included.
        batch_size: Patches in a micro-batch, of all ranks together; like the two that follow, of
            training alone.
        foreground_ratio: Share of patches centred on foreground.
        flip_axes: Axes that may be mirrored.
        ignore_value: Label value that counts nowhere; `None`: there is none.
        reasons: Why each is what it is.
    """

    spacing: Sequence[float]
    crop_empty_borders: bool
    normalization: str | Mapping[str, Any] | Sequence[Any]
    roi_size: Sequence[int]
    strides: Sequence[Any]
    class_names: Sequence[str]
    in_channels: int
    num_classes: int
    batch_size: int = 1
    foreground_ratio: float = 0.0
    flip_axes: Sequence[int] = ()
    ignore_value: int | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Each value and its reason, for people."""
        values = self.as_dict()
        return [
            f"{name:<18} {json.dumps(_rounded(values[name]))}  ({reason})"
            for name, reason in self.reasons.items()
        ]


def make_plan(
    fingerprint: DatasetFingerprint,
    settings: Settings,
    *,
    dataset: Cases,
    budget_bytes: float,
    base_channels: int,
    recompute_levels: int = 0,
    num_ranks: int = 1,
) -> Plan:
    """Decide what is `auto`.

    Args:
        fingerprint: Of the dataset.
        settings: Value or `auto` for each of `SETTINGS`.
        dataset: Declares names and modality.
        budget_bytes: Memory that a training step in float32 may take. Mixed precision takes less;
            a plan is the same in every precision, so that precisions can be compared.
        base_channels: Of the network.
        recompute_levels: Of the network.
        num_ranks: That share a batch; each has that memory.

    Raises:
        InputError: If a value does not fit the dataset, or the budget the smallest patch.
    """
    chosen: dict[str, Any] = {}
    reasons: dict[str, str] = {}

    def decide(name: str, rule: Callable[[], tuple[Any, str]]) -> Any:
        given = settings[name]
        chosen[name], reasons[name] = (given, "given") if given != AUTO else rule()
        return chosen[name]

    names = decide("class_names", lambda: rules.names_of(dataset, fingerprint))
    num_classes = decide("num_classes", lambda: (len(names), f"{len(names)} class names"))
    decide("in_channels", lambda: (fingerprint.num_channels, "channels of the images"))
    _require_fit(chosen, dataset, fingerprint)
    crop = decide("crop_empty_borders", lambda: rules.crop_of(fingerprint))
    shapes = np.array(((crop and fingerprint.occupied_shapes) or fingerprint.shapes).cases)
    spacing = decide("spacing", lambda: rules.spacing_of(fingerprint))
    decide("normalization", lambda: rules.normalization_of(dataset, fingerprint))
    resampled = shapes * np.array(fingerprint.spacings_mm.cases) / np.array(spacing)
    _require_voxels(spacing, np.median(resampled, axis=0))
    resampled = np.maximum(np.rint(resampled), 1)
    median = np.ceil(np.median(resampled, axis=0))
    limit = median.tolist() if settings["roi_size"] == AUTO else settings["roi_size"]
    strides = decide("strides", lambda: rules.strides_of(spacing, limit))

    def bytes_of(roi_size: Sequence[int], batch_size: int) -> float:
        network = strides, base_channels, num_classes, chosen["in_channels"], recompute_levels
        return step_bytes(roi_size, batch_size, *network)

    steps = triples(strides)
    roi = decide("roi_size", lambda: rules.patch_of(median, spacing, steps, bytes_of, budget_bytes))
    total = float(resampled.prod(axis=1).sum())
    decide("batch_size", lambda: rules.batch_size_of(roi, total, bytes_of, budget_bytes, num_ranks))
    decide("foreground_ratio", lambda: rules.foreground_ratio_of(roi, median))
    decide("flip_axes", lambda: rules.flip_axes_of(names))
    return Plan(**chosen, ignore_value=dataset.ignore_value, reasons=reasons)


def _require_fit(chosen: Settings, dataset: Cases, fingerprint: DatasetFingerprint) -> None:
    faults = []
    if chosen["in_channels"] != fingerprint.num_channels:
        faults.append(
            f"in_channels: expected {fingerprint.num_channels}, the channels of the images, "
            f"got {chosen['in_channels']}. Leave it at auto."
        )
    if len(chosen["class_names"]) != chosen["num_classes"]:
        faults.append(
            f"class_names: expected {chosen['num_classes']} names, background included, "
            f"got {len(chosen['class_names'])}. Name every label value."
        )
    if len(set(chosen["class_names"])) < len(chosen["class_names"]):
        faults.append(
            f"class_names: expected different names, got {', '.join(chosen['class_names'])}. "
            "Rename one."
        )
    named = [*chosen["class_names"], *(dataset.channel_names or [])]
    if marked := [name for name in named if name.startswith(("$", "@", "%"))]:
        faults.append(
            f"{dataset.name}: expected names of classes and channels that do not begin with $, @ "
            f"or %, as references in configs do, got {', '.join(marked)}. Rename them."
        )
    least = max(len(dataset.class_names or []), len(fingerprint.classes))
    if chosen["num_classes"] < least:
        faults.append(
            f"num_classes: expected {least} or more, the classes of the "
            f"dataset, got {chosen['num_classes']}. Leave it at auto."
        )
    if faults:
        raise InputError(*faults)


def _require_voxels(spacing: Sequence[float], median: np.ndarray) -> None:
    """Metres in place of mm, or a comma astray, would make volumes of nothing or of terabytes."""
    if (median < 1).any() or (median > MOST_VOXELS).any():
        raise InputError(
            f"spacing: expected mm that leave 1 to {MOST_VOXELS} voxels along each axis, got "
            f"{list(spacing)}, with which the median volume has "
            f"{'x'.join(f'{n:.3g}' for n in median)}. Correct it."
        )


def _rounded(value: Any) -> Any:
    """Numbers as people read them."""
    if isinstance(value, dict):
        return {key: _rounded(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(child) for child in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
