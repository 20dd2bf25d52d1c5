"""Predictions and labels from two folders: matched by name, and read onto one grid."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation

from pipeline.data.listing import ENDINGS, case_name
from pipeline.data.nifti import Header, VolumeError, read_header, slabs
from pipeline.errors import InputError
from transforms.grid import TOLERANCE_MM, align
from transforms.labels import MAX_VALUE, round_labels

Pair = tuple[str, Path, Path]  # case id, prediction, label


def match(pred_dir: Path, label_dir: Path) -> tuple[list[Pair], dict[str, str]]:
    """Pairs of NIfTI files of one case id, in order of it.

    Returns:
        The pairs, and for each case that makes none the reason.

    Raises:
        InputError: If a folder is not there, or the two have no case in common.
    """
    preds, labels = _files(pred_dir, "predictions"), _files(label_dir, "labels")
    if not set(preds) & set(labels):
        raise InputError(
            f"{pred_dir}: expected NIfTI files named as those of {label_dir}, got {len(preds)} "
            f"and {len(labels)} cases, none in common. Check the paths."
        )
    pairs, refused = [], {}
    for case_id in sorted({*preds, *labels}):
        found = preds.get(case_id, []), labels.get(case_id, [])
        for kind, folder, files in zip(
            ("prediction", "label"), (pred_dir, label_dir), found, strict=True
        ):
            if not files:
                refused[case_id] = f"expected a {kind} in {folder}, found none. "
                refused[case_id] += "Add it or take the other away."
            elif len(files) > 1:
                names = " and ".join(file.name for file in files)
                refused[case_id] = f"expected one {kind} in {folder}, got {names}. Remove one."
        if case_id not in refused:
            pairs.append((case_id, found[0][0], found[1][0]))
    return pairs, refused


def _files(folder: Path, what: str) -> dict[str, list[Path]]:
    """NIfTI files by case id; hidden ones are left out."""
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
    # what prediction writes beside a label map is none
    beside = [
        name for name in found if name.removesuffix("_probabilities") in found.keys() - {name}
    ]
    return {name: files for name, files in found.items() if name not in beside}


def read_pair(pred_path: Path, label_path: Path) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """A prediction, and its label in the prediction's order and direction of axes.

    Args:
        pred_path: Of the prediction.
        label_path: Of the label: on the same grid, whichever way its file puts that.

    Returns:
        `(H, W, D)` uint8 prediction and label, and the voxel size in mm in array-axis order.

    Raises:
        InputError: If a file cannot be read or is not a label map, or the grids differ; without
            the case id.
    """
    pred_grid, label_grid = _grid(pred_path, "prediction"), _grid(label_path, "label")
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
    pred = _voxels(pred_path, pred_grid, "prediction")
    label = apply_orientation(_voxels(label_path, label_grid, "label"), found.change)
    return pred, label, np.linalg.norm(pred_grid.affine[:3, :3], axis=0).tolist()


def _grid(path: Path, kind: str) -> Header:
    try:
        header = read_header(str(path))
    except VolumeError as error:
        raise _unreadable(path, kind, error) from error
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
    return header


def _voxels(path: Path, header: Header, kind: str) -> np.ndarray:
    """`(H, W, D)` uint8, whatever type the file stores them as."""
    voxels, at = np.empty(math.prod(header.shape), np.uint8), 0
    try:
        for piece in map(round_labels, slabs(str(path), header)):
            if not (piece == np.rint(piece)).all():  # nor is a NaN
                wrong = piece[piece != np.rint(piece)][0]
                raise InputError(
                    f"expected integer values in the {kind}, got {wrong:g}. "
                    "Resample it with nearest neighbours."
                )
            if piece.min() < 0 or piece.max() > MAX_VALUE:
                wrong = piece[(piece < 0) | (piece > MAX_VALUE)][0]
                raise InputError(
                    f"expected values 0 to {MAX_VALUE} in the {kind}, got {wrong:g}. Correct it."
                )
            voxels[at : at + len(piece)] = piece
            at += len(piece)
    except VolumeError as error:
        raise _unreadable(path, kind, error) from error
    return voxels.reshape(header.shape, order="F")


def _unreadable(path: Path, kind: str, error: VolumeError) -> InputError:
    return InputError(
        f"expected a readable NIfTI file {path.name} of the {kind}, got {error}. Replace the file."
    )
