"""Writes files whole or not at all, and what was predicted on the very grid of the input file."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from transforms.dicom import read_geometry

# fields of a NIfTI header that say where voxels are, beside `pixdim`
PLACE = [
    "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units",
]  # fmt: skip


MARK = b"segmentation by mixed-precision-segmentation"  # of what is written here


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` at the end, if all went well.

    Raises:
        OSError: If the system refuses; what was there is then as it was.
    """
    # ends as the other, since nibabel compresses by the ending
    temporary = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_prediction(path: Path) -> bool:
    """Whether a file was written by `save_like`, and may be written over by it."""
    try:
        header: Any = nib.load(path).header
        return bool(header["descrip"] == MARK)
    except Exception:  # nibabel raises many kinds for what is no image
        return False


def save_like(voxels: np.ndarray, source: str | Path, path: Path) -> None:
    """Write a volume on the grid of another file.

    Of a NIfTI file everything that says where its voxels are is kept bit for bit: sform and qform
    with their codes, pixdim, units. What is of the image and not of its grid (scaling, intent,
    description, extensions) is not; the description says who wrote it. A DICOM series has its
    affine as sform and qform, in mm.

    Args:
        voxels: `(H, W, D)`, or `(H, W, D, classes)`, on the grid of `source`.
        source: NIfTI file, or folder with a DICOM series.
        path: To write, `.nii` or `.nii.gz`; whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    image = _image(voxels, source)
    image.header["descrip"] = MARK
    with whole_file(path) as temporary:
        nib.save(image, temporary)


def _image(voxels: np.ndarray, source: str | Path) -> Any:
    if Path(source).is_dir():
        _, affine = read_geometry(str(source))
        image: Any = nib.Nifti1Image(voxels, affine)
        image.set_sform(affine, code="scanner")
        image.set_qform(affine, code="scanner")
        image.header.set_xyzt_units("mm")
        return image
    like: Any = nib.load(source)
    made = type(like)(voxels, None, dtype=voxels.dtype)
    header = made.header
    for field in PLACE:
        header[field] = like.header[field]
    header["pixdim"][:4] = like.header["pixdim"][:4]
    return type(like)(voxels, None, header)
