"""Reads headers and voxels of volumes: NIfTI, Analyze, NRRD, MetaImage, DICOM series and labels.

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
from nibabel.nifti1 import Nifti1PairHeader
from nibabel.nifti2 import Nifti2PairHeader
from nibabel.spm2analyze import Spm2AnalyzeHeader

from transforms import segmentation
from transforms.dicom import DicomError, is_dicom, read_geometry, read_series
from transforms.formats import (
    FORMATS,
    MAX_INFLATION,
    READERS,
    find_ending,
    list_files,
    read_itk_header,
    read_itk_voxels,
)
from transforms.grid import TOLERANCE_MM, put_on_grid

MAX_TRAILING_BYTES = 2**16  # after the voxels; some writers pad


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
    is_segmentation: bool = False  # DICOM, on the grid of its image
    is_oriented: bool = True  # whether the file states its affine, so that left is known from right
    zooms_mm: tuple[float, ...] = ()  # voxel size that the header states beside the affine

    @property
    def num_bytes(self) -> int:
        """Size of the voxels of all channels as stored."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: str, image: Header | None = None) -> Header:
    """Read the header of a volume, without trailing axes of one voxel.

    Args:
        path: A file with an ending of `FORMATS`, or a DICOM series: a folder or a file.
        image: The header of the image if the file is a label, which may be a DICOM Segmentation.

    Raises:
        VolumeError: If there is no valid header, or it states more than the file can hold.
        DicomError: If a folder is not one series, or a label is no DICOM Segmentation on part of
            the image's grid.
    """
    with _name_file(path):
        ending = find_ending(path)
        if image is not None and is_dicom(path):
            grid = image.shape[:3], image.affine
            segmentation.check_segmentation(path, *grid)
            return _make_header(*grid, np.dtype(np.uint8), is_segmentation=True)
        if is_dicom(path):
            return _make_header(*read_geometry(path), np.dtype(np.float32))
        if not ending:
            name = os.path.basename(path)
            expected = f"expected a DICOM series or a file that ends in {', '.join(FORMATS)}"
            raise VolumeError(f"{expected}, got {name}. Convert it to NIfTI.")
        if FORMATS[ending] in READERS:
            shape, affine, dtype, is_oriented = read_itk_header(Path(path))
            header = _make_header(shape, affine, dtype, is_oriented=is_oriented)
        else:
            with _open(path) as file:
                header = _parse(file.read(540), is_pair=ending == ".hdr")
            file_size = os.path.getsize(_data_file(path))
            most = file_size * (MAX_INFLATION if ending == ".nii.gz" else 1)
            claim = f"a header that claims {header.num_bytes} bytes of voxels, in a file that can "
            _require(header.offset + header.num_bytes <= most, f"{claim}hold {most} at most")
        _require(header.dtype.kind in "iuf", f"voxels of type {header.dtype}")
        _require(min(header.shape, default=0) > 0, f"a shape of {header.shape}")
        return header


def read_voxels(path: str, header: Header, content: bytes | None = None) -> np.ndarray:
    """Read the voxels of a file or folder, to its end; `content` is its bytes, if they are read.

    The array has the header's shape, the first axis running fastest. It holds stored values in
    native byte order, or float64 where the header scales them.

    Raises:
        VolumeError: If the file ends early, continues for long after the voxels, or its checksum
            is wrong.
        DicomError: If a slice's pixels cannot be decoded, or segments overlap.
    """
    with _name_file(path):
        if header.is_segmentation:
            return segmentation.read_segmentation(path, header.shape, header.affine)
        if is_dicom(path):
            return read_series(path)[0]
        if FORMATS[find_ending(path)] in READERS:
            voxels = read_itk_voxels(Path(path), header.num_bytes)
            return voxels.reshape(header.shape, order="F")
        with _open(_data_file(path), None if find_ending(path) == ".hdr" else content) as file:
            file.seek(header.offset)
            stored = file.read(header.num_bytes)
            _require(len(stored) == header.num_bytes, "an end before the last voxel")
            rest, most = len(file.read(MAX_TRAILING_BYTES + 1)), MAX_TRAILING_BYTES
            _require(rest <= most, f"more than {most} bytes after the last voxel")
    voxels = np.frombuffer(stored, header.dtype).reshape(header.shape, order="F")
    if (header.slope, header.intercept) != (1.0, 0.0):
        return voxels.astype(np.float64) * header.slope + header.intercept
    return voxels.astype(header.dtype.newbyteorder("="), copy=False)


def read_label(
    path: str,
    image: Header,
    *,
    content: bytes | None = None,
    tolerance_mm: float = TOLERANCE_MM,
) -> np.ndarray:
    """Read a label on the grid of its image, `(H, W, D)`, whatever the order of its own axes.

    Raises:
        ValueError: If the file is no label on the grid, or cannot be read.
    """
    header = read_header(path, image)
    voxels = read_voxels(path, header, content)
    return put_on_grid(voxels, header.affine, image.shape[:3], image.affine, tolerance_mm)


def _make_header(
    shape: tuple[int, ...], affine: np.ndarray, dtype: np.dtype, **facts: Any
) -> Header:
    """Make a header of which `zooms_mm` are the affine's unless they are given."""
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    zooms_mm = tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist())
    return Header(shape, affine, dtype, **{"zooms_mm": zooms_mm, **facts})


def _parse(block: bytes, is_pair: bool) -> Header:
    single, pair = (nib.Nifti1Header, nib.Nifti2Header), (Nifti1PairHeader, Nifti2PairHeader)
    candidates: Any = (*pair, Spm2AnalyzeHeader) if is_pair else single
    kinds = [kind for kind in candidates if kind.may_contain_header(block)]
    _require(kinds, "no NIfTI header")
    block = block[: kinds[0].sizeof_hdr]
    stated = kinds[0](block, check=False)  # the check would put 1 for 0 in pixdim
    is_nifti = isinstance(stated, nib.Nifti1Header)  # and not Analyze, which has no orientation
    has_sizes = stated["pixdim"][1:4][: stated["dim"][0]].all()
    has_affine = is_nifti and stated["sform_code"] > 0
    _require(has_affine or has_sizes, "a voxel size of 0 in pixdim and no sform")
    header: Any = kinds[0](block)
    offset = int(header["vox_offset"])
    _require(offset >= (0 if is_pair else 348), f"voxels from byte {offset} on")
    slope, intercept = header.get_slope_inter()
    return _make_header(
        tuple(int(n) for n in header.get_data_shape()),
        header.get_best_affine(),
        header.get_data_dtype(),
        offset=offset,
        slope=1.0 if slope is None else float(slope),
        intercept=float(intercept or 0),
        is_oriented=bool(has_affine or (is_nifti and header["qform_code"] > 0)),
        zooms_mm=tuple(float(z) for z in header.get_zooms()[:3]),
    )


def _require(condition: Any, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _data_file(path: str) -> str:
    files = list_files(path)
    _require(len(files) > 1 or find_ending(path) != ".hdr", "no .img file beside it")
    return str(files[-1])


def _open(path: str, content: bytes | None = None) -> Any:
    source = path if content is None else io.BytesIO(content)
    if path.lower().endswith(".gz"):
        return gzip.open(source)
    return open(path, "rb") if content is None else source


@contextlib.contextmanager
def _name_file(path: str) -> Iterator[None]:
    """Turn whatever is wrong with a file into a VolumeError that names it."""
    try:
        yield
    except (DicomError, VolumeError, MemoryError):
        raise
    except Exception as error:  # nibabel raises many kinds for an invalid header
        got = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, EOFError):
            got = "an end before that of its gzip stream"
        got, name = got.splitlines()[0].rstrip("."), os.path.basename(path)
        kind = FORMATS.get(find_ending(path), "volume")
        message = f"expected a readable {kind} file {name}, got {got}. Replace the file."
        raise VolumeError(message) from error
