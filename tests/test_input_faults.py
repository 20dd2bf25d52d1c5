"""Each fault of the table in docs/input_faults.md, by the case and the check that names it."""

import nibabel as nib
import numpy as np
import pytest

from benchmarks.input_faults import BAD, FAULTS, label_of, make_case, make_dataset, write
from pipeline.data.dataset import load_cases
from pipeline.data.preflight import preflight
from pipeline.errors import InputError


def test_sound_dataset_draws_no_finding(tmp_path):
    found = preflight(load_cases(make_dataset(tmp_path / "d"), num_folds=2))
    assert found.issues == []
    assert found.fingerprint is not None


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_named_and_no_healthy_case_is(tmp_path, fault):
    root = make_dataset(tmp_path / "d")
    fault.spoil(root)
    if fault.check == "dataset":
        with pytest.raises(InputError, match=r"dataset\.json.*: expected .*, got") as caught:
            load_cases(root, num_folds=2)
        assert len(caught.value.faults) == 1
        return
    found = preflight(load_cases(root, num_folds=2))
    blamed = {finding.case_id for finding in found.issues}
    everyone = fault.name.startswith("dataset.json")  # who has one channel of two
    assert blamed == ({f"case_{n:03d}" for n in range(1, 7)} if everyone else {BAD})
    assert {finding.check for finding in found.issues} == {fault.check}
    assert all(finding.warning == fault.warning for finding in found.issues)
    assert all(" expected " in finding.line for finding in found.issues)
    assert (found.fingerprint is None) != fault.warning


def turned(path):
    """The same volume, its file's axes in another order and direction."""
    volume = nib.load(path).as_reoriented([[1, -1], [0, 1], [2, -1]])
    write(path, np.asanyarray(volume.dataobj), volume.affine)


def test_label_whose_axes_are_turned_is_sound(tmp_path):
    root = make_dataset(tmp_path / "d")
    turned(label_of(root))
    assert preflight(load_cases(root, num_folds=2)).issues == []


def test_channel_whose_axes_are_turned_is_a_fault(tmp_path):
    for seed in range(2):
        image, label = make_case(seed)
        for channel in range(2):
            write(tmp_path / f"images/c{seed}_000{channel}.nii.gz", image + channel)
        write(tmp_path / f"labels/c{seed}.nii.gz", label)
    assert preflight(load_cases(tmp_path, num_folds=2)).issues == []
    turned(tmp_path / "images/c1_0001.nii.gz")
    (finding,) = preflight(load_cases(tmp_path, num_folds=2)).issues
    assert finding.line.startswith("c1: expected the image's channels of one shape, got (24, 20")
