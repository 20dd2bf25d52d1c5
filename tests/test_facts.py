"""What is measured of a case, against numpy on whole volumes; and that it is kept rightly."""

import gzip
import io
import json
import logging
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest

from pipeline.data import content, facts, nifti
from pipeline.data.facts import measure_headers, measure_voxels
from pipeline.data.survey import survey

SHAPE = (9, 8, 7)


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    monkeypatch.setattr(nifti, "SLAB_VOXELS", 101)


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


def assert_channel(got, values, label, ignore_value=None):
    """Facts of a channel against numpy in float64."""
    flat = values.astype(np.float64)
    finite = np.isfinite(flat.astype(np.float32))
    kept = flat[finite]
    inside = flat[finite & (label > 0) & (label != ignore_value)]
    assert got["non_finite"] == (~finite).sum()
    assert got["count"] == kept.size
    assert (got["min"], got["max"]) == (kept.min(), kept.max())
    assert got["mean"] == pytest.approx(kept.mean(), rel=1e-12)
    assert got["std"] == pytest.approx(kept.std(), rel=1e-6)
    assert got["foreground_count"] == inside.size
    assert got["foreground_mean"] == pytest.approx(inside.mean(), rel=1e-12)
    assert got["foreground_std"] == pytest.approx(inside.std(), rel=1e-6)
    levels = (np.arange(200) + 0.5) / 200
    np.testing.assert_allclose(got["foreground_quantiles"], np.quantile(inside, levels))


# ---- measuring


@pytest.mark.parametrize("ignore_value", [None, 3, -1])
def test_voxels_are_measured_as_numpy_does(tmp_path, ignore_value):
    image, label = make_voxels()
    got = measure_voxels(make_case(tmp_path, image, label), ignore_value)
    values, counts = np.unique(label, return_counts=True)
    assert got["values"] == dict(zip(map(str, values), counts, strict=True))
    assert (got["non_integer"], got["non_finite_label"]) == (0, 0)
    assert got["box"] == [[2, 6], [1, 7], [3, 6]]
    assert_channel(got["channels"][0], image, label, ignore_value)
    assert got == json.loads(json.dumps(got))


@pytest.mark.parametrize("dtype", ["i2", ">i2", "f4", "f8"])
def test_label_values_are_counted_in_any_type(tmp_path, dtype):
    image, label = make_voxels()
    stored = label.astype(dtype)
    stored[0, 0, :3] = -2
    got = measure_voxels(make_case(tmp_path, image, stored))
    assert got["values"]["-2"] == 3
    assert sum(got["values"].values()) == label.size


def test_zero_below_zero_is_background(tmp_path):
    """As a negative slope makes it of 0."""
    image, label = make_voxels()
    stored = np.where(label == 0, -0.0, label).astype(np.float32)
    assert np.signbit(stored[stored == 0]).all()
    got = measure_voxels(make_case(tmp_path, image, stored))
    assert got["values"] == measure_voxels(make_case(tmp_path, image, label))["values"]


def test_label_is_measured_when_it_has_fractions_and_nan(tmp_path):
    image, label = make_voxels()
    stored = label.astype(np.float32)
    stored[:2, 0, 0], stored[3, 3, 3], stored[4, 4, 4:6] = np.nan, np.inf, 0.5
    got = measure_voxels(make_case(tmp_path, image, stored))
    assert (got["non_integer"], got["non_finite_label"], got["values"]["0.5"]) == (2, 3, 2)


def test_channels_are_measured_one_by_one_in_one_file_and_in_several(tmp_path):
    image, label = make_voxels(channels=(3,))
    image[..., 2] += 7  # not zero at the border
    case = make_case(tmp_path, image, label)
    files = [save(tmp_path / f"{n}.nii", image[..., n]) for n in range(3)]
    one, several = measure_voxels(case), measure_voxels({**case, "image": files})
    for a, b in zip(one["channels"], several["channels"], strict=True):
        assert [a[k] for k in ("digest", "sketch", "min")] == [
            b[k] for k in ("digest", "sketch", "min")
        ]
    assert (one["box"], one["values"]) == (several["box"], several["values"])
    assert one["box"] == [[0, 9], [0, 8], [0, 7]]
    for n in range(3):
        assert_channel(one["channels"][n], image[..., n], label)
        assert_channel(several["channels"][n], image[..., n], label)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_voxels_that_are_not_finite_as_float32_are_counted_and_left_out(tmp_path, value):
    image, label = make_voxels()
    image = image.astype(np.float64)
    image[3, 3, 3:5] = value
    got = measure_voxels(make_case(tmp_path, image, label))["channels"][0]
    assert got["non_finite"] == 2
    inner = image.copy()
    inner[3, 3, 3:5] = np.nan
    assert_channel(got, inner, label)


def test_image_without_a_finite_voxel_is_measured(tmp_path):
    image, label = make_voxels()
    got = measure_voxels(make_case(tmp_path, image * np.nan, label))["channels"][0]
    assert (got["count"], got["mean"], got["std"], got["min"]) == (0, None, None, None)
    assert (got["non_finite"], got["foreground_quantiles"]) == (label.size, [])


def test_deviation_is_right_far_from_zero(tmp_path):
    rng = np.random.default_rng(0)
    image, label = 1e9 + rng.normal(size=SHAPE), make_voxels()[1]
    assert_channel(measure_voxels(make_case(tmp_path, image, label))["channels"][0], image, label)


def test_quantiles_of_many_voxels_are_near_those_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "MAX_FOREGROUND_SAMPLES", 200)
    image = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
    label = np.ones(image.shape, np.uint8)
    channel = measure_voxels(make_case(tmp_path, image, label))["channels"][0]
    assert channel["foreground_mean"] == pytest.approx(image.astype(float).mean(), rel=1e-9)
    # every 64th voxel is what is kept of 8000, where 200 are the most
    levels = (np.arange(200) + 0.5) / 200
    expected = np.quantile(image.ravel(order="F")[::64].astype(float), levels)
    np.testing.assert_allclose(channel["foreground_quantiles"], expected)


def test_distinct_values_are_known_up_to_64(tmp_path):
    label = make_voxels()[1]
    for number in (64, 65):
        values = np.resize(np.arange(number, dtype=np.float32), SHAPE)
        got = measure_voxels(make_case(tmp_path, values, label))["channels"][0]["distinct"]
        assert got == (list(range(64)) if number == 64 else None)


def test_digest_and_sketch_are_those_of_the_voxels_whatever_stores_them(tmp_path):
    image, label = make_voxels()
    image = image.astype(np.int16)
    seen = []
    for dtype, name in (("i2", "a.nii"), ("f8", "b.nii.gz"), ("f4", "c.nii.gz"), (">i4", "d.nii")):
        case = {"image": save(tmp_path / name, image.astype(dtype))}
        case["label"] = save(tmp_path / "label.nii", label)
        channel = measure_voxels(case)["channels"][0]
        seen.append((channel["digest"], channel["sketch"]))
    assert all(one == seen[0] for one in seen)
    image[3, 3, 3] += 1
    case["image"] = save(tmp_path / "a.nii", image)
    assert measure_voxels(case)["channels"][0]["digest"] != seen[0][0]


def test_sketch_holds_the_smallest_hashes_of_all_values_but_zero(tmp_path):
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 900, SHAPE).astype(np.float32), make_voxels()[1]
    got = measure_voxels(make_case(tmp_path, image, label))["channels"][0]["sketch"]

    def mix(x):  # SplitMix64's finalizer in Python's integers
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    bits = np.unique(image[image != 0].astype(np.float64)).view(np.uint64).tolist()
    assert got == sorted(map(mix, bits))[:256]


@pytest.mark.parametrize("key", ["image", "label"])
def test_voxels_name_the_file_that_cannot_be_read_to_its_end(tmp_path, key):
    case = make_case(tmp_path, *make_voxels())
    raw = gzip.decompress(open_bytes(case[key]))
    with open(case[key], "wb") as file:
        file.write(gzip.compress(raw[:-9]))
    got = measure_voxels(case)
    assert (got["key"], got["number"], got["is_dicom"]) == (key, 0, False)
    assert got["error"] == "an end before the last voxel"


def open_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def test_headers_say_what_nibabel_says(tmp_path):
    case = make_case(tmp_path, *make_voxels())
    got = measure_headers({**case, "label": str(tmp_path / "absent.nii")})
    file = nib.load(case["image"])
    assert got["image"] == [
        {
            "shape": list(file.shape),
            "affine": file.affine.tolist(),
            "dtype": "float32",
            "is_oriented": True,
            "zooms_mm": [1, 1.5, 2],
        }
    ]
    assert got["label"] == [{"error": "No such file or directory", "is_dicom": False}]


# ---- keeping


class Spy:
    """Counts whose voxels are read."""

    def __init__(self, monkeypatch):
        self.seen = []
        original = facts.measure_voxels

        def measure(case, ignore_value=None):
            self.seen.append(case["case_id"])
            return original(case, ignore_value)

        monkeypatch.setattr(facts, "measure_voxels", measure)

    def of(self, function):
        self.seen = []
        result = function()
        return result, sorted(self.seen)


@pytest.fixture
def spy(monkeypatch):
    monkeypatch.setattr(content, "SETTLED_S", -1)  # files are remembered however new they are
    return Spy(monkeypatch)


@pytest.fixture
def cases(tmp_path):
    return [make_case(tmp_path / "data", *make_voxels(n), f"c{n}") for n in range(3)]


def look(cases, cache_dir, **keywords):
    return survey(cases, is_sound=lambda case, headers: True, cache_dir=cache_dir, **keywords)


def test_survey_reads_voxels_once(cases, tmp_path, spy):
    first, seen = spy.of(lambda: look(cases, tmp_path / "cache"))
    assert seen == ["c0", "c1", "c2"]
    second, seen = spy.of(lambda: look(cases, tmp_path / "cache"))
    assert (second, seen) == (first, [])
    assert list(first) == ["c0", "c1", "c2"]
    assert first["c1"]["voxels"] == measure_voxels(cases[1])
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_survey_reads_again_what_has_other_content_or_another_ignore_value(cases, tmp_path, spy):
    look(cases, tmp_path / "cache")
    image, _ = make_voxels(9)
    save(tmp_path / "data" / "c1.nii.gz", image)
    found, seen = spy.of(lambda: look(cases, tmp_path / "cache"))
    assert seen == ["c1"]
    assert found["c1"]["voxels"] == measure_voxels(cases[1])
    found, seen = spy.of(lambda: look(cases, tmp_path / "cache", ignore_value=2))
    assert seen == ["c0", "c1", "c2"]


def test_survey_knows_files_that_were_moved_or_touched(cases, tmp_path, spy):
    before = look(cases, tmp_path / "cache")
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    moved = [
        {key: value.replace("/data/", "/elsewhere/") for key, value in case.items()}
        for case in cases
    ]
    os.utime(moved[0]["image"], (1, 1))
    assert spy.of(lambda: look(moved, tmp_path / "cache")) == (before, [])


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[:-20],
        lambda text: "[" * 100_000,
        lambda text: "[]",
        lambda text: '{"facts": {"values": 3, "channels": [], "box": []}, "sha256": "0"}',
        lambda text: text.replace('"count": 504', '"count": 505'),
        lambda text: "\0\xff",
    ],
)
def test_survey_measures_again_when_kept_facts_are_not_as_written(cases, tmp_path, spy, change):
    before = look(cases, tmp_path / "cache")
    files = sorted((tmp_path / "cache" / "facts").iterdir())
    assert len(files) == 3
    text = files[0].read_text()
    assert change(text) != text
    files[0].write_text(change(text))
    found, seen = spy.of(lambda: look(cases, tmp_path / "cache"))
    assert found == before
    assert len(seen) == 1
    assert files[0].read_text() == text


def test_survey_measures_again_when_the_facts_are_another_cases(cases, tmp_path, spy):
    before = look(cases, tmp_path / "cache")
    a, b, _ = sorted((tmp_path / "cache" / "facts").iterdir())
    shutil.copy(a, b)
    found, seen = spy.of(lambda: look(cases, tmp_path / "cache"))
    assert found == before
    assert len(seen) == 1


def test_survey_works_and_warns_once_when_nothing_can_be_kept(cases, tmp_path, spy, caplog):
    (tmp_path / "cache").write_text("a file, where the folder should be")
    with caplog.at_level(logging.WARNING):
        found, seen = spy.of(lambda: look(cases, tmp_path / "cache"))
    assert seen == ["c0", "c1", "c2"]
    assert found == look(cases, None)
    assert {record.message.split(":")[1] for record in caplog.records} == {
        " expected to keep facts there, got"
    }


def test_survey_keeps_no_facts_of_files_that_are_changed_meanwhile(
    cases, tmp_path, spy, monkeypatch
):
    measure = facts.measure_voxels

    def measure_and_change(case, ignore_value):
        measured = measure(case, ignore_value)
        if case["case_id"] == "c1":
            save(tmp_path / "data" / "c1.nii.gz", make_voxels(9)[0])
        return measured

    monkeypatch.setattr(facts, "measure_voxels", measure_and_change)
    look(cases, tmp_path / "cache")
    monkeypatch.setattr(facts, "measure_voxels", measure)
    found, seen = spy.of(lambda: look(cases, tmp_path / "cache"))
    assert seen == ["c1"]
    assert found["c1"]["voxels"] == measure_voxels(cases[1])


def test_survey_keeps_facts_of_many_cases_of_one_content(cases, tmp_path, spy, caplog):
    """They are written to one file by several threads."""
    same = [{**cases[0], "case_id": f"s{n}"} for n in range(24)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: look(same, tmp_path / "cache"), range(4)))
    assert not caplog.records
    assert len(list((tmp_path / "cache" / "facts").iterdir())) == 1


def test_survey_keeps_nothing_of_what_cannot_be_read(cases, tmp_path, spy):
    whole = open_bytes(cases[2]["image"])
    with open(cases[2]["image"], "wb") as file:
        file.write(whole[:-8])
    assert "error" in look(cases, tmp_path / "cache")["c2"]["voxels"]
    assert spy.of(lambda: look(cases, tmp_path / "cache"))[1] == ["c2"]


def test_survey_says_nothing_of_voxels_when_asked_for_headers(cases, tmp_path, spy):
    """Whatever is kept: a plan does not depend on what was looked at before."""
    look(cases, tmp_path / "cache")
    found, seen = spy.of(lambda: look(cases, tmp_path / "cache", read_voxels=False))
    assert seen == []
    assert all(one["voxels"] is None and one["headers"]["image"] for one in found.values())


def test_survey_reads_no_voxels_of_a_case_whose_headers_are_not_sound(cases, spy):
    found, seen = spy.of(lambda: survey(cases, is_sound=lambda case, _: case["case_id"] != "c1"))
    assert seen == ["c0", "c2"]
    assert found["c1"]["voxels"] is None


def test_survey_leaves_no_thread_behind_when_it_shows_a_bar(cases, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    before = threading.enumerate()
    look(cases, None)
    assert "Checking: 100%" in sys.stderr.getvalue()
    assert threading.enumerate() == before
