"""Scores of predictions: a row per case and class, kept as `metrics.csv`, and their summary.

What a class is in a case is its `status`, and what cannot be measured then is `nan`, never 0 or 1:

    scored    in label and prediction
    missed    in the label alone: dice, iou, sensitivity and nsd are 0, the rest undefined
    spurious  in the prediction alone: dice, iou, precision and nsd are 0, the rest undefined
    absent    in neither: undefined, but for the volumes
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.utils import convert_to_numpy
from scipy.ndimage import find_objects

from pipeline.errors import InputError
from pipeline.evaluation.score_summary import MEASURES, Row, plain, summarize
from pipeline.evaluation.surface import surface_measures
from pipeline.prediction.nifti_output import whole_file

Voxels = np.ndarray | torch.Tensor

# whether a class is in the label, and in the prediction
STATUS = {
    (True, True): "scored",
    (True, False): "missed",
    (False, True): "spurious",
    (False, False): "absent",
}
WORDS = ("case_id", "person", "class", "status")
COLUMNS = (*WORDS, *MEASURES, "label_volume_ml", "pred_volume_ml")
FILES = ("metrics.csv", "summary.json")


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
    """Scores of one case.

    Args:
        pred: `(H, W, D)` integer label map.
        label: `(H, W, D)` integer reference on the same grid.
        spacing_mm: Voxel size in mm, in array-axis order.
        class_names: In the order of the label values, background first.
        tolerance_mm: Of the normalised surface Dice.
        ignore_value: Label of voxels that count nowhere: they are background in both, so that a
            class ends where they begin.
        device: Of the surface distances.

    Returns:
        A row for each foreground class, in their order: `COLUMNS` without `case_id` and `person`.

    Raises:
        InputError: If the shapes differ, or a value is no class; without the case id.
    """
    # in C order, which erosion is six times quicker on
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
    boxes = _boxes(of_pred, of_label, len(class_names) - 1)
    return [
        {"class": name}
        | _scores(of_pred[box] == value, of_label[box] == value, spacing_mm, tolerance_mm, device)
        for value, (name, box) in enumerate(zip(class_names[1:], boxes, strict=True), 1)
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


def _boxes(pred: np.ndarray, label: np.ndarray, num_boxes: int) -> list[tuple[slice, ...]]:
    """For each foreground class the smallest box that holds it in both; an empty one if absent."""
    boxes = []
    for found in zip(*(find_objects(v, num_boxes) for v in (pred, label)), strict=True):
        there = [box for box in found if box is not None]
        boxes.append(
            tuple(
                slice(min(s.start for s in sides), max(s.stop for s in sides))
                for sides in zip(*there, strict=True)
            )
            or (slice(0, 0),) * 3
        )
    return boxes


def _scores(
    pred: np.ndarray,
    label: np.ndarray,
    spacing_mm: Sequence[float],
    tolerance_mm: float,
    device: str | torch.device,
) -> Row:
    """Of one class, from two bool masks that are cropped to what is in either."""
    num_pred, num_label, num_both = (int(np.count_nonzero(m)) for m in (pred, label, pred & label))
    status = STATUS[num_label > 0, num_pred > 0]
    surface = {"hd95_mm": math.nan, "assd_mm": math.nan}
    surface["nsd"] = math.nan if status == "absent" else 0.0
    if status == "scored":
        surface = surface_measures(
            pred, label, spacing_mm=spacing_mm, tolerance_mm=tolerance_mm, device=device
        )
    voxel_ml = math.prod(map(float, spacing_mm)) / 1000
    return {
        "status": status,
        "dice": _ratio(2 * num_both, num_pred + num_label),
        "iou": _ratio(num_both, num_pred + num_label - num_both),
        "sensitivity": _ratio(num_both, num_label),
        "precision": _ratio(num_both, num_pred),
        **surface,
        "volume_difference_ml": (num_pred - num_label) * voxel_ml,
        "label_volume_ml": num_label * voxel_ml,
        "pred_volume_ml": num_pred * voxel_ml,
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


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
        directory: Is made if it is not there.
        rows: Of `score_case`, with `case_id` and `person` besides.
        class_names: As for `score_case`.
        tolerance_mm: That the rows were made with.
        refused: Cases that could not be scored, and why.
        num_worst: Cases to name as the worst.

    Returns:
        What `summary.json` holds: see `summarize`.

    Raises:
        OSError: If the system refuses; a file is then as it was.
    """
    summary = summarize(rows, class_names, tolerance_mm, refused or {}, num_worst)
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: plain(value, "") for name, value in row.items()} for row in rows)
    Path(directory).mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    for name, content in zip(FILES, (table.getvalue(), text), strict=True):
        with whole_file(Path(directory) / name) as temporary:
            temporary.write_text(content, encoding="utf-8", newline="")
    return summary


def read_scores(path: str | Path) -> list[Row]:
    """The rows of a `metrics.csv`, as they were given to `write_scores`.

    Raises:
        InputError: If it is not there, or not such a file.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            columns, *cells = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: expected a metrics.csv, got: {error}. Check the path.") from None
    if tuple(columns) != COLUMNS:
        raise InputError(
            f"{path}: expected the columns {','.join(COLUMNS)}, got {','.join(columns) or 'none'}. "
            "Name a metrics.csv."
        )
    rows: list[Row] = []
    for number, line in enumerate(cells, 1):
        try:
            row: Row = dict(zip(COLUMNS, line, strict=True))
            rows.append(row | {n: float(row[n] or "nan") for n in COLUMNS if n not in WORDS})
        except ValueError as error:
            raise InputError(
                f"{path}: expected words and numbers in row {number}, got: {error}. Write it anew."
            ) from None
    return rows
