"""DICOM Segmentations as labels: written by highdicom, compared voxel by voxel with the array."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from any_datasets import AFFINE, volumes
from dicom_series import write_series
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentDescription
from pydicom.sr.codedict import codes

from pipeline.commands.evaluate import main
from pipeline.data.cases import match
from pipeline.data.dataset import load_cases
from pipeline.data.nifti import check_headers, read_pair
from pipeline.data.preflight import preflight
from pipeline.drawing import read_case
from pipeline.errors import InputError
from transforms.dicom import DicomError
from transforms.load import LoadVolumesd
from transforms.segmentation import read_segment_names, read_segmentation

SHAPE = (9, 8, 7)
NAMES = ("Left_lung", "right lung")
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])


def oblique():
    turn = nib.eulerangles.euler2mat(0.1, -0.2, 0.3)
    return nib.affines.from_matvec(turn * [0.8, 1.2, 2.5], [-31.5, 12.25, 7])


def label_map():
    """Two segments; slices 0, 3 and 6 are empty, and 2 has the second alone."""
    label = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.uint8)
    label[:, :, [0, 3, 6]] = 0
    label[:, :, 2] = 2 * (label[:, :, 2] > 0)
    return label


def change_series(one, _):
    """What highdicom copies from the slices."""
    one.PatientID = one.AccessionNumber = one.StudyID = "a"
    one.PatientName = "a^b"
    one.PatientBirthDate = one.PatientSex = one.StudyDate = one.StudyTime = ""
    one.ReferringPhysicianName = one.PositionReferenceIndicator = ""
    one.StudyInstanceUID = one.FrameOfReferenceUID = "1.2.3.4"
    one.SliceThickness = 1.0


def normal(one):
    return np.cross(*np.reshape(one.ImageOrientationPatient, (2, 3)))


def write_segmentation(path, folder, label, names=NAMES, kind="BINARY", edit=lambda one: None):
    """Write a label `(H, W, D)` on the series of a folder; its stored frames are shuffled."""
    how = SegmentAlgorithmTypeValues.MANUAL
    tissue = codes.SCT.Tissue
    described = [
        SegmentDescription(n, name, tissue, tissue, how) for n, name in enumerate(names, start=1)
    ]
    slices = [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
    slices.sort(key=lambda one: np.dot(one.ImagePositionPatient, normal(one)))
    maker = ("maker", "model", "1", "2")
    pixels = np.moveaxis(label, (2, 1, 0), (0, 1, 2))
    one = Segmentation(slices, pixels, kind, described, "1.2.9", 1, "1.2.10", 1, *maker)
    groups, frames = one.PerFrameFunctionalGroupsSequence, one.pixel_array
    order = np.random.default_rng(1).permutation(len(groups))
    one.PerFrameFunctionalGroupsSequence = [groups[n] for n in order]
    stored = frames[order]
    packed = np.packbits(stored.ravel(), bitorder="little") if one.BitsAllocated == 1 else stored
    data = packed.tobytes()
    one.PixelData = data + bytes(len(data) % 2)
    edit(one)
    path.parent.mkdir(parents=True, exist_ok=True)
    one.save_as(path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A series, NIfTI made of it with its axes in another order, and its segmentation."""
    root = tmp_path_factory.mktemp("made")
    image = np.random.default_rng(2).integers(0, 99, SHAPE)
    write_series(root / "series", image, oblique(), change=change_series)
    turned = nib.Nifti1Image(image.astype(np.int16), oblique()).as_reoriented(TURN)
    nib.save(turned, root / "image.nii.gz")
    write_segmentation(root / "folder" / "any", root / "series", label_map())
    return root


TURN = np.array([[2, -1], [0, 1], [1, -1]])


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_segmentation_is_read_on_the_grid_of_its_image(made, tmp_path, kind):
    label = label_map()
    path = write_segmentation(tmp_path / "seg.dcm", made / "series", label, kind=kind)
    turned = nib.orientations.apply_orientation(label, TURN)
    for image, expected in ((made / "series", label), (made / "image.nii.gz", turned)):
        case = {"case_id": "a", "image": str(image), "label": str(path)}
        headers, issues = check_headers(case, 1)
        assert issues == []
        grid = headers["label"][0]
        got = read_segmentation(path, grid.shape, grid.affine)
        np.testing.assert_array_equal(got, expected)
        loaded = LoadVolumesd(["image", "label"])(case)
        np.testing.assert_array_equal(loaded["label"], expected)
        np.testing.assert_array_equal(loaded["label"].affine, loaded["image"].affine)
        nib.save(nib.Nifti1Image(expected, grid.affine), tmp_path / "pred.nii.gz")
        pred, found, _ = read_pair(tmp_path / "pred.nii.gz", path)
        np.testing.assert_array_equal(found, pred)
        drawn = read_case({**case, "pred": str(tmp_path / "pred.nii.gz")})
        np.testing.assert_array_equal(drawn.label, drawn.pred)
        assert drawn.label.sum() == label.sum()
    assert read_segment_names(path) == {1: "Left_lung", 2: "right lung"}


def of_type(one, kind):
    one.SegmentationType = kind


def of_class(one, uid):
    one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = uid


def overlapping(one):
    places = [group.PlanePositionSequence[0] for group in one.PerFrameFunctionalGroupsSequence]
    for place in places:
        place.ImagePositionPatient = places[0].ImagePositionPatient
    one.PixelData = b"\xff" * len(one.PixelData)


def shifted(one, by):
    group = one.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0]
    group.ImagePositionPatient = [x + by for x in group.ImagePositionPatient]


def resized(one):
    one.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [2, 2]


def numbered(one):
    one.SegmentSequence[1].SegmentNumber = 300


FAULTS = {
    "fractional": (lambda one: of_type(one, "FRACTIONAL"), "got one of type FRACTIONAL"),
    "contours": (lambda one: of_class(one, "1.2.840.10008.5.1.4.1.1.481.3"), "with plastimatch"),
    "image": (
        lambda one: of_class(one, "1.2.840.10008.5.1.4.1.1.2"),
        "got CT Image Storage. ",
    ),
    "overlap": (overlapping, "expected segments that do not overlap in seg.dcm"),
    "between": (lambda one: shifted(one, 0.4), "voxels from it. Resample the label onto"),
    "outside": (lambda one: shifted(one, 400), "of the image, got frames "),
    "another size": (resized, "got voxels of another size or direction"),
    "many segments": (numbered, "got segment number 300. Use numbers up to 255"),
    "cut off": (
        lambda one: one.__delattr__("SegmentSequence"),
        "Convert the label to NIfTI or DICOM",
    ),
}


@pytest.mark.parametrize(("edit", "message"), FAULTS.values(), ids=FAULTS)
def test_label_that_is_no_segmentation_of_the_image_is_one_line(made, tmp_path, edit, message):
    path = write_segmentation(tmp_path / "seg.dcm", made / "series", label_map(), edit=edit)
    case = {"image": str(made / "series"), "label": str(path)}
    with pytest.raises(DicomError) as caught:
        LoadVolumesd(["image", "label"])(case)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def dataset(root, names=lambda n: NAMES):
    """Series, and their segmentations as files and in folders."""
    for n in range(4):
        image, label = volumes(n)
        label[:, :, :2] = 0
        folder = write_series(
            root / f"images/c{n}", image.astype(int), AFFINE, change=change_series
        )
        place = f"c{n}/seg" if n % 2 else f"c{n}.dcm"
        write_segmentation(root / "labels" / place, folder, label, names(n))
    return root


def test_dataset_of_segmentations_is_checked_and_loaded(tmp_path):
    found = preflight(load_cases(dataset(tmp_path), num_folds=2))
    assert found.faults == []
    assert found.cases.class_names == ["background", *NAMES]
    assert [entry.num_cases for entry in found.fingerprint.classes] == [4, 4, 4]
    for n in range(4):
        (tmp_path / f"c{n}.nii.gz").touch()
    pairs, refused, _ = match(tmp_path, tmp_path / "labels")
    assert [label.name for *_, label in pairs] == ["c0.dcm", "c1", "c2.dcm", "c3"]
    assert refused == {}
    for n, case in enumerate(found.cases.cases):
        label = volumes(n)[1]
        label[:, :, :2] = 0
        np.testing.assert_array_equal(LoadVolumesd(["image", "label"])(case)["label"], label)


def test_segment_of_another_name_is_a_fault_of_its_case(tmp_path):
    named = [NAMES, ("left lung", "RIGHT_LUNG"), NAMES[::-1], NAMES]
    cases = load_cases(dataset(tmp_path, names=lambda n: named[n]), num_folds=2)
    (issue,) = cases.issues
    expected = "expected segment 1 to be 'Left_lung', as in c0, got 'right lung'."
    assert (issue.case_id, issue.check) == ("c2", "segment")
    assert issue.message.startswith(expected)
    rows = [f"images/c{n},labels/c{n}{'/seg' if n % 2 else '.dcm'}" for n in range(4)]
    (tmp_path / "cases.csv").write_text("\n".join(["image,label", *rows]))
    assert load_cases(tmp_path, num_folds=2).issues == cases.issues
    for n in range(4):
        nib.save(nib.Nifti1Image(volumes(n)[1], AFFINE), tmp_path / f"c{n}.nii.gz")
    words = [tmp_path, tmp_path / "labels", "--output_dir", tmp_path / "out"]
    assert main([str(word) for word in words]) == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["refused"] == {"c2": issue.message}
    assert (summary["num_cases"], [*summary["classes"]]) == (3, [*NAMES])


def test_label_that_is_broken_dicom_is_told_alone(tmp_path):
    dataset(tmp_path)
    for place in ("c0.dcm", "c1/seg", "c2.dcm", "c3/seg"):
        (tmp_path / "labels" / place).write_bytes(bytes(128) + b"DICM" + bytes(64))
    shutil.copy(tmp_path / "labels/c1/seg", tmp_path / "labels/c1/other")
    faults = preflight(load_cases(tmp_path, num_folds=2)).faults
    faults.sort(key=lambda issue: issue.case_id)
    assert [issue.case_id for issue in faults] == ["c0", "c1", "c2", "c3"]
    assert all("Convert the label to NIfTI or DICOM SEG" in issue.message for issue in faults)
    assert "expected one DICOM file in c1, got 2" in faults[1].message
    shutil.rmtree(tmp_path / "labels")
    (tmp_path / "labels").mkdir()
    with pytest.raises(InputError) as caught:
        load_cases(tmp_path, num_folds=2)
    assert [fault[:10] for fault in caught.value.faults] == [f"c{n}: expect" for n in range(4)]
