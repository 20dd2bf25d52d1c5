"""How much memory a training step is expected to take, and what a plan may spend."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import REPOSITORY, run_tiny

from networks.dense_unet import DenseUNet
from pipeline.data import data_module
from pipeline.data.memory import RESERVE, TrainingStep
from pipeline.data.plan import AUTO

GIB = 2**30
STEP = TrainingStep([96, 96, 96], 2, [[2, 2, 2]] * 3, 32, 5)


@pytest.mark.parametrize("strides", [[[2, 2, 1], [2, 2, 2]], [2, 2, 2, 2]])
def test_estimate_knows_the_weights_of_the_network(strides):
    network = DenseUNet(2, 5, 8, strides, seed=0)
    weights = sum(m.weight.numel() for m in network.modules() if isinstance(m, torch.nn.Conv3d))
    one = TrainingStep([16, 16, 16], 1, strides, 8, 5, in_channels=2)
    # without voxels weights, gradients and two moments are left, float32 each
    assert replace(one, batch_size=0).terms() == (16 * weights, 0, 0)


@pytest.mark.parametrize(
    "larger",
    [
        {"batch_size": 3}, {"roi_size": [96, 96, 112]}, {"base_channels": 40}, {"num_classes": 60},
        {"in_channels": 4}, {"strides": [[1, 2, 2], [2, 2, 2], [2, 2, 2]]},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_estimate_grows_with(larger):
    assert replace(STEP, **larger).estimate_bytes() > STEP.estimate_bytes()


@pytest.mark.parametrize("mode", ["float32", "float16"])
def test_estimate_is_lower_where_levels_are_recomputed(mode):
    steps = [replace(STEP, recompute_levels=n, mode=mode) for n in range(4)]
    taken = [step.estimate_bytes() for step in steps]
    assert taken == sorted(taken, reverse=True)
    assert taken[1] < 0.9 * taken[0]


@pytest.mark.parametrize(("free", "budget"), [(80 * GIB, 8 * GIB), (7 * GIB, 0.7 * 7 * GIB)])
def test_budget_is_8_gib_or_what_a_smaller_card_has_free(monkeypatch, free, budget):
    monkeypatch.setattr(data_module, "resolve_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(data_module, "available_bytes", lambda device: free)
    split = {"split_file": None, "data_roots": []}
    for stated, expected in ((AUTO, budget), (5, 5)):
        module = data_module.DataModule(".", "d", "c", split, "full", {}, stated, "cuda", 16)
        assert module._budget_bytes() == pytest.approx(expected)


def test_recompute_levels_may_change(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert run_tiny(dataset, tmp_path / "r", max_epochs=1, recompute_levels=1) == 0
    assert run_tiny(dataset, tmp_path / "r", max_epochs=2, recompute_levels=0) == 0
    assert "Continuing with a changed recompute_levels" in (tmp_path / "r" / "log.txt").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["float16", "float32"])
@pytest.mark.parametrize("levels", [0, 1])
def test_steps_on_a_card_take_what_is_estimated(mode, levels):
    gpu_memory = pytest.importorskip("benchmarks.gpu_memory")
    config = {
        "mode": mode, "roi_size": [96, 96, 96], "batch_size": 2, "base_channels": 32,
        "num_classes": 2, "strides": [[2, 2, 2]] * 3, "norm": "instance",
        "recompute_levels": levels,
    }  # fmt: skip
    reserved = gpu_memory.measured(config)["train"]["reserved"]
    estimate = gpu_memory.step_of(config).estimate_bytes()
    assert math.isclose(estimate, reserved, rel_tol=0.3)
    assert reserved < (1 + RESERVE) * estimate * 1.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["float16", "float32"])
@pytest.mark.parametrize("name", ["hippocampus", "cardiac_mr", "abdominal_ct"])
def test_planned_batch_trains_and_predicts_on_a_card_of_8_gb(mode, name):
    card_memory = pytest.importorskip("benchmarks.card_memory")
    try:
        card_memory.limit_to(8)
        plan = card_memory.planned(card_memory.DATASETS[name], "cuda")
        found = card_memory.tried(card_memory.config_of(plan, mode))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found["fitted"], found
    assert found["train"]["reserved"] < (1 + RESERVE) * found["predicted_bytes"]
