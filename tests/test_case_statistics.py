"""Statistics of a case against numpy on whole volumes, and that they are stored rightly."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pytest

from pipeline.data import content, statistics
from pipeline.data.content import ContentHashes
from pipeline.data.nifti import check_headers
from transforms import volumes

SHAPE = (9, 8, 7)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(statistics, "PIECE", 101)


def save(path, voxels):
    path.parent.mkdir(exist_ok=True, parents=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([1, 1.5, 2, 1])), path)
    return str(path)


def make_voxels(seed=0, channels=()):
    rng = np.random.default_rng(seed)
    image = np.zeros((*SHAPE, *channels), np.float32)
    image[2:6, 1:7, 3:6] = rng.normal(100, 30, (4, 6, 3, *channels))
    return image, rng.integers(0, 4, SHAPE).astype(np.uint8)


def make_case(folder, image, label, case_id="a"):
    return {
        "case_id": case_id,
        "image": save(folder / f"{case_id}.nii.gz", image),
        "label": save(folder / f"{case_id}_label.nii.gz", label),
    }


def measure(case, ignore_value=None, hashes=None):
    headers, issues = check_headers(case, None)
    assert issues == []
    return statistics.recall(case, headers, ignore_value, hashes)


def measure_voxels(folder, image, label, ignore_value=None):
    return measure(make_case(folder, image, label), ignore_value)


def assert_channel(got, values, label, ignore_value=None):
    """Statistics of a channel against numpy in float64."""
    flat = values.astype(np.float64)
    finite = np.isfinite(flat.astype(np.float32))
    kept = flat[finite]
    inside = flat[finite & (label > 0) & (label != ignore_value)]
    assert got.num_non_finite == (~finite).sum()
    assert (got.min, got.max) == (kept.min(), kept.max())
    assert got.mean == pytest.approx(kept.mean(), rel=1e-12)
    assert got.std == pytest.approx(kept.std(), rel=1e-6)
    levels = (np.arange(200) + 0.5) / 200
    np.testing.assert_allclose(got.foreground_quantiles, np.quantile(inside, levels))


# ---- measuring


@pytest.mark.parametrize("ignore_value", [None, 3, -1])
def test_case_is_measured_as_numpy_does(tmp_path, ignore_value):
    image, label = make_voxels()
    got = measure_voxels(tmp_path, image, label, ignore_value)
    values, counts = np.unique(label, return_counts=True)
    assert got.label_counts == dict(zip(map(str, values), counts, strict=True))
    assert (got.num_fractions, got.num_non_finite_labels) == (0, 0)
    assert got.box == [[2, 6], [1, 7], [3, 6]]
    assert_channel(got.channels[0], image, label, ignore_value)
    assert asdict(got) == json.loads(json.dumps(asdict(got)))


@pytest.mark.parametrize("dtype", ["i2", ">i2", "f4", "f8"])
def test_label_values_are_counted_in_any_type(tmp_path, dtype):
    image, label = make_voxels()
    stored = label.astype(dtype)
    counts = measure_voxels(tmp_path, image, stored).label_counts
    assert counts == measure_voxels(tmp_path, image, label).label_counts
    stored[0, 0, :3] = -2
    counts = measure_voxels(tmp_path, image, stored).label_counts
    assert counts["-2"] == 3
    assert sum(counts.values()) == label.size


def test_label_is_measured_when_it_has_fractions_and_nan(tmp_path):
    image, label = make_voxels()
    stored = label.astype(np.float32)
    stored[:2, 0, 0], stored[3, 3, 3], stored[4, 4, 4:6] = np.nan, np.inf, 0.5
    stored[5, 5, 5] += 0.0005  # is rounded
    got = measure_voxels(tmp_path, image, stored)
    assert (got.num_fractions, got.num_non_finite_labels) == (2, 3)
    assert got.label_counts["0.5"] == 2


def test_channels_are_measured_one_by_one_in_one_file_and_in_several(tmp_path):
    image, label = make_voxels(channels=(3,))
    image[..., 2] += 7  # not zero at the border
    case = make_case(tmp_path, image, label)
    files = [save(tmp_path / f"{n}.nii", image[..., n]) for n in range(3)]
    one, several = measure(case), measure({**case, "image": files})
    assert one == several
    assert one.box == [[0, 9], [0, 8], [0, 7]]
    for n in range(3):
        assert_channel(one.channels[n], image[..., n], label)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_voxels_that_are_not_finite_as_float32_are_counted_and_left_out(tmp_path, value):
    image, label = make_voxels()
    image = image.astype(np.float64)
    image[3, 3, 3:5] = value
    got = measure_voxels(tmp_path, image, label).channels[0]
    assert got.num_non_finite == 2
    image[3, 3, 3:5] = np.nan
    assert_channel(got, image, label)


def test_deviation_is_right_far_from_zero(tmp_path):
    image = 1e9 + np.random.default_rng(0).normal(size=SHAPE)
    label = make_voxels()[1]
    assert_channel(measure_voxels(tmp_path, image, label).channels[0], image, label)


def test_sketch_holds_the_smallest_hashes_of_all_values_but_zero(tmp_path):
    image = np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.float32)
    got = measure_voxels(tmp_path, image, make_voxels()[1]).channels[0].sketch

    def mix(x):  # SplitMix64's finalizer in Python's integers
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    bits = np.unique(image[image != 0].astype(np.float64)).view(np.uint64).tolist()
    assert got == sorted(map(mix, bits))[:256]


# ---- storing


class Stored:
    """Measures cases with hashes that are read anew each time, and notes which are really read."""

    def __init__(self, cache_dir, monkeypatch):
        self.cache_dir, self.measure_case = cache_dir, Mock(side_effect=statistics.measure_case)
        monkeypatch.setattr(content, "SETTLED_S", -1)  # files are remembered however new they are
        monkeypatch.setattr(statistics, "measure_case", self.measure_case)

    def __call__(self, cases, ignore_value=None):
        self.measure_case.reset_mock()
        hashes = ContentHashes(self.cache_dir)
        found = [measure(case, ignore_value, hashes) for case in cases]
        hashes.save()
        return found

    @property
    def read(self):
        return [call.args[0]["case_id"] for call in self.measure_case.call_args_list]

    @property
    def files(self):
        return sorted((self.cache_dir / "statistics").iterdir())


@pytest.fixture
def stored(tmp_path, monkeypatch):
    return Stored(tmp_path / "cache", monkeypatch)


@pytest.fixture
def cases(tmp_path):
    return [make_case(tmp_path / "data", *make_voxels(n), f"c{n}") for n in range(3)]


def test_stored_statistics_are_those_that_were_measured(cases, stored):
    expected = [measure(case) for case in cases]
    assert (stored(cases), stored.read) == (expected, ["c0", "c1", "c2"])
    assert (stored(cases), stored.read) == (expected, [])
    assert [path.suffix for path in stored.files] == [".json"] * 3


def test_files_are_read_once_for_statistics_and_hashes(cases, stored, monkeypatch):
    read_voxels = Mock(side_effect=statistics.read_voxels)
    for module in (statistics, volumes):
        monkeypatch.setattr(module, "read_voxels", read_voxels)
    stored(cases)
    paths = [Path(case[key]) for case in cases for key in ("label", "image")]
    assert [call.args[2] for call in read_voxels.call_args_list] == [p.read_bytes() for p in paths]


def test_case_is_measured_again_when_content_or_ignore_value_differs(cases, tmp_path, stored):
    before = stored(cases)
    save(tmp_path / "data" / "c1.nii.gz", make_voxels(9)[0])
    found = stored(cases)
    assert (found[1] != before[1], stored.read) == (True, ["c1"])
    stored(cases, 2)
    assert stored.read == ["c0", "c1", "c2"]


def test_statistics_are_found_when_files_were_moved_or_touched(cases, tmp_path, stored):
    before = stored(cases)
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    moved = json.loads(json.dumps(cases).replace("/data/", "/elsewhere/"))
    os.utime(moved[0]["image"], (1, 1))
    assert (stored(moved), stored.read) == (before, [])


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-20],
        lambda text: "[" * 100_000,
        lambda text: '{"value": {"channels": []}, "sha256": "0"}',
        lambda text: text.replace('"num_fractions": 0', '"num_fractions": 1'),
    ],
)
def test_case_is_measured_again_when_its_statistics_are_not_as_written(cases, stored, change):
    before = stored(cases)
    text = stored.files[0].read_text()
    assert change(text) != text
    stored.files[0].write_text(change(text))
    assert (stored(cases), len(stored.read)) == (before, 1)
    assert stored.files[0].read_text() == text


def test_statistics_are_measured_when_nothing_can_be_stored(cases, stored):
    stored.cache_dir.write_text("a file, where the folder should be")
    assert stored(cases) == [measure(case) for case in cases]


def test_nothing_is_stored_of_files_that_change_meanwhile(cases, tmp_path, stored):
    measure_case = stored.measure_case.side_effect

    def measure_and_change(case, *arguments):
        measured = measure_case(case, *arguments)
        if case["case_id"] == "c1":
            save(tmp_path / "data" / "c1.nii.gz", make_voxels(9)[0])
        return measured

    stored.measure_case.side_effect = measure_and_change
    stored(cases)
    stored.measure_case.side_effect = measure_case
    stored(cases)
    assert stored.read == ["c1"]
