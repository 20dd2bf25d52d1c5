"""Writes predictions on the grid of another file, with names and colours of classes in the header.

The header extension is the one that TotalSegmentator writes and reads, a label table of Connectome
Workbench: `totalsegmentator/nifti_ext_header.py`, version 2.18.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import nibabel as nib
import numpy as np

from pipeline.drawing import class_color
from pipeline.errors import printable
from pipeline.files import replace_file
from transforms.volumes import read_header

# fields of a NIfTI header that say where voxels are, beside `pixdim`
GRID_FIELDS = [
    "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units",
]  # fmt: skip
MARK = b"segmentation by mixed-precision-segmentation"  # in the description of predictions
TABLE = """<?xml version="1.0" encoding="UTF-8"?>
<CaretExtension><VolumeInformation Index="0"><LabelTable>
{}</LabelTable><VolumeType>Label</VolumeType></VolumeInformation></CaretExtension>
"""
ENTRY = '<Label Key="{}" Red="{:.4f}" Green="{:.4f}" Blue="{:.4f}" Alpha="1">{}</Label>\n'


def is_prediction(path: Path) -> bool:
    """Return whether a file was written by `save_like`, which may then overwrite it."""
    try:
        header: Any = nib.load(path).header
        return bool(header["descrip"] == MARK)
    except Exception:  # nibabel raises many kinds for what is no image
        return False


def save_like(
    voxels: np.ndarray, source: str | Path, path: Path, class_names: Sequence[str] = ()
) -> None:
    """Write a volume `(H, W, D)` or `(H, W, D, classes)` on the grid of another file, or nothing.

    Header fields of a NIfTI `source` that place its voxels are kept bit for bit: sform and qform
    with their codes, pixdim, units. The affine of a DICOM series becomes sform and qform, in mm.
    `class_names` of a label map, background first, become an extension of the header.
    """
    image: Any
    if not str(source).lower().endswith((".nii", ".nii.gz")):
        affine = read_header(str(source)).affine
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
    if class_names:
        image.header.extensions.append(make_label_table(class_names))
    with replace_file(path) as temporary:
        nib.save(image, temporary)


def make_label_table(class_names: Sequence[str]) -> nib.nifti1.Nifti1Extension:
    """Return the header extension with names and colours of all classes but the background."""
    entries = [
        ENTRY.format(value, *(n / 255 for n in class_color(value)), escape(printable(name)))
        for value, name in enumerate(class_names[1:], 1)
    ]
    content = TABLE.format("".join(entries)).encode()
    # to a multiple of 16 bytes with the 8 of its head: padding by nibabel would be no XML
    return nib.nifti1.Nifti1Extension(0, content.ljust(-(-(len(content) + 8) // 16) * 16 - 8))
