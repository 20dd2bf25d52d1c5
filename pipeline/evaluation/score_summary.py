"""What many scores come to: per class, and over the classes of each case."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.evaluation.bootstrap import paired_interval

Row = dict[str, Any]

DEFINITIONS = {
    "dice": "2 |P ∩ L| / (|P| + |L|), of voxels of prediction P and label L",
    "iou": "|P ∩ L| / (|P| + |L| - |P ∩ L|)",
    "sensitivity": "|P ∩ L| / |L|",
    "precision": "|P ∩ L| / |P|",
    "hd95_mm": "larger of the 95th percentiles of distances from surface to surface, either way",
    "assd_mm": "mean of the distances from surface to surface, both ways together",
    "nsd": "share of surface voxels of both that lie within tolerance_mm of the other surface",
    "volume_difference_ml": "volume of the prediction minus volume of the label",
}
MORE_DEFINITIONS = {
    "mean_dice": "dice over foreground classes, per case, then over cases; absent classes left out",
    "surface": "voxels of a class that share a face with another voxel or the border",
    "n": "of the values that are defined, of which all other figures are",
    "interval": "95 % of the bootstrap means, persons drawn; null with fewer than two persons",
    "missed": "in the label, not predicted: dice, iou, sensitivity, nsd 0, distances undefined",
    "spurious": "predicted, not in the label: dice, iou, precision, nsd 0, distances undefined",
    "absent": "in neither: undefined, and a volume difference of 0",
}
MEASURES = tuple(DEFINITIONS)
STATUSES = ("scored", "missed", "spurious", "absent")
# of each of some hundred intervals; their ends then vary by 6 % of a standard error
NUM_RESAMPLES = 2_000


def summarize(
    rows: Sequence[Row],
    class_names: Sequence[str],
    tolerance_mm: float,
    refused: Mapping[str, str],
    num_worst: int,
) -> Row:
    """Summary of scores; arguments as for `write_scores`.

    Returns:
        Plain values for JSON, `None` where undefined. `mean_dice` and its `mean_dice_interval`;
        `classes`: for each `status`, a count for each of `STATUSES`, and for each of `MEASURES`
        `n`, `mean`, `median`, `q1`, `q3`, `interval`; `over_classes`: the same for the mean over
        the classes of each case; `worst_cases`: `case_id` and `mean_dice`, the lowest first;
        `num_cases`, `num_persons`, `tolerance_mm`, `definitions`, `refused`.
    """
    persons = {row["case_id"]: row["person"] for row in rows}
    names = list(class_names[1:])
    at = {case_id: number for number, case_id in enumerate(persons)}
    table = np.full((len(MEASURES), len(at), len(names)), np.nan)  # (measures, N, classes)
    for row in rows:
        values = [row[measure] for measure in MEASURES]
        table[:, at[row["case_id"]], names.index(row["class"])] = values
    statuses = {name: Counter(r["status"] for r in rows if r["class"] == name) for name in names}
    over_classes = _figures(_mean_over_classes(table), list(persons.values()))
    dice = _mean_over_classes(table)[MEASURES.index("dice")]
    return {
        "mean_dice": over_classes["dice"]["mean"],
        "mean_dice_interval": over_classes["dice"]["interval"],
        "num_cases": len(persons),
        "num_persons": len(set(persons.values())),
        "tolerance_mm": tolerance_mm,
        "classes": {
            name: {
                "status": {status: statuses[name][status] for status in STATUSES},
                **_figures(table[..., number], list(persons.values())),
            }
            for number, name in enumerate(names)
        },
        "over_classes": over_classes,
        "worst_cases": [
            {"case_id": case_id, "mean_dice": score}
            for score, case_id in sorted(zip(dice.tolist(), at, strict=True))
            if not math.isnan(score)
        ][:num_worst],
        "refused": dict(refused),
        "definitions": DEFINITIONS | MORE_DEFINITIONS,
    }


def _mean_over_classes(table: np.ndarray) -> np.ndarray:
    """`(measures, N)` means over the classes that have a value."""
    known = ~np.isnan(table)
    with np.errstate(invalid="ignore"):  # none has: 0 / 0 is nan
        return np.where(known, table, 0).sum(axis=2) / known.sum(axis=2)


def _figures(table: np.ndarray, persons: Sequence[str]) -> dict[str, Row]:
    """Figures by measure, of `(measures, N)` values."""
    return {name: _of(values, persons) for name, values in zip(MEASURES, table, strict=True)}


def _of(values: np.ndarray, persons: Sequence[str]) -> Row:
    known = ~np.isnan(values)
    found = values[known]
    quartiles = np.quantile(found, [0.25, 0.5, 0.75]) if len(found) else np.full(3, np.nan)
    interval = None
    if len({person for person, is_known in zip(persons, known, strict=True) if is_known}) > 1:
        drawn = paired_interval(values[None], persons, num_resamples=NUM_RESAMPLES)
        interval = [drawn.low, drawn.high]
    q1, median, q3 = (plain(float(value)) for value in quartiles)
    mean = float(found.mean()) if len(found) else None
    return {"n": len(found), "mean": mean, "median": median, "q1": q1, "q3": q3} | {
        "interval": interval
    }


def plain(value: Any, undefined: Any = None) -> Any:
    """A value for JSON or CSV, neither of which has a NaN."""
    return undefined if isinstance(value, float) and math.isnan(value) else value
