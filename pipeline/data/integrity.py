"""Preflight: what would break training is found before it starts, and all of it at once."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from pipeline.data.datasets import Case, Cases
from pipeline.errors import InputError

AFFINE_TOLERANCE_MM = 0.001


def preflight(cases: Cases) -> None:
    """Read the files of all cases and check them.

    Raises:
        InputError: One line per fault: a file that cannot be read to its end, an image that is
            not finite or has not three axes and the declared channels, a label on another grid
            than its image, a label value outside the declared set.
    """
    with ThreadPoolExecutor() as pool:
        every = cases.train + cases.validation
        found = pool.map(lambda case: _check_case(case, cases), every)
    faults = [fault for faults in found for fault in faults]
    if faults:
        raise InputError(*faults)


def _check_case(case: Case, cases: Cases) -> list[str]:
    where = case["case_id"]
    files, faults = {}, []
    for key in ("image", "label"):
        try:
            files[key] = _read(case[key])
        except Exception as error:  # nibabel raises many kinds for a broken file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            faults.append(
                f"{where}: expected a readable NIfTI file {Path(case[key]).name}, got: {reason}. "
                "Replace the file."
            )
    if faults:
        return faults
    (image, image_affine), (label, label_affine) = files["image"], files["label"]
    return [
        f"{where}: {fault}"
        for fault in [
            *_image_faults(image, cases.num_channels),
            *_grid_faults(image.shape[:3], image_affine, label.shape, label_affine),
            *_value_faults(label, cases.num_classes),
        ]
    ]


def _read(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine. A truncated file shows only when its voxels are read."""
    file: Any = nib.load(path)  # nibabel's own return type knows no voxels
    voxels = np.asanyarray(file.dataobj)
    if voxels.dtype.kind not in "iuf":
        raise ValueError(f"voxels of type {voxels.dtype}")
    return voxels, file.affine


def _image_faults(image: np.ndarray, num_channels: int) -> list[str]:
    faults = []
    channels = {3: 1, 4: image.shape[-1]}.get(image.ndim)
    if channels is None:
        faults.append(
            f"expected an image of shape (H, W, D) or (H, W, D, channels), got {image.shape}. "
            "Convert it or exclude the case."
        )
    elif channels != num_channels:
        faults.append(
            f"expected {num_channels} image channels (dataset.json, modality), got {channels}. "
            "Correct dataset.json or the image."
        )
    if not (finite := np.isfinite(image)).all():
        faults.append(
            f"expected finite image values, got {np.sum(~finite)} NaN or infinite voxels. "
            "Replace them or exclude the case."
        )
    return faults


def _grid_faults(
    shape: tuple[int, ...],
    affine: np.ndarray,
    label_shape: tuple[int, ...],
    label_affine: np.ndarray,
) -> list[str]:
    if label_shape not in (shape, (*shape, 1)):
        return [
            f"expected image and label of one shape, got {shape} and {label_shape}. "
            "Resample the label or exclude the case."
        ]
    if len(shape) < 3:
        return []  # already a fault of the image
    corners = np.array(list(itertools.product(*[(0, n - 1) for n in shape], [1]))).T
    distance = np.linalg.norm((affine - label_affine) @ corners, axis=0).max()
    if distance > AFFINE_TOLERANCE_MM:
        return [
            f"expected label affine to match image within {AFFINE_TOLERANCE_MM} mm, "
            f"got {distance:.3f} mm. Resample the label or exclude the case."
        ]
    return []


def _value_faults(label: np.ndarray, num_classes: int) -> list[str]:
    unknown = [f"{value:g}" for value in np.unique(label) if value not in range(num_classes)]
    if not unknown:
        return []
    return [
        f"expected label values 0 to {num_classes - 1} (dataset.json), "
        f"got {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}. "
        "Declare the value in dataset.json or correct the label."
    ]
