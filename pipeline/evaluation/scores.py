"""Scores of predictions: a row per case and class, kept as `metrics.csv`, and their summary.

The `status` of a class in a case tells whether it is there. Measures that are then undefined are
`nan`, never 0 or 1:

    scored    in label and prediction
    missed    in the label alone: dice, iou, sensitivity and nsd are 0, the rest undefined
    spurious  in the prediction alone: dice, iou, precision and nsd are 0, the rest undefined
    absent    in neither: undefined, except for the volumes

The surface of a mask is the set of its voxels that share a face with a voxel outside the mask or
with the border of the volume: the voxels that MONAI's erosion removes. Distances are between the
centres of voxels, so that equal masks are 0 mm apart, and a mask of one voxel is its own surface.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics.utils import get_mask_edges, get_surface_distance
from monai.utils import convert_to_numpy
from scipy.ndimage import find_objects

from pipeline import distributed
from pipeline.data.pairs import Pair, read_pair
from pipeline.errors import InputError
from pipeline.evaluation.metrics import compute_dice, divide, mean_of_defined
from pipeline.evaluation.statistics import bootstrap_interval
from pipeline.files import nan_to_none, replace_file
from pipeline.progress_bar import ProgressBar

Voxels = np.ndarray | torch.Tensor
Row = dict[str, Any]

# whether a class is in the label, and in the prediction
STATUS = {
    (True, True): "scored",
    (True, False): "missed",
    (False, True): "spurious",
    (False, False): "absent",
}
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
    "n": "number of defined values, which all other figures are made of",
    "interval": "95 % of the bootstrap means, persons drawn; null with fewer than two persons",
    "missed": "in the label, not predicted: dice, iou, sensitivity, nsd 0, distances undefined",
    "spurious": "predicted, not in the label: dice, iou, precision, nsd 0, distances undefined",
    "absent": "in neither: undefined, and a volume difference of 0",
}
MEASURES = tuple(DEFINITIONS)
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
    of_pred, of_label = (np.ascontiguousarray(convert_to_numpy(v)) for v in (pred, label))
    if of_pred.shape != of_label.shape or of_pred.ndim != 3:
        raise InputError(
            f"expected prediction and label of one shape (H, W, D), got {of_pred.shape} and "
            f"{of_label.shape}. Resample one of them or leave the case out."
        )
    if ignore_value is not None and not (counted := of_label != ignore_value).all():
        of_pred, of_label = of_pred * counted, of_label * counted
    for what, voxels in (("prediction", of_pred), ("label", of_label)):
        _require_classes(what, voxels, len(class_names))
    counts: list[list[int]] = []
    surfaces: list[dict[str, float]] = []
    boxes = (find_objects(v, len(class_names) - 1) for v in (of_pred, of_label))
    for value, found in enumerate(zip(*boxes, strict=True), 1):
        # in the box around both: a large volume with many classes would take too long
        sides = zip(*(box for box in found if box is not None), strict=True)
        box = tuple(slice(min(s.start for s in n), max(s.stop for s in n)) for n in sides)
        masks = [v[box or (slice(0),) * 3] == value for v in (of_pred, of_label)]
        counts.append([int(np.count_nonzero(mask)) for mask in (masks[0] & masks[1], *masks)])
        surfaces.append({})
        if all(box is not None for box in found):
            tensors = (torch.as_tensor(mask, device=device) for mask in masks)
            surfaces[-1] = score_surfaces(
                *tensors, spacing_mm=spacing_mm, tolerance_mm=tolerance_mm
            )
    both, of_preds, of_labels = np.array(counts).T
    voxel_ml = math.prod(map(float, spacing_mm)) / 1000
    rows = _score_overlap(both, of_preds, of_labels, voxel_ml)
    return [
        {"class": name} | row | surface
        for name, row, surface in zip(class_names[1:], rows, surfaces, strict=True)
    ]


def _require_classes(what: str, voxels: np.ndarray, num_classes: int) -> None:
    if voxels.dtype.kind not in "iub":
        raise InputError(f"expected integer values in the {what}, got {voxels.dtype}. Convert it.")
    if voxels.size and (voxels.min() < 0 or voxels.max() >= num_classes):
        unknown = [n for n in np.unique(voxels).tolist() if not 0 <= n < num_classes]
        raise InputError(
            f"expected values 0 to {num_classes - 1} in the {what}, got "
            f"{', '.join(map(str, unknown[:5]))}{', …' if len(unknown) > 5 else ''}. "
            "Name all classes or correct it."
        )


def _score_overlap(
    both: np.ndarray, of_pred: np.ndarray, of_label: np.ndarray, voxel_ml: float
) -> list[Row]:
    """Return rows of all measures that follow from numbers of voxels, by class."""
    status = [STATUS[in_both] for in_both in zip(of_label > 0, of_pred > 0, strict=True)]
    columns = {
        "dice": compute_dice(both, of_pred, of_label),
        "iou": divide(both, of_pred + of_label - both),
        "sensitivity": divide(both, of_label),
        "precision": divide(both, of_pred),
        "hd95_mm": np.full(len(both), np.nan),
        "assd_mm": np.full(len(both), np.nan),
        "nsd": np.array([np.nan if word == "absent" else 0.0 for word in status]),
        "volume_difference_ml": (of_pred - of_label) * voxel_ml,
        "label_volume_ml": of_label * voxel_ml,
        "pred_volume_ml": of_pred * voxel_ml,
    }
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [
        {"status": word} | dict(zip(columns, row, strict=True))
        for word, row in zip(status, values, strict=True)
    ]


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
        `hd95_mm`: the larger of the 95th percentiles of the two directions, in mm; `assd_mm`: mean
        over the distances of both directions together, in mm; `nsd`: share of them within the
        tolerance, 0 to 1.

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

    def score(pair: Pair) -> list[Row] | InputError:
        case_id, pred_path, label_path = pair
        try:
            pred, label, spacing_mm = read_pair(pred_path, label_path)
            rows = score_case(pred, label, spacing_mm=spacing_mm, **how)
        except InputError as error:
            return error
        return [{"case_id": case_id, **row} for row in rows]

    rows: list[Row] = []
    refused = {}
    with ThreadPoolExecutor(num_threads) as pool:
        total, enabled = len(pairs), distributed.is_main()
        found = pool.map(score, pairs)
        bar = ProgressBar(found, desc="Scoring", total=total, enabled=enabled)
        for (case_id, *_), result in zip(pairs, bar, strict=True):
            if isinstance(result, InputError):
                refused[case_id] = str(result)
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
    num_worst: int = 5,
) -> Row:
    """Write `metrics.csv` and `summary.json` into a directory, each whole or not at all.

    Args:
        directory: Made if it is not there.
        rows: As `score_case` returns them, with `case_id` and `person` in addition.
        class_names: As for `score_case`.
        tolerance_mm: With which the rows were made.
        refused: Cases that could not be scored, and the reasons.
        num_worst: Number of worst cases to name.

    Returns:
        The content of `summary.json`: see `summarize`.

    Raises:
        OSError: If the system refuses; a file is then as it was.
    """
    summary = summarize(rows, class_names, tolerance_mm, num_worst) | {
        "refused": dict(refused or {})
    }
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
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="nothing")
            columns, rows = reader.fieldnames or (), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: expected a metrics.csv, got: {error}. Check the path.") from None
    if tuple(columns) != COLUMNS:
        raise InputError(
            f"{path}: expected the columns {','.join(COLUMNS)}, got {','.join(columns) or 'none'}. "
            "Name a metrics.csv."
        )
    numbers = [name for name in COLUMNS if name not in WORDS]
    try:
        return [row | {name: float(row[name] or "nan") for name in numbers} for row in rows]
    except ValueError as error:
        raise InputError(
            f"{path}: expected numbers in {', '.join(numbers)}, got: {error}. Write it anew."
        ) from None


def summarize(
    rows: Sequence[Row], class_names: Sequence[str], tolerance_mm: float, num_worst: int
) -> Row:
    """Summarize scores; arguments as for `write_scores`.

    Returns:
        Plain values for JSON, `None` where undefined. `mean_dice` and its `mean_dice_interval`;
        `classes`: for each class `status`, a count for each word of `STATUS`, and for each of
        `MEASURES` `n`, `mean`, `median`, `q1`, `q3`, `interval`; `over_classes`: the same for the
        mean over the classes of each case; `worst_cases`: `case_id` and `mean_dice`, the lowest
        first; `num_cases`, `num_persons`, `tolerance_mm`, `definitions`.
    """
    persons = {row["case_id"]: row["person"] for row in rows}
    names = list(class_names[1:])
    at = {case_id: number for number, case_id in enumerate(persons)}
    table = np.full((len(MEASURES), len(at), len(names)), np.nan)  # (measures, N, classes)
    for row in rows:
        values = [row[measure] for measure in MEASURES]
        table[:, at[row["case_id"]], names.index(row["class"])] = values
    statuses = Counter((row["class"], row["status"]) for row in rows)
    means = mean_of_defined(table, axis=2)
    over_classes = _summarize_measures(means, list(persons.values()))
    dice = zip(means[MEASURES.index("dice")].tolist(), at, strict=True)
    worst = sorted(pair for pair in dice if not math.isnan(pair[0]))[:num_worst]
    return {
        "mean_dice": over_classes["dice"]["mean"],
        "mean_dice_interval": over_classes["dice"]["interval"],
        "num_cases": len(persons),
        "num_persons": len(set(persons.values())),
        "tolerance_mm": tolerance_mm,
        "classes": {
            name: {"status": {word: statuses[name, word] for word in STATUS.values()}}
            | _summarize_measures(table[..., number], list(persons.values()))
            for number, name in enumerate(names)
        },
        "over_classes": over_classes,
        "worst_cases": [{"case_id": case_id, "mean_dice": score} for score, case_id in worst],
        "definitions": DEFINITIONS | MORE_DEFINITIONS,
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
