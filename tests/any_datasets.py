"""Makes tiny datasets in every layout that training takes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from conftest import make_dataset, write_dataset_json
from dicom_series import write_series
from scipy.ndimage import gaussian_filter

SIZE = (16, 14, 12)
AFFINE = np.diag([1.0, 1.0, 1.5, 1.0])
NUM_CASES = 6


def volumes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and label: two bright blobs of different brightness in noise."""
    rng = np.random.default_rng(seed)
    blobs = gaussian_filter(rng.normal(size=SIZE), 2)
    label = np.digitize(blobs, np.quantile(blobs, [0.7, 0.9])).astype(np.uint8)
    return (label * 40 + rng.normal(0, 5, SIZE)).astype(np.float32), label


def save(path: Path, voxels: np.ndarray) -> None:
    """One NIfTI file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, AFFINE), path)


def case_ids() -> list[str]:
    """Of every dataset here."""
    return [f"case_{n:03d}" for n in range(NUM_CASES)]


def msd(root: Path) -> Path:
    """Medical Segmentation Decathlon."""
    return make_dataset(root)


def msd_of_two_channels(root: Path) -> Path:
    """Medical Segmentation Decathlon, channels along the fourth axis."""
    for n, case in enumerate(case_ids()):
        image, label = volumes(n)
        save(root / f"imagesTr/{case}.nii.gz", np.stack([image, image[::-1]], axis=-1))
        save(root / f"labelsTr/{case}.nii.gz", label)
    write_dataset_json(root, case_ids(), modality={"0": "T1", "1": "T2"})
    return root


def nnunet(root: Path, channels: Sequence[str] = ("T1", "T2"), **changes: Any) -> Path:
    """nnU-Net's raw layout; in each label a corner is of the value that is ignored."""
    for n, case in enumerate(case_ids()):
        image, label = volumes(n)
        for channel in range(len(channels)):
            save(root / f"imagesTr/{case}_{channel:04d}.nii.gz", image + channel)
        label[:6, :6] = 3
        save(root / f"labelsTr/{case}.nii.gz", label)
    source = {
        "channel_names": {str(n): name for n, name in enumerate(channels)},
        "labels": {"background": 0, "dim": 1, "bright": 2, "ignore": 3},
        "numTraining": NUM_CASES,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps({**source, **changes}))
    return root


def ct(root: Path) -> Path:
    """nnU-Net's raw layout with one channel, of Hounsfield units by its name."""
    return nnunet(root, channels=["CT"])


def folders(root: Path) -> Path:
    """Folders with equal names, no class declared."""
    for n, case in enumerate(case_ids()):
        for folder, voxels in zip(("images", "labels"), volumes(n), strict=True):
            save(root / folder / f"{case}.nii.gz", voxels)
    return root


def with_borders(root: Path) -> Path:
    """Folders; around what there is to see the image is 0, in most of the volume."""
    for n, case in enumerate(case_ids()):
        margin = ((5 + n, 7), (6, 4), (5, 5))
        image, label = (np.pad(voxels, margin) for voxels in volumes(n))
        save(root / f"images/{case}.nii.gz", image)
        save(root / f"labels/{case}.nii.gz", label)
    return root


def csv_table(root: Path) -> Path:
    """A table whose cases belong to persons, two each."""
    folders(root)
    with (root / "cases.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label", "case_id", "group"])
        for n, case in enumerate(case_ids()):
            files = [f"{folder}/{case}.nii.gz" for folder in ("images", "labels")]
            rows.writerow([*files, case, f"person_{n // 2}"])
    return root


def json_table(root: Path) -> Path:
    """A list of cases in a file of its own."""
    folders(root)
    entries = [
        {"image": f"images/{case}.nii.gz", "label": f"labels/{case}.nii.gz"} for case in case_ids()
    ]
    (root / "mine.json").write_text(json.dumps(entries))
    return root / "mine.json"


def dicom(root: Path) -> Path:
    """Folders; images are DICOM series."""
    for n, case in enumerate(case_ids()):
        image, label = volumes(n)
        write_series(root / "images" / case, image.astype(np.int16), AFFINE)
        save(root / f"labels/{case}.nii.gz", label)
    return root


MAKERS: list[Callable[[Path], Path]] = [
    msd, msd_of_two_channels, nnunet, ct, folders, with_borders, csv_table, json_table, dicom,
]  # fmt: skip
