"""Predictions and labels from two folders: matched by name, and read onto one grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation

from pipeline.data.cases import ENDINGS, case_name
from pipeline.data.nifti import Header, VolumeError, read_header, read_voxels
from pipeline.errors import InputError, require
from transforms.grid import TOLERANCE_MM, align
from transforms.preprocess import MAX_VALUE, round_labels

Pair = tuple[str, Path, Path]  # case id, prediction, label


def match(pred_dir: Path, label_dir: Path) -> tuple[list[Pair], dict[str, str]]:
    """Match the NIfTI files of two folders by case id.

    Returns:
        The pairs, in order of the case id, and the reason for each case that makes none.

    Raises:
        InputError: If a folder does not exist, or the two have no case in common.
    """
    preds, labels = _files(pred_dir, "predictions"), _files(label_dir, "labels")
    expected = f"NIfTI files named as those of {label_dir}"
    got = f"{len(preds)} and {len(labels)} cases, none in common"
    require(preds.keys() & labels.keys(), pred_dir, expected, got, "Check the paths.")
    refused = {}
    for kind, folder, found in ("prediction", pred_dir, preds), ("label", label_dir, labels):
        for case_id in {*preds, *labels}:
            names = [file.name for file in found.get(case_id, [])]
            if not names:
                reason = (
                    f"expected a {kind} in {folder}, found none. Add it or take the other away."
                )
                refused[case_id] = reason
            elif len(names) > 1:
                got = " and ".join(names)
                refused[case_id] = f"expected one {kind} in {folder}, got {got}. Remove one."
    whole = sorted(preds.keys() & labels.keys() - refused.keys())
    return [(name, preds[name][0], labels[name][0]) for name in whole], refused


def _files(folder: Path, what: str) -> dict[str, list[Path]]:
    """NIfTI files by case id, without hidden ones and predicted probabilities."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        expected = f"{folder}: expected a folder of {what}"
        raise InputError(f"{expected}, got: {error.strerror}. Check the path.") from None
    found: dict[str, list[Path]] = {}
    for path in paths:
        if path.name.endswith(ENDINGS) and not path.name.startswith(".") and path.is_file():
            found.setdefault(case_name(path), []).append(path)
    others = {
        name for name in found if name.removesuffix("_probabilities") in found.keys() - {name}
    }
    return {name: files for name, files in found.items() if name not in others}


def read_pair(pred_path: Path, label_path: Path) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Read a prediction, and its label on the same grid in any order and direction of axes.

    Returns:
        `(H, W, D)` uint8 prediction and label, in the prediction's order and direction of axes,
        and the voxel size in mm in array-axis order.

    Raises:
        InputError: If a file cannot be read or is not a label map, or the grids differ; without
            the case id.
    """
    pred_grid, pred = _read_label_map(pred_path, "prediction")
    label_grid, label = _read_label_map(label_path, "label")
    found = align(label_grid.shape, label_grid.affine, pred_grid.shape, pred_grid.affine)
    got, remedy = f"{pred_grid.shape} and {label_grid.shape}", "Resample the prediction"
    _require(found.shape == pred_grid.shape, "prediction and label of one shape", got, remedy)
    expected = f"prediction affine to match label within {TOLERANCE_MM} mm"
    is_near, got = found.distance_mm <= TOLERANCE_MM, f"{found.distance_mm:.3f} mm"
    _require(is_near, expected, got, remedy)
    label = apply_orientation(label, found.change)
    return pred, label, np.linalg.norm(pred_grid.affine[:3, :3], axis=0).tolist()


def _read_label_map(path: Path, kind: str) -> tuple[Header, np.ndarray]:
    """Header and `(H, W, D)` uint8 voxels, whatever type the file stores them as."""
    try:
        header = read_header(str(path))
        expected = f"a {kind} of shape (H, W, D)"
        _require(len(header.shape) == 3, expected, header.shape, "Store one label map")
        axes, shown = header.affine[:3, :3], header.affine[:3].tolist()
        is_sound = np.isfinite(header.affine).all() and (
            abs(np.linalg.det(axes)) > 1e-3 * np.linalg.norm(axes, axis=0).prod()
        )
        expected = f"an affine with three directions in the {kind}"
        _require(is_sound, expected, shown, "Correct the header")
        voxels = round_labels(read_voxels(str(path), header))
    except VolumeError as error:
        named = f"{path.name} of the {kind}"
        raise InputError(str(error).replace(path.name, named, 1)) from error
    outside = (voxels < 0) | (voxels > MAX_VALUE)
    for wrong, expected, remedy in (  # a NaN is no integer
        (voxels != np.rint(voxels), "integer values", "Resample it with nearest neighbours"),
        (outside, f"values 0 to {MAX_VALUE}", "Correct it"),
    ):
        got = f"{voxels[wrong][0]:g}" if wrong.any() else ""
        _require(not got, f"{expected} in the {kind}", got, remedy)
    return header, voxels.astype(np.uint8)


def _require(condition: object, expected: str, got: object, remedy: str) -> None:
    if not condition:
        raise InputError(f"expected {expected}, got {got}. {remedy}.")
