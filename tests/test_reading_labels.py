"""What a label file holds is what is learned, or the case is refused by name.

All through commands: no test here knows a module of the package by its path.
"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import make_dataset


@pytest.fixture
def labelled(tmp_path):
    """A dataset; `labelled(change, dtype)` changes the label of its first case."""
    root = make_dataset(tmp_path / "data")

    def change_label(change, dtype=np.float32, cases=("tiny_001",)) -> Path:
        for case in cases:
            path = root / f"labelsTr/{case}.nii.gz"
            image = nib.load(path)
            voxels = change(np.asarray(image.dataobj).astype(dtype))
            nib.save(nib.Nifti1Image(voxels.astype(dtype), image.affine), path)
        return root

    return change_label


def put(value):
    """One voxel of a label gets a value."""

    def change(voxels):
        voxels[5, 5, 5] = value
        return voxels

    return change


@pytest.mark.parametrize("fold", [0, 1, 2])  # in one of them the case is one of validation
@pytest.mark.parametrize(
    ("value", "dtype", "check"),
    [
        (257, np.int16, "off"),
        (-1, np.int16, "fast"),
        (np.nan, np.float32, "fast"),
        (0.5, np.float32, "fast"),
        (3, np.uint8, "full"),
    ],
)
def test_label_value_that_is_no_class_is_refused_with_its_case(
    train, labelled, tmp_path, check, value, dtype, fold
):
    data = labelled(put(value), dtype)
    status, told = train(tmp_path / "r", dataset_dir=str(data), preflight=check, fold=fold)
    assert status == 2
    line = told.strip().splitlines()[-1]
    assert line.startswith("tiny_001: ")
    assert "label" in line
    assert "Traceback" not in told


@pytest.mark.parametrize("check", ["full", "fast"])
def test_label_a_hair_off_whole_numbers_is_rounded_and_said_once(
    train, labelled, tmp_path, dataset, check
):
    cases = [f"tiny_{n:03d}" for n in range(1, 7)]
    data = labelled(lambda voxels: voxels - np.float32(0.0005) * (voxels > 0), cases=cases)
    cache = {"cache_dir": str(tmp_path / "cache")}
    status, told = train(tmp_path / "r", dataset_dir=str(data), preflight=check, **cache)
    assert status == 0
    assert told.count("rounded") == 1
    assert train(tmp_path / "exact", dataset_dir=str(dataset), preflight=check)[0] == 0
    models = [(tmp_path / run / "models/last.pt").read_bytes() for run in ("r", "exact")]
    assert models[0] == models[1]


def test_evaluate_rounds_as_training_does_and_refuses_the_rest(command, labelled, tmp_path):
    data = labelled(lambda voxels: voxels - np.float32(0.0005) * (voxels > 0))
    words = ("evaluate", data / "labelsTr", data / "labelsTr", "--output_dir", tmp_path / "scores")
    status, told = command(*words)
    assert status == 0, told
    summary = json.loads((tmp_path / "scores/summary.json").read_text())
    assert summary["mean_dice"] == 1
    labelled(put(np.nan))
    status, told = command(*words)
    assert "tiny_001: expected integer values" in told
