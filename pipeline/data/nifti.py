"""Reads NIfTI files and DICOM series, and notices what nibabel does not.

A header is compared with the size of its file before anything of that size is allocated, and a
compressed file is read to its end, where its checksum is.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation

from pipeline.data.cases import Case, files_of
from pipeline.errors import DatasetIssue, InputError, make_issue
from transforms.dicom import DicomError, is_dicom, read_geometry, read_series
from transforms.grid import TOLERANCE_MM, align, compare
from transforms.preprocess import MAX_VALUE, round_labels

MAX_TRAILING_BYTES = 2**16  # after the voxels; some writers pad
MAX_INFLATION = 1032  # bytes that DEFLATE can make of one
SPACING_RANGE_MM = (0.001, 100.0)


class VolumeError(ValueError):
    """A file that is not a whole, readable volume; the message is one line that names the file."""


@dataclass(frozen=True)
class Header:
    """The facts that a file states about its voxels."""

    shape: tuple[int, ...]  # in voxels: three axes and, for channels, a fourth
    affine: np.ndarray  # (4, 4) from voxel to world RAS+ in mm
    dtype: np.dtype  # of the voxels as stored
    offset: int = 0  # of the first voxel in the decompressed file, bytes
    slope: float = 1.0  # stored values are multiplied by it, then the intercept is added
    intercept: float = 0.0
    is_oriented: bool = True  # whether the file states its affine, so that left is known from right
    zooms_mm: tuple[float, ...] = ()  # voxel size that the header states beside the affine

    @property
    def num_bytes(self) -> int:
        """Size of the voxels of all channels as stored."""
        return math.prod(self.shape) * self.dtype.itemsize


Headers = dict[str, list[Header]]  # of `image` and `label`, one per file


def read_header(path: str) -> Header:
    """Read the header of a NIfTI file or of a DICOM series, without trailing axes of one voxel.

    Raises:
        VolumeError: If there is no valid header, or it states more than the file can hold.
        DicomError: If a folder is not one series.
    """
    with _name_file(path):
        if is_dicom(path):
            shape, affine = read_geometry(path)
            zooms = tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist())
            return Header(shape, affine, np.dtype(np.float32), zooms_mm=zooms)
        with _open(path) as file:
            header = _parse(file.read(540))
        most = os.path.getsize(path) * (MAX_INFLATION if path.endswith(".gz") else 1)
        _require(header.dtype.kind in "iuf", f"voxels of type {header.dtype}")
        _require(min(header.shape, default=0) > 0, f"a shape of {header.shape}")
        _require(header.offset >= 348, f"voxels from byte {header.offset} on")
        claim = f"a header that claims {header.num_bytes} bytes of voxels, in a file that can hold"
        _require(header.offset + header.num_bytes <= most, f"{claim} {most} at most")
        return header


def read_voxels(path: str, header: Header, content: bytes | None = None) -> np.ndarray:
    """Read the voxels of a file or folder, to its end; `content` is its bytes, if they are read.

    The array has the header's shape, the first axis running fastest. It holds stored values in
    native byte order, or float64 where the header scales them.

    Raises:
        VolumeError: If the file ends early, continues for long after the voxels, or its checksum
            is wrong.
        DicomError: If a slice's pixels cannot be decoded.
    """
    with _name_file(path):
        if is_dicom(path):
            return read_series(path)[0]
        with _open(path, content) as file:
            file.seek(header.offset)
            stored = file.read(header.num_bytes)
            _require(len(stored) == header.num_bytes, "an end before the last voxel")
            rest, most = len(file.read(MAX_TRAILING_BYTES + 1)), MAX_TRAILING_BYTES
            _require(rest <= most, f"more than {most} bytes after the last voxel")
    voxels = np.frombuffer(stored, header.dtype).reshape(header.shape, order="F")
    if (header.slope, header.intercept) != (1.0, 0.0):
        return voxels.astype(np.float64) * header.slope + header.intercept
    return voxels.astype(header.dtype.newbyteorder("="), copy=False)


def _parse(block: bytes) -> Header:
    kinds = [k for k in (nib.Nifti1Header, nib.Nifti2Header) if k.may_contain_header(block)]
    _require(kinds, "no NIfTI header")
    block = block[: kinds[0].sizeof_hdr]
    stated = kinds[0](block, check=False)  # the check would put 1 for 0 in pixdim
    has_sizes = stated["pixdim"][1:4][: stated["dim"][0]].all()
    _require(stated["sform_code"] > 0 or has_sizes, "a voxel size of 0 in pixdim and no sform")
    header: Any = kinds[0](block)
    shape = tuple(int(n) for n in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    slope, intercept = header.get_slope_inter()
    return Header(
        shape,
        header.get_best_affine(),
        header.get_data_dtype(),
        offset=int(header["vox_offset"]),
        slope=1.0 if slope is None else float(slope),
        intercept=float(intercept or 0),
        is_oriented=bool(header["sform_code"] > 0 or header["qform_code"] > 0),
        zooms_mm=tuple(float(z) for z in header.get_zooms()[:3]),
    )


def _require(condition: Any, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _open(path: str, content: bytes | None = None) -> Any:
    source = path if content is None else io.BytesIO(content)
    if path.endswith(".gz"):
        return gzip.open(source)
    return open(path, "rb") if content is None else source


@contextlib.contextmanager
def _name_file(path: str) -> Iterator[None]:
    """Turn whatever is wrong with a file into a VolumeError that names it."""
    try:
        yield
    except (DicomError, MemoryError):
        raise
    except Exception as error:  # nibabel raises many kinds for an invalid header
        got = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, EOFError):
            got = "an end before that of its gzip stream"
        got, name = got.splitlines()[0].rstrip("."), os.path.basename(path)
        message = f"expected a readable NIfTI file {name}, got {got}. Replace the file."
        raise VolumeError(message) from error


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
        try:
            headers[key].append(read_header(path))
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
        got = "none (sform and qform codes are 0)"
        remedy = "Which side is left is a guess; set one of the two"
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
    other, label = _read_label_map(label_path, "label")
    found = align(other.shape, other.affine, grid.shape, grid.affine)
    expected, got = "prediction and label of one shape", f"{grid.shape} and {other.shape}"
    if found.shape == grid.shape:
        expected = f"prediction affine to match label within {TOLERANCE_MM} mm"
        got = f"{found.distance_mm:.3f} mm"
    _demand(found.distance_mm <= TOLERANCE_MM, expected, got, "Resample the prediction")
    spacing_mm = np.linalg.norm(grid.affine[:3, :3], axis=0).tolist()
    return pred, apply_orientation(label, found.change), spacing_mm


def _read_label_map(path: Path, kind: str) -> tuple[Header, np.ndarray]:
    """Header and `(H, W, D)` uint8 voxels, whatever type the file stores them as."""
    try:
        header = read_header(str(path))
        expected = f"a {kind} of shape (H, W, D)"
        _demand(len(header.shape) == 3, expected, header.shape, "Store one label map")
        voxels = round_labels(read_voxels(str(path), header))
    except VolumeError as error:
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
