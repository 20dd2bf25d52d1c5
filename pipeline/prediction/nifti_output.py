"""Writes predictions on the grid of the input file, and recognises them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from pipeline.files import replace_file
from transforms.load import read_geometry

# fields of a NIfTI header that say where voxels are, beside `pixdim`
GRID_FIELDS = [
    "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units",
]  # fmt: skip

MARK = b"segmentation by mixed-precision-segmentation"  # in the description of predictions


def is_prediction(path: Path) -> bool:
    """Return whether a file was written by `save_like`, which may then overwrite it."""
    try:
        header: Any = nib.load(path).header
        return bool(header["descrip"] == MARK)
    except Exception:  # nibabel raises many kinds for what is no image
        return False


def save_like(voxels: np.ndarray, source: str | Path, path: Path) -> None:
    """Write a volume on the grid of another file.

    All header fields of a NIfTI file that place its voxels are kept bit for bit: sform and qform
    with their codes, pixdim, units. Fields that belong to the image rather than to its grid
    (scaling, intent, description, extensions) are not; the description says who wrote the file. For
    a DICOM series, its affine becomes sform and qform, in mm.

    Args:
        voxels: `(H, W, D)`, or `(H, W, D, classes)`, on the grid of `source`.
        source: NIfTI file, or folder with a DICOM series.
        path: File to write, `.nii` or `.nii.gz`; it is written whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    image = _make_image(voxels, source)
    image.header["descrip"] = MARK
    with replace_file(path) as temporary:
        nib.save(image, temporary)


def _make_image(voxels: np.ndarray, source: str | Path) -> Any:
    if Path(source).is_dir():
        _, affine = read_geometry(str(source))
        image: Any = nib.Nifti1Image(voxels, affine)
        image.set_sform(affine, code="scanner")
        image.set_qform(affine, code="scanner")
        image.header.set_xyzt_units("mm")
        return image
    like: Any = nib.load(source)
    made = type(like)(voxels, None, dtype=voxels.dtype)
    for field in GRID_FIELDS:
        made.header[field] = like.header[field]
    made.header["pixdim"][:4] = like.header["pixdim"][:4]
    return type(like)(voxels, None, made.header)
