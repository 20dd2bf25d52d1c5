"""Preflight beyond the faults of test_input_faults: tolerances, limits, leakage."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import make_dataset, write_dataset_json

from pipeline.data.dataset import given_cases, load_cases
from pipeline.data.preflight import preflight


@pytest.fixture
def writable(tmp_path):
    """A dataset of four cases that the test may change."""
    return make_dataset(tmp_path / "tiny", num_cases=4)


def rewrite(path, change):
    """Save the file again, its voxels changed."""
    file = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asanyarray(file.dataobj).copy()), file.affine), path)


def lines_of(root, **keywords):
    return [issue.line for issue in preflight(load_cases(root, num_folds=2), **keywords).issues]


# ---- one case


def test_preflight_passes_images_with_several_channels_and_labels_with_one(writable):
    for n in (1, 2):
        rewrite(writable / "imagesTr" / f"tiny_00{n}.nii.gz", lambda v: np.stack([v, v], -1))
        rewrite(writable / "labelsTr" / f"tiny_00{n}.nii.gz", lambda v: v[..., None])
    write_dataset_json(writable, ["tiny_001", "tiny_002"], modality={"0": "T1", "1": "T2"})
    found = preflight(load_cases(writable, num_folds=2))
    assert found.issues == []
    assert found.notes == ["The fourth axis of 2 images is taken for their channels."]


def test_preflight_allows_affines_a_tolerance(writable):
    path = writable / "labelsTr" / "tiny_003.nii.gz"
    moved = nib.load(path).affine
    moved[1, 3] += 0.0005
    nib.save(nib.Nifti1Image(np.asarray(nib.load(path).dataobj), moved), path)
    assert lines_of(writable) == []


def test_preflight_refuses_label_values_that_a_byte_does_not_hold(writable):
    names = {str(n): f"class {n}" for n in range(300)}
    write_dataset_json(writable, [f"tiny_00{n}" for n in (1, 2, 3, 4)], labels=names)
    label = writable / "labelsTr" / "tiny_002.nii.gz"
    rewrite(label, lambda v: np.where(v == 2, np.int16(299), v))
    (line,) = lines_of(writable)
    assert line.startswith("tiny_002: expected label values 0 to 254, got 299.")


# ---- all cases

SHAPE = (12, 11, 10)


def save(path, voxels):
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    return str(path)


def find(folder, train, validation, check):
    """Ids of the cases with an issue; `train` and `validation` hold images by case id."""
    sides = [
        [
            {
                "case_id": case_id,
                "image": save(folder / f"{case_id}.nii", image),
                "label": save(folder / "labels" / f"{case_id}.nii", label_of(image)),
            }
            for case_id, image in side.items()
        ]
        for side in (train, validation)
    ]
    found = preflight(given_cases(*sides, ["background", "organ"]))
    return [issue for issue in found.issues if issue.check == check]


def label_of(image):
    return np.ones(image.shape[:3], np.uint8)


def scan(person, part=0, size=SHAPE):
    """Float grey values of a scanner that scales each person's session in its own way."""
    scale = np.random.default_rng(person).uniform(0.5, 1.5)
    stored = np.random.default_rng((person, part)).integers(0, 300, size)
    return (stored * scale).astype(np.float32)


def eight_bits(seed, least=0, most=255):
    return np.random.default_rng(seed).integers(least, most, SHAPE).astype(np.uint8)


def test_unusual_number_of_channels_is_found_when_none_is_declared(tmp_path):
    train = {"a": scan(1), "b": scan(2), "c": np.stack([scan(3), scan(3)], axis=-1)}
    (issue,) = find(tmp_path, train, {}, "channels")
    assert issue.line.startswith("c: expected 1 image channels, as most cases have, got 2.")


def test_identical_images_are_found_whatever_their_type(tmp_path):
    image = eight_bits(0)
    train = {"a": image, "b": image.T.copy(), "c": image.astype(np.float64)}
    (issue,) = find(tmp_path, train, {}, "identical")
    assert (issue.case_id, issue.warning) == ("c", False)
    assert "the voxels of a" in issue.message


def test_shared_values_are_found_when_a_person_is_on_two_sides(tmp_path):
    train = {f"t{n}": scan(n) for n in range(8)}
    (issue,) = find(tmp_path, train, {"v3": scan(3, part=1), "v20": scan(20)}, "shared_values")
    assert (issue.case_id, issue.warning) == ("v3", True)
    assert "a validation case of a person who is not in the training cases" in issue.message
    assert "values in t3 as well" in issue.message


@pytest.mark.parametrize("number", [1, 2, 3, 4, 9])
def test_shared_values_are_no_sign_when_all_images_have_them(tmp_path, number):
    """8-bit images, and Hounsfield units, have no value of their own."""
    train = {f"t{n}": eight_bits(n) for n in range(number)}
    validation = {f"v{n}": eight_bits(99 + n) for n in range(max(1, number // 4))}
    assert find(tmp_path, train, validation, "shared_values") == []


# ---- real data


def test_hippocampus_draws_warnings_only_when_it_is_split_by_case(tmp_path):
    """Cases 2k - 1 and 2k are the two sides of one head."""
    if "SEG_TEST_DATA" not in os.environ:
        pytest.skip("SEG_TEST_DATA is unset: it names the folder of Task04_Hippocampus")
    root = Path(os.environ["SEG_TEST_DATA"])
    root = root if root.name == "Task04_Hippocampus" else root / "Task04_Hippocampus"
    cases = load_cases(root, group_pattern="pairs")
    assert cases.class_names == ["background", "Anterior", "Posterior"]
    assert preflight(cases, cache_dir=tmp_path).issues == []

    cases = load_cases(root)
    training, validation = (
        {int(case["case_id"].split("_")[1]) for case in side}
        for side in (cases.train, cases.validation)
    )
    torn = {n for n in validation if (n - 1 if n % 2 == 0 else n + 1) in training}
    issues = preflight(cases, cache_dir=tmp_path).issues
    assert {issue.check for issue in issues} == {"shared_values"}
    seen = {int(issue.case_id.split("_")[1]) for issue in issues}
    assert seen <= torn
    assert len(seen) >= 0.5 * len(torn) > 5
