"""Reads DICOM: a series as one volume, from its folder or by the name of one of its files.

MONAI's readers are not used: PydicomReader orders slices by Instance Number and joins two series,
ITKReader picks one of two and reads uneven gaps as even.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pydicom
from pydicom.filereader import read_dataset, read_partial, read_preamble
from pydicom.pixels import pixel_array

from transforms.formats import LPS_TO_RAS

CONVERT = "Convert the series to NIfTI with dcm2niix."
INSTALL = 'Install the extra: pip install "ampseg[dicom]".'
# of a voxel: a slice may be so far from its place, since positions are rounded in files; where one
# of four or more slices is missing, some slice is a third of a voxel or more from its place
SHIFT = 0.2
# the numbers that each slice must state, and how many they are
REQUIRED = {
    "ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2,
    "Rows": 1, "Columns": 1,
}  # fmt: skip
RESCALING = ("RescaleSlope", "RescaleIntercept")
GROUPS = (
    "PlanePosition", "PlaneOrientation", "PixelMeasures", "PixelValueTransformation", "FrameContent"
)  # fmt: skip
SIZE = ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated")
HEADER_BYTES = 2**20  # that a deflated file may hold beside its pixels
UNKNOWN = "no whole DICOM file"  # the kind of other files
HEAD, PIXELS, END = 0x00280012, 0x7FE00000, 2**32  # tags after the size, pixels, everything

_warn = functools.cache(logging.getLogger(__name__).warning)  # once per line


class DicomError(ValueError):
    """A path that cannot be read as one volume; the message is one line."""


class Series(NamedTuple):
    """Files of one series, or of one other kind, in one folder."""

    files: list[Path]  # by name
    number: str  # Series Number
    num_slices: int
    uid: str  # empty where each slice has one of its own
    kind: str  # empty; of files that are no images of a volume, such as SR, what they are


class _Slice(NamedTuple):
    source: Any  # pydicom's dataset of the file
    frame: int
    name: str  # of the file
    facts: dict[str, np.ndarray]  # by the names of REQUIRED
    scale: tuple[float, float]  # slope and intercept
    stack: str


def is_dicom(path: str | Path) -> bool:
    """Return whether a path is a folder, or a file that begins as DICOM files do.

    Without a preamble, a file begins with a low group and soon has one of the standard's UIDs.
    """
    if not Path(path).is_file():
        return Path(path).is_dir()
    with open(path, "rb") as file:
        start = file.read(512)
    is_bare = start[:2] in (b"\2\0", b"\x08\0") and b"1.2.840.10008." in start
    return start[128:132] == b"DICM" or is_bare


def dicom_files(path: str | Path) -> list[Path]:
    """Return the DICOM files in and below a folder, or those of the series of a DICOM file."""
    path = Path(path)
    found = _look(path) if is_dicom(path) else []
    if path.is_dir():
        return sorted(file for one in found if one.kind != UNKNOWN for file in one.files)
    return next((one.files if not one.kind else [path] for one in found), [])


def find_series(folder: Path) -> list[Series]:
    """Find the series of images in a folder and below; DICOM files of other kinds are logged."""
    found = _look(folder)
    for one in found:
        if one.kind not in ("", UNKNOWN):
            place, got = one.files[0].parent, f"{len(one.files)} of {one.kind}"
            _warn(f"{place}: left out DICOM files that are no images of a volume, {got}")
    series = [one for one in found if not one.kind]
    for uid, count in Counter(one.uid for one in series if one.uid).items():
        if count > 1:
            names = ", ".join(one.files[0].parent.name for one in series if one.uid == uid)
            _warn(f"{folder}: one DICOM series lies in several folders, {names}; each is one case")
    return series


def series_files(path: str | Path) -> list[Path]:
    """Return the files, by name, of the one series that a folder holds or a file belongs to.

    A `DicomError` says that there is none, or more than one.
    """
    path = Path(path)
    kinds = ", ".join(sorted({one.kind for one in _look(path)} - {""}))
    remedy = "Convert its contours with plastimatch." if "RTSTRUCT" in kinds else "Check the path."
    series = find_series(path)
    _require(series, f"a DICOM series of images in {path.name}", kinds or "none", remedy)
    names = (f"{os.path.relpath(one.files[0], path)} ({one.num_slices} slices)" for one in series)
    got = f"{len(series)}, which begin with {', '.join(names)}"
    remedy = "Name such a file to choose its series, or put each into a folder of its own."
    _require(len(series) == 1, f"one DICOM series in {path.name}", got, remedy)
    folder = series[0].files[0].parent  # where a damaged slice may be among the others
    other = "".join(one.files[0].name for one in _examine(folder) if one.kind == UNKNOWN)
    expected, remedy = f"nothing but whole DICOM files in {folder.name}", "Replace or remove it."
    _require(not other, expected, other, remedy)
    return series[0].files


def read_series(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the one series that a folder holds, or that a file belongs to.

    Returns voxels `(H, W, D)` float32, rescaled by each slice's own slope and intercept, with the
    first axis along the rows of the slices, and the affine `(4, 4)` float64 to RAS mm. A
    `DicomError` says in one line that the files are not the slices of one regular volume.
    """
    slices, affine = _ordered_slices(path, pixels=True)
    return np.stack([_values(one).T for one in slices], axis=-1), affine


def read_geometry(path: str | Path) -> tuple[tuple[int, int, int], np.ndarray]:
    """Return shape and affine of what `read_series` returns, without reading pixels."""
    slices, affine = _ordered_slices(path, pixels=False)
    rows, columns = (int(slices[0].facts[name][0]) for name in ("Rows", "Columns"))
    return (columns, rows, len(slices)), affine


def read_slices(path: str | Path) -> tuple[list[pydicom.Dataset], list[int], np.ndarray]:
    """Read a series without its pixels, for what refers to it.

    Returns the datasets of the files in the order of their slices, the number of each slice's frame
    in its file, and the affine of `read_series`.
    """
    slices, affine = _ordered_slices(path, pixels=False)
    datasets = [*{one.name: one.source for one in slices}.values()]
    return datasets, [one.frame for one in slices], affine


def _require(condition: object, expected: str, got: object = "", remedy: str = CONVERT) -> None:
    if not condition:
        raise DicomError(f"expected {expected}, got {got}. {remedy}")


def _look(path: Path, seen: set[Path] | None = None) -> list[Series]:
    """Return what is in a folder and below, each folder once however links go; or a file's own."""
    if not path.is_dir():
        return [one for one in _examine(path.parent) if path in one.files]
    seen = set() if seen is None else seen
    if path.resolve() in seen:
        return []
    seen.add(path.resolve())
    below = [p for p in _visible(path) if p.is_dir()]
    return [*_examine(path), *(one for folder in below for one in _look(folder, seen))]


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name[0] != "." and p.name != "DICOMDIR")


def _examine(folder: Path) -> list[Series]:
    """Sort the files of a folder by their series; slices of a series each are one series."""
    files = [path for path in _visible(folder) if not path.is_dir()]
    heads = {path: _read_head(path, path.lstat().st_mtime_ns) for path in files}
    counts = Counter(head[:2] for head in heads.values())
    groups: dict[tuple[str, str], list[Path]] = {}
    for path, (kind, uid, _, num_frames) in heads.items():
        is_alone = counts[kind, uid] == num_frames == 1
        groups.setdefault((kind, "" if kind or is_alone else uid), []).append(path)
    return [
        Series(paths, min(heads[p][2] for p in paths), sum(heads[p][3] for p in paths), uid, kind)
        for (kind, uid), paths in groups.items()
    ]


@functools.lru_cache(maxsize=2**16)
def _read_head(path: Path, time_ns: int) -> tuple[str, str, str, int]:
    """Read the kind of a file, the UID and number of its series, and how many frames it has."""
    try:
        _require(is_dicom(path), "a DICOM file")
        head = read_file(path, HEAD)
        uid, number = (str(head.get(f"Series{key}") or "") for key in ("InstanceUID", "Number"))
        _require(uid or _kind(head), "a SeriesInstanceUID")
        return _kind(head), uid, number, int(head.get("NumberOfFrames") or 1)
    except Exception:  # pydicom raises many kinds for a broken file
        return UNKNOWN, "", "", 1


def _kind(head: Any) -> str:
    name = pydicom.uid.UID(head.get("SOPClassUID") or "").name
    if "LOCALIZER" in (head.get("ImageType") or ""):
        return "LOCALIZER"
    if name.startswith("Secondary Capture") and "ImagePositionPatient" not in head:
        return "secondary capture"
    is_image = name.endswith("Image Storage") or not name.endswith(" Storage")
    return "" if is_image else str(head.get("Modality") or name)


def _ordered_slices(path: str | Path, *, pixels: bool) -> tuple[list[_Slice], np.ndarray]:
    """Return slices in the order of their places, and the affine `(4, 4)` to RAS mm."""
    slices = [one for file in series_files(path) for one in _read_file(file, pixels)]
    expected = f"two DICOM slices or more in {Path(path).name}"
    _require(len(slices) > 1, expected, len(slices), "Check the path.")
    facts = {name: np.array([one.facts[name] for one in slices]) for name in REQUIRED}
    for name in REQUIRED:
        is_one = np.allclose(facts[name], facts[name][0], rtol=0, atol=1e-4)
        _require(is_one or "Position" in name, f"slices of one {name}", "several")
    number = len({one.stack for one in slices})
    _require(number == 1, "one stack of slices", number)
    x, y = axes = facts["ImageOrientationPatient"][0].reshape(2, 3)
    dy, dx = facts["PixelSpacing"][0]  # between rows, between columns
    is_regular = np.allclose(axes @ axes.T, np.eye(2), atol=1e-3) and min(dx, dy) > 0
    _require(is_regular, "rows at right angles to columns", f"axes {axes.tolist()}")
    places = facts["ImagePositionPatient"]
    order = np.argsort(places @ np.cross(x, y), kind="stable")
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1] = x * dx, y * dy
    lps[:3, 2], lps[:3, 3] = _step(places[order], np.cross(x, y), min(dx, dy)), places[order[0]]
    return [slices[n] for n in order], LPS_TO_RAS @ lps


def _read_file(path: Path, pixels: bool) -> list[_Slice]:
    """Read the slices of a file, their pixels not yet decoded."""
    with _name_faults(f"a readable slice {path.name}"):
        one = read_file(path, END if pixels else PIXELS)
        frames = one.get("PerFrameFunctionalGroupsSequence") or [one]
        num_frames = int(one.get("NumberOfFrames") or 1)
        expected = f"one slice in {path.name}, or functional groups of each frame"
        got = f"{num_frames} frames, of which {len(frames)} are described"
        _require(num_frames == len(frames), expected, got)
        is_grey = one.get("SamplesPerPixel", 1) == 1 and "ModalityLUTSequence" not in one
        expected = f"grey values with slope and intercept in {path.name}"
        _require(is_grey, expected, "colours or a lookup table")
        return [_slice(one, path.name, *numbered) for numbered in enumerate(frames)]


def _slice(one: Any, name: str, number: int, groups: Any) -> _Slice:
    """Gather what a slice states, or a frame by its functional groups and those of all frames."""
    frame = pydicom.Dataset()
    frame.update({one[key].tag: one[key] for key in (*REQUIRED, *RESCALING) if key in one})
    for source in (*(one.get("SharedFunctionalGroupsSequence") or ()), groups):
        for key in GROUPS:
            if items := source.get(f"{key}Sequence"):
                frame.update(items[0])
    for key in REQUIRED:
        _require(frame.get(key), f"{key} in {name}", "none")
    facts = {key: np.array(frame[key].value, float).reshape(n) for key, n in REQUIRED.items()}
    slope, intercept = (frame.get(key) for key in RESCALING)
    scale = (1.0 if slope is None else float(slope), float(intercept or 0))
    return _Slice(one, number, name, facts, scale, str(frame.get("StackID")))


def read_file(path: Path, end: int) -> Any:
    """Read a file up to a tag, its pixels not yet decoded: a pydicom dataset."""
    stream: BinaryIO
    with open(path, "rb") as stream:
        read_preamble(stream, force=True)
        meta = read_dataset(stream, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
        if meta.get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:
            stream = _inflate(stream, path.name, end == HEAD)
        else:
            stream.seek(0)
        one = read_partial(stream, lambda tag, *_: tag >= end, force=True)
    kind = "Implicit" if one.original_encoding[0] else "Explicit"
    syntax = getattr(pydicom.uid, f"{kind}VRLittleEndian")
    one.file_meta.setdefault("TransferSyntaxUID", syntax)  # of a file without a preamble
    return one


def _inflate(file: BinaryIO, name: str, is_head: bool) -> BinaryIO:
    """Inflate the rest of a file, if that is what its pixels need and HEADER_BYTES at most."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    start = inflater.decompress(file.read(), HEADER_BYTES)
    if is_head:
        return io.BytesIO(start)
    head = read_dataset(io.BytesIO(start), False, True, stop_when=lambda tag, *_: tag >= PIXELS)
    num_bytes = math.prod(int(head.get(key) or 1) for key in SIZE) // 8
    most = HEADER_BYTES + max(num_bytes, 0)
    whole = start + inflater.decompress(inflater.unconsumed_tail, most - len(start) + 1)
    expected = f"{most} bytes at most in {name} once inflated, by its rows, columns and frames"
    _require(len(whole) <= most, expected, "more", "Replace the file.")
    return io.BytesIO(whole)


def _step(places: np.ndarray, normal: np.ndarray, pixel: float) -> np.ndarray:
    """Return the step between slices, `(3,)` mm, if all are equally far apart and on one line.

    `places` `(D, 3)` mm are sorted along the slices' `normal`; `pixel` is its smaller edge in mm.
    """
    step = (places[-1] - places[0]) / (len(places) - 1)
    between = np.diff(places @ normal)
    got = "two at one (a series over time, or of several contrasts)"
    _require(between.min() > 1e-3, "slices at different places", got)
    even = places[0] + np.arange(len(places))[:, None] * step
    is_even = np.abs((places - even) @ normal).max() <= SHIFT * (step @ normal)
    got = f"{between.min():.3f} to {between.max():.3f} mm (a slice is missing, or one too many)"
    remedy = "Complete the series, or convert it to NIfTI with dcm2niix."
    _require(is_even, "slices at even distances", got, remedy)
    across = (places - places[0]) - ((places - places[0]) @ normal)[:, None] * normal
    shift = np.linalg.norm(across, axis=1).max()
    got = f"a shift of {shift:.3f} mm (a tilted gantry)"
    _require(shift <= SHIFT * pixel, "slices stacked at right angles to their planes", got)
    return step


def _values(one: _Slice) -> np.ndarray:
    """`(rows, columns)` float32, rescaled (DICOM PS3.3 C.11.1)."""
    with _name_faults(f"pixels that can be decoded in {one.name}"):
        stored = pixel_array(one.source, index=one.frame)
        shape = tuple(int(one.facts[name][0]) for name in ("Rows", "Columns"))
        _require(stored.shape == shape, f"pixels of shape {shape} in {one.name}", stored.shape)
    return (stored.astype(np.float64) * one.scale[0] + one.scale[1]).astype(np.float32)


@contextlib.contextmanager
def _name_faults(expected: str) -> Iterator[None]:
    """Turn whatever pydicom raises, of many kinds, into a DicomError."""
    try:
        yield
    except (DicomError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a codec in Rust panics with one that is no Exception
        got = (str(error).splitlines() or [""])[0].rstrip(".:") or type(error).__name__
        remedy = INSTALL if "missing dependencies" in str(error) else "Replace the file."
        raise DicomError(f"expected {expected}, got: {got}. {remedy}") from error
