"""What a dataset is like as a whole: sizes, spacings, intensities, classes. Axes are R, A, S."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np

from pipeline.data.dataset import Case
from pipeline.data.facts import Facts

Fingerprint = dict[str, Any]
PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)


def make_fingerprint(
    cases: Sequence[Case],
    facts: dict[str, Facts],
    class_names: Sequence[str],
    channel_names: Sequence[str],
) -> Fingerprint:
    """Summary of the facts of cases that were found sound.

    Args:
        cases: Whose facts count.
        facts: By case id; where voxels were not read, what needs them is left out.
        class_names: Background first.
        channel_names: One per channel.

    Returns:
        Plain values: `num_cases`; `spacings_mm` and `shapes`, a triple per case, with their
        `median`, `min` and `max`; `occupied_shapes` and `occupied_share`: what is left when empty
        borders are cut off; `channels` and `classes`, a dictionary for each.
    """
    grids = [_grid(facts[case["case_id"]]) for case in cases]
    spacings, shapes, occupied = (np.array(values) for values in zip(*grids, strict=True))
    measured = [voxels for case in cases if (voxels := facts[case["case_id"]]["voxels"])]
    is_complete = len(measured) == len(cases)
    return {
        "num_cases": len(cases),
        "num_channels": len(channel_names),
        "voxels_were_read": is_complete,
        "spacings_mm": _spread(spacings),
        "shapes": _spread(shapes),
        "occupied_shapes": _spread(occupied) if is_complete else None,
        "occupied_share": (
            float(np.mean(occupied.prod(axis=1) / shapes.prod(axis=1))) if is_complete else None
        ),
        "channels": [
            _channel(name, [voxels["channels"][n] for voxels in measured])
            for n, name in enumerate(channel_names)
            if measured
        ],
        "classes": [
            _class(name, value, measured, [np.prod(s) for s in spacings])
            for value, name in enumerate(class_names)
            if is_complete
        ],
    }


def _grid(facts: Facts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spacing in mm, shape, and shape without empty borders, in voxels along R, A, S."""
    image = facts["headers"]["image"][0]
    affine, shape = np.array(image["affine"]), np.array(image["shape"][:3])
    voxels = facts["voxels"]
    box = np.array(voxels["box"]) if voxels else np.stack([0 * shape, shape], axis=1)
    order = np.argsort(nib.io_orientation(affine)[:, 0])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return spacing[order], shape[order], np.maximum(box[:, 1] - box[:, 0], 1)[order]


def _spread(values: np.ndarray) -> dict[str, Any]:
    """Of `(cases, 3)` values."""
    return {
        "median": np.median(values, axis=0).tolist(),
        "min": values.min(axis=0).tolist(),
        "max": values.max(axis=0).tolist(),
        "cases": values.tolist(),
    }


def _channel(name: str, channels: list[Facts]) -> dict[str, Any]:
    """Every case counts alike, whatever its size; foreground statistics by its quantiles."""
    pooled = np.concatenate([channel["foreground_quantiles"] for channel in channels])
    percentiles = np.percentile(pooled, PERCENTILES) if len(pooled) else [None] * len(PERCENTILES)
    return {
        "name": name,
        "mean": float(np.mean([channel["mean"] for channel in channels])),
        "std": float(np.mean([channel["std"] for channel in channels])),
        "means": _ends([channel["mean"] for channel in channels]),
        "stds": _ends([channel["std"] for channel in channels]),
        "min": min(channel["min"] for channel in channels),
        "max": max(channel["max"] for channel in channels),
        "foreground_mean": float(pooled.mean()) if len(pooled) else None,
        "foreground_std": float(pooled.std()) if len(pooled) else None,
        "foreground_percentiles": {
            f"{level:g}": None if value is None else float(value)
            for level, value in zip(PERCENTILES, percentiles, strict=True)
        },
    }


def _ends(values: list[float]) -> list[float]:
    return [min(values), max(values)]


def training_range(fingerprint: Fingerprint) -> dict[str, Any]:
    """What images a network was trained on: nothing of a single one of them.

    Returns:
        `spacing_mm`: smallest and largest along R, A, S; `channels`: where voxels were read, for
        each `name`, and the smallest and largest of the images' `means` and `stds`.
    """
    spacings = fingerprint["spacings_mm"]
    return {
        "spacing_mm": [spacings["min"], spacings["max"]],
        "channels": [
            {key: channel[key] for key in ("name", "means", "stds")}
            for channel in fingerprint["channels"]
        ],
    }


def _class(name: str, value: int, measured: list[Facts], voxel_mm3: list[float]) -> dict[str, Any]:
    counts = np.array([voxels["values"].get(str(value), 0) for voxels in measured])
    total = sum(sum(voxels["values"].values()) for voxels in measured)
    present = counts > 0
    volumes = counts[present] * np.array(voxel_mm3)[present] / 1000
    return {
        "name": name,
        "num_cases": int(present.sum()),
        "voxel_share": float(counts.sum() / total),
        "median_volume_ml": float(np.median(volumes)) if len(volumes) else None,
    }
