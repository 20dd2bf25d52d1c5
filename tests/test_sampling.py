"""Random patches, against a computation in memory that shares no code with ours."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from pipeline import distributed
from pipeline.data import sampling
from pipeline.data.cache import VolumeCache
from pipeline.data.sampling import EpochSampler, PatchDataset, PatchLoader, sampling_positions
from pipeline.errors import InputError
from pipeline.training.trainer import MixedPrecisionTrainer, StepEvents

IGNORED = 9
SIZE = (13, 9, 7)
VOXEL = {"roi_size": (1, 1, 1), "patch_size": (1, 1, 1)}  # never moved into the volume
GEOMETRIES = {
    "smaller": ((4, 5, 3), (8, 5, 7)),
    "equal": (SIZE, SIZE),
    "patch larger than volume": ((4, 4, 4), (20, 30, 10)),
    "roi larger than volume": ((3, 15, 7),) * 2,
}


def volumes(number, ignored=0.0):
    """Image and label of a case; a share of the voxels is ignored."""
    rng = np.random.default_rng(number)
    image = rng.normal(size=(2, *SIZE)).astype(np.float32)
    label = rng.choice([0, 1, 2, 3], size=(1, *SIZE), p=[0.9, 0.07, 0.02, 0.01]).astype(np.uint8)
    label[rng.random(label.shape) < ignored] = IGNORED
    return image, label


def make_patches(folder, shares, **changes):
    """Patches of cases of which a share of the voxels is ignored."""

    def transform(case):
        image, label = volumes(case["number"], case["share"])
        return {**case, "image": MetaTensor(image), "label": MetaTensor(label)}

    arguments = {
        "data": [{"case_id": str(n), "number": n, "share": s} for n, s in enumerate(shares)],
        "transform": transform,
        "roi_size": (4, 5, 3),
        "patch_size": (8, 5, 7),
        "num_classes": 4,
        "seed": 3,
        "samples_per_epoch": 10,
        "cache": VolumeCache(folder / "cache", 10**9, {}),
        "foreground_ratio": 0.6,
    }
    return PatchDataset(**{**arguments, **changes})


def make_loader(patches, batch_size=2, **kwargs):
    return PatchLoader(patches, EpochSampler(batch_size, 1, 10 // batch_size), batch_size, **kwargs)


def rng_of(*key):
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def in_memory(number, num_cases, roi=(4, 5, 3), patch=(8, 5, 7)):
    """Sample `number` from its description."""
    round_number, place = divmod(number, num_cases)
    case = int(rng_of(3, "order", round_number).permutation(num_cases)[place])
    image, label = volumes(case)
    rng = rng_of(3, *divmod(number, 10))
    if rng.random() < 0.6:
        present = [c for c in (1, 2, 3) if (label == c).any()]
        voxels = np.argwhere(label[0] == present[rng.integers(len(present))])
        centre = voxels[rng.integers(len(voxels))]
    else:
        centre = rng.integers(np.array(SIZE))
    start = [
        (s // 2 if r >= s else min(max(c, r // 2), s - (r - r // 2))) - p // 2
        for c, r, s, p in zip(centre, roi, SIZE, patch, strict=True)
    ]
    windows = []
    for volume in (image, label):
        padded = np.pad(volume, [(0, 0), *((30, 30),) * 3])
        a, b, c = (s + 30 for s in start)
        windows.append(padded[:, a : a + patch[0], b : b + patch[1], c : c + patch[2]])
    return case, start, *windows, int(rng.integers(2**63))


def require_equal(got, expected):
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        assert a["case_id"] == b["case_id"]
        for key in a.keys() - {"case_id"}:
            one, other = (torch.as_tensor(sample[key]).cpu() for sample in (a, b))
            assert (one.dtype, one.shape) == (other.dtype, other.shape), key
            assert torch.equal(one, other), key
        assert a["seed"].device.type == "cpu"


# ---- patches


@pytest.mark.parametrize(("roi", "patch"), GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("ignore_value", [None, IGNORED])
def test_patches_are_those_of_a_computation_in_memory(tmp_path, ignore_value, roi, patch):
    how = {"ignore_value": ignore_value, "roi_size": roi, "patch_size": patch}
    patches = make_patches(tmp_path, [0, 0, 0], **how)
    for number in range(30):
        got = patches[number]
        case, start, image, label, seed = in_memory(number, 3, roi, patch)
        assert (got["case_id"], got["seed"], got["number"]) == (str(case), seed, number)
        assert got["origin"].tolist() == start
        assert got["image"].dtype == torch.float32
        assert got["label"].dtype == torch.uint8
        np.testing.assert_array_equal(got["image"].numpy(), image)
        np.testing.assert_array_equal(got["label"].numpy(), label)


def centres(patches, numbers):
    """Label values at the centres."""
    return np.array([int(patches[n]["label"][0, 0, 0, 0]) for n in range(numbers)])


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_foreground_ratio_is_the_share_of_centres_on_foreground(tmp_path, ratio):
    patches = make_patches(tmp_path, [0], foreground_ratio=ratio, **VOXEL)
    drawn = centres(patches, 2000)
    expected = ratio + (1 - ratio) * (volumes(0)[1] > 0).mean()
    deviation = np.sqrt(expected * (1 - expected) / 2000)
    assert abs((drawn > 0).mean() - expected) <= 4 * deviation
    if ratio == 1:  # rare classes are drawn as often as common ones
        shares = [(drawn == value).mean() for value in (1, 2, 3)]
        assert np.abs(np.array(shares) - 1 / 3).max() <= 4 * np.sqrt(2 / 9 / 2000)


@pytest.mark.parametrize("ratio", [0.0, 0.6, 1.0])
def test_patches_are_never_centred_on_an_ignored_voxel(tmp_path, ratio):
    one = {**VOXEL, "foreground_ratio": ratio}
    patches = make_patches(tmp_path, [0.9, 0.5], ignore_value=IGNORED, **one)
    assert IGNORED not in centres(patches, 400)
    without = make_patches(tmp_path, [0.9, 0.5], num_classes=IGNORED + 1, **one)
    assert IGNORED in centres(without, 400)


def test_patches_are_never_centred_on_a_class_that_is_ignored(tmp_path):
    drawn = centres(make_patches(tmp_path, [0, 0], ignore_value=2, **VOXEL), 400)
    assert {*drawn} == {0, 1, 3}


def test_patches_of_a_case_with_ignored_voxels_reach_every_annotated_one(tmp_path):
    one = {**VOXEL, "foreground_ratio": 0.0}
    patches = make_patches(tmp_path, [0.97], ignore_value=IGNORED, **one)
    drawn = {tuple(patches[n]["origin"].tolist()) for n in range(400)}
    annotated = {tuple(p) for p in np.argwhere(volumes(0, 0.97)[1][0] != IGNORED).tolist()}
    assert drawn == annotated


def test_entries_follow_ignore_value_and_number_of_classes(tmp_path):
    changes = [{}, {}, {"ignore_value": IGNORED}, {"num_classes": IGNORED + 2}]
    first, *others = (
        make_patches(tmp_path, [0.5], **{"num_classes": IGNORED + 1, **change}).keys
        for change in changes
    )
    assert [keys == first for keys in others] == [True, False, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": []}, "expected at least one"),
        ({"foreground_ratio": 1.1}, "foreground_ratio: expected 0 to 1, got 1.1"),
        ({"roi_size": (4, 6, 3)}, r"roi_size: expected 1 to \(8, 5, 7\)"),
        ({"roi_size": (0, 5, 3)}, "roi_size"),
        ({"ignore_value": IGNORED}, r"^1: expected an annotated voxel, got 9 .*\.$"),
    ],
)
def test_patches_refuse_what_is_out_of_range(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        make_patches(tmp_path, [0, "ignore_value" in changes], **changes)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 8, 8), np.uint8), ((4, 8, 9), np.uint16), ((64, 64, 17), np.uint32)]
)
def test_positions_have_the_smallest_dtype_that_holds_them(shape, dtype):
    label = torch.zeros((1, *shape), dtype=torch.uint8)
    label[..., -1] = 1
    label[0, 0, 0, 0] = IGNORED
    found = sampling_positions(label, 3, IGNORED)
    assert found.keys() == {"class_1", "annotated"}
    for name, values in found.items():
        expected = label.flatten() == 1 if name == "class_1" else label.flatten() != IGNORED
        assert values.dtype == dtype
        assert set(values.tolist()) <= set(np.flatnonzero(expected).tolist())
        assert values.max() == label.numel() - 1 or name == "annotated"


def test_positions_of_annotated_voxels_are_thinned_evenly_over_the_volume(monkeypatch):
    monkeypatch.setattr(sampling, "MAX_POSITIONS_PER_CLASS", 1000)
    label = torch.zeros((1, 50, 50, 50), dtype=torch.uint8)
    label.flatten()[: 50**3 - 99_901] = IGNORED
    found = sampling_positions(label, 2, IGNORED)["annotated"]
    assert len(set(found.tolist())) == 1000
    assert found.min() >= 50**3 - 99_901
    # a thousand regular steps would be of 100 voxels: all in one plane across the last axis
    assert len(set((found % 50).tolist())) == 50


# ---- batches


def test_epoch_sampler_yields_the_rest_of_its_epoch():
    sampler = EpochSampler(batch_size=2, accumulation_steps=3, steps_per_epoch=4)
    assert sampler.samples_per_epoch == 24
    for start, end in ((0, 24), (24, 48), (6, 24), (22, 24), (30, 48)):
        sampler.start = start
        assert (list(sampler), len(sampler)) == (list(range(start, end)), end - start)


@pytest.mark.parametrize(
    ("batch_size", "how"),
    [(1, {}), (2, {"num_workers": 2}), (2, {"cache_on_device": True, "num_workers": 2})],
    ids=["alone", "workers", "device"],
)
@pytest.mark.parametrize("start", [0, 14], ids=["epoch", "continued"])
@pytest.mark.parametrize("ignore_value", [None, IGNORED])
def test_loader_gives_the_same_samples_however_they_are_read(
    tmp_path, device, batch_size, how, start, ignore_value
):
    classes = {"ignore_value": ignore_value, "num_classes": 4 if ignore_value else IGNORED + 1}
    patches = make_patches(tmp_path, [0, 0.5, 0.3], **classes)
    expected = [patches[number] for number in range(start, 20 if start else 10)]
    for path in (tmp_path / "cache").glob("*.safetensors"):
        path.unlink()  # it is made anew by whoever reads
    loader = make_loader(patches, batch_size, device=device, **how)
    loader.sampler.start = start
    batches = list(loader)
    if "cache_on_device" in how:
        devices = {batch[key].device.type for batch in batches for key in ("image", "label")}
        assert devices == {device}
    got = [
        {key: values[n] for key, values in batch.items()}
        for batch in batches
        for n in range(batch_size)
    ]
    require_equal(got, expected)


def test_batches_on_a_device_are_divided_among_ranks(tmp_path, monkeypatch):
    patches = make_patches(tmp_path, [0, 0, 0.3], num_classes=IGNORED + 1)
    whole = list(make_loader(patches, 5))
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "sync_errors", nullcontext)  # there is nobody to agree with
    for rank, own in enumerate([slice(0, 3), slice(3, 5)]):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        ours = make_loader(patches, 5, cache_on_device=True)
        require_equal(list(ours), [{k: v[own] for k, v in batch.items()} for batch in whole])


def test_cases_on_a_device_need_no_file_and_no_worker(tmp_path):
    patches = make_patches(tmp_path, [0, 0, 0.3], num_classes=IGNORED + 1)
    expected = list(make_loader(patches))
    ours = make_loader(patches, cache_on_device="true", num_workers=2)
    assert ours.describe()["effective"]["cache_on_device"] is None
    require_equal([next(iter(ours))], expected[:1])
    shutil.rmtree(tmp_path / "cache")
    require_equal(list(ours), expected)
    described = ours.describe()
    assert described["requested"] == {"cache_on_device": "true", "num_workers": 2}
    size = described["effective"].pop("bytes")
    assert 0 <= size - np.prod(SIZE) * 3 * (2 * 4 + 1) < 4000 * 3  # and positions
    assert described["effective"] == {
        "cache_on_device": True, "num_workers": 0, "reason": "as asked for",
    }  # fmt: skip


@pytest.mark.parametrize(("times", "expected"), [(4.1, True), (3.9, False)])
def test_cases_take_at_most_a_quarter_of_what_is_free(tmp_path, monkeypatch, times, expected):
    patches = make_patches(tmp_path, [0, 0])
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    read_all = PatchDataset.read_all
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(times * size), 10**12))
    monkeypatch.setattr(PatchDataset, "read_all", lambda self, _: read_all(self, "cpu"))
    ours = make_loader(patches, device="cuda")
    assert len(list(ours)) == 5
    assert ours.describe()["effective"]["cache_on_device"] is expected


def test_lack_of_memory_is_told(tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(PatchDataset, "read_all", full)
    ours = make_loader(make_patches(tmp_path, [0]), cache_on_device=True)
    with pytest.raises(InputError, match=r"^cache_on_device: expected .* cache_on_device=false"):
        next(iter(ours))


def test_run_with_cases_on_a_device_ends_with_the_same_weights(run, tmp_path, monkeypatch):
    """Also where it is interrupted within an epoch, and goes on the other way."""
    assert run(tmp_path / "a", steps_per_epoch=3) == 0
    begin = MixedPrecisionTrainer.run

    def interrupted(trainer):
        trainer.add_event_handler(StepEvents.STEP_COMPLETED, lambda engine: engine.interrupt())
        begin(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(MixedPrecisionTrainer, "run", interrupted)
        with pytest.raises(SystemExit):
            run(tmp_path / "b", steps_per_epoch=3, num_workers=1)
    assert run(tmp_path / "b", steps_per_epoch=3, num_workers=1, cache_on_device=True) == 0
    a, b = (torch.load(tmp_path / x / "models/last.pt", weights_only=True) for x in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)

    told = [json.loads((tmp_path / x / "summary.json").read_text())["training_data"] for x in "ab"]
    assert [one["effective"]["cache_on_device"] for one in told] == [False, True]
    assert told[1]["requested"] == {"cache_on_device": True, "num_workers": 1}
    assert told[1]["effective"]["num_workers"] == 0
    log = (tmp_path / "b/log.txt").read_text()
    assert "Training cases are read in the memory of cpu (as asked for); asked for: cache_" in log
    assert "Continuing with a changed cache_on_device" in log
