"""A folder or a file to predict, as cases: which files are channels of one, and which are alone."""

from pathlib import Path

import numpy as np
import pytest
from dicom_series import write_series

from pipeline.data.cases import list_images
from pipeline.errors import InputError


def touch(root, names):
    for name in names:
        (root / (name if "." in name else f"{name}.nii.gz")).touch()


def shown(cases):
    """Case id to file names, as a word where there is one path and not a list."""
    return {
        case["case_id"]: [Path(path).name for path in case["image"]]
        if isinstance(case["image"], list)
        else Path(case["image"]).name
        for case in cases
    }


def test_list_images_finds_nifti_files_by_name(tmp_path):
    touch(tmp_path, ("b.nii.gz", "a.b.nii", "._a.nii", "a.nii.gz.part", "notes.txt"))
    assert list_images(tmp_path) == [
        {"case_id": "a.b", "image": str(tmp_path / "a.b.nii")},
        {"case_id": "b", "image": str(tmp_path / "b.nii.gz")},
    ]


def alone(*names):
    return {name: f"{name}.nii.gz" for name in names}


def channels(case_id, *numbers):
    return {case_id: [f"{case_id}_{number:04d}.nii.gz" for number in numbers]}


@pytest.mark.parametrize(
    ("num_channels", "expected"),
    [
        (None, channels("a_1", 0, 1) | channels("b", 0, 1)),
        (2, channels("a_1", 0, 1) | channels("b", 0, 1)),
        (None, alone("amos_0001", "amos_0002")),  # channels count from 0
        (2, alone("amos_0001", "amos_0002")),
        (1, alone("amos_0000", "amos_0001")),
        (2, alone("amos_0000", "amos_0001", "amos_0002")),
        (1, alone("a_0000", "b_0000", "b_0001")),
        (None, alone("a_0000", "a_0001", "b_0000")),
        (None, alone("a_0000", "b")),
        (2, alone("a_0000", "b_0000")),
        # cases that lack a channel
        (2, channels("a", 0, 1) | channels("b", 1) | channels("c", 0, 1, 2) | alone("d", "e_1")),
    ],
)
def test_list_images_takes_files_for_channels_or_for_cases(tmp_path, num_channels, expected):
    for files in expected.values():
        touch(tmp_path, [files] if isinstance(files, str) else files)
    assert shown(list_images(tmp_path, num_channels=num_channels)) == expected


@pytest.mark.parametrize(
    ("name", "num_channels", "expected"),
    [
        ("a_0001", 2, {"a": ["a_0000.nii.gz", "a_0001.nii.gz"]}),
        ("a_0001", None, {"a": ["a_0000.nii.gz", "a_0001.nii.gz"]}),
        ("a_0001", 1, {"a_0001": "a_0001.nii.gz"}),
        ("a_0000", 1, {"a_0000": "a_0000.nii.gz"}),
        ("a_0001", 4, {"a_0001": "a_0001.nii.gz"}),
        ("brats_0001", 4, {"brats_0001": "brats_0001.nii.gz"}),
        ("brats_0001", None, {"brats_0001": "brats_0001.nii.gz"}),
        ("b_0000", 1, {"b": "b_0000.nii.gz"}),
        ("b_0000", 2, {"b_0000": "b_0000.nii.gz"}),
        ("c", 2, {"c": "c.nii.gz"}),
    ],
)
def test_list_images_takes_a_file_with_its_channels_or_alone(
    tmp_path, name, num_channels, expected
):
    touch(tmp_path, ["a_0000", "a_0001", "brats_0001", "brats_0002", "b_0000", "c", "c.nii"])
    cases = list_images(f"{name}.nii.gz", num_channels, tmp_path)
    assert shown(cases) == expected
    assert all("fault" not in case for case in cases)


def test_list_images_finds_dicom_series(tmp_path):
    stored = np.zeros((4, 3, 2), int)
    for name in ("1.2.840", ".hidden", "a_0000", "a_0001"):
        write_series(tmp_path / name, stored, np.eye(4))
    (tmp_path / "empty").mkdir()
    found = [(case["case_id"], Path(case["image"]).name) for case in list_images(tmp_path)]
    assert found == [(name, name) for name in ("1.2.840", "a_0000", "a_0001")]
    assert shown(list_images(tmp_path, 2)) == {"1.2.840": "1.2.840", "a": ["a_0000", "a_0001"]}
    one = tmp_path / "1.2.840"
    assert list_images(one) == [{"case_id": "1.2.840", "image": str(one)}]


@pytest.mark.parametrize(
    ("names", "num_channels", "image", "got"),
    [
        (["a.nii", "a", "b"], 1, "a.nii", "a.nii and a.nii.gz"),
        (["a_0000.nii", "a_0000", "b_0000"], 1, "a_0000.nii", "a_0000.nii and a_0000.nii.gz"),
        (
            ["a_0000", "a_0001.nii", "a_0001", "b"],
            2,
            ["a_0000.nii.gz", "a_0001.nii"],
            "a_0001.nii and a_0001.nii.gz",
        ),
        (["a", "a_0000", "a_0001", "b"], 2, "a.nii.gz", "a.nii.gz and a_0000.nii.gz"),
    ],
)
def test_list_images_says_what_is_wrong_with_a_name_that_is_there_twice(
    tmp_path, names, num_channels, image, got
):
    touch(tmp_path, names)
    cases = list_images(tmp_path, num_channels)
    assert [case["case_id"] for case in cases] == ["a", "b"]
    assert shown(cases)["a"] == image
    line = f"expected one volume of this name in {tmp_path}, got {got}. Remove one."
    assert [case.get("fault") for case in cases] == [line, None]


@pytest.mark.parametrize("folder", [".", "absent", "notes.txt"])
def test_list_images_refuses_a_folder_without_images(tmp_path, folder):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"or DICOM series\) in .*, got none"):
        list_images(tmp_path / folder)
