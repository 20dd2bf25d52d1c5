"""What stands beside predictions: names and colours, volumes, warnings, the page."""

from __future__ import annotations

import csv
import json
import re
from urllib.parse import unquote

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import xmltodict
from monai.data import MetaTensor
from PIL import Image

from pipeline.drawing import class_color
from pipeline.prediction.nifti_output import save_like
from pipeline.prediction.results import (
    CaseResult,
    count_voxels,
    draw_pictures,
    make_color_table,
    write_results,
)

NAMES = ["background", "left kidney", "a & <b> ]]>"]


def read_as_totalsegmentator(path) -> list[dict[str, str]]:
    """The entries of the label table, by the calls of its `load_multilabel_nifti`."""
    content = xmltodict.parse(nib.load(path).header.extensions[0].get_content())
    entries = content["CaretExtension"]["VolumeInformation"]["LabelTable"]["Label"]
    return [entries] if isinstance(entries, dict) else entries


@pytest.mark.parametrize("names", [NAMES, NAMES[:2], [*NAMES, "x" * 40]])
@pytest.mark.parametrize("form", [nib.Nifti1Image, nib.Nifti2Image])
def test_header_has_names_and_colors_as_totalsegmentator_reads_them(tmp_path, names, form):
    labels = np.random.default_rng(0).integers(0, len(names), (7, 6, 5)).astype(np.uint8)
    affine = np.diag([1, 2, 3, 1.0])
    nib.save(form(np.zeros((7, 6, 5), np.int16), affine), tmp_path / "image.nii.gz")
    path = tmp_path / "pred.nii.gz"
    save_like(labels, tmp_path / "image.nii.gz", path, names)
    entries = read_as_totalsegmentator(path)
    assert {int(one["@Key"]): one["#text"] for one in entries} == dict(enumerate(names[1:], 1))
    for value, one in enumerate(entries, 1):
        color = [255 * float(one[f"@{part}"]) for part in ("Red", "Green", "Blue")]
        np.testing.assert_allclose(color, class_color(value), atol=0.1)
    np.testing.assert_array_equal(nib.load(path).dataobj, labels)
    if form is nib.Nifti1Image:  # ITK, which passes over the extension, reads no other
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(path)).T, labels)


def test_color_table_has_a_line_of_six_words_for_each_value():
    lines = [line for line in make_color_table(NAMES).splitlines() if not line.startswith("#")]
    rows = [line.split(" ") for line in lines]
    assert [row[:2] for row in rows] == [
        ["0", "background"], ["1", "left_kidney"], ["2", "a_&_<b>_]]>"],
    ]  # fmt: skip
    assert [tuple(map(int, row[2:5])) for row in rows[1:]] == [class_color(1), class_color(2)]


def test_voxels_are_counted_by_name_also_where_there_are_none():
    labels = np.random.default_rng(0).choice([0, 2], (9, 8, 7)).astype(np.uint8)
    found = count_voxels(torch.from_numpy(labels), NAMES)
    assert found == {NAMES[1]: 0, NAMES[2]: int((labels == 2).sum())}


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIL"])
def test_pictures_show_the_patients_right_on_the_left(tmp_path, axes):
    image, labels = np.zeros((2, 40, 30, 20))
    image[30:36, 20:26, 10:16] = labels[30:36, 20:26, 10:16] = 1  # right, anterior, superior
    ornt = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)
    )
    turned = [nib.Nifti1Image(v, np.eye(4)).as_reoriented(ornt) for v in (image, labels)]
    arrays = [np.asarray(one.dataobj) for one in turned]
    tensor = MetaTensor(torch.from_numpy(arrays[0].copy())[None], affine=turned[0].affine)
    draw_pictures(tmp_path, "a b", tensor, arrays[1].astype(np.uint8))
    found = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert found == [f"a b_{name}.webp" for name in ("axial", "coronal", "sagittal")]
    for name in found:
        picture = np.asarray(Image.open(tmp_path / "pictures" / name).convert("RGB"), int)
        near = np.abs(picture - class_color(1)).sum(axis=2) < 90  # WebP is lossy
        rows, columns = np.nonzero(near)
        assert len(rows) > 50
        assert rows.mean() < near.shape[0] / 2, name
        assert columns.mean() < near.shape[1] / 2, name


def test_results_of_a_folder_are_those_of_all_its_predictions(tmp_path):
    def write(*cases):
        write_results(tmp_path, cases, NAMES)
        with open(tmp_path / "volumes.csv") as file:
            rows = [tuple(row.values()) for row in csv.DictReader(file)]
        return rows, json.loads((tmp_path / "predictions.json").read_text())

    voxels = dict(zip(NAMES[1:], (3, 0), strict=True))
    first = CaseResult("a", "../a.nii.gz", "one", None, ["expected 1 mm, got 9 mm."], 0.5, voxels)
    bad = CaseResult("c", "c.nii.gz", "one", "expected a readable file, got none.")
    (tmp_path / "a.nii.gz").touch()
    of_first = [("a", NAMES[1], "1.5", "3"), ("a", NAMES[2], "0.0", "0")]
    rows, content = write(first, bad)
    assert rows == of_first
    assert content["cases"]["a"]["warnings"] == first.warnings
    assert content["cases"]["a"]["volumes_ml"] == {NAMES[1]: 1.5, NAMES[2]: 0.0}
    assert content["cases"]["c"]["fault"] == bad.fault
    assert json.loads((tmp_path / "labels.json").read_text()) == dict(zip("012", NAMES))  # noqa: B905
    page = (tmp_path / "index.html").read_text()
    for text in (*first.warnings, bad.fault, "a &amp; &lt;b&gt; ]]&gt;", "1.50 ml"):
        assert text in page, text
    second = CaseResult(
        "b\x1b[31m\u202e", "b.nii.gz", "two", None, [], 0.25, {**voxels, NAMES[2]: 4}
    )
    rows, content = write(second)
    assert [row[0] for row in rows[:2]] == ["a", "a"]
    assert (len(rows), rows[3][2:]) == (4, ("1.0", "4"))
    assert "c" not in content["cases"]
    assert [of["model"] for of in content["cases"].values()] == ["one", "two"]
    assert not re.search("[\x1b\u202e]", (tmp_path / "index.html").read_text())
    (tmp_path / "a.nii.gz").unlink()
    assert len(write(second)[0]) == 2
    (tmp_path / "predictions.json").write_text('{"class_names": 2, "cases": [1]}')
    assert len(write(second)[0]) == 2


def test_page_reads_slices_from_files_where_cases_are_many(tmp_path, monkeypatch):
    image = MetaTensor(torch.rand(1, 9, 8, 7), affine=torch.eye(4))
    for case_id in ("a", "b #1%"):
        draw_pictures(tmp_path, case_id, image, np.zeros((9, 8, 7), np.uint8))
    cases = [CaseResult(case_id, voxels={n: 0 for n in NAMES[1:]}) for case_id in ("a", "b #1%")]
    write_results(tmp_path, cases, NAMES)
    assert (tmp_path / "index.html").read_text().count('src="data:image/webp;base64,') == 6
    monkeypatch.setattr("pipeline.prediction.results.MOST_EMBEDDED", 1)
    write_results(tmp_path, cases, NAMES)
    page = (tmp_path / "index.html").read_text()
    assert {*re.findall('href="#([^"]+)"', page)} <= {*re.findall('id="([^"]+)"', page)}
    addresses = re.findall('<img src="([^"]+)"', page)
    assert len(addresses) == 6
    assert all((tmp_path / unquote(address)).is_file() for address in addresses)
