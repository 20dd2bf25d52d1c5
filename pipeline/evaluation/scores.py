"""Scores of predictions: a row per case and class, kept as `metrics.csv`, and their summary.

`DEFINITIONS` says what each measure is; where it is undefined it is `nan`, never 0 or 1. Surface
voxels are those that MONAI's erosion removes, and distances are between their centres.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics.utils import get_mask_edges, get_surface_distance
from scipy.ndimage import find_objects

from pipeline.data.cases import Pair
from pipeline.data.content import map_threads
from pipeline.data.layouts import read_csv
from pipeline.data.nifti import read_pair
from pipeline.errors import InputError, some
from pipeline.evaluation.metrics import compute_dice, divide, mean_of_defined
from pipeline.evaluation.statistics import bootstrap_interval
from pipeline.files import make_directory, nan_to_none, read_cell, write_csv, write_json

Row = dict[str, Any]

STATUS = ("scored", "missed", "spurious", "absent")
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
MEASURES = tuple(DEFINITIONS)
WORDS = ("case_id", "person", "class", "status")
COLUMNS = (*WORDS, *MEASURES, "label_volume_ml", "pred_volume_ml")
ROUNDING = 1e-5  # relative; spacings in headers and distances in MONAI pass through float32


def score_case(
    pred: np.ndarray,
    label: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    class_names: Sequence[str],
    tolerance_mm: float,
    ignore_value: int | None = None,
    device: str | torch.device = "cpu",
) -> list[Row]:
    """Score one case; returns a row per foreground class, without `case_id` and `person`.

    Args:
        pred: `(H, W, D)` integer label map; `label` is one of the same shape.
        spacing_mm: Voxel size in array-axis order.
        class_names: In the order of the label values, background first.
        tolerance_mm: Distance up to which surfaces agree, for `nsd`.
        ignore_value: Label of voxels that become background in both maps.

    Raises:
        InputError: If a value is not a class; without the case id.
    """
    # in C order, for which erosion is six times faster
    maps = [np.ascontiguousarray(voxels) for voxels in (pred, label)]
    if ignore_value is not None and not (counted := maps[1] != ignore_value).all():
        maps = [voxels * counted for voxels in maps]
    for what, voxels in zip(("prediction", "label"), maps, strict=True):
        if voxels.size and (voxels.min() < 0 or voxels.max() >= len(class_names)):
            unknown = [str(n) for n in np.unique(voxels) if not 0 <= n < len(class_names)]
            raise InputError(
                f"expected values 0 to {len(class_names) - 1} in the {what}, got {some(unknown)}. "
                "Name all classes or correct it."
            )
    voxel_ml = math.prod(map(float, spacing_mm)) / 1000
    rows = []
    boxes = (find_objects(voxels, len(class_names) - 1) for voxels in maps)
    for value, found in enumerate(zip(*boxes, strict=True), 1):
        # in the box around both: a large volume with many classes would take too long
        sides = zip(*(box for box in found if box is not None), strict=True)
        box = tuple(slice(min(s.start for s in n), max(s.stop for s in n)) for n in sides)
        masks = [voxels[box or (slice(0),) * 3] == value for voxels in maps]
        row = {"class": class_names[value], **_score_overlap(masks, voxel_ml)}
        if row["status"] == "scored":
            tensors = [torch.as_tensor(mask, device=device) for mask in masks]
            row |= _score_surfaces(tensors, [*map(float, spacing_mm)], tolerance_mm)
        rows.append(row)
    return rows


def _score_overlap(masks: Sequence[np.ndarray], voxel_ml: float) -> Row:
    """Return all measures of a class that follow from numbers of voxels."""
    both, pred, label = np.array([*map(np.count_nonzero, (masks[0] & masks[1], *masks))])
    status = STATUS[2 * (not label) + (not pred)]
    measures = {
        "dice": compute_dice(both, pred, label),
        "iou": divide(both, pred + label - both),
        "sensitivity": divide(both, label),
        "precision": divide(both, pred),
        "hd95_mm": math.nan,
        "assd_mm": math.nan,
        "nsd": math.nan if status == "absent" else 0,
        "volume_difference_ml": (pred - label) * voxel_ml,
        "label_volume_ml": label * voxel_ml,
        "pred_volume_ml": pred * voxel_ml,
    }
    return {"status": status, **{name: float(value) for name, value in measures.items()}}


def _score_surfaces(
    masks: Sequence[torch.Tensor], spacing: Sequence[float], tolerance_mm: float
) -> dict[str, float]:
    """Measure the distances between the surfaces of two `(H, W, D)` bool masks, none empty.

    Axes are taken to be perpendicular. On CUDA, MONAI measures with cuCIM where that is installed.

    Source: Huttenlocher et al., IEEE TPAMI 15 (1993) for the Hausdorff distance by ranks; Heimann
    et al., IEEE TMI 28 (2009) for the average symmetric distance; Nikolov et al., J Med Internet
    Res 23 (2021) for surface Dice, here over voxels instead of pieces of a mesh.
    """
    # as MONAI's get_edge_surface_distance, which warns of an argument of its own
    a, b = get_mask_edges(*masks)
    directed = [
        torch.as_tensor(get_surface_distance(*way, spacing=spacing)).double().cpu().numpy()
        for way in ((a, b), (b, a))
    ]
    both = np.concatenate(directed)
    return {
        "hd95_mm": max(float(np.percentile(distances, 95)) for distances in directed),
        "assd_mm": float(both.mean()),
        "nsd": float(np.mean(both <= tolerance_mm * (1 + ROUNDING))),
    }


def score_files(
    pairs: Sequence[Pair], num_threads: int | None = None, **how: Any
) -> tuple[list[Row], dict[str, str]]:
    """Score predictions in files, several at a time; `how` are further arguments of `score_case`.

    Returns:
        Rows of the cases in their order, without `person`, and for each refused case the reason.
    """
    refused = {}

    def score(pair: Pair) -> list[Row]:
        case_id, *paths = pair
        try:
            pred, label, spacing_mm = read_pair(*paths)
            rows = score_case(pred, label, spacing_mm=spacing_mm, **how)
        except InputError as error:
            refused[case_id] = str(error)
            return []
        return [{"case_id": case_id, **row} for row in rows]

    found = map_threads(score, pairs, "Scoring", num_threads)
    return list(itertools.chain.from_iterable(found)), refused


def write_scores(
    directory: str | Path,
    rows: Sequence[Row],
    *,
    class_names: Sequence[str],
    tolerance_mm: float,
    refused: Mapping[str, str] | None = None,
) -> Row:
    """Write `metrics.csv` and `summary.json` into a directory, each whole or not at all.

    `rows` are those of `score_case` with `case_id` and `person`; `refused` are cases and reasons.

    Returns:
        The content of `summary.json`, `None` where undefined; `classes` and `over_classes`, the
        mean over the classes of each case, have figures for each of `MEASURES`.

    Raises:
        OSError: If the system refuses; a file is then as it was.
    """
    summary = _summarize(rows, class_names[1:], tolerance_mm)
    summary["refused"] = dict(sorted((refused or {}).items()))
    make_directory(Path(directory))
    write_csv(Path(directory, "metrics.csv"), COLUMNS, rows)
    write_json(Path(directory, "summary.json"), summary)
    return summary


def read_scores(path: str | Path) -> list[Row]:
    """Read the rows of a `metrics.csv`, as they were given to `write_scores`.

    Raises:
        InputError, ValueError, KeyError: If it is not there, or not such a file.
    """
    numbers = COLUMNS[len(WORDS) :]
    return [
        {word: read_cell(cells[word]) for word in WORDS}
        | {n: float(cells[n] or "nan") for n in numbers}
        for _, cells in read_csv(path)
    ]


def _summarize(rows: Sequence[Row], names: Sequence[str], tolerance_mm: float) -> Row:
    person_of = {row["case_id"]: row["person"] for row in rows}
    cases = {case_id: number for number, case_id in enumerate(person_of)}
    persons = list(person_of.values())
    table = np.full((len(MEASURES), len(cases), len(names)), np.nan)  # (measures, N, classes)
    for row in rows:
        place = cases[row["case_id"]], names.index(row["class"])
        table[:, *place] = [row[measure] for measure in MEASURES]
    statuses = Counter((row["class"], row["status"]) for row in rows)
    means = mean_of_defined(table, axis=2)
    over_classes = _summarize_measures(means, persons)
    dice = zip(means[MEASURES.index("dice")].tolist(), cases, strict=True)
    worst = sorted(pair for pair in dice if not math.isnan(pair[0]))[:5]
    return {
        "mean_dice": over_classes["dice"]["mean"],
        "mean_dice_interval": over_classes["dice"]["interval"],
        "num_cases": len(cases),
        "num_persons": len(set(persons)),
        "tolerance_mm": tolerance_mm,
        "classes": {
            name: {"status": {word: statuses[name, word] for word in STATUS}}
            | _summarize_measures(table[..., number], persons)
            for number, name in enumerate(names)
        },
        "over_classes": over_classes,
        "worst_cases": [{"case_id": case_id, "mean_dice": score} for score, case_id in worst],
        "definitions": DEFINITIONS,
    }


def _summarize_measures(table: np.ndarray, persons: Sequence[str]) -> dict[str, Row]:
    figures = {}
    for name, values in zip(MEASURES, table, strict=True):
        found = values[~np.isnan(values)]
        quartiles = np.quantile(found, [0.25, 0.5, 0.75]).tolist() if len(found) else [None] * 3
        figures[name] = {
            "n": len(found),
            "mean": nan_to_none(float(mean_of_defined(values))),
            **dict(zip(("q1", "median", "q3"), quartiles, strict=True)),
            "interval": bootstrap_interval(values, persons),
        }
    return figures


def format_table(columns: str, rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lay out rows as a table in Markdown; `None` is shown as `-`.

    `columns` are heads, each with the format of its numbers, such as `class, mean Dice:.3f`.
    """
    heads = [column.partition(":")[::2] for column in columns.split(", ")]
    table = [[head for head, _ in heads]]
    for row in rows:
        pairs = zip(row, heads, strict=True)
        table.append(["-" if value is None else format(value, form) for value, (_, form) in pairs])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(map(str.ljust, cells, widths))} |" for cells in table]
