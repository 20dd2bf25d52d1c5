"""A folder or a file to predict, as cases: which files are channels of one, and which are alone."""

from pathlib import Path

import numpy as np
import pytest
from dicom_series import write_enhanced, write_series

from pipeline.data.cases import case_name, list_images
from pipeline.data.content import ContentHashes
from pipeline.data.layouts import read_layout
from pipeline.errors import InputError
from transforms.dicom import read_geometry, read_series


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


def write_numbered(folder, value, **how):
    """A series in which all voxels have one value."""
    return write_series(folder, np.full((4, 3, 2), value), np.eye(4), **how)


def values_of(cases):
    """Case id to the value of all voxels."""
    return {case["case_id"]: set(read_series(case["image"])[0].ravel()) for case in cases}


NESTED = {
    "p1/study/series": "p1",
    "p2/study/t1": "p2_t1",
    "p2/study/t2": "p2_t2",
    "p3/a/s": "p3_a_s",
    "p3/b/s": "p3_b_s",
    "p3/b/r": "p3_b_r",
    "p4": "p4",
}


def test_list_images_finds_nested_series_and_names_them(tmp_path):
    for value, folder in enumerate(NESTED):
        write_numbered(tmp_path / folder, value)
        (tmp_path / folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    for folder in ("p1/notes", "viewer", ".hidden/p5"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text("no image")
    (tmp_path / "p2/again").symlink_to(tmp_path)  # a loop
    cases = list_images(tmp_path)
    assert values_of(cases) == {name: {n} for n, name in enumerate(NESTED.values())}
    assert [case["image"] for case in cases] == sorted(str(tmp_path / name) for name in NESTED)
    assert shown(list_images(tmp_path / "p1")) == {"study": "series"}
    assert values_of([{"case_id": "p1", "image": tmp_path / "p1"}]) == {"p1": {0}}


def write_flat(folder):
    """Two series in one folder; a third, of one file, has the number of the second."""
    write_numbered(folder, 1, prefix="A", number=3)
    write_numbered(folder, 2, prefix="B", number=5)
    write_enhanced(folder / "C", np.full((4, 3, 2), 3), np.eye(4), number=5)
    return folder


FLAT = {"flat_series3": {1}, "flat_series5": {2}, "flat_series5_2": {3}}


def test_list_images_takes_the_series_of_a_flat_folder_for_cases(tmp_path):
    flat = write_flat(tmp_path / "flat")
    assert values_of(list_images(flat)) == FLAT
    assert values_of(list_images(tmp_path)) == FLAT
    write_numbered(flat / "below", 4)
    want = {"flat_series3": {1}, "flat_series5": {2}, "flat_series5_2": {3}, "flat_below": {4}}
    assert values_of(list_images(tmp_path)) == want
    assert shown(list_images(flat / "B0001")) == {"flat_series5": "B0001"}
    assert values_of(list_images(flat / "C")) == {"flat_series5": {3}}


def test_read_layout_takes_nested_series_and_dicom_files(tmp_path):
    write_numbered(tmp_path / "images/a/study/series", 1)
    write_flat(tmp_path / "images/flat")
    (tmp_path / "labels").mkdir()
    for name in ("a", *FLAT):
        (tmp_path / f"labels/{name}.nii.gz").touch()
    found = read_layout(tmp_path)
    assert values_of(found.cases) == {"a": {1}, **FLAT}
    rows = ["image,label,case_id", "images/a,labels/a.nii.gz,x"]
    rows += ["images/flat/B0001,labels/a.nii.gz,y", "images/none,labels/a.nii.gz,z"]
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    found = read_layout(tmp_path)
    assert values_of(found.cases) == {"x": {1}, "y": {2}}
    assert [(issue.case_id, issue.check) for issue in found.issues] == [("z", "missing")]


def test_read_layout_finds_a_file_of_a_series_outside_the_folder(tmp_path):
    home, store = tmp_path / "home", write_numbered(tmp_path / "store", 1, prefix="B")
    write_numbered(home / "images/a", 1, prefix="A")
    for file in store.iterdir():
        (home / "images/a" / file.name).symlink_to(file)
    (home / "cases.csv").write_text("image,label\nimages/a/B0000,images/a/A0000")
    assert [issue.check for issue in read_layout(home).issues] == ["outside"]
    assert not read_layout(home, data_roots=[store]).issues


def test_content_of_a_dicom_file_is_that_of_its_series(tmp_path):
    flat, hashes = write_flat(tmp_path), ContentHashes(tmp_path / "cache")
    case = {"case_id": "a", "image": str(flat / "A0000")}
    before = hashes.of_case(case)
    write_numbered(flat, 7, prefix="B")
    assert hashes.of_case(case) == before
    (flat / "A0001").write_bytes(b"changed")
    assert hashes.of_case(case) != before


def test_case_names_have_no_characters_that_a_terminal_or_a_file_system_obeys(tmp_path):
    assert case_name('a\x1b[31m\nb|c<"é ü>.nii.gz') == "a_[31m_b_c__é ü_"

    def change(one, k):
        one.SeriesNumber = None

    for name in ("A", "B"):
        write_numbered(tmp_path / "x\x1b:", 1, prefix=name, change=change)
    assert list(shown(list_images(tmp_path))) == ["x___series", "x___series_2"]


def test_list_images_lists_dicom_without_an_image_so_that_reading_says_what_it_is(tmp_path):
    (tmp_path / "a").mkdir()
    write_enhanced(
        tmp_path / "a/1", np.zeros((4, 3, 2)), np.eye(4), sop_class="SegmentationStorage"
    )
    (case,) = list_images(tmp_path)
    with pytest.raises(ValueError, match="got CT"):
        read_geometry(case["image"])


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
