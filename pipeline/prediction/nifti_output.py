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

    Header fields of a NIfTI file that place its voxels are kept bit for bit: sform and qform with
    their codes, pixdim, units. For a DICOM series, its affine becomes sform and qform, in mm.

    Args:
        voxels: `(H, W, D)`, or `(H, W, D, classes)`, on the grid of `source`.
        source: NIfTI file, or folder with a DICOM series.
        path: File to write, `.nii` or `.nii.gz`; it is written whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    image: Any
    if Path(source).is_dir():
        _, affine = read_geometry(str(source))
        image = nib.Nifti1Image(voxels, affine)
        image.set_sform(affine, code="scanner")
        image.set_qform(affine, code="scanner")
        image.header.set_xyzt_units("mm")
    else:
        like: Any = nib.load(source)
        header = type(like)(voxels, None, dtype=voxels.dtype).header
        for field in GRID_FIELDS:
            header[field] = like.header[field]
        header["pixdim"][:4] = like.header["pixdim"][:4]
        image = type(like)(voxels, None, header)
    image.header["descrip"] = MARK
    with replace_file(path) as temporary:
        nib.save(image, temporary)
