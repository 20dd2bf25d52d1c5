"""Makes tiny datasets in every layout that training takes."""

from __future__ import annotations

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
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, AFFINE), path)


def case_ids() -> list[str]:
    return [f"case_{n:03d}" for n in range(NUM_CASES)]


def msd_of_two_channels(root: Path) -> Path:
    """Decathlon, channels along the fourth axis."""
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


def folders(root: Path, margin: int = 0) -> Path:
    """Folders with equal names, no class declared; a margin around the volumes is 0."""
    for n, case in enumerate(case_ids()):
        around = [(margin + n, margin)] + 2 * [(margin, margin)] if margin else 3 * [(0, 0)]
        for folder, voxels in zip(("images", "labels"), volumes(n), strict=True):
            save(root / folder / f"{case}.nii.gz", np.pad(voxels, around))
    return root


def with_borders(root: Path) -> Path:
    """Folders whose images are 0 in most of the volume."""
    return folders(root, margin=6)


def csv_table(root: Path) -> Path:
    """A table whose cases belong to persons, two each."""
    folders(root)
    rows = [
        f"images/{case}.nii.gz,labels/{case}.nii.gz,{case},person_{n // 2}"
        for n, case in enumerate(case_ids())
    ]
    (root / "cases.csv").write_text("\n".join(["image,label,case_id,group", *rows]))
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
    make_dataset, msd_of_two_channels, nnunet, ct, folders, with_borders, csv_table, json_table,
    dicom,
]  # fmt: skip
