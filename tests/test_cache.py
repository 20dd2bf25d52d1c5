"""The cache of preprocessed cases: what it gives, and what happens to it."""

from __future__ import annotations

import errno
import importlib
import json
import multiprocessing
import os
import pickle
import shutil
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, make_dataset
from monai.data import CacheDataset, MetaTensor
from torch.utils.data import DataLoader

from pipeline.data import content
from pipeline.data.cache import CachedDataset, VolumeCache, preprocessing_key
from pipeline.data.content import HASHES, contents_of
from pipeline.data.dataset import load_cases
from pipeline.data.plan import Plan
from pipeline.errors import InputError
from transforms.preprocess import ValidationPreprocessing, preprocessing

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def cases(dataset):
    """Four training cases that no test changes."""
    return load_cases(dataset, num_folds=3).train


@pytest.fixture
def writable(tmp_path):
    """Cases whose files a test may change."""
    return load_cases(make_dataset(tmp_path / "data", num_cases=3), num_folds=3).train


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled at once."""
    monkeypatch.setattr(content, "SETTLED_S", -1)


def load(case):
    """Stands for preprocessing: reads the voxels, notes nothing else."""
    image, label = (np.asarray(nib.load(case[key]).dataobj)[None] for key in ("image", "label"))
    return {**case, "image": MetaTensor(image), "label": MetaTensor(label)}


def cache_in(folder, limit_bytes=10**9, **recipe):
    return VolumeCache(folder / "cache", limit_bytes, recipe)


def entries_in(folder):
    return sorted((folder / "cache").glob("[!.]*.safetensors"))


def refuse(case):
    raise AssertionError("expected nothing to be made")


def image_of(cached, number):
    return cached.read(number)[0]["image"].numpy()


# ---- what it gives


def test_cached_dataset_gives_what_cache_dataset_gives(cases, tmp_path):
    transform = ValidationPreprocessing(preprocessing([1, 1, 1], keys=("image", "label")))
    ours = CachedDataset(cases, transform, cache_in(tmp_path))
    theirs = CacheDataset(cases, transform, copy_cache=False, progress=False)
    for a, b in zip(ours, theirs, strict=True):
        assert (a["case_id"], a.keys()) == (b["case_id"], b.keys())
        for key in ("image", "label"):
            assert type(a[key]) is type(b[key]) is MetaTensor
            exactly = {"rtol": 0, "atol": 0}
            torch.testing.assert_close(a[key].as_tensor(), b[key].as_tensor(), **exactly)
            torch.testing.assert_close(a[key].affine, b[key].affine, **exactly)
            for name in ("original_affine", "spatial_shape"):
                np.testing.assert_array_equal(a[key].meta[name], b[key].meta[name])
            for name in ("filename_or_obj", "space"):
                assert a[key].meta[name] == b[key].meta[name]


def test_cache_holds_no_name_of_a_file_or_case_or_text_of_a_header(tmp_path, settled):
    cases = load_cases(make_dataset(tmp_path / "secret", num_cases=3), num_folds=3).train
    for case in cases:
        file = nib.load(case["image"])
        file = nib.Nifti1Image(np.asarray(file.dataobj), file.affine)
        file.header["descrip"] = b"secret"
        nib.save(file, case["image"])
    CachedDataset(cases, preprocessing([1, 1, 1]), cache_in(tmp_path))
    files = [path for path in (tmp_path / "cache").iterdir() if path.is_file()]
    assert len(files) == len(cases) + 1  # the hashes of the files
    for path in files:
        for word in (b"secret", b"tiny_00"):
            assert word not in path.read_bytes()
            assert word not in path.name.encode()


def test_reading_leaves_no_entry_in_resident_memory(tmp_path, cases):
    volume = np.random.default_rng(0).normal(size=(1, 128, 256, 256)).astype(np.float32)  # 32 MB
    cached = CachedDataset(cases, lambda case: {"image": volume}, cache_in(tmp_path))
    image_of(cached, 0)

    def resident_kb():
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(dict(line.split(":", 1) for line in lines)["VmRSS"].split()[0])

    before = resident_kb()
    for number in range(len(cases)):
        image_of(cached, number).sum()
    assert resident_kb() - before < 16_000


# ---- what is made, and made anew


def test_fill_makes_equal_cases_once(cases, tmp_path):
    made = Mock(side_effect=load)
    cached = CachedDataset([cases[0], {**cases[0], "case_id": "twin"}], made, cache_in(tmp_path))
    assert made.call_count == 1
    np.testing.assert_array_equal(image_of(cached, 0), image_of(cached, 1))


def alter(place):
    def change(path):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)

    return change


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a voxel altered": alter(5000),
    "pickle": lambda path: path.write_bytes(pickle.dumps([1])),
    "another case's": lambda path: shutil.copy(
        next(p for p in path.parent.glob("*.safetensors") if p != path), path
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_entry_is_made_anew_when_it_is_first_read(cases, tmp_path, caplog, damage):
    CachedDataset(cases[:2], load, cache_in(tmp_path))
    damage(entries_in(tmp_path)[0])
    made = Mock(side_effect=load)
    cached = CachedDataset(cases[:2], made, cache_in(tmp_path))
    assert not made.called  # nothing is read at the start
    for number in range(2):
        np.testing.assert_array_equal(image_of(cached, number), load(cases[number])["image"])
    assert made.call_count == 1
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning.startswith(f"{entries_in(tmp_path)[0]} IS LOST: ")
    again = CachedDataset(cases[:2], refuse, cache_in(tmp_path))
    np.testing.assert_array_equal(image_of(again, 0), load(cases[0])["image"])


def test_entry_is_read_whole_once_in_a_run_by_workers_too(cases, tmp_path, monkeypatch):
    CachedDataset(cases, load, cache_in(tmp_path))
    ours = CachedDataset(cases, refuse, cache_in(tmp_path))
    alter(-1)(entries_in(tmp_path)[0])
    ours.is_checked[:] = True
    assert len([ours[n] for n in range(len(cases))]) == len(cases)  # no checksum is compared
    fresh = CachedDataset(cases, load, cache_in(tmp_path))
    options = {"batch_size": None, "num_workers": 1, "multiprocessing_context": "fork"}
    for got, case in zip(DataLoader(fresh, **options), cases, strict=True):
        np.testing.assert_array_equal(got["image"], load(case)["image"])
    assert fresh.is_checked.sum() == len(cases) - 1  # the new one is compared at the next reading


def test_file_that_changes_while_it_is_preprocessed_is_noticed(writable, tmp_path):
    def slow(case):
        made = load(case)
        shutil.copy(writable[1]["image"], writable[0]["image"])
        return made

    with pytest.raises(InputError, match=f"^{writable[0]['case_id']}: expected the files"):
        CachedDataset(writable[:1], slow, cache_in(tmp_path))
    assert not entries_in(tmp_path)


# ---- keys


class Patches(CachedDataset):
    form = "patches"


def keys_of(folder, cases, recipe=None, kind=CachedDataset):
    return kind(cases, load, VolumeCache(folder / "cache", 10**9, recipe or {})).keys


def test_key_is_that_of_the_content_not_of_the_place(writable, tmp_path):
    before = keys_of(tmp_path, writable)
    copies = []
    for n, case in enumerate(writable):
        files = {key: tmp_path / f"{n}_{key}.nii.gz" for key in ("image", "label")}
        copies.append({"case_id": f"new_{n}"})
        for key, path in files.items():
            copies[n][key] = str(shutil.copyfile(case[key], path))
    assert keys_of(tmp_path, copies) == before
    assert len(set(before)) == len(before)


@pytest.mark.parametrize("key", ["image", "label"])
def test_key_differs_when_a_file_differs_in_one_byte(writable, tmp_path, key):
    before = keys_of(tmp_path, writable)
    alter(-1)(Path(writable[0][key]))
    after = keys_of(tmp_path, writable)
    assert after[0] != before[0]
    assert after[1:] == before[1:]


def test_key_differs_with_recipe_form_and_what_the_case_says(cases, tmp_path):
    one = cases[:1]
    keys = [
        *keys_of(tmp_path, one),
        *keys_of(tmp_path, one, recipe={"spacing": [1, 1, 1]}),
        *keys_of(tmp_path, one, kind=Patches),
        *keys_of(tmp_path, [{**one[0], "session": 2}]),
        *keys_of(tmp_path, [{**one[0], "label": one[0]["image"]}]),
    ]
    assert len(set(keys)) == len(keys)


def test_key_counts_all_files_of_an_image(tmp_path):
    folder = tmp_path / "dicom"
    (folder / "below").mkdir(parents=True)
    files = [folder / "a.dcm", folder / "below" / "b.dcm"]
    for file in files:
        file.write_bytes(file.name.encode())
    names = [str(file) for file in files]
    images = [str(folder), names, names[::-1], names[0]]
    cases = [{"case_id": str(n), "image": image} for n, image in enumerate(images)]
    before = contents_of(cases, tmp_path)
    assert len({*before.values()}) == len(images)
    files[1].write_bytes(b"B")
    after = contents_of(cases, tmp_path)
    assert [after[key] == before[key] for key in "0123"] == [False, False, False, True]


# ---- which configs share entries

AMP = json.loads((REPOSITORY / "configs/amp.json").read_text())
PLAN = Plan([1, 2, 3], False, ["zscore"], [8, 8, 8], [2], ["background", "a"], 1, 2)


def described(plan=PLAN, **changes):
    source = deepcopy(AMP)
    for key, value in changes.items():
        node = source
        *above, last = key.split("#")
        for part in above:
            node = node[part]
        node[last] = value
    return json.dumps(preprocessing_key(source, plan), sort_keys=True)


@pytest.mark.parametrize(
    ("differs", "changes"),
    [
        (True, {"plan": replace(PLAN, spacing=[1, 1, 1])}),
        (True, {"plan": replace(PLAN, crop_empty_borders=True)}),
        (True, {"preprocessing#spacing": [1, 1, 1]}),
        (True, {"transforms_before": [{"_target_": "ScaleIntensityd", "keys": "image"}]}),
        (True, {"train#preprocessing": {"_target_": "ScaleIntensityd"}}),
        (True, {"validate#preprocessing#image": {"_target_": "ScaleIntensityd"}}),
        (True, {"preprocessing#spacing": "$[s * 2 for s in @overlap]"}),
        (False, {"seed": 5}),
        (False, {"roi_size": [8, 8, 8]}),
        (False, {"output_dir": "elsewhere"}),
        (False, {"dataset_dir": "elsewhere"}),
        (False, {"plan": replace(PLAN, roi_size=[16, 16, 16], reasons={"roi_size": "given"})}),
    ],
)
def test_preprocessing_key_differs_with_what_preprocesses_alone(differs, changes):
    assert (described(**changes) != described()) is differs


def test_preprocessing_key_follows_references_and_expressions():
    change = {"preprocessing#spacing": "@overlap", "overlap": "$@sw_batch_size + 1"}
    assert described(**change, sw_batch_size=5) != described(**change, sw_batch_size=6)
    whole = {"preprocessing#spacing": "$list(map(float, @plan.spacing)) if @plan else 0"}
    assert described(**whole) != described(**whole, plan=replace(PLAN, num_classes=3))


def test_preprocessing_key_differs_when_a_file_of_own_code_differs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "mine_for_the_key.py"
    own = {"transforms_after": [{"_target_": "mine_for_the_key.Mine"}]}
    found = []
    for text in ("class Mine: pass", "class Mine: pass", "class Mine: 'other'"):
        file.write_text(text)
        importlib.invalidate_caches()
        found.append(described(**own))
    assert found[0] == found[1] != found[2]


# ---- the memory of hashes


@pytest.fixture
def reads(monkeypatch):
    """Files that were read for their hashes."""
    seen = []
    real = Path.read_bytes

    def read(path):
        if path.name.endswith(".nii.gz"):
            seen.append(path)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    return seen


@pytest.mark.parametrize("is_settled", [True, False])
def test_hashes_are_remembered_but_not_of_files_that_changed_just_now(
    writable, tmp_path, monkeypatch, reads, is_settled
):
    monkeypatch.setattr(content, "SETTLED_S", -1 if is_settled else 60)
    first = keys_of(tmp_path, writable)
    once = len(reads)
    assert keys_of(tmp_path, writable) == first
    assert len(reads) - once == (0 if is_settled else 2 * len(writable))


def forget_one(text):
    files = json.loads(text)["value"]
    name = next(iter(files))
    return text.replace(files[name], "0" * 64)


@pytest.mark.parametrize("change", [lambda text: "[1, 2]", lambda text: "\x80abc", forget_one])
def test_hashes_do_no_harm_when_their_memory_is_corrupt(cases, tmp_path, settled, reads, change):
    before = keys_of(tmp_path, cases)
    path = tmp_path / "cache" / HASHES
    path.write_text(change(path.read_text()), encoding="latin-1")
    for _ in range(2):
        assert keys_of(tmp_path, cases) == before
        assert len(reads) == 4 * len(cases)


# ---- limits


def use(folder, cases, number, at, **recipe):
    """Make an entry whose last use was at a time."""
    cached = CachedDataset([cases[number]], load, cache_in(folder, **recipe))
    path = cached.cache.path(cached.keys[0])
    os.utime(path, (at, at))
    return path


def test_fill_removes_what_was_used_longest_ago(cases, tmp_path):
    times = [5, 3, 8, 1, 6, 2, 7, 4]
    paths = {at: use(tmp_path, cases, 0, at, entry=at) for at in times}
    limit = 6 * max(path.stat().st_size for path in paths.values()) + 500
    CachedDataset(cases[3:], load, cache_in(tmp_path, limit))
    assert [at for at in sorted(paths) if paths[at].exists()] == [4, 5, 6, 7, 8]
    assert sum(path.stat().st_size for path in entries_in(tmp_path)) <= limit


def test_fill_counts_entries_it_finds_as_used_now(cases, tmp_path):
    paths = [use(tmp_path, cases, n, at) for n, at in enumerate((100, 200, 300))]
    CachedDataset(cases[:1], refuse, cache_in(tmp_path))
    size = max(path.stat().st_size for path in paths)
    CachedDataset(cases[3:], load, cache_in(tmp_path, 3 * size + 500, other=1))
    assert [path.exists() for path in paths] == [True, False, True]


def test_fill_never_removes_what_this_run_needs(cases, tmp_path):
    size = use(tmp_path, cases, 0, 500).stat().st_size
    cache = cache_in(tmp_path, 2 * size + 500, fresh=1)
    mine = cache.path(CachedDataset(cases[:1], load, cache).keys[0])
    os.utime(mine, (1, 1))  # the oldest, and yet it stays
    CachedDataset(cases[1:2], load, cache)  # another dataset of the run
    assert mine.exists()
    assert len(entries_in(tmp_path)) == 2


def test_fill_refuses_a_run_that_does_not_fit(cases, tmp_path):
    theirs = use(tmp_path, cases, 0, 100)
    limit = int(2.5 * theirs.stat().st_size)
    with pytest.raises(InputError) as caught:
        CachedDataset(cases, load, cache_in(tmp_path, limit, mine=1))
    (line,) = str(caught.value).splitlines()
    assert line.startswith("cache_limit_bytes: expected room for the 4 cases of this run, got")
    assert f"got {limit} bytes" in line
    assert not list((tmp_path / "cache").glob(".*"))
    assert sum(path.stat().st_size for path in entries_in(tmp_path)) <= limit
    advised = int(line.split("about ")[1].rstrip("."))
    CachedDataset(cases, load, cache_in(tmp_path, advised + 100, mine=1))


# ---- several processes


def run_processes(number, function, *arguments):
    """Exit codes."""
    processes = [FORK.Process(target=function, args=arguments) for _ in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def fill_slowly(folder, cases):
    def slow(case):
        time.sleep(0.05)
        return load(case)

    torch.set_num_threads(1)  # torch's pool is lost in the fork; threads at once race to renew it
    CachedDataset(cases, slow, cache_in(folder))


def test_processes_fill_one_cache_at_once(cases, tmp_path):
    assert run_processes(4, fill_slowly, tmp_path, cases) == [0] * 4
    cached = CachedDataset(cases, refuse, cache_in(tmp_path))
    for number, case in enumerate(cases):
        np.testing.assert_array_equal(image_of(cached, number), load(case)["image"])
    assert not list((tmp_path / "cache").glob(".*"))


def rotate(folder, cases, limit_bytes, rounds):
    """Fill with one case after the other, each of which pushes others out."""
    for n in range(rounds):
        case = cases[(n + os.getpid()) % len(cases)]
        cached = CachedDataset([case], load, cache_in(folder, limit_bytes))
        np.testing.assert_array_equal(image_of(cached, 0), load(case)["image"])


def test_processes_that_evict_one_anothers_entries_read_right_ones(cases, tmp_path):
    limit = int(1.5 * use(tmp_path, cases, 0, 1).stat().st_size)
    assert run_processes(3, rotate, tmp_path, cases, limit, 15) == [0] * 3
    assert len(entries_in(tmp_path)) <= 1


# ---- in a run


def test_runs_share_the_cases_that_they_preprocess_alike(run, tmp_path):
    def inodes():
        return {path.name: path.stat().st_ino for path in entries_in(tmp_path)}

    shared = {"cache_dir": str(tmp_path / "cache")}
    assert run(tmp_path / "a", **shared) == 0
    made = inodes()
    assert len(made) == 6  # four to train on, two to validate on
    assert run(tmp_path / "b", seed=1, **shared) == 0
    assert inodes() == made
    assert run(tmp_path / "c", **{**shared, "spacing": [1, 1, 2]}) == 0
    assert len(inodes()) == 12


def test_run_says_its_disk_is_full_in_one_line(run, tmp_path, capsys, monkeypatch):
    real = os.replace

    def full(source, target):
        if str(target).endswith(".safetensors"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert run(tmp_path / "r", cache_dir=str(tmp_path / "cache")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("cache_dir: expected a directory that can be written")
    assert "No space left on device" in line
    assert not list((tmp_path / "cache").glob("*.safetensors"))  # nor the part that was written
