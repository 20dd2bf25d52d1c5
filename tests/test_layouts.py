import json
import re

import numpy as np
import pytest
from conftest import make_dataset, write_dataset_json
from dicom_series import write_series

from pipeline.data.layouts import read_layout
from pipeline.errors import InputError


def fault_of(path):
    with pytest.raises(InputError) as caught:
        read_layout(path)
    (fault,) = caught.value.faults
    assert "\n" not in fault
    return fault


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def ids(layout):
    return [case["case_id"] for case in layout.cases]


def found(layout):
    return [(issue.case_id, issue.check) for issue in layout.issues]


def test_read_layout_recognises_msd(tmp_path):
    make_dataset(tmp_path, num_cases=2)
    classes = {str(n): f"class {n}" for n in (10, 2, 1, 3, 4, 5, 6, 7, 8, 9)}  # not as words
    modality = {"10": "k", **{str(n): "abcdefghij"[n] for n in range(10)}}
    facts = {"description": "Left and right", "license": "CC-BY-SA 4.0", "release": "2.0"}
    changes = {"labels": {**classes, "0": "none"}, "modality": modality, **facts}
    write_dataset_json(tmp_path, ["tiny_001", "tiny_002"], **changes)
    layout = read_layout(tmp_path)
    assert (layout.kind, layout.name, layout.root) == ("msd", "tiny", tmp_path.resolve())
    assert layout.class_names == ["none", *(f"class {n}" for n in range(1, 11))]
    assert (layout.channel_names, layout.ignore_value) == (list("abcdefghijk"), None)
    assert layout.description == {"description": "Left and right", "licence": "CC-BY-SA 4.0"}
    assert (ids(layout), layout.issues) == (["tiny_001", "tiny_002"], [])
    assert layout.cases[0] == {
        "case_id": "tiny_001",
        "image": str(tmp_path / "imagesTr" / "tiny_001.nii.gz"),
        "label": str(tmp_path / "labelsTr" / "tiny_001.nii.gz"),
    }
    write_dataset_json(tmp_path, ["tiny_001"], modality=None, channel_names={"0": "CT"})
    assert read_layout(tmp_path).channel_names == ["CT"]


@pytest.mark.parametrize(
    "labels",
    [
        {"0": "background", "2": "bright"},
        {"1": "dim", "2": "bright"},
        {"0": "background"},
        {"0": "background", "1": "dim", "one": "bright"},
        {"background": 0, "dim": 1, "bright": 1},
        {"background": 0, "whole": [1, 2], "core": 2},
    ],
)
def test_read_layout_refuses_labels_that_do_not_count_from_0(tmp_path, labels):
    make_dataset(tmp_path, num_cases=1)
    write_dataset_json(tmp_path, ["tiny_001"], labels=labels)
    assert f"without gaps or regions, 'ignore' the last, got {labels}. Renumber" in fault_of(
        tmp_path
    )


def nnunet(root, cases=("a", "b"), channels=2, ending=".nii.gz", **changes):
    for case in cases:
        touch(root, *(f"imagesTr/{case}_{n:04d}{ending}" for n in range(channels)))
        touch(root, f"labelsTr/{case}{ending}")
    source = {
        "channel_names": {str(n): f"T{n + 1}" for n in range(channels)},
        "labels": {"background": 0, "tumour": 2, "liver": 1},
        "file_ending": ending,
        **changes,
    }
    root.mkdir(exist_ok=True)
    (root / "dataset.json").write_text(json.dumps({k: v for k, v in source.items() if v}))
    return root


def test_read_layout_recognises_nnunet(tmp_path):
    layout = read_layout(nnunet(tmp_path))
    assert (layout.kind, layout.issues) == ("nnunet", [])
    assert layout.class_names == ["background", "liver", "tumour"]
    assert (layout.channel_names, layout.ignore_value) == (["T1", "T2"], None)
    assert layout.cases == [
        {
            "case_id": case,
            "image": [str(tmp_path / f"imagesTr/{case}_{n:04d}.nii.gz") for n in (0, 1)],
            "label": str(tmp_path / f"labelsTr/{case}.nii.gz"),
        }
        for case in ("a", "b")
    ]


OF_NNUNET = [{"ending": ".nii"}, {"channel_names": None, "modality": {"0": "T1"}}]


@pytest.mark.parametrize("changes", [*OF_NNUNET, {"file_ending": None}])
def test_read_layout_takes_spellings_of_nnunet(tmp_path, changes):
    layout = read_layout(nnunet(tmp_path, channels=1, **changes))
    assert (layout.kind, layout.channel_names) == ("nnunet", ["T1"])
    ending = changes.get("ending", ".nii.gz")
    images = [case["image"] for case in layout.cases]
    assert images == [str(tmp_path / f"imagesTr/{case}_0000{ending}") for case in "ab"]


def test_read_layout_reads_nnunets_list_of_files(tmp_path):
    files = [f"elsewhere/{name}.nii.gz" for name in ("x1", "x2", "y")]
    touch(tmp_path, *files)
    listed = {"x": {"images": files[:2], "label": files[2]}}
    layout = read_layout(nnunet(tmp_path, cases=(), dataset=listed))
    *images, label = (str(tmp_path / name) for name in files)
    assert layout.cases == [{"case_id": "x", "image": images, "label": label}]


def test_read_layout_takes_the_highest_label_for_ignore(tmp_path):
    labels = {"background": 0, "ignore": 3, "a": 1, "b": 2}
    layout = read_layout(nnunet(tmp_path, labels=labels))
    assert (layout.class_names, layout.ignore_value) == (["background", "a", "b"], 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"background": 0, "ignore": 1, "a": 2}}, r"'ignore' the last, got "),
        ({"labels": {"background": 0, "ignore": 1}}, r"without gaps"),
        ({"file_ending": ".png"}, r"expected a file_ending of \.nii\.gz, .*, got '\.png'"),
        ({"channel_names": None}, r"expected 'channel_names' \(mapping, not empty\), got None"),
        ({"dataset": {"x": {"images": ["a.nii.gz"]}}}, r"expected image and .* in dataset\['x'\]"),
        ({"dataset": ["x"]}, r"expected 'dataset' \(mapping, not empty\), got \['x'\]"),
        ({"cases": ()}, r"expected cases, got none"),
    ],
)
def test_read_layout_refuses_of_nnunet_in_one_line(tmp_path, changes, message):
    assert re.search(message, fault_of(nnunet(tmp_path, **changes)))


def test_read_layout_finds_each_incomplete_case_of_nnunet_once(tmp_path):
    nnunet(tmp_path, cases=("a", "b", "c", "d", "e", "f"))
    for name in ("imagesTr/b_0000", "labelsTr/c", "imagesTr/d_0000", "imagesTr/d_0001"):
        (tmp_path / f"{name}.nii.gz").unlink()
    touch(tmp_path, "imagesTr/e_0002.nii.gz", "imagesTr/plain.nii.gz", "imagesTr/._a_0000.nii.gz")
    touch(tmp_path, "labelsTr/.a.nii.gz", "imagesTr/notes.txt", "imagesTr/g.nii", "labelsTr/g.nii")
    layout = read_layout(tmp_path)
    assert ids(layout) == ["a", "f"]
    assert sorted(found(layout)) == [
        ("b", "missing"),
        ("c", "unpaired"),
        ("d", "unpaired"),
        ("e", "unpaired"),
        ("plain", "unpaired"),
    ]
    lines = {issue.case_id: issue.line for issue in layout.issues}
    assert lines["b"] == "b: expected channels 0000, 0001, found no 0000. Add it."
    assert lines["c"].startswith("c: expected a label of image imagesTr/c_0000.nii.gz, found none.")
    assert lines["d"].startswith("d: expected an image of label labelsTr/d.nii.gz, found none.")
    assert "0001, got 0000, 0001, 0002. Move the others away." in lines["e"]


@pytest.mark.parametrize(("images", "labels"), [("images", "labels"), ("imagesTr", "labelsTr")])
def test_read_layout_recognises_folders(tmp_path, images, labels):
    touch(tmp_path, f"{images}/b.nii.gz", f"{images}/a_0001.nii", f"{images}/._b.nii.gz")
    touch(tmp_path, f"{labels}/b.nii", f"{labels}/a_0001.nii.gz", f"{labels}/.DS_Store")
    layout = read_layout(tmp_path)
    assert (layout.kind, layout.name, layout.issues) == ("folders", tmp_path.name, [])
    assert (layout.class_names, layout.channel_names) == (None, None)
    names = [("a_0001", "a_0001.nii", "a_0001.nii.gz"), ("b", "b.nii.gz", "b.nii")]
    assert layout.cases == [
        {"case_id": case, "image": f"{tmp_path}/{images}/{i}", "label": f"{tmp_path}/{labels}/{n}"}
        for case, i, n in names
    ]


def test_read_layout_puts_channels_of_folders_together(tmp_path):
    touch(tmp_path, *(f"images/{case}_{n:04d}.nii.gz" for case in "abc" for n in range(3)))
    touch(tmp_path, *(f"labels/{case}.nii.gz" for case in "abd"))
    (tmp_path / "images/b_0001.nii.gz").unlink()
    layout = read_layout(tmp_path)
    (case,) = layout.cases
    assert case["case_id"] == "a"
    assert case["image"] == [str(tmp_path / f"images/a_{n:04d}.nii.gz") for n in range(3)]
    assert found(layout) == [("b", "missing"), ("c", "unpaired"), ("d", "unpaired")]


def test_read_layout_takes_numbered_names_for_cases_when_labels_are_named_so(tmp_path):
    touch(tmp_path, "images/a_0000.nii", "images/c_0001.nii", "labels/a_0000.nii")
    layout = read_layout(tmp_path)
    assert (ids(layout), found(layout)) == (["a_0000"], [("c_0001", "unpaired")])


def test_read_layout_finds_a_case_of_folders_that_occurs_twice(tmp_path):
    touch(tmp_path, "images/a.nii", "images/a.nii.gz", "labels/a.nii", "images/b.nii")
    touch(tmp_path, "labels/b.nii", "images/c.nii", "labels/c.nii", "labels/c.nii.gz")
    layout = read_layout(tmp_path)
    twins = [("a", "duplicate_id"), ("c", "duplicate_id")]
    assert (ids(layout), found(layout)) == (["b"], twins)
    assert "in images, got a.nii and a.nii.gz. Remove one." in layout.issues[0].line


def series(folder):
    return write_series(folder, np.zeros((4, 3, 2), int), np.eye(4))


def test_read_layout_takes_dicom_folders_for_images(tmp_path):
    for name in ("a", "1.2.840", ".hidden"):
        series(tmp_path / "images" / name)
    touch(tmp_path, "images/empty/notes.txt", "labels/a.nii.gz", "labels/1.2.840.nii.gz")
    touch(tmp_path, "labels/empty.nii.gz")
    layout = read_layout(tmp_path)
    assert ids(layout) == ["1.2.840", "a"]
    assert layout.cases[1]["image"] == str(tmp_path / "images/a")
    assert found(layout) == [("empty", "unpaired")]


def table(root, text, name="cases.csv"):
    touch(root, *(f"{kind}{n}.nii.gz" for kind in ("i", "j", "l") for n in (1, 2)))
    (root / name).write_text(text, encoding="utf-8")
    return root


ROWS = "image,label,case_id,group,age\ni1.nii.gz,l1.nii.gz,x,p1,50\n\ni2.nii.gz,l2.nii.gz,y,p1,51\n"


SPELLINGS = {
    "byte order mark": "\ufeff" + ROWS,
    "semicolon": ROWS.replace(",", ";"),
    "tab": ROWS.replace(",", "\t"),
    "CRLF": ROWS.replace("\n", "\r\n"),
    "empty cells": ROWS.replace("\n\n", "\n,,,,\n"),
}


@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS)
def test_read_layout_reads_csv(tmp_path, text):
    table(tmp_path, text)
    expected = [
        {"case_id": case, "image": f"{tmp_path}/i{n}.nii.gz", "label": f"{tmp_path}/l{n}.nii.gz",
         "group": "p1"}
        for n, case in ((1, "x"), (2, "y"))
    ]  # fmt: skip
    for path in (tmp_path, tmp_path / "cases.csv"):
        layout = read_layout(path)
        assert (layout.kind, layout.name) == ("table", tmp_path.name)
        assert (layout.class_names, layout.channel_names, layout.issues) == (None, None, [])
        assert layout.root == tmp_path.resolve()
        assert layout.cases == expected


def test_read_layout_reads_channels_of_csv_in_their_order(tmp_path):
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz")
    rows = "image_1,image_0,label\nj1.nii.gz,i1.nii.gz,l1.nii.gz\n"
    table(tmp_path, f"{rows}a_0001.nii.gz,a_0000.nii.gz,l2.nii.gz\n", "mine.csv")
    layout = read_layout(tmp_path / "mine.csv")
    assert layout.name == "mine"
    assert layout.cases[0]["image"] == [str(tmp_path / f"{name}1.nii.gz") for name in "ij"]
    assert ids(layout) == ["i1", "a"]


def test_read_layout_reads_json_tables(tmp_path):
    rows = [
        {"image": ["i1.nii.gz", "j1.nii.gz"], "label": "l1.nii.gz", "group": 7, "note": [1, {}]},
        {"image": ["i2.nii.gz"], "label": str(tmp_path / "l2.nii.gz"), "group": 8, "case_id": None},
    ]
    layout = read_layout(table(tmp_path, json.dumps(rows), "cases.json"))
    first, second = layout.cases
    assert first["image"] == [str(tmp_path / "i1.nii.gz"), str(tmp_path / "j1.nii.gz")]
    assert (first["group"], second["group"]) == ("7", "8")
    assert second["image"] == str(tmp_path / "i2.nii.gz")
    assert second["label"] == str(tmp_path / "l2.nii.gz")
    assert ids(layout) == ["i1", "i2"]


def test_read_layout_finds_faults_of_rows(tmp_path):
    rows = ["i1.nii.gz,,p", "i2.nii.gz,l2.nii.gz,", ",l1.nii.gz,p", "j1.nii.gz,l1.nii.gz,p"]
    rows += ["j1.nii.gz,l2.nii.gz,p", "j2.nii.gz,l1.nii.gz,q", "no_series,l1.nii.gz,p"]
    (tmp_path / "no_series").mkdir()
    layout = read_layout(table(tmp_path, "\n".join(["image,label,group", *rows])))
    assert ids(layout) == ["j2"]
    assert found(layout) == [
        ("i1", "missing"),
        ("i2", "missing"),
        ("row 3", "missing"),
        ("j1", "duplicate_id"),
        ("no_series", "missing"),
    ]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("imgae,label\na,b\n", "cases.csv", r"column image, got imgae, label\. .* mean 'imgae'\?"),
        ("image,lable\na,b\n", "cases.csv", r"a column label, got .*Did you mean 'lable'\?"),
        ("image_0,image_2,label\na,b,c\n", "cases.csv", r"a column image_1, got "),
        ("image,image_0,label\na,b,c\n", "cases.csv", r"either a column image or image_0"),
        ("image,label\na,b,c\n", "cases.csv", r"expected 2 cells in line 2, got 3"),
        ("image,label,image\na,b,c\n", "cases.csv", r"columns of different names"),
        ("", "cases.csv", r"expected cases, got none"),
        ('image,label\n"a,b\n', "cases.csv", r"expected CSV in UTF-8, got: "),
        ("image,label,case_id\na,b,../c\n", "cases.csv", r"case ids without / .*, got '\.\./c'"),
        ("{}", "cases.json", r"expected a JSON list of cases, got dict"),
        ("[3]", "cases.json", r"file names\) in entry 1, got 3"),
        ("[", "cases.json", r"expected JSON, got: "),
    ],
)
def test_read_layout_refuses_a_table_in_one_line(tmp_path, text, name, message):
    assert re.search(message, fault_of(table(tmp_path, text, name)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", r"^dataset_dir: expected a folder with dataset.json .*, found no .*absent\."),
        ("file.mha", r"^dataset_dir: expected a folder, or a \.csv or \.json file .*file\.mha\."),
        ("empty", r"found nothing in .*empty\."),
        ("scans", r"found 0\.mha, 1\.mha, 2\.mha, 3\.mha, 4\.mha and 2 more in .*scans\."),
        ("both", r"expected one of cases\.csv and cases\.json, got both"),
        ("none", r"expected cases, got none"),
    ],
)
def test_read_layout_refuses_a_place_that_is_no_dataset(tmp_path, name, message):
    touch(tmp_path, "file.mha", "both/cases.csv", "both/cases.json", "scans/.hidden")
    touch(tmp_path / "scans", *(f"{n}.mha" for n in range(7)))
    for folder in ("empty", "none/images", "none/labels"):
        (tmp_path / folder).mkdir(parents=True)
    assert re.search(message, fault_of(tmp_path / name))


def test_read_layout_finds_files_outside_the_folder(tmp_path):
    """One case is at home, one is linked from elsewhere, and one is listed with `..`."""
    root = tmp_path / "home"
    touch(root, "images/a.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz", "labels/c.nii.gz")
    touch(tmp_path, "store/b", "beside.nii.gz")
    (root / "images/b.nii.gz").symlink_to(tmp_path / "store/b")
    rows = ["image,label", "images/a.nii.gz,labels/a.nii.gz", "images/b.nii.gz,labels/b.nii.gz"]
    (root / "cases.csv").write_text("\n".join([*rows, "../beside.nii.gz,labels/c.nii.gz"]))
    layout = read_layout(root)
    assert (ids(layout), found(layout)) == (["a"], [("b", "outside"), ("beside", "outside")])
    assert f"got {(tmp_path / 'store/b').resolve()}." in layout.issues[0].line
    layout = read_layout(root, data_roots=[tmp_path / "store"])
    assert (ids(layout), found(layout)) == (["a", "b"], [("beside", "outside")])
    assert layout.cases[1]["image"] == str(root / "images/b.nii.gz")  # the link's name


def test_read_layout_finds_a_dicom_file_outside_the_folder(tmp_path):
    store, inside = series(tmp_path / "store"), series(tmp_path / "home/images/a")
    touch(tmp_path, "home/labels/a.nii.gz")
    name = sorted(path.name for path in inside.iterdir())[-1]
    (inside / name).unlink()
    (inside / name).symlink_to(store / name)
    assert found(read_layout(tmp_path / "home")) == [("a", "outside")]
    assert found(read_layout(tmp_path / "home", data_roots=[store])) == []
