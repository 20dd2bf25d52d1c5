"""Reads DICOM Segmentations on the grid of their image; a segment's number is its label value."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.uid import UID, RTStructureSetStorage

from transforms.dicom import END, PIXELS, SHIFT, DicomError, is_dicom, read_file
from transforms.formats import LPS_TO_RAS

KINDS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # the latter: a label map
CONVERT = "Convert the label to NIfTI or DICOM SEG"
Place = tuple[np.ndarray, np.ndarray, np.ndarray]  # voxel of the first pixel; steps (3,) to others


def find_dicom(path: str | Path) -> list[Path]:
    """Return the file of a label, or the files in its folder, that begin as DICOM files do."""
    path = Path(path)
    paths = sorted(path.glob("[!.]*")) if path.is_dir() else [path]
    return [one for one in paths if one.is_file() and is_dicom(one)]


def read_segment_names(path: str | Path) -> dict[int, str]:
    """Read the names of the segments of a DICOM Segmentation, by number.

    Raises:
        DicomError: If it is none.
    """
    with _explain(path):
        return _segments(_read(path, pixels=False))


def check_segmentation(path: str | Path, shape: Sequence[int], affine: np.ndarray) -> None:
    """Raise a DicomError unless a path is a DICOM Segmentation on part of a grid."""
    with _explain(path):
        _locate_frames(_read(path, pixels=False), shape, affine, Path(path).name)


def read_segmentation(path: str | Path, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """Read a DICOM Segmentation on a grid, of which its frames show some of the planes.

    Args:
        path: A file, or a folder that holds one.
        shape: `(H, W, D)` of the grid.
        affine: `(4, 4)` of the grid to RAS mm.

    Returns:
        `(H, W, D)` uint8; 0 where there is no frame.

    Raises:
        DicomError: If it is none, or its segments overlap.
    """
    label = np.zeros(shape, np.uint8, order="F")
    with _explain(path):
        one = _read(path, pixels=True)
        places = _locate_frames(one, shape, affine, Path(path).name)
        frames = one.pixel_array.reshape(len(places), one.Rows, one.Columns)
        values = [1] * len(frames)
        if one.SegmentationType == "BINARY":
            values = _of_frames(one, "SegmentIdentificationSequence", "ReferencedSegmentNumber")
        for frame, value, (first, along, down) in zip(frames, values, places, strict=True):
            axes = np.abs([down, along]).argmax(axis=1)
            ends = first + down * (one.Rows - 1) + along * (one.Columns - 1)
            low, high = np.minimum(first, ends), np.maximum(first, ends) + 1
            box = label[tuple(map(slice, low, high))]
            part = np.moveaxis(box, axes, (0, 1))[..., 0]
            new = frame[:: down.sum(), :: along.sum()] * np.uint8(value)
            if ((part > 0) & (new > 0) & (part != new)).any():
                raise DicomError(
                    f"expected segments that do not overlap in {Path(path).name}, got some that "
                    f"do. {CONVERT} without overlap."
                )
            part[new > 0] = new[new > 0]
    return label


@contextlib.contextmanager
def _explain(path: str | Path) -> Iterator[None]:
    """Turn what pydicom raises about a file that is broken into one line."""
    try:
        yield
    except (DicomError, MemoryError):
        raise
    except Exception as error:
        got = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
        name = Path(path).name
        raise DicomError(f"expected a DICOM Segmentation {name}, got: {got}. {CONVERT}.") from error


def _read(path: str | Path, *, pixels: bool) -> Any:
    """Read a DICOM Segmentation of a kind that is a label map: a pydicom dataset."""
    name, files = Path(path).name, find_dicom(path)
    if len(files) != 1:
        raise DicomError(f"expected one DICOM file in {name}, got {len(files)}. {CONVERT}.")
    one = read_file(files[0], END if pixels else PIXELS)
    kind = UID(one.get("SOPClassUID", ""))
    if kind == RTStructureSetStorage:
        raise DicomError(
            f"expected a label map as label, got {name} with the contours of an RTSTRUCT. Convert "
            "it to NIfTI with plastimatch."
        )
    expected = f"expected a DICOM Segmentation {name}, got"
    if kind not in KINDS:
        raise DicomError(f"{expected} {kind.name or 'DICOM of no kind'}. {CONVERT}.")
    if one.SegmentationType not in ("BINARY", "LABELMAP"):
        raise DicomError(f"{expected} one of type {one.SegmentationType}. {CONVERT}, as BINARY.")
    if (most := max(_segments(one), default=0)) > 255:
        raise DicomError(f"{expected} segment number {most}. Use numbers up to 255.")
    return one


def _segments(one: Any) -> dict[int, str]:
    named = {int(item.SegmentNumber): str(item.SegmentLabel) for item in one.SegmentSequence}
    return {number: named[number] for number in sorted(named) if number}  # 0: the background


def _of_frames(one: Any, group: str, name: str) -> list[Any]:
    """Return an attribute of each frame, its own or the one that all share."""
    shared = one.get("SharedFunctionalGroupsSequence", [{}])[0]
    frames = one.PerFrameFunctionalGroupsSequence
    groups = [getattr(frame if group in frame else shared, group) for frame in frames]
    return [getattr(items[0], name) for items in groups]


def _locate_frames(one: Any, shape: Sequence[int], affine: np.ndarray, name: str) -> list[Place]:
    """Return where each frame lies, if its pixels are voxels of a grid."""
    if len(shape) != 3 or not np.isfinite(affine).all() or not np.linalg.det(affine):
        return []  # the fault is the image's
    axes = np.array(_of_frames(one, "PlaneOrientationSequence", "ImageOrientationPatient"), float)
    sizes = np.array(_of_frames(one, "PixelMeasuresSequence", "PixelSpacing"), float)
    origins = np.array(_of_frames(one, "PlanePositionSequence", "ImagePositionPatient"), float)
    to_voxel = np.linalg.inv(affine) @ LPS_TO_RAS
    steps = axes.reshape(-1, 2, 3) * sizes[:, ::-1, None]  # from column to column, row to row
    points = np.concatenate([origins[:, None], steps], axis=1) @ to_voxel[:3, :3].T
    points[:, 0] += to_voxel[:3, 3]
    voxels = np.rint(points).astype(int)
    counts = np.array([1, one.Columns - 1, one.Rows - 1])
    off = (np.abs(points - voxels) * counts[:, None]).sum(axis=1).max()
    first, along, down = np.moveaxis(voxels, 1, 0)
    ends = first + along * counts[1] + down * counts[2]
    is_axis = (np.abs(voxels[:, 1:]).sum(axis=2) == 1).all() and not (along * down).any()
    is_inside = min(first.min(), ends.min()) >= 0 and (np.maximum(first, ends) < shape).all()
    for is_right, got in (
        (is_axis, "voxels of another size or direction"),
        (off <= SHIFT, f"frames {off:.2f} voxels from it"),
        (is_inside, "frames outside of it"),
    ):
        if not is_right:
            raise DicomError(
                f"expected frames of {name} on the grid of the image, got {got}. Resample the "
                "label onto the image or exclude the case."
            )
    return list(zip(first, along, down, strict=True))
