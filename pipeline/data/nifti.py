"""Reads NIfTI files and DICOM series, and notices what nibabel does not.

A header is compared with the size of its file before anything of that size is allocated, and a
compressed file is read to its end, where its checksum is: most single flipped bits are noticed
there and nowhere else.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np

from transforms.load import DicomError, read_geometry, read_series

MAX_VOXELS = 2**31  # 16 times 512 x 512 x 512
OFFSET_BYTES = (348, 2**24)  # of the first voxel; nibabel reads voxels from within the header too
MAX_TRAILING_BYTES = 2**16  # after the voxels; some writers pad
MAX_INFLATION = 1032  # bytes that DEFLATE can make of one


class VolumeError(ValueError):
    """A file that is not a whole, readable volume; the message is one line that names the file."""


@dataclass(frozen=True)
class Header:
    """What a file states about its voxels."""

    shape: tuple[int, ...]  # in voxels: three axes and, for channels, a fourth
    affine: np.ndarray  # (4, 4) from voxel to world RAS+ in mm
    dtype: np.dtype  # of the voxels as stored
    offset: int = 0  # of the first voxel in the decompressed file, bytes
    slope: float = 1.0  # stored values are multiplied by it, then the intercept is added
    intercept: float = 0.0
    is_oriented: bool = True  # whether the file states its affine, so that left is known from right
    zooms_mm: tuple[float, ...] = ()  # voxel size that the header states beside the affine

    @property
    def num_voxels(self) -> int:
        """Number of voxels, of all channels together."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the voxels as stored."""
        return self.num_voxels * self.dtype.itemsize


def read_header(path: str) -> Header:
    """Read the header of a NIfTI file, 1 or 2, or of a folder with a DICOM series.

    Trailing axes of one voxel are left out.

    Raises:
        VolumeError: If there is no valid header, or it states more than the file can hold.
        DicomError: If a folder is not one series.
    """
    with _name_file(path):
        if os.path.isdir(path):
            shape, affine = read_geometry(path)
            zooms = tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist())
            header = Header(shape, affine, np.dtype(np.float32), zooms_mm=zooms)
            _require(header.num_voxels <= MAX_VOXELS, f"a series of {header.num_voxels} voxels")
            return header
        with _open(path) as file:
            header = _parse(file.read(540))
        size = os.path.getsize(path)
        _require_plausible(header, size * MAX_INFLATION if path.endswith(".gz") else size)
        return header


def read_voxels(path: str, header: Header, content: bytes | None = None) -> np.ndarray:
    """Read the voxels of a volume, and its file to the end.

    Args:
        path: Path of the file or folder.
        header: Header of that file.
        content: The bytes of the file, where they have been read already.

    Returns:
        Array of the header's shape, the first axis running fastest; stored values in native byte
        order, or float64 where the header scales them.

    Raises:
        VolumeError: If the file ends early, continues for long after the voxels, or its checksum
            is wrong.
        DicomError: If a slice's pixels cannot be decoded.
    """
    with _name_file(path):
        if os.path.isdir(path):
            return read_series(path)[0]
        with _open(path, content) as file:
            file.seek(header.offset)
            stored = file.read(header.num_bytes)
            _require_end(file, header)
    voxels = np.frombuffer(stored, header.dtype).reshape(header.shape, order="F")
    if (header.slope, header.intercept) != (1.0, 0.0):
        return voxels.astype(np.float64) * header.slope + header.intercept
    return voxels.astype(header.dtype.newbyteorder("="), copy=False)


def require_whole(path: str) -> None:
    """Read a file to its end without keeping its voxels; raises what `read_voxels` raises."""
    header = read_header(path)
    if os.path.isdir(path):
        read_voxels(path, header)
        return
    with _name_file(path), _open(path) as file:
        file.seek(header.offset + header.num_bytes)
        _require_end(file, header)


def _parse(block: bytes) -> Header:
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        size = kind.template_dtype.itemsize
        if len(block) < size or not kind.may_contain_header(block[:size]):
            continue
        stated = kind(block[:size], check=False)  # the check would put 1 for 0 in pixdim
        has_sizes = stated["pixdim"][1:4][: stated["dim"][0]].all()
        _require(stated["sform_code"] > 0 or has_sizes, "a voxel size of 0 in pixdim and no sform")
        header: Any = kind(block[:size])
        shape = tuple(int(n) for n in header.get_data_shape())
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        slope, intercept = header.get_slope_inter()
        return Header(
            shape,
            header.get_best_affine(),
            header.get_data_dtype(),
            int(header["vox_offset"]),
            1.0 if slope is None else float(slope),
            0.0 if intercept is None else float(intercept),
            bool(header["sform_code"] > 0 or header["qform_code"] > 0),
            tuple(float(z) for z in header.get_zooms()[:3]),
        )
    raise ValueError("no NIfTI header")


def _require_plausible(header: Header, max_bytes: int) -> None:
    """Refuse a header that a file of `max_bytes`, decompressed, cannot have."""
    _require(header.dtype.kind in "iuf", f"voxels of type {header.dtype}")
    _require(min(header.shape, default=0) > 0, f"a shape of {header.shape}")
    claim = f"a header that claims {header.num_voxels} voxels, more than {MAX_VOXELS}"
    _require(header.num_voxels <= MAX_VOXELS, claim)
    low, high = OFFSET_BYTES
    _require(low <= header.offset <= high, f"voxels from byte {header.offset} on")
    claim = f"a header that claims {header.num_bytes} bytes of voxels, in a file that can hold"
    _require(header.offset + header.num_bytes <= max_bytes, f"{claim} {max_bytes} at most")


def _require_end(file: BinaryIO, header: Header) -> None:
    """A file that was read up to its last voxel has all of them, and ends soon after."""
    is_whole = file.tell() == header.offset + header.num_bytes
    _require(is_whole, "an end before the last voxel")
    rest = len(file.read(MAX_TRAILING_BYTES + 1))
    _require(
        rest <= MAX_TRAILING_BYTES, f"more than {MAX_TRAILING_BYTES} bytes after the last voxel"
    )


def _require(condition: Any, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


@contextlib.contextmanager
def _open(path: str, content: bytes | None = None) -> Iterator[Any]:
    """Open a file, decompressing `.gz`."""
    with open(path, "rb") if content is None else io.BytesIO(content) as file:
        yield gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file


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
        got = got.splitlines()[0].rstrip(".")
        name = os.path.basename(path)
        raise VolumeError(
            f"expected a readable NIfTI file {name}, got {got}. Replace the file."
        ) from error
