"""Reads DICOM: the series of a folder as one volume.

MONAI's readers are not used: PydicomReader orders slices by Instance Number and joins two series,
ITKReader picks one of two and reads uneven gaps as even.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.misc import is_dicom

CONVERT = "Convert the series to NIfTI."
# of a voxel: a slice may be so far from its place, since positions are rounded in files; where one
# of four or more slices is missing, some slice is a third of a voxel or more from its place
SHIFT = 0.2
REQUIRED = (
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SeriesInstanceUID",
    "Rows", "Columns",
)  # fmt: skip


class DicomError(ValueError):
    """A folder that cannot be read as one volume; the message is one line."""


def dicom_files(folder: str | Path) -> list[Path]:
    """Return the files that begin as DICOM files do, by name, but for hidden ones and DICOMDIR."""
    return [path for path in _visible(Path(folder)) if path.is_file() and is_dicom(path)]


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name[0] != "." and p.name != "DICOMDIR")


def read_series(folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the one series that a folder holds, one file per slice.

    Returns voxels `(H, W, D)` float32, rescaled by each slice's own slope and intercept, with the
    first axis along the rows of the slices, and the affine `(4, 4)` float64 to RAS mm. A
    `DicomError` says in one line that the files are not the slices of one regular volume.
    """
    slices, affine = _ordered_slices(Path(folder), pixels=True)
    return np.stack([_values(one).T for one in slices], axis=-1), affine


def read_geometry(folder: str | Path) -> tuple[tuple[int, int, int], np.ndarray]:
    """Return shape and affine of what `read_series` returns, without reading pixels."""
    slices, affine = _ordered_slices(Path(folder), pixels=False)
    return (int(slices[0].Columns), int(slices[0].Rows), len(slices)), affine


def read_slices(folder: str | Path) -> list[Any]:
    """Read the slices of a series in the order of `read_series`, as pydicom datasets."""
    return _ordered_slices(Path(folder), pixels=True)[0]


def _ordered_slices(folder: Path, *, pixels: bool) -> tuple[list[Any], np.ndarray]:
    """Return slices in the order of their places, and the affine `(4, 4)` to RAS mm."""
    files = dicom_files(folder)
    if others := sorted({*_visible(folder)} - {*files}):  # a damaged slice may be among them
        raise DicomError(
            f"expected nothing but DICOM files in {folder.name}, got {others[0].name}. Take it out."
        )
    if len(files) < 2:
        raise DicomError(f"expected two DICOM slices or more in {folder.name}, got {len(files)}.")
    slices = [_read_slice(path, pixels) for path in files]
    _require_one_series(slices)
    x, y = np.array(slices[0].ImageOrientationPatient, float).reshape(2, 3)
    places = np.array([one.ImagePositionPatient for one in slices], float)
    order = np.argsort(places @ np.cross(x, y), kind="stable")
    dy, dx = (float(step) for step in slices[0].PixelSpacing)  # between rows, between columns
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1] = x * dx, y * dy
    lps[:3, 2], lps[:3, 3] = _step(places[order], np.cross(x, y), min(dx, dy)), places[order[0]]
    return [slices[n] for n in order], np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def _read_slice(path: Path, pixels: bool) -> Any:
    """Read one slice, its pixels not yet decoded: a pydicom dataset."""
    try:
        one = pydicom.dcmread(path, stop_before_pixels=not pixels)
        missing = [name for name in REQUIRED if not one.get(name)]
        has_frames = one.get("NumberOfFrames", 1) != 1 or "PerFrameFunctionalGroupsSequence" in one
        is_grey = one.get("SamplesPerPixel", 1) == 1 and "ModalityLUTSequence" not in one
    except Exception as error:  # pydicom raises many kinds for a broken file
        raise DicomError(f"expected a readable slice {path.name}, got: {_first(error)}.") from error
    if has_frames:
        raise DicomError(f"expected one slice per file, got {path.name} with frames. {CONVERT}")
    if missing:
        raise DicomError(f"expected {missing[0]} in {path.name}, found none. {CONVERT}")
    if not is_grey:
        raise DicomError(
            f"expected grey values with slope and intercept in {path.name}, got colours or a "
            f"lookup table. {CONVERT}"
        )
    return one


def _require_one_series(slices: Sequence[Any]) -> None:
    if (number := len({one.SeriesInstanceUID for one in slices})) > 1:
        raise DicomError(
            f"expected one DICOM series, got {number}. Put each into a folder of its own."
        )
    for name in ("Rows", "Columns", "ImageOrientationPatient", "PixelSpacing"):
        values = np.array([one.get(name) for one in slices], float)
        if not np.allclose(values, values[0], rtol=0, atol=1e-4):
            raise DicomError(f"expected slices of one {name}, got several. {CONVERT}")
    axes = np.array(slices[0].ImageOrientationPatient, float).reshape(2, 3)
    if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-3) or min(slices[0].PixelSpacing) <= 0:
        raise DicomError(f"expected rows at right angles to columns, got axes {axes.tolist()}.")


def _step(places: np.ndarray, normal: np.ndarray, pixel: float) -> np.ndarray:
    """Return the step between slices, `(3,)` mm, if all are equally far apart and on one line.

    `places` `(D, 3)` mm are sorted along the slices' `normal`; `pixel` is its smaller edge in mm.
    """
    step = (places[-1] - places[0]) / (len(places) - 1)
    between = np.diff(places @ normal)
    if not between.min() > 1e-3:
        raise DicomError(
            "expected slices at different places, got two at one (a series over time, or of "
            f"several contrasts). {CONVERT}"
        )
    even = places[0] + np.arange(len(places))[:, None] * step
    if np.abs((places - even) @ normal).max() > SHIFT * (step @ normal):
        raise DicomError(
            f"expected slices at even distances, got {between.min():.3f} to {between.max():.3f} mm "
            "(a slice is missing, or one too many). Complete the series or convert it to NIfTI."
        )
    across = (places - places[0]) - ((places - places[0]) @ normal)[:, None] * normal
    if (shift := np.linalg.norm(across, axis=1).max()) > SHIFT * pixel:
        raise DicomError(
            "expected slices stacked at right angles to their planes, got a shift of "
            f"{shift:.3f} mm (a tilted gantry). {CONVERT}"
        )
    return step


def _values(one: Any) -> np.ndarray:
    """`(rows, columns)` float32, rescaled (DICOM PS3.3 C.11.1)."""
    try:
        stored = one.pixel_array
    except Exception as error:  # a codec that is not there, or pixels cut off
        raise DicomError(
            f"expected pixels that can be decoded in {Path(one.filename).name}, got: "
            f"{_first(error)}. Replace or decompress the series."
        ) from error
    slope, intercept = one.get("RescaleSlope"), one.get("RescaleIntercept") or 0
    slope = 1.0 if slope is None else float(slope)
    return (stored.astype(np.float64) * slope + float(intercept)).astype(np.float32)


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
