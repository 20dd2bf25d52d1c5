"""Writes synthetic DICOM series for tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

STUDY = {name: generate_uid() for name in ("StudyInstanceUID", "FrameOfReferenceUID")}
ABOUT = {"PatientID": "p1", "PatientName": "A^B", "PatientBirthDate": "", "PatientSex": "",
         "StudyID": "1", "StudyDate": "", "StudyTime": "", "AccessionNumber": "",
         "ReferringPhysicianName": "", "SeriesNumber": 3, "SliceThickness": 2}  # fmt: skip


def describe(one: FileDataset, k: int) -> None:
    """Give a slice what a scanner says of person, study and frame of reference."""
    for name, value in {**STUDY, **ABOUT}.items():
        setattr(one, name, value)


Change = Callable[[FileDataset, int], None]


def no_change(one: FileDataset, k: int) -> None:
    """Leave the slice as it is."""


def write_series(
    folder: Path,
    stored: np.ndarray,
    affine: np.ndarray,
    *,
    slope: float = 1,
    intercept: float = 0,
    without: Collection[int] = (),
    change: Change = no_change,
    prefix: str = "IM",
    number: int = 1,
    bare: bool = False,
) -> Path:
    """Write `stored` `(H, W, D)`, one file per slice, names and Instance Numbers shuffled.

    The first axis runs along a row of a slice; `affine` is to RAS mm. `change` is called with each
    slice, but for those of `without`, and its number before it is written. `number` is the Series
    Number; `bare` files have neither preamble nor file meta information.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1, -1, 1, 1]) @ affine
    dx, dy = np.linalg.norm(lps[:3, :2], axis=0)
    series, depth = generate_uid(), stored.shape[2]
    names, numbers = (random.Random(seed).sample(range(depth), depth) for seed in (1, 2))
    for k in set(range(depth)) - set(without):
        one = new_file(CTImageStorage, series, number)
        one.InstanceNumber = numbers[k] + 1
        one.ImagePositionPatient = position(lps, k)
        one.ImageOrientationPatient = orientation(lps)
        one.PixelSpacing = [f"{dy:.10g}", f"{dx:.10g}"]
        set_pixels(one, stored[:, :, k].T)
        one.RescaleSlope, one.RescaleIntercept = slope, intercept
        change(one, k)
        file = folder / f"{prefix}{names[k]:04d}"
        if bare:
            syntax = one.file_meta.TransferSyntaxUID
            one.preamble, one.file_meta = None, FileMetaDataset()
            how = {"implicit_vr": syntax.is_implicit_VR, "little_endian": True}
            one.save_as(file, enforce_file_format=False, **how)
        else:
            one.save_as(file, enforce_file_format=True)
    return folder


def new_file(sop_class: str, series: str, number: int = 1, modality: str = "CT") -> FileDataset:
    """Make a data set without an image."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    one.SOPClassUID, one.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    one.Modality, one.SeriesInstanceUID, one.SeriesNumber = modality, series, number
    return one


def position(lps: np.ndarray, k: int) -> list[str]:
    return [f"{x:.8g}" for x in (lps @ [0, 0, k, 1])[:3]]


def orientation(lps: np.ndarray) -> list[str]:
    axes = (lps[:3, :2] / np.linalg.norm(lps[:3, :2], axis=0)).T
    return [f"{x:.10g}" for x in axes.ravel()]


def set_pixels(one: FileDataset, stored: np.ndarray) -> None:
    """Store `(rows, columns)`, or `(frames, rows, columns)`, as 16 bits with sign."""
    one.Rows, one.Columns = stored.shape[-2:]
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated, one.BitsStored, one.HighBit = 16, 16, 15
    one.PixelRepresentation = 1
    one.PixelData = np.ascontiguousarray(stored).astype("<i2").tobytes()


def write_enhanced(
    file: Path,
    stored: np.ndarray,
    affine: np.ndarray,
    *,
    slopes: Sequence[float] = (),
    change: Change = no_change,
    number: int = 1,
    sop_class: str = "EnhancedCTImageStorage",
) -> Path:
    """Write `stored` `(H, W, D)` as the frames of one file, in a shuffled order.

    Orientation and pixel measures are shared. With `slopes`, one per slice along the last axis,
    each frame has a slope of its own and the intercept -5. `change` is called with the functional
    groups of each frame and its slice's number.
    """
    lps, depth = np.diag([-1, -1, 1, 1]) @ affine, stored.shape[2]
    dx, dy = np.linalg.norm(lps[:3, :2], axis=0)
    order = random.Random(3).sample(range(depth), depth)
    one = new_file(getattr(uid, sop_class), generate_uid(), number)
    set_pixels(one, np.stack([stored[:, :, k].T for k in order]))
    one.NumberOfFrames = depth
    shared = Dataset()
    shared.PlaneOrientationSequence = [item(ImageOrientationPatient=orientation(lps))]
    shared.PixelMeasuresSequence = [item(PixelSpacing=[f"{dy:.10g}", f"{dx:.10g}"])]
    one.SharedFunctionalGroupsSequence = [shared]
    one.PerFrameFunctionalGroupsSequence = []
    for k in order:
        groups = item(
            PlanePositionSequence=[item(ImagePositionPatient=position(lps, k))],
            FrameContentSequence=[item(StackID="1")],
        )
        if slopes:
            rescaling = item(RescaleSlope=str(slopes[k]), RescaleIntercept="-5")
            groups.PixelValueTransformationSequence = [rescaling]
        change(groups, k)
        one.PerFrameFunctionalGroupsSequence.append(groups)
    file.parent.mkdir(parents=True, exist_ok=True)
    one.save_as(file, enforce_file_format=True)
    return file


def item(**elements: object) -> Dataset:
    """Make an item of a sequence."""
    one = Dataset()
    for name, value in elements.items():
        setattr(one, name, value)
    return one
