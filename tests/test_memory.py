"""What a run is predicted to take of a card's memory, beside what was read there."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, run_tiny
from test_plan import Declared, fingerprint_of

from networks.dense_unet import DenseUNet
from pipeline.data import data_module
from pipeline.data.arena import MIB, Arena
from pipeline.data.forecast import GIB, Forecast
from pipeline.data.memory import Process, step_bytes
from pipeline.data.plan import AUTO, make_plan
from pipeline.data.step_memory import Net, Walk, forward, step
from pipeline.data.window_memory import Slabs, Windows
from pipeline.errors import InputError

MEASURED = json.loads((REPOSITORY / "benchmarks" / "gpu_memory.json").read_text())
NUM_FITTED, NUM_HELD_OUT = 45, 20
PHASES = ("train", "validate", "predict")


def net_of(reading):
    names = ("strides", "base_channels", "num_classes")
    return Net(*(reading[n] for n in names), 1, reading["recompute_levels"], reading["mode"])


def predicted(reading):
    """Training, validation and prediction, as benchmarks/gpu_memory.py reads them."""
    windows = Windows(reading["roi_size"], reading["num_classes"])
    run, alone = Process(net_of(reading)), Process(net_of(reading))
    run.train(reading["roi_size"], reading["batch_size"])
    training = run.peak
    run.predict(windows, reading["volume"])
    alone.predict(windows, reading["volume"])
    return training, run.peak, alone.peak


@pytest.mark.parametrize("number", range(NUM_FITTED, NUM_FITTED + NUM_HELD_OUT))
def test_memory_of_configurations_held_out_is_predicted_within_a_tenth(number):
    (reading,) = (one for one in MEASURED["readings"] if one["number"] == number)
    read = [reading[phase]["reserved"] for phase in PHASES]
    assert predicted(reading) == pytest.approx(read, rel=0.1)


def test_readings_are_of_the_configurations_that_the_benchmark_draws():
    gpu_memory = pytest.importorskip("benchmarks.gpu_memory")
    every = gpu_memory.configurations()
    assert len(every) == len(MEASURED["readings"]) == NUM_FITTED + NUM_HELD_OUT
    for number, (config, reading) in enumerate(zip(every, MEASURED["readings"], strict=True)):
        assert {"number": number, **config}.items() <= reading.items()


# ---- the allocator


def test_arena_reserves_segments_as_the_allocator_does():
    arena = Arena()
    first = arena.hold(1)
    assert arena.reserved == 2 * MIB  # small tensors share one
    arena.hold(MIB)
    assert arena.reserved == 2 * MIB
    arena.hold(3 * MIB)
    assert arena.reserved == 22 * MIB  # and those up to 10 MiB one of 20
    own = arena.hold(18 * MIB + 1)
    assert arena.reserved == 42 * MIB  # larger ones have their own
    arena.drop(own, first)
    arena.trim()
    assert (arena.reserved, arena.peak) == (22 * MIB, 42 * MIB)


def test_arena_takes_the_smallest_block_that_is_free_and_splits_it():
    arena = Arena()
    large, small = arena.hold(40 * MIB), arena.hold(30 * MIB)
    arena.drop(large, small)
    again = arena.hold(25 * MIB)
    assert again.place == small.place
    assert arena.hold(4 * MIB).place == small.place + 25 * MIB  # what was left of it
    assert arena.hold(38.5 * MIB).place == large.place
    assert arena.reserved == 70 * MIB
    arena.hold(2 * MIB)  # 1.5 and 1 MiB are left, which are of no use
    assert arena.reserved == 90 * MIB


def test_arena_joins_neighbours_that_are_free():
    arena = Arena()
    whole = arena.hold(30 * MIB)
    arena.drop(whole)
    parts = [arena.hold(10 * MIB) for _ in range(3)]
    arena.drop(parts[0], parts[2], parts[1])
    arena.hold(30 * MIB)
    assert arena.reserved == 30 * MIB


# ---- the terms


@pytest.mark.parametrize("strides", [[[2, 2, 1], [2, 2, 2]], [[2, 2, 2]] * 4])
def test_weights_are_those_of_the_network(strides):
    network = DenseUNet(2, 5, 8, strides, seed=0)
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv3d)]
    expected = [m.weight.numel() for m in convolutions]
    assert Net(strides, 8, 5, 2).weights() == expected


@pytest.mark.parametrize("mode", ["float32", "float16"])
@pytest.mark.parametrize("levels", range(3))
def test_step_and_forward_pass_drop_all_that_they_hold(levels, mode):
    net, arena = Net([[2, 2, 1], [2, 2, 2]], 8, 5, 1, levels, mode), Arena()
    gradients, logits = step(Walk(net, arena, [32, 32, 16], 2))
    assert sorted(block.size // 512 for block in gradients) == sorted(
        math.ceil(4 * n / 512) for n in net.weights()
    )
    arena.drop(*gradients, logits, forward(Walk(net, arena, [32, 32, 16], 2)))
    Slabs(net, arena, Windows([32, 32, 16], 5), [40, 33, 50]).predict()
    arena.trim()
    assert arena.reserved == 0


@pytest.mark.parametrize("mode", ["float32", "float16"])
def test_recomputed_levels_take_less_memory(mode):
    taken = []
    for levels in range(4):
        process = Process(Net([[2, 2, 2]] * 3, 32, 5, 1, levels, mode))
        process.train([96, 96, 96], 4)
        taken.append(process.graph.reserved)
    assert taken == sorted(taken, reverse=True)
    assert taken[2] < 0.86 * taken[0]


# ---- the preflight


def test_training_that_will_not_fit_is_refused_in_one_line():
    forecast = Forecast(9 * GIB, 10 * GIB, 8 * GIB, "cuda:0")
    with pytest.raises(InputError) as caught:
        forecast.require_room()
    (line,) = caught.value.faults
    assert line == (
        "batch_size: expected training steps that fit into 8.00 GiB, free on cuda:0, got 9.00 GiB "
        "as predicted. Lower batch_size, roi_size or base_channels, or raise recompute_levels."
    )


def test_forecast_says_what_is_predicted_and_what_is_there():
    fits = Forecast(2 * GIB, 3 * GIB, 8 * GIB, "cuda:0")
    fits.require_room()
    assert fits.line == (
        "Memory, predicted: 2.00 GiB in training, 3.00 GiB in validation; cuda:0 has 8.00 GiB free"
    )
    tight = Forecast(2 * GIB, 9 * GIB, 8 * GIB, "cuda:0")
    tight.require_room()  # prediction finds a way
    assert tight.line.endswith(
        "Validation will go on with fewer windows, or sums in the host's memory"
    )


def card_of(monkeypatch, free):
    monkeypatch.setattr(data_module, "resolve_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(data_module, "available_bytes", lambda device: free)


def data_module_with(**changes):
    split = {"split_file": None, "data_roots": []}
    arguments = {"memory_budget_bytes": AUTO, "device": "cuda", "base_channels": 16, **changes}
    return data_module.DataModule(".", "d", "c", split, "full", {}, **arguments)


@pytest.mark.parametrize(("free", "budget"), [(80 * GIB, 8 * GIB), (7 * GIB, 0.7 * 7 * GIB)])
def test_budget_is_8_gib_or_what_a_smaller_card_has_free(monkeypatch, free, budget):
    card_of(monkeypatch, free)
    assert data_module_with()._budget_bytes() == pytest.approx(budget)
    assert data_module_with(memory_budget_bytes=5)._budget_bytes() == 5


def test_forecast_is_of_the_precision_batch_and_largest_volume_of_the_run(monkeypatch):
    card_of(monkeypatch, 8 * GIB)
    fingerprint = fingerprint_of([[1, 1, 2], [1, 1, 1]], [[64, 64, 40], [64, 64, 64]])
    plan = SimpleNamespace(
        strides=[2, 2], num_classes=3, in_channels=1, roi_size=[48, 48, 48], batch_size=3,
        spacing=[1, 1, 1],
    )  # fmt: skip
    found = SimpleNamespace(fingerprint=fingerprint)
    net = ([[2, 2, 2]] * 2, 16, 3, 1, 1)
    for amp, mode in ((True, "float16"), (False, "float32")):
        forecast = data_module_with(amp=amp, recompute_levels=1).forecast(plan, found)
        process = Process(Net(*net, mode))
        process.train([48] * 3, 3)
        assert forecast.training == process.peak
        process.predict(Windows([48] * 3, 3), [64, 64, 80])
        assert forecast.validation == process.peak
        assert (forecast.available, forecast.device) == (8 * GIB, "cuda")


def test_nothing_is_forecast_on_a_cpu():
    assert data_module_with(device="cpu").forecast(None, SimpleNamespace(fingerprint={})) is None


def test_run_that_will_not_fit_ends_before_it_begins(dataset, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(REPOSITORY)
    forecast = Forecast(9 * GIB, 10 * GIB, 8 * GIB, "cuda:0")
    monkeypatch.setattr(data_module.DataModule, "forecast", lambda *arguments: forecast)
    with pytest.raises(SystemExit, match=r"^2$"):
        run_tiny(dataset, tmp_path / "r")
    assert "batch_size: expected training steps that fit into 8.00 GiB" in capfd.readouterr().err
    assert not (tmp_path / "r").exists()


def test_run_says_what_is_predicted_and_keeps_it(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    forecast = Forecast(2 * GIB, 3 * GIB, 8 * GIB, "cuda:0")
    monkeypatch.setattr(data_module.DataModule, "forecast", lambda *arguments: forecast)
    assert run_tiny(dataset, tmp_path / "r", max_epochs=1, recompute_levels=1) == 0
    assert forecast.line in (tmp_path / "r" / "log.txt").read_text()
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["predicted_memory_bytes"] == {"training": 2 * GIB, "validation": 3 * GIB}
    # and goes on with its activations kept
    assert run_tiny(dataset, tmp_path / "r", max_epochs=2, recompute_levels=0) == 0
    assert "Continuing with a changed recompute_levels" in (tmp_path / "r" / "log.txt").read_text()


def test_too_many_recomputed_levels_are_one_line(dataset, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(REPOSITORY)
    assert run_tiny(dataset, tmp_path / "r", recompute_levels=9) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("DenseUNet: expected recompute_levels to be 0 to ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["float16", "float32"])
@pytest.mark.parametrize("levels", [0, 1])
def test_planned_batch_trains_on_a_card_of_8_gb(mode, levels):
    from benchmarks.gpu_memory import clean, trainer_of
    from pipeline.precision import Precision

    clean()
    share = 7.5 * GIB / torch.cuda.get_device_properties(0).total_memory  # a context takes the rest
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        budget = data_module_with(base_channels=32)._budget_bytes()
        assert budget < 8 * GIB
        names = (
            "class_names", "num_classes", "in_channels", "crop_empty_borders", "spacing",
            "normalization", "strides", "roi_size", "batch_size", "foreground_ratio", "flip_axes",
        )  # fmt: skip
        settings = {**dict.fromkeys(names, AUTO), "roi_size": [96, 96, 96]}
        fingerprint = fingerprint_of([[1] * 3] * 50, [[160] * 3] * 50)
        given = {"base_channels": 32, "recompute_levels": levels}
        plan = make_plan(fingerprint, settings, dataset=Declared(), budget_bytes=budget, **given)
        assert plan.reasons["batch_size"].startswith("what fits into 5.2")
        sizes = [96, 96, 96], plan.batch_size, plan.strides, 32, 2, 1, levels
        assert step_bytes(*sizes) <= budget
        assert step_bytes(sizes[0], 2 * plan.batch_size, *sizes[2:]) > 7.5 * GIB
        config = {
            "roi_size": sizes[0], "batch_size": plan.batch_size, "strides": plan.strides,
            "num_classes": 2, "norm": "instance", **given,
        }  # fmt: skip
        amp = mode != "float32"
        precision = Precision("cuda", amp=amp, amp_dtype=mode if amp else "auto")
        trainer = trainer_of(config, precision)
        trainer.run()
        assert trainer.progress.step == 6
        assert math.isfinite(trainer.last_step.loss)
        expected = step_bytes(*sizes, mode=mode)
        assert trainer.peak_reserved_bytes == pytest.approx(expected, rel=0.1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
