"""Scans and persons on two sides of a split, by their grey values."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipeline.data.dataset import load_cases
from pipeline.data.facts import measure_headers, measure_voxels
from pipeline.data.leakage import identical_images, shared_grey_values
from pipeline.data.preflight import preflight

SHAPE = (12, 11, 10)


def scan(person, part=0, size=SHAPE):
    """Float grey values of a scanner that scales each person's session in its own way."""
    scale = np.random.default_rng(person).uniform(0.5, 1.5)
    stored = np.random.default_rng((person, part)).integers(0, 300, size)
    return (stored * scale).astype(np.float32)


def eight_bits(seed, least=0, most=255):
    return np.random.default_rng(seed).integers(least, most, SHAPE).astype(np.uint8)


def look(folder, sides):
    """Cases by side, and their facts; `sides` holds images by case id."""
    parts, facts = {}, {}
    label = folder / "label.nii"
    nib.save(nib.Nifti1Image(np.ones(SHAPE, np.uint8), np.eye(4)), label)
    for side, images in sides.items():
        parts[side] = []
        for case_id, image in images.items():
            path = folder / f"{case_id}.nii"
            nib.save(nib.Nifti1Image(image, np.eye(4)), path)
            case = {"case_id": case_id, "image": str(path), "label": str(label)}
            parts[side].append(case)
            facts[case_id] = {"headers": measure_headers(case), "voxels": measure_voxels(case)}
    return parts, facts


def warned(folder, sides):
    return [finding.case_id for finding in shared_grey_values(*look(folder, sides))]


def test_shared_values_are_found_when_a_person_is_on_two_sides(tmp_path):
    sides = {
        "training": {f"t{n}": scan(n) for n in range(8)},
        "validation": {"v3": scan(3, part=1), "v20": scan(20)},
        "test": {"e20": scan(20, part=1), "e21": scan(21)},
    }
    findings = shared_grey_values(*look(tmp_path, sides))
    assert [finding.case_id for finding in findings] == ["v3", "e20"]
    assert all(finding.warning for finding in findings)
    assert "of a person who is not in the training cases" in findings[0].message
    assert "values in t3 as well" in findings[0].message


@pytest.mark.parametrize("number", [1, 2, 3, 4, 9])
def test_shared_values_are_no_sign_when_all_images_have_them(tmp_path, number):
    """8-bit images, and Hounsfield units, have no value of their own."""
    sides = {
        "training": {f"t{n}": eight_bits(n) for n in range(number)},
        "validation": {f"v{n}": eight_bits(99 + n) for n in range(max(1, number // 4))},
    }
    assert warned(tmp_path, sides) == []


def test_shared_values_are_no_sign_when_there_are_few(tmp_path):
    """Of masks, and of images of a few values."""
    sides = {
        "training": {f"t{n}": eight_bits(n, 0, 200) for n in range(9)},
        "validation": {"v": eight_bits(50, 240, 250)},
    }
    sides["training"]["t9"] = eight_bits(51, 240, 250)
    assert warned(tmp_path, sides) == []


def test_shared_values_of_a_case_that_cannot_be_read_are_none(tmp_path):
    parts, facts = look(tmp_path, {"training": {"a": scan(1)}, "validation": {"b": scan(1, 1)}})
    facts["a"]["voxels"] = {"error": "an end"}
    assert shared_grey_values(parts, facts) == []
    facts["b"]["voxels"] = None
    assert shared_grey_values(parts, facts) == []
    assert identical_images(parts["training"] + parts["validation"], facts) == []


def test_identical_images_are_found_whatever_their_type(tmp_path):
    image = eight_bits(0)
    parts, facts = look(
        tmp_path,
        {"training": {"a": image, "b": image.T.copy(), "c": image.astype(np.float64)}},
    )
    (finding,) = identical_images(parts["training"], facts)
    assert (finding.case_id, finding.warning) == ("c", False)
    assert "the voxels of a" in finding.message


# ---- real data


@pytest.fixture(scope="module")
def hippocampus(tmp_path_factory):
    """Folder of the dataset, and a cache of its facts."""
    if "SEG_TEST_DATA" not in os.environ:
        pytest.skip("SEG_TEST_DATA is unset: it names the folder of Task04_Hippocampus")
    root = Path(os.environ["SEG_TEST_DATA"])
    root = root if root.name == "Task04_Hippocampus" else root / "Task04_Hippocampus"
    return root, tmp_path_factory.mktemp("facts")


def number_of(case_id):
    return int(case_id.split("_")[1])


def test_hippocampus_draws_no_warning_when_it_is_split_by_person(hippocampus):
    root, cache = hippocampus
    for fold in range(2):
        cases = load_cases(root, fold=fold, group_pattern="pairs")
        assert preflight(cases, cache_dir=cache).findings == []


def test_hippocampus_draws_warnings_when_it_is_split_by_case(hippocampus):
    """Cases 2k - 1 and 2k are the two sides of one head."""
    root, cache = hippocampus
    cases = load_cases(root)
    training = {number_of(case["case_id"]) for case in cases.train}
    validation = {number_of(case["case_id"]) for case in cases.validation}
    torn = {n for n in validation if (n - 1 if n % 2 == 0 else n + 1) in training}
    findings = preflight(cases, cache_dir=cache).findings
    assert {finding.check for finding in findings} == {"shared_values"}
    seen = {number_of(finding.case_id) for finding in findings}
    print(f"{len(seen & torn)} of {len(torn)} torn pairs seen, {len(seen - torn)} others blamed")
    assert seen <= torn
    assert len(seen) >= 0.5 * len(torn) > 5
