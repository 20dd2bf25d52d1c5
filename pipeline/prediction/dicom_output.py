"""Writes a prediction as a DICOM Segmentation of the series that it was made from.

Source: DICOM PS3.3 A.51, Segmentation IOD. highdicom writes it, from the extra `dicom`.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.sr.codedict import codes

from pipeline.drawing import class_color
from pipeline.errors import InputError, printable
from pipeline.files import replace_file
from pipeline.prediction.segmenter import PredictionError
from transforms.dicom import PIXELS, read_file, read_slices

MAKER = "ampseg"
# attributes of person and study that a segmentation repeats, and that may be empty
REPEATED = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate",
    "StudyTime", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
HIGHEST_NUMBER = 2**31 - 1  # of the value representation IS
LONGEST_NAME = 64  # characters of the value representation LO


def load_highdicom() -> Any:
    """Import highdicom; an `InputError` says how to install it."""
    try:
        import highdicom
    except ImportError as error:
        raise InputError(
            f"dicom_seg: expected the package highdicom, got: {error}. "
            'Install the extra: pip install "ampseg[dicom]".'
        ) from None
    logging.getLogger("highdicom").setLevel(logging.WARNING)  # it logs each module that it copies
    return highdicom


def is_segmentation(path: Path) -> bool:
    """Return whether a file was written by `save_segmentation`, which may then overwrite it."""
    try:
        return bool(read_file(path, PIXELS).Manufacturer == MAKER)
    except Exception:  # pydicom raises many kinds for what is no DICOM file
        return False


def save_segmentation(
    labels: np.ndarray, source: str | Path, path: Path, class_names: Sequence[str]
) -> None:
    """Write a label map as a binary DICOM Segmentation, completely or not at all.

    Each class is a segment of the number of its value, with its name and colour. Frames without
    the class are left out.

    Args:
        labels: `(H, W, D)` uint8 on the grid of `transforms.dicom.read_series`.
        source: DICOM series that the labels are of: its folder, or a file of it.
        path: File to write.
        class_names: Background first.

    Raises:
        PredictionError: If the series lacks what a segmentation has to say of it.
    """
    highdicom = load_highdicom()
    slices, order, affine = read_slices(source)
    frames = np.ascontiguousarray(labels.transpose(2, 1, 0))  # (slices, rows, columns)
    if len(slices) == 1:  # of an enhanced file, which has its frames in an order of its own
        frames = frames[np.argsort(order)]
    for one in slices:
        for name in REPEATED:
            if name not in one:
                setattr(one, name, "")
        if not one.get("SliceThickness"):
            one.SliceThickness = f"{np.linalg.norm(affine[:3, 2]):.8g}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names and texts that the series has already
            segmentation = _make_segmentation(highdicom, slices, frames, class_names)
    except Exception as error:  # highdicom raises many kinds for what a series lacks
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        reason = re.sub(r"'FileDataset' object has no attribute '(\w+)'", r"one without \1", reason)
        raise PredictionError(
            f"dicom_seg: expected a series that a DICOM Segmentation can refer to, got: {reason}. "
            "Its label map is written as NIfTI alone."
        ) from error
    segmentation.SpecificCharacterSet = "ISO_IR 192"  # UTF-8, for names of classes
    with replace_file(path) as temporary:
        segmentation.save_as(temporary)


def _make_segmentation(
    highdicom: Any, slices: Sequence[Any], frames: np.ndarray, class_names: Sequence[str]
) -> Any:
    return highdicom.seg.Segmentation(
        source_images=slices,
        pixel_array=frames,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            _describe_segment(highdicom, value, name)
            for value, name in enumerate(class_names[1:], 1)
        ],
        series_instance_uid=highdicom.UID(),
        series_number=min(int(slices[0].get("SeriesNumber") or 0) + 1, HIGHEST_NUMBER),
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer=MAKER,
        manufacturer_model_name=MAKER,
        software_versions=f"highdicom {highdicom.__version__}",
        content_creator_name=f"{MAKER}^",
        device_serial_number="1",
        series_description="Segmentation",
    )


def _describe_segment(highdicom: Any, value: int, name: str) -> Any:
    how = highdicom.AlgorithmIdentificationSequence(
        name=MAKER, version="1", family=codes.DCM.ArtificialIntelligence
    )
    return highdicom.seg.SegmentDescription(
        segment_number=value,
        segment_label=printable(name, keep="").replace("\\", "_")[:LONGEST_NAME],
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=codes.SCT.AnatomicalStructure,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=how,
        display_color=highdicom.color.CIELabColor.from_rgb(*class_color(value)),
    )
