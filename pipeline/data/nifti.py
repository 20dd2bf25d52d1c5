"""Checks headers of cases, and reads a prediction and its label."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation

from pipeline.data.cases import Case, files_of
from pipeline.errors import DatasetIssue, InputError, make_issue
from transforms.dicom import DicomError, is_dicom
from transforms.grid import TOLERANCE_MM, align, compare
from transforms.preprocess import MAX_VALUE, round_labels
from transforms.volumes import Header, VolumeError, read_header, read_voxels

SPACING_RANGE_MM = (0.001, 100.0)
Headers = dict[str, list[Header]]  # of `image` and `label`, one per file


def check_headers(
    case: Case, num_channels: int | None
) -> tuple[Headers | None, list[DatasetIssue]]:
    """Read and check the headers of a case, which are `None` if one is not valid.

    `num_channels` is that of an image, where the dataset declares it.
    """
    case_id, files = case["case_id"], files_of(case)
    headers: Headers = {key: [] for key in files}
    issues = []
    listed = [(key, path) for key, paths in files.items() for path in paths]
    for key, path in listed:
        image = headers["image"][0] if key == "label" and headers["image"] else None
        try:
            if image or key == "image" or not is_dicom(path):  # which is on its image's grid
                headers[key].append(read_header(path, image))
        except (VolumeError, DicomError) as error:
            issues.append(DatasetIssue(case_id, "unreadable", str(error)))
    if issues:
        return None, issues
    issues += _check_shapes(case_id, headers, num_channels)
    if any(issue.check == "shape" for issue in issues):
        return headers, issues  # nothing is known of axes that do not exist
    first, *others = [header for found in headers.values() for header in found]
    for (_, path), header in zip(listed, (first, *others), strict=True):
        issues += _check_geometry(case_id, os.path.basename(path), header)
    if all(issue.warning for issue in issues):  # else there may be no grid to compare
        for (key, _), header in zip(listed[1:], others, strict=True):
            issues += _check_grid(case_id, key, first, header)
    return headers, issues


def count_channels(headers: Headers) -> int:
    """Channels of an image: files, or voxels along the fourth axis of one."""
    images = headers["image"]
    is_4d = len(images) == 1 and len(images[0].shape) == 4
    return images[0].shape[3] if is_4d else len(images)


def _check_shapes(
    case_id: str, headers: Headers, num_channels: int | None
) -> Iterator[DatasetIssue]:
    several = len(headers["image"]) == 1  # a file per channel has no channels in it
    form = "an image of shape (H, W, D)" + several * " or (H, W, D, channels)"
    stated = [(image.shape, 3 + several, form) for image in headers["image"]]
    stated += [(label.shape, 3, "a label of shape (H, W, D)") for label in headers.get("label", [])]
    wrong = [one for one in stated if not 3 <= len(one[0]) <= one[1] or min(one[0][:3]) < 2]
    for shape, _, form in wrong:
        expected = f"{form}, each axis of 2 voxels or more"
        yield make_issue(case_id, "shape", expected, shape, "Convert it or exclude the case")
    channels = count_channels(headers)
    if not wrong and num_channels not in (None, channels):
        remedy = "Correct the dataset's description or the image"
        yield make_issue(case_id, "channels", f"{num_channels} image channels", channels, remedy)


def _check_geometry(case_id: str, name: str, header: Header) -> Iterator[DatasetIssue]:
    """The first thing that is wrong with the affine of one file."""
    affine, (low, high) = header.affine, SPACING_RANGE_MM
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    shown, zooms = ("x".join(f"{s:g}" for s in sizes) for sizes in (spacing, header.zooms_mm))
    remedy = "Correct the header"
    if not np.isfinite(affine).all():
        expected = f"an affine of finite numbers in {name}"
        yield make_issue(case_id, "spacing", expected, affine[:3].tolist(), remedy)
    elif (spacing < low).any() or (spacing > high).any():
        expected = f"a spacing of {low:g} to {high:g} mm in {name}"
        yield make_issue(case_id, "spacing", expected, f"{shown} mm", remedy)
    elif abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        expected = f"an affine with three directions in {name}"
        yield make_issue(case_id, "singular", expected, "a singular one", remedy)
    elif not header.is_oriented:
        expected = f"an orientation in the header of {name}"
        got = "none (in NIfTI, sform and qform codes are 0)"
        remedy = "Which side is left is a guess; set it"
        yield make_issue(case_id, "orientation", expected, got, remedy, warning=True)
    elif not np.allclose(spacing, header.zooms_mm, rtol=0.01):
        expected = f"one spacing in the header of {name}"
        got = f"{shown} mm by the affine, which is used, and {zooms} mm by pixdim"
        yield make_issue(case_id, "spacing", expected, got, "See which is right", warning=True)


def _check_grid(case_id: str, key: str, image: Header, other: Header) -> Iterator[DatasetIssue]:
    """Report an image and its label, or another channel, that are not on one grid."""
    what, both = "channel", "the image's channels"
    if key == "label":
        what, both = "label", "image and label"
    # a label is put into the image's order of axes when it is loaded, a channel is not
    look = align if key == "label" else compare
    found = look(other.shape[:3], other.affine, image.shape[:3], image.affine)
    remedy = f"Resample the {what} or exclude the case"
    if found.shape != image.shape[:3]:
        got = f"{image.shape[:3]} and {other.shape[:3]}"
        yield make_issue(case_id, "shape", f"{both} of one shape", got, remedy)
    elif not found.distance_mm <= TOLERANCE_MM:
        expected = f"{what} affine to match image within {TOLERANCE_MM} mm"
        yield make_issue(case_id, "affine", expected, f"{found.distance_mm:.3f} mm", remedy)


def read_pair(pred_path: Path, label_path: Path) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Read a prediction and its label, `(H, W, D)` uint8, and their voxel size in mm by axis.

    The label is on the same grid, and is put into the prediction's order and direction of axes.

    Raises:
        InputError: If a file is not a label map that can be read, or the grids differ; without the
            case id.
    """
    grid, pred = _read_label_map(pred_path, "prediction")
    other, label = _read_label_map(label_path, "label", grid)
    found = align(other.shape, other.affine, grid.shape, grid.affine)
    expected, got = "prediction and label of one shape", f"{grid.shape} and {other.shape}"
    if found.shape == grid.shape:
        expected = f"prediction affine to match label within {TOLERANCE_MM} mm"
        got = f"{found.distance_mm:.3f} mm"
    _demand(found.distance_mm <= TOLERANCE_MM, expected, got, "Resample the prediction")
    spacing_mm = np.linalg.norm(grid.affine[:3, :3], axis=0).tolist()
    return pred, apply_orientation(label, found.change), spacing_mm


def _read_label_map(path: Path, kind: str, grid: Header | None = None) -> tuple[Header, np.ndarray]:
    """Header and `(H, W, D)` uint8 voxels, whatever type the file stores them as."""
    try:
        header = read_header(str(path), grid)
        expected = f"a {kind} of shape (H, W, D)"
        _demand(len(header.shape) == 3, expected, header.shape, "Store one label map")
        voxels = round_labels(read_voxels(str(path), header))
    except (VolumeError, DicomError) as error:
        named = f"{path.name} of the {kind}"
        raise InputError(str(error).replace(path.name, named, 1)) from error
    for issue in _check_geometry("", f"the {kind}", header):
        if not issue.warning:
            raise InputError(issue.message)
    between = voxels[voxels != np.rint(voxels)]  # a NaN is no integer
    remedy = "Resample it with nearest neighbours"
    _demand(not between.size, f"integer values in the {kind}", between[:1], remedy)
    outside = voxels[(voxels < 0) | (voxels > MAX_VALUE)]
    expected = f"values 0 to {MAX_VALUE} in the {kind}"
    _demand(not outside.size, expected, outside[:1], "Correct it")
    return header, voxels.astype(np.uint8)


def _demand(condition: object, expected: str, got: object, remedy: str) -> None:
    if not condition:
        shown = f"{got[0]:g}" if isinstance(got, np.ndarray) else got
        raise InputError(f"expected {expected}, got {shown}. {remedy}.")
