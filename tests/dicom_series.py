"""Writes synthetic DICOM series for tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

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
) -> Path:
    """Write `stored` `(H, W, D)`, one file per slice, names and Instance Numbers shuffled.

    The first axis runs along a row of a slice; `affine` is to RAS mm. `change` is called with each
    slice, but for those of `without`, and its number before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1, -1, 1, 1]) @ affine
    dx, dy = np.linalg.norm(lps[:3, :2], axis=0)
    series, depth = generate_uid(), stored.shape[2]
    names, numbers = (random.Random(seed).sample(range(depth), depth) for seed in (1, 2))
    for k in set(range(depth)) - set(without):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        one.SOPClassUID, one.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        one.Modality, one.SeriesInstanceUID = "CT", series
        one.InstanceNumber = numbers[k] + 1
        one.ImagePositionPatient = [f"{x:.8g}" for x in (lps @ [0, 0, k, 1])[:3]]
        axes = [*(lps[:3, 0] / dx), *(lps[:3, 1] / dy)]
        one.ImageOrientationPatient = [f"{x:.10g}" for x in axes]
        one.PixelSpacing = [f"{dy:.10g}", f"{dx:.10g}"]
        pixels = np.ascontiguousarray(stored[:, :, k].T).astype("<i2")
        one.Rows, one.Columns = pixels.shape
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit = 16, 16, 15
        one.PixelRepresentation = 1
        one.RescaleSlope, one.RescaleIntercept = slope, intercept
        one.PixelData = pixels.tobytes()
        change(one, k)
        one.save_as(folder / f"{prefix}{names[k]:04d}", enforce_file_format=True)
    return folder
