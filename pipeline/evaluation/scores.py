"""Scores of predictions: a row per case and class, kept as `metrics.csv`, and their summary.

`DEFINITIONS` says what each measure is; where it is undefined it is `nan`, never 0 or 1. Surface
voxels are those that MONAI's erosion removes, and distances are between their centres: equal masks
are 0 mm apart, and a mask of one voxel is its own surface.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics.utils import get_mask_edges, get_surface_distance
from monai.utils import convert_to_numpy
from scipy.ndimage import find_objects

from pipeline.data.cases import Pair
from pipeline.data.content import map_threads
from pipeline.data.issues import some
from pipeline.data.nifti import read_pair
from pipeline.errors import InputError
from pipeline.evaluation.metrics import compute_dice, divide, mean_of_defined
from pipeline.evaluation.statistics import bootstrap_interval
from pipeline.files import nan_to_none, replace_file

Voxels = np.ndarray | torch.Tensor
Row = dict[str, Any]

STATUS = ("scored", "missed", "spurious", "absent")
NUM_WORST = 5  # cases that the summary names
DEFINITIONS = {
    "dice": "2 |P ∩ L| / (|P| + |L|), of voxels of prediction P and label L",
    "iou": "|P ∩ L| / (|P| + |L| - |P ∩ L|)",
    "sensitivity": "|P ∩ L| / |L|",
    "precision": "|P ∩ L| / |P|",
    "hd95_mm": "larger of the 95th percentiles of distances from surface to surface, either way",
    "assd_mm": "mean of the distances from surface to surface, both ways together",
    "nsd": "share of surface voxels of both that lie within tolerance_mm of the other surface",
    "volume_difference_ml": "volume of the prediction minus volume of the label",
    "mean_dice": "dice over foreground classes, per case, then over cases; absent classes left out",
    "surface": "voxels of a class that share a face with another voxel or the border",
    "n": "number of defined values, which all other figures are made of",
    "interval": "95 % of the bootstrap means, persons drawn; null with fewer than two persons",
    "missed": "in the label, not predicted: dice, iou, sensitivity, nsd 0, distances undefined",
    "spurious": "predicted, not in the label: dice, iou, precision, nsd 0, distances undefined",
    "absent": "in neither: undefined, and a volume difference of 0",
}
MEASURES = tuple(DEFINITIONS)[:8]
WORDS = ("case_id", "person", "class", "status")
COLUMNS = (*WORDS, *MEASURES, "label_volume_ml", "pred_volume_ml")
# Relative. Spacings pass through float32 in headers, and distances in MONAI: without it, a surface
# of which all voxels lie one voxel of 1.2 mm off would not be within 1.2 mm.
ROUNDING = 1e-5


def score_case(
    pred: Voxels,
    label: Voxels,
    *,
    spacing_mm: Sequence[float],
    class_names: Sequence[str],
    tolerance_mm: float,
    ignore_value: int | None = None,
    device: str | torch.device = "cpu",
) -> list[Row]:
    """Score one case.

    Args:
        pred: `(H, W, D)` integer label map.
        label: `(H, W, D)` integer reference on the same grid.
        spacing_mm: Voxel size in mm, in array-axis order.
        class_names: In the order of the label values, background first.
        tolerance_mm: Of the normalised surface Dice.
        ignore_value: Label of voxels that do not count: they become background in both, so that a
            class ends where they begin.
        device: For the surface distances.

    Returns:
        A row for each foreground class, in their order: `COLUMNS` without `case_id` and `person`.

    Raises:
        InputError: If the shapes differ, or a value is not a class; without the case id.
    """
    # in C order, for which erosion is six times faster
    maps = [np.ascontiguousarray(convert_to_numpy(voxels)) for voxels in (pred, label)]
    if maps[0].shape != maps[1].shape or maps[0].ndim != 3:
        raise InputError(
            f"expected prediction and label of one shape (H, W, D), got {maps[0].shape} and "
            f"{maps[1].shape}. Resample one of them or leave the case out."
        )
    if ignore_value is not None and not (counted := maps[1] != ignore_value).all():
        maps = [voxels * counted for voxels in maps]
    for what, voxels in zip(("prediction", "label"), maps, strict=True):
        _require_classes(what, voxels, len(class_names))
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
            tensors = (torch.as_tensor(mask, device=device) for mask in masks)
            row |= score_surfaces(*tensors, spacing_mm=spacing_mm, tolerance_mm=tolerance_mm)
        rows.append(row)
    return rows


def _require_classes(what: str, voxels: np.ndarray, num_classes: int) -> None:
    if voxels.dtype.kind not in "iub":
        raise InputError(f"expected integer values in the {what}, got {voxels.dtype}. Convert it.")
    if voxels.size and (voxels.min() < 0 or voxels.max() >= num_classes):
        unknown = [str(n) for n in np.unique(voxels) if not 0 <= n < num_classes]
        raise InputError(
            f"expected values 0 to {num_classes - 1} in the {what}, got {some(unknown)}. "
            "Name all classes or correct it."
        )


def _score_overlap(masks: Sequence[np.ndarray], voxel_ml: float) -> Row:
    """Return all measures of a class that follow from numbers of voxels."""
    counts = [np.count_nonzero(mask) for mask in (masks[0] & masks[1], *masks)]
    both, pred, label = np.array(counts)
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


def score_surfaces(
    pred: torch.Tensor, label: torch.Tensor, *, spacing_mm: Sequence[float], tolerance_mm: float
) -> dict[str, float]:
    """Measure the distances from either surface to the nearest voxel of the other.

    Args:
        pred: `(H, W, D)` bool mask, not empty. On CUDA, MONAI measures with cuCIM where that is
            installed, else with SciPy.
        label: `(H, W, D)` bool reference on the same grid, not empty.
        spacing_mm: Voxel size in mm, in array-axis order; axes are taken to be perpendicular.
        tolerance_mm: Distance up to which surfaces agree.

    Returns:
        `hd95_mm`, `assd_mm` and `nsd`; see `DEFINITIONS`.

    Source: Huttenlocher et al., IEEE TPAMI 15 (1993) for the Hausdorff distance by ranks; Heimann
    et al., IEEE TMI 28 (2009) for the average symmetric distance; Nikolov et al., J Med Internet
    Res 23 (2021) for surface Dice, here over voxels instead of pieces of a mesh.
    """
    # as MONAI's get_edge_surface_distance, which warns of an argument of its own
    edges: tuple[torch.Tensor, torch.Tensor] = get_mask_edges(pred, label)
    spacing = [float(size) for size in spacing_mm]
    directed = [
        torch.as_tensor(get_surface_distance(*way, spacing=spacing)).double().cpu().numpy()
        for way in (edges, edges[::-1])
    ]
    both = np.concatenate(directed)
    return {
        "hd95_mm": max(float(np.percentile(distances, 95)) for distances in directed),
        "assd_mm": float(both.mean()),
        "nsd": float(np.mean(both <= tolerance_mm * (1 + ROUNDING))),
    }


def score_files(
    pairs: Sequence[Pair], num_threads: int, **how: Any
) -> tuple[list[Row], dict[str, str]]:
    """Score predictions in files against labels in files.

    Args:
        pairs: Case id, prediction and label.
        num_threads: Cases that are scored at the same time.
        how: Arguments of `score_case` beside voxels and spacing.

    Returns:
        Rows of the cases in their order, without `person`, and for each refused case the reason.
    """

    def score(pair: Pair) -> list[Row] | str:
        case_id, *paths = pair
        try:
            pred, label, spacing_mm = read_pair(*paths)
            rows = score_case(pred, label, spacing_mm=spacing_mm, **how)
        except InputError as error:
            return str(error)
        return [{"case_id": case_id, **row} for row in rows]

    rows: list[Row] = []
    refused = {}
    found = map_threads(score, pairs, "Scoring", num_threads)
    for (case_id, *_), result in zip(pairs, found, strict=True):
        if isinstance(result, str):
            refused[case_id] = result
        else:
            rows += result
    return rows, refused


def write_scores(
    directory: str | Path,
    rows: Sequence[Row],
    *,
    class_names: Sequence[str],
    tolerance_mm: float,
    refused: Mapping[str, str] | None = None,
) -> Row:
    """Write `metrics.csv` and `summary.json` into a directory, each whole or not at all.

    Args:
        directory: Made if it is not there.
        rows: As `score_case` returns them, with `case_id` and `person` in addition.
        class_names: As for `score_case`.
        tolerance_mm: With which the rows were made.
        refused: Cases that could not be scored, and the reasons.

    Returns:
        The content of `summary.json`, `None` where undefined. `mean_dice` and its
        `mean_dice_interval`; `classes`: for each class `status`, a count for each word of `STATUS`,
        and for each of `MEASURES` `n`, `mean`, `median`, `q1`, `q3`, `interval`; `over_classes`:
        the same for the mean over the classes of each case; `worst_cases`: `case_id` and
        `mean_dice`, the lowest first; `num_cases`, `num_persons`, `tolerance_mm`, `definitions`,
        `refused`.

    Raises:
        OSError: If the system refuses; a file is then as it was.
    """
    summary = _summarize(rows, class_names[1:], tolerance_mm) | {"refused": dict(refused or {})}
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: nan_to_none(value) for name, value in row.items()} for row in rows)
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, content in (("metrics.csv", table.getvalue()), ("summary.json", text)):
        with replace_file(Path(directory) / name) as temporary:
            temporary.write_text(content, encoding="utf-8", newline="")
    return summary


def read_scores(path: str | Path) -> list[Row]:
    """Read the rows of a `metrics.csv`, as they were given to `write_scores`.

    Raises:
        InputError: If it is not there, or not such a file.
    """
    numbers = COLUMNS[len(WORDS) :]
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="nothing")
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"the columns {','.join(reader.fieldnames or ['none'])}")
            return [row | {n: float(row[n] or "nan") for n in numbers} for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"{path}: expected a metrics.csv of the columns {','.join(COLUMNS)}, got: {error}. "
            "Name another file."
        ) from None


def _summarize(rows: Sequence[Row], names: Sequence[str], tolerance_mm: float) -> Row:
    """Summarize scores of the foreground classes; see `write_scores`."""
    persons = {row["case_id"]: row["person"] for row in rows}
    at = {case_id: number for number, case_id in enumerate(persons)}
    table = np.full((len(MEASURES), len(at), len(names)), np.nan)  # (measures, N, classes)
    for row in rows:
        values = [row[measure] for measure in MEASURES]
        table[:, at[row["case_id"]], names.index(row["class"])] = values
    statuses = Counter((row["class"], row["status"]) for row in rows)
    means = mean_of_defined(table, axis=2)
    over_classes = _summarize_measures(means, list(persons.values()))
    dice = zip(means[MEASURES.index("dice")].tolist(), at, strict=True)
    worst = sorted(pair for pair in dice if not math.isnan(pair[0]))[:NUM_WORST]
    return {
        "mean_dice": over_classes["dice"]["mean"],
        "mean_dice_interval": over_classes["dice"]["interval"],
        "num_cases": len(persons),
        "num_persons": len(set(persons.values())),
        "tolerance_mm": tolerance_mm,
        "classes": {
            name: {"status": {word: statuses[name, word] for word in STATUS}}
            | _summarize_measures(table[..., number], list(persons.values()))
            for number, name in enumerate(names)
        },
        "over_classes": over_classes,
        "worst_cases": [{"case_id": case_id, "mean_dice": score} for score, case_id in worst],
        "definitions": DEFINITIONS,
    }


def _summarize_measures(table: np.ndarray, persons: Sequence[str]) -> dict[str, Row]:
    """Return figures by measure, of `(measures, N)` values."""
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


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out cells in columns as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def format_number(value: float | None, form: str = ".4f") -> str:
    """Format a number; `-` where there is none."""
    return "-" if value is None else format(value, form)
