"""Predictions and labels from two folders: matched by name, and read onto one grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation

from pipeline.data.cases import ENDINGS, case_name
from pipeline.data.nifti import Header, VolumeError, read_header, read_voxels
from pipeline.errors import InputError
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
    if not set(preds) & set(labels):
        raise InputError(
            f"{pred_dir}: expected NIfTI files named as those of {label_dir}, got {len(preds)} "
            f"and {len(labels)} cases, none in common. Check the paths."
        )
    pairs, refused = [], {}
    for case_id in sorted({*preds, *labels}):
        sides = ("prediction", pred_dir, preds), ("label", label_dir, labels)
        for kind, folder, found in sides:
            files = found.get(case_id, [])
            if not files:
                refused[case_id] = f"expected a {kind} in {folder}, found none. "
                refused[case_id] += "Add it or take the other away."
            elif len(files) > 1:
                names = " and ".join(file.name for file in files)
                refused[case_id] = f"expected one {kind} in {folder}, got {names}. Remove one."
        if case_id not in refused:
            pairs.append((case_id, preds[case_id][0], labels[case_id][0]))
    return pairs, refused


def _files(folder: Path, what: str) -> dict[str, list[Path]]:
    """NIfTI files by case id, without hidden ones and predicted probabilities."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(
            f"{folder}: expected a folder of {what}, got: {error.strerror}. Check the path."
        ) from None
    found: dict[str, list[Path]] = {}
    for path in paths:
        if path.name.endswith(ENDINGS) and not path.name.startswith(".") and path.is_file():
            found.setdefault(case_name(path), []).append(path)
    return {
        name: files
        for name, files in found.items()
        if name.removesuffix("_probabilities") not in found.keys() - {name}
    }


def read_pair(pred_path: Path, label_path: Path) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Read a prediction, and its label in the prediction's order and direction of axes.

    Args:
        pred_path: Path of the prediction.
        label_path: Path of the label, on the same grid in any order and direction of axes.

    Returns:
        `(H, W, D)` uint8 prediction and label, and the voxel size in mm in array-axis order.

    Raises:
        InputError: If a file cannot be read or is not a label map, or the grids differ; without
            the case id.
    """
    pred_grid, pred = _read_label_map(pred_path, "prediction")
    label_grid, label = _read_label_map(label_path, "label")
    found = align(label_grid.shape, label_grid.affine, pred_grid.shape, pred_grid.affine)
    if found.shape != pred_grid.shape:
        raise InputError(
            f"expected prediction and label of one shape, got {pred_grid.shape} and "
            f"{label_grid.shape}. Resample the prediction."
        )
    if not found.distance_mm <= TOLERANCE_MM:
        raise InputError(
            f"expected prediction affine to match label within {TOLERANCE_MM} mm, got "
            f"{found.distance_mm:.3f} mm. Resample the prediction."
        )
    label = apply_orientation(label, found.change)
    return pred, label, np.linalg.norm(pred_grid.affine[:3, :3], axis=0).tolist()


def _read_label_map(path: Path, kind: str) -> tuple[Header, np.ndarray]:
    """Header and `(H, W, D)` uint8 voxels, whatever type the file stores them as."""
    try:
        header = read_header(str(path))
        _require_grid(header, kind)
        voxels = round_labels(read_voxels(str(path), header))
    except VolumeError as error:
        named = f"{path.name} of the {kind}"
        raise InputError(str(error).replace(path.name, named, 1)) from error
    if not (is_whole := voxels == np.rint(voxels)).all():  # nor is a NaN
        raise InputError(
            f"expected integer values in the {kind}, got {voxels[~is_whole][0]:g}. Resample it "
            "with nearest neighbours."
        )
    if voxels.min() < 0 or voxels.max() > MAX_VALUE:
        wrong = voxels[(voxels < 0) | (voxels > MAX_VALUE)][0]
        raise InputError(
            f"expected values 0 to {MAX_VALUE} in the {kind}, got {wrong:g}. Correct it."
        )
    return header, voxels.astype(np.uint8)


def _require_grid(header: Header, kind: str) -> None:
    if len(header.shape) != 3:
        raise InputError(
            f"expected a {kind} of shape (H, W, D), got {header.shape}. Store one label map."
        )
    axes = header.affine[:3, :3]
    is_finite = np.isfinite(header.affine).all()
    if not is_finite or abs(np.linalg.det(axes)) <= 1e-3 * np.linalg.norm(axes, axis=0).prod():
        raise InputError(
            f"expected an affine with three directions in the {kind}, got "
            f"{header.affine[:3].tolist()}. Correct the header."
        )
