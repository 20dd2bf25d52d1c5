"""Reads a volume's header first and its voxels piece by piece, trusting neither.

What a header claims is weighed against the file before anything of that size is allocated, and a
compressed file is read to its end, where its checksum is: most single flipped bits are seen there
and nowhere else.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np

from transforms.dicom import DicomError, read_geometry, read_series

HEADER_BYTES = 348  # of NIfTI-1; nibabel reads voxels from within it if the offset says so
MAX_VOXELS = 2**31  # 16 times 512 x 512 x 512
MAX_OFFSET_BYTES = 2**24  # of voxels in the file; what is before them are header and extensions
MAX_TRAILING_BYTES = 2**16  # after the voxels; some writers pad
MAX_INFLATION = 1032  # bytes that DEFLATE can make of one
SLAB_VOXELS = 2**20


class VolumeError(ValueError):
    """A file that is not a whole, readable volume; the message says what was got."""


@dataclass(frozen=True)
class Header:
    """What a file says about its voxels.

    Attributes:
        shape: In voxels, three axes and, of channels, a fourth.
        affine: `(4, 4)` from voxel to world RAS+ in mm.
        dtype: Of the voxels as stored.
        slope: Stored values are multiplied by it, then
        intercept: is added.
        offset: Of the first voxel in the inflated file, bytes.
        is_oriented: Whether the file states its affine, so that left is known from right.
        zooms: Voxel size as the header states it beside the affine, mm.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    dtype: np.dtype
    slope: float
    intercept: float
    offset: int
    is_oriented: bool
    zooms: tuple[float, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the voxels as stored."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: str) -> Header:
    """The header of a NIfTI file, 1 or 2, weighed against the size of the file.

    Args:
        path: Of the file, or of a folder with a DICOM series.

    Raises:
        VolumeError: If it is not one, or claims what the file cannot hold or nobody needs.
        DicomError: If a folder is not one series.
    """
    if os.path.isdir(path):
        return _series_header(path)
    with _reading(path) as file:
        block = file.read(540)
        size = os.path.getsize(path)
    try:
        header = _parse(block)
        shape = tuple(int(n) for n in header.get_data_shape())
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        slope, intercept = header.get_slope_inter()
        made = Header(
            shape,
            header.get_best_affine(),
            header.get_data_dtype(),
            1.0 if slope is None else float(slope),
            0.0 if intercept is None else float(intercept),
            int(header["vox_offset"]),
            bool(header["sform_code"] > 0 or header["qform_code"] > 0),
            tuple(float(z) for z in header.get_zooms()[:3]),
        )
    except VolumeError:
        raise
    except Exception as error:  # nibabel raises many kinds for a broken header
        raise VolumeError(_first_line(error)) from error
    _weigh(made, size * MAX_INFLATION if path.endswith(".gz") else size)
    return made


def _parse(block: bytes) -> Any:
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        size = kind.template_dtype.itemsize
        if len(block) >= size and kind.may_contain_header(block[:size]):
            stated = kind(block[:size], check=False)  # else nibabel puts 1 for 0 in pixdim
            sizes = stated["pixdim"][1:4][: stated["dim"][0]]
            if stated["sform_code"] <= 0 and not sizes.all():
                raise VolumeError("a voxel size of 0 in pixdim and no sform")
            return kind(block[:size])
    raise VolumeError("no NIfTI header")


def _series_header(folder: str) -> Header:
    shape, affine = _of_series(read_geometry, folder)
    if math.prod(shape) > MAX_VOXELS:
        raise VolumeError(f"a series of {math.prod(shape)} voxels, more than {MAX_VOXELS}")
    zooms = tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist())
    return Header(shape, affine, np.dtype(np.float32), 1.0, 0.0, 0, True, zooms)


def _of_series(reader: Callable[[str], Any], folder: str) -> Any:
    try:
        return reader(folder)
    except DicomError:
        raise
    # a file that may not be opened, or is gone; a value of another form than its name asks for
    except (OSError, ValueError, TypeError) as error:
        raise VolumeError(_first_line(error)) from error


def _weigh(header: Header, most: int) -> None:
    """Refuses what a file that can hold `most` bytes, inflated, does not hold."""
    if header.dtype.kind not in "iuf":
        raise VolumeError(f"voxels of type {header.dtype}")
    if min(header.shape, default=0) < 1:
        raise VolumeError(f"a shape of {header.shape}")
    voxels = math.prod(header.shape)
    if voxels > MAX_VOXELS:
        raise VolumeError(f"a header that claims {voxels} voxels, more than {MAX_VOXELS}")
    if not HEADER_BYTES <= header.offset <= MAX_OFFSET_BYTES:
        raise VolumeError(f"voxels from byte {header.offset} on")
    if header.offset + header.num_bytes > most:
        raise VolumeError(
            f"a header that claims {header.num_bytes} bytes of voxels, in a file that can hold "
            f"{most} at most"
        )


def slabs(path: str, header: Header) -> Iterator[np.ndarray]:
    """The voxels in file order, in pieces of a few MB, and the checksum at the end.

    Args:
        path: Of the file.
        header: Of the file.

    Yields:
        One-dimensional pieces, the first axis running fastest; stored values in native byte order,
        or float64 where the header scales them.

    Raises:
        VolumeError: If the file ends early, goes on for long, or its checksum differs.
        DicomError: If a slice's pixels cannot be decoded.
    """
    if os.path.isdir(path):
        voxels = _of_series(read_series, path)[0].ravel(order="F")
        for start in range(0, len(voxels), SLAB_VOXELS):
            yield voxels[start : start + SLAB_VOXELS]
        return
    remaining = header.num_bytes
    scaled = (header.slope, header.intercept) != (1.0, 0.0)
    with _reading(path) as file:
        _read_whole(file, header.offset)
        while remaining:
            content = _read_whole(file, min(remaining, SLAB_VOXELS * header.dtype.itemsize))
            remaining -= len(content)
            stored = np.frombuffer(content, header.dtype)
            stored = stored.astype(header.dtype.newbyteorder("="), copy=False)
            if scaled:
                stored = stored.astype(np.float64) * header.slope + header.intercept
            yield stored
        if len(file.read(MAX_TRAILING_BYTES + 1)) > MAX_TRAILING_BYTES:
            raise VolumeError(f"more than {MAX_TRAILING_BYTES} bytes after the last voxel")


def _read_whole(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise VolumeError("an end before the last voxel")
    return content


class _reading:  # noqa: N801 (a context manager, used as a function)
    """Opens a file, inflating `.gz`; what goes wrong inside becomes a VolumeError."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            self.file = gzip.open(self.path) if self.path.endswith(".gz") else open(self.path, "rb")
        except OSError as error:
            raise VolumeError(_first_line(error)) from error
        return self.file

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.file.close()
        if isinstance(error, EOFError):
            raise VolumeError("an end before that of its gzip stream") from error
        if isinstance(error, OSError | zlib.error):
            raise VolumeError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def files_of(case: Mapping[str, Any]) -> dict[str, list[str]]:
    """Files of a case by key, as lists: `{"image": [...], "label": [...]}`."""
    return {
        key: [case[key]] if isinstance(case[key], str) else list(case[key])
        for key in ("image", "label")
        if key in case
    }
