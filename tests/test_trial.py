"""One step on trial: it names what does not fit together, and leaves no trace."""

from __future__ import annotations

import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY, run_tiny
from engines import (
    batch,
    batch_norm_network,
    differing,
    in_mode,
    instance_norm_network,
    make_trainer,
    state_of,
)
from in_ranks import in_ranks
from torch import nn

from networks.dense_unet import DenseUNet
from pipeline.data.plan import Plan
from pipeline.errors import InputError
from pipeline.evaluation.metrics import MeanDice
from pipeline.precision import Precision
from pipeline.training import trial
from pipeline.training.loss import SegmentationLoss
from pipeline.training.trial import TrialStep, fit_batch_size, try_step

IMAGES = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = (IMAGES > 0.5).to(torch.uint8)


def random_states(device):
    found = [torch.get_rng_state(), torch.tensor(random.getstate()[1])]
    found += [torch.from_numpy(np.random.get_state()[1].astype(np.int64))]
    return found + ([torch.cuda.get_rng_state()] if device == "cuda" else [])


@pytest.mark.parametrize("mode", ["float32", "float16"])
def test_trial_leaves_everything_as_it_was(device, mode):
    trainer = make_trainer(
        in_mode(mode, device), [batch(n) for n in range(2)], network=batch_norm_network(),
        optimizer=torch.optim.Adagrad,  # has its state from the beginning
    )  # fmt: skip
    before, states = state_of(trainer), random_states(device)
    scaler = trainer.scaler and trainer.scaler.state_dict()
    TrialStep().run(trainer)
    assert differing(before, state_of(trainer)) == []
    assert all(map(torch.equal, states, random_states(device)))
    assert scaler == (trainer.scaler and trainer.scaler.state_dict())
    assert all(parameter.grad is None for parameter in trainer.network.parameters())
    assert trainer.trial_step["batch_size"] == 2
    peak = trainer.trial_step["peak_bytes"]
    assert peak > 0 if device == "cuda" else peak is None


# ---- what does not fit together


class Halved(nn.Module):
    """Does without half of the voxels, and one layer of its own."""

    def __init__(self, output=lambda x: x[..., ::2]):
        super().__init__()
        self.layer, self.unused, self.output = nn.Conv3d(1, 2, 1), nn.Conv3d(1, 2, 1), output

    def forward(self, images):
        return self.output(self.layer(images))


class Unet(nn.Module):
    """Can take sizes that are multiples of four alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv3d(1, 2, 1)

    def forward(self, images):
        small = nn.functional.max_pool3d(self.layer(images), 3)
        return self.layer(images) + nn.functional.interpolate(small, scale_factor=3)


def cross_entropy(logits, labels):
    return nn.functional.cross_entropy(logits, labels[:, 0].long())


def parts(network, loss_function=None):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return SimpleNamespace(
        network=network, loss_function=loss_function or SegmentationLoss(), optimizer=optimizer,
        precision=Precision("cpu"),
    )  # fmt: skip


def refusal(network=None, loss=None, labels=LABELS, images=IMAGES):
    with pytest.raises(InputError) as caught:
        try_step(parts(network or instance_norm_network(), loss), images, labels)
    (line,) = caught.value.faults
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"network": Unet()}, [r"network that takes images \(2, 1, 8, 8, 8\)", r"roi_size in mult",
                               r"\[32, 32, 32\]"]),
        ({"network": instance_norm_network(), "images": torch.zeros(2, 3, 8, 8, 8)},
         ["network of 3 channels"]),
        ({"network": Halved()}, [r"got: logits of shape \(2, 2, 8, 8, 4\). Choose roi_size"]),
        ({"network": Halved(lambda x: [x, x[..., ::2]]), "loss": cross_entropy},
         ["deep supervision", r"logits \(2, 2, 8, 8, 8\) and"]),
        ({"loss": SegmentationLoss(class_weights=[1.0, 2, 3])}, ["expected 2 class_weights"]),
        ({"loss": lambda x, y: nn.functional.cross_entropy(x, y[:, 0].long(), torch.ones(3))},
         ["class weights need a value for each"]),
        ({"loss": cross_entropy, "labels": LABELS + 7}, ["ignores label 8"]),
        ({"loss": lambda x, y: x.detach().mean()}, ["can be differentiated"]),
        ({"network": DenseUNet(1, 2, 2, [2, 2, 2, 2], num_dense_layers=1, growth_rate=1)},
         ["got: DenseUNet: expected an image of at least"]),
    ],
)  # fmt: skip
def test_trial_names_what_does_not_fit(given, told):
    line = refusal(**given)
    for words in told:
        assert re.search(words, line), line


def test_trial_names_the_cases_and_tries_the_metric():
    handler = TrialStep({"mean_dice": MeanDice(["background"])})
    trainer = make_trainer(Precision("cpu"), [batch(3)], train_handlers=[handler])
    with pytest.raises(InputError, match="trial step with case_3_0, case_3_1: expected a metric"):
        handler.run(trainer)


def unused_in_ranks():
    try_step(parts(Halved(lambda x: x)), IMAGES, LABELS)


def test_parameter_without_gradient_is_named_where_there_are_ranks():
    for error in in_ranks(unused_in_ranks):
        assert "no gradient of unused.weight, unused.bias" in str(error)
    unused_in_ranks()  # one process does without


# ---- memory


PLAN = Plan([1, 1, 1], False, "zscore", [8, 8, 8], [2], ["a", "b"], 1, 2, batch_size=12,
            reasons={"batch_size": "planned", "spacing": "given"})  # fmt: skip


@pytest.mark.parametrize(
    ("patch_bytes", "card_bytes", "expected"), [(10, 400, 12), (10, 100, 7), (100, 150, 1)]
)
@pytest.mark.parametrize("fails", [False, True])
def test_batch_size_is_lowered_until_a_step_fits(
    monkeypatch, patch_bytes, card_bytes, expected, fails
):
    def fake(parts, images, labels):
        assert labels.shape == (len(images), 1, 8, 8, 8)
        if fails and len(images) * patch_bytes > card_bytes:
            raise trial.MemoryLimitError("full")
        return len(images) * patch_bytes

    monkeypatch.setattr(trial, "try_step", fake)
    monkeypatch.setattr(trial, "available_bytes", lambda device: card_bytes)
    plan = fit_batch_size({"precision": SimpleNamespace(device=torch.device("cpu"))}, PLAN)
    assert plan.batch_size <= expected
    assert plan.batch_size * patch_bytes <= 0.75 * card_bytes or plan.batch_size == 1
    reason = "planned" if expected == 12 else "what fits: a trial step with 12 took more"
    assert plan.reasons["batch_size"].startswith(reason)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batch_that_does_not_fit_is_refused_or_lowered(dataset, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(REPOSITORY)
    share = 1.5 * 2**30 / torch.cuda.get_device_properties(0).total_memory
    large = {"roi_size": [96, 96, 96], "base_channels": 16, "device": "cuda", "max_epochs": 1,
             "network_def#num_dense_layers": 4}  # fmt: skip
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        assert run_tiny(dataset, tmp_path / "r", **large, batch_size=8) == 2
        assert "batch_size: expected a training step that fits into" in capfd.readouterr().err
        auto = {**large, "batch_size": "auto", "memory_budget_bytes": 20 * 10**9}
        assert run_tiny(dataset, tmp_path / "a", **auto) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    plan = json.loads((tmp_path / "a" / "plan.json").read_text())
    assert summary["trial_step"]["batch_size"] == plan["batch_size"]
    assert 0 < summary["trial_step"]["peak_bytes"] < 1.5 * 2**30


# ---- in a run


def test_run_tells_of_its_trial_step_once(run, tmp_path):
    assert run(tmp_path / "r", max_epochs=1) == 0
    line = "Trial step with 2 patches: all fits together"
    log = (tmp_path / "r" / "log.txt").read_text()
    assert log.count(line) == 1
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["trial_step"] == {"batch_size": TINY["batch_size"], "peak_bytes": None}
    assert run(tmp_path / "r", max_epochs=2) == 0
    assert (tmp_path / "r" / "log.txt").read_text().count(line) == 1


@pytest.mark.parametrize(("limit_s", "is_told"), [(0, True), (600, False)])
def test_trial_tells_how_long_the_steps_take_on_a_cpu(monkeypatch, caplog, limit_s, is_told):
    monkeypatch.setattr(trial, "LONG_S", limit_s)
    trainer = make_trainer(in_mode("float32"), [batch(n) for n in range(2)], epochs=3)
    with caplog.at_level("INFO"):
        TrialStep().run(trainer)
    (line,) = [r.getMessage() for r in caplog.records if "--time_budget" in r.getMessage()] or [""]
    expected = r"6 steps of \S+ s take about \S+ hours on this CPU; --time_budget 1h limits them"
    assert bool(re.fullmatch(expected, line)) is is_told
