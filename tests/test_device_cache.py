"""Cases in a device's memory: the samples are those of the cache on disk, bit for bit."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from test_positions import IGNORED
from test_positions import make_patches as make_patches_of

from pipeline import distributed
from pipeline.data import device_cache
from pipeline.data.sampling import EpochSampler, PatchLoader
from pipeline.errors import InputError
from pipeline.training.trainer import MixedPrecisionTrainer, StepEvents

SHARES = [0, 0, 0.3, 0.5]  # of voxels of the last class; the first two cases differ
make_patches = partial(make_patches_of, num_classes=IGNORED + 1)


def loader(patches, *, batch_size=2, **kwargs):
    return PatchLoader(patches, EpochSampler(batch_size, 1, 10 // batch_size), batch_size, **kwargs)


def require_equal(got, expected):
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        assert a["case_id"] == b["case_id"]
        for key in a.keys() - {"case_id"}:
            assert (a[key].dtype, a[key].shape) == (b[key].dtype, b[key].shape), key
            assert torch.equal(a[key].cpu(), b[key].cpu()), key
        assert a["seed"].device.type == "cpu"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ignore_value": IGNORED, "num_classes": 4, "foreground_ratio": 0.0},
        {"roi_size": (3, 15, 7), "patch_size": (21, 15, 9)},
        {"roi_size": (4, 5, 3), "patch_size": (4, 5, 3), "foreground_ratio": 1.0},
    ],
    ids=["padded", "annotated", "larger than the volume", "inside"],
)
@pytest.mark.parametrize("start", [0, 14], ids=["epoch", "continued"])
def test_resident_batches_are_those_of_the_cache(tmp_path, device, changes, start):
    patches = make_patches(tmp_path, SHARES, **changes)
    resident, cached = loader(patches, cache_on_device=True, device=device), loader(patches)
    for one in (resident, cached):
        one.sampler.start = start
    got = list(resident)
    assert {batch[key].device.type for batch in got for key in ("image", "label")} == {device}
    require_equal(got, list(cached))


def test_resident_batches_are_divided_among_ranks(tmp_path, monkeypatch):
    patches = make_patches(tmp_path, SHARES)
    whole = list(loader(patches, batch_size=5))
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "sync_errors", nullcontext)  # there is nobody to agree with
    for rank, own in enumerate([slice(0, 3), slice(3, 5)]):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        ours = loader(patches, batch_size=5, cache_on_device=True)
        require_equal(list(ours), [{k: v[own] for k, v in batch.items()} for batch in whole])


def test_resident_cases_need_no_file_and_no_worker(tmp_path):
    patches = make_patches(tmp_path, SHARES)
    expected = list(loader(patches))
    ours = loader(patches, cache_on_device="true", num_workers=2)
    assert ours.describe()["effective"]["cache_on_device"] is None
    require_equal([next(iter(ours))], expected[:1])
    shutil.rmtree(tmp_path / "cache")
    require_equal(list(ours), expected)
    described = ours.describe()
    assert described["requested"] == {"cache_on_device": "true", "num_workers": 2}
    size = described["effective"].pop("bytes")
    assert 0 <= size - 13 * 9 * 7 * len(SHARES) * (2 * 4 + 1) < 4000 * len(SHARES)  # and positions
    assert described["effective"] == {
        "cache_on_device": True, "num_workers": 0, "reason": "as asked for",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "size", "free", "expected"),
    [
        (None, 100, 400, True), (None, 101, 400, False), (None, None, None, False),
        (True, 500, 400, True), (False, 1, 400, False),
    ],
)  # fmt: skip
def test_decision_takes_a_quarter_of_what_is_free(asked, size, free, expected):
    got, reason = device_cache.decide(asked, size, free)
    assert got is expected
    assert reason


@pytest.mark.parametrize("asked", ["auto", True])
def test_lack_of_memory_is_told_or_avoided(tmp_path, monkeypatch, asked):
    def full(*args):
        raise torch.OutOfMemoryError("full")

    ours = loader(make_patches(tmp_path, SHARES), cache_on_device=asked)
    monkeypatch.setattr(device_cache, "load_cases_on", full)
    monkeypatch.setattr(device_cache, "decide", lambda *args: (True, ""))
    if asked == "auto":
        assert len(list(ours)) == 5
        assert "taken meanwhile" in ours.describe()["effective"]["reason"]
    else:
        with pytest.raises(
            InputError, match=r"^cache_on_device: expected .* Use cache_on_device=auto or false"
        ):
            next(iter(ours))


def test_loader_refuses_another_word(tmp_path):
    with pytest.raises(
        InputError, match="cache_on_device: expected auto, true or false, got 'gpu'"
    ):
        loader(make_patches(tmp_path, SHARES), cache_on_device="gpu")


def test_run_with_resident_cases_ends_with_the_same_weights(run, tmp_path, monkeypatch):
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
    assert "Training cases in force: {'cache_on_device': True" in log
    assert "asked for: {'cache_on_device': True, 'num_workers': 1}" in log
    assert "Continuing with a changed cache_on_device" in log
