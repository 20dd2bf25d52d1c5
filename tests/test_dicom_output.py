"""Predictions as DICOM Segmentations, read back by others."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_series import STUDY, describe, write_enhanced, write_series

from pipeline.drawing import class_color
from pipeline.errors import InputError
from pipeline.prediction.dicom_output import is_segmentation, load_highdicom, save_segmentation
from pipeline.prediction.segmenter import PredictionError
from transforms.dicom import read_series, read_slices

NAMES = ["background", "left kidney", "tumour", "not there"]


def make_affine() -> np.ndarray:
    """Return an oblique affine to RAS mm, whose slices run from head to foot."""
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)) + 3 * np.eye(3))[0]
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.7, 0.9, -2.5])
    affine[:3, 3] = [11, -22, 33]
    return affine


@pytest.fixture
def made(tmp_path):
    """A series, labels with slices that have none, and the segmentation of them."""
    stored = np.random.default_rng(0).integers(0, 99, (13, 11, 9)).astype(np.int16)
    series = write_series(tmp_path / "series", stored, make_affine(), change=describe)
    labels = np.random.default_rng(1).integers(0, 3, (13, 11, 9)).astype(np.uint8)
    labels[..., [0, 4]] = 0
    save_segmentation(labels, series, tmp_path / "seg.dcm", NAMES)
    return series, labels, tmp_path / "seg.dcm"


def test_segmentation_says_of_every_frame_where_it_lies(made):
    series, labels, path = made
    segmentation = pydicom.dcmread(path)
    _, affine = read_series(series)
    frames = segmentation.pixel_array
    groups = segmentation.PerFrameFunctionalGroupsSequence
    assert len(frames) == len(groups) == 14  # two segments on seven slices that have any
    back = np.zeros_like(labels)
    for frame, group in zip(frames, groups, strict=True):
        value = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        lps = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        place = np.linalg.solve(affine, [*(lps * [-1, -1, 1]), 1])
        np.testing.assert_allclose(place[:2], 0, atol=1e-3)
        assert place[2] == pytest.approx(round(place[2]), abs=1e-3)
        back[..., round(place[2])] += (frame.T * value).astype(np.uint8)
    np.testing.assert_array_equal(back, labels)
    assert [one.SegmentLabel for one in segmentation.SegmentSequence] == NAMES[1:]
    assert segmentation.StudyInstanceUID == STUDY["StudyInstanceUID"]
    assert is_segmentation(path)
    assert not is_segmentation(next(series.iterdir()))


def test_segmentation_is_read_back_by_highdicom(made):
    series, labels, path = made
    segmentation = highdicom.seg.segread(path)
    uids = [one.SOPInstanceUID for one in read_slices(series)[0]]
    got = segmentation.get_pixels_by_source_instance(
        uids, combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(got.transpose(2, 1, 0), labels)
    color = segmentation.get_segment_description(2).RecommendedDisplayCIELabValue
    rgb = highdicom.color.CIELabColor.from_dicom_value(color).to_rgb()
    np.testing.assert_allclose(rgb, class_color(2), atol=2)


@pytest.mark.skipif(
    not (DCMQI := shutil.which("segimage2itkimage", path=str(Path(sys.executable).parent))),
    reason="dcmqi is not installed",
)
def test_segmentation_is_read_back_by_dcmqi(made, tmp_path):
    import SimpleITK as sitk

    series, labels, path = made
    words = ["--inputDICOM", path, "--outputDirectory", tmp_path, "--mergeSegments"]
    done = subprocess.run([DCMQI, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.nrrd")
    got = sitk.ReadImage(file)
    _, affine = read_series(series)
    back = np.zeros_like(labels)
    for index in np.argwhere(sitk.GetArrayFromImage(got).T):
        lps = got.TransformIndexToPhysicalPoint(index.tolist())
        place = np.linalg.solve(affine, [*(np.array(lps) * [-1, -1, 1]), 1])[:3]
        np.testing.assert_allclose(place, np.rint(place), atol=1e-2)
        back[tuple(np.rint(place).astype(int))] = got[index.tolist()]
    np.testing.assert_array_equal(back, labels)


def test_segmentation_of_an_anonymous_series_is_read_by_others(made, tmp_path):
    _, labels, _ = made
    stored = np.zeros(labels.shape, np.int16)

    def strip(one, k):
        describe(one, k)
        for name in ("PatientID", "PatientName", "PatientBirthDate", "StudyDate", "StudyID"):
            delattr(one, name)
        one.SliceThickness = None

    series = write_series(tmp_path / "stripped", stored, make_affine(), change=strip)
    names = ["background", "a\\b \u65e5", "tumour"]
    save_segmentation(labels, series, tmp_path / "new.dcm", names)
    segmentation = highdicom.seg.segread(tmp_path / "new.dcm")
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    assert shared.PixelMeasuresSequence[0].SliceThickness == pytest.approx(2.5)
    assert [one.SegmentLabel for one in segmentation.SegmentSequence] == ["a_b \u65e5", "tumour"]
    uids = [one.SOPInstanceUID for one in read_slices(series)[0]]
    got = segmentation.get_pixels_by_source_instance(
        uids, combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(got.transpose(2, 1, 0), labels)


def test_segmentation_of_an_enhanced_file_lies_where_its_frames_lie(tmp_path):
    labels = np.random.default_rng(1).integers(0, 3, (13, 11, 9)).astype(np.uint8)
    path = write_enhanced(tmp_path / "e.dcm", np.zeros(labels.shape, np.int16), make_affine())
    source = pydicom.dcmread(path)
    describe(source, 0)
    source.save_as(path)
    _, affine = read_series(path)
    save_segmentation(labels, path, tmp_path / "seg.dcm", NAMES)
    segmentation, back = pydicom.dcmread(tmp_path / "seg.dcm"), np.zeros_like(labels)
    groups = segmentation.PerFrameFunctionalGroupsSequence
    for frame, group in zip(segmentation.pixel_array, groups, strict=True):
        lps = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        place = np.linalg.solve(affine, [*(lps * [-1, -1, 1]), 1])
        value = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        back[..., round(place[2])] += (frame.T * value).astype(np.uint8)
    np.testing.assert_array_equal(back, labels)


def test_segmentation_of_an_empty_prediction_has_all_segments(made, tmp_path):
    series, labels, _ = made
    save_segmentation(labels * 0, series, tmp_path / "empty.dcm", NAMES)
    segmentation = pydicom.dcmread(tmp_path / "empty.dcm")
    assert len(segmentation.SegmentSequence) == 3
    assert not segmentation.pixel_array.any()


def test_series_that_cannot_be_referred_to_is_one_line(tmp_path):
    series = write_series(tmp_path / "series", np.ones((5, 4, 3), np.int16), np.eye(4))
    with pytest.raises(PredictionError, match="dicom_seg: expected a series that a"):
        save_segmentation(np.ones((5, 4, 3), np.uint8), series, tmp_path / "seg.dcm", NAMES)
    assert not (tmp_path / "seg.dcm").exists()


def test_missing_highdicom_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(InputError, match=r'Install the extra: pip install "ampseg\[dicom\]"'):
        load_highdicom()
