"""The flight recorder: what it says of a skipped step, that it changes nothing, and replays."""

from __future__ import annotations

import contextlib
import json
import math
from datetime import datetime

import pytest
import torch
from engines import (
    batch,
    batch_norm_network,
    curve,
    differing,
    half,
    in_mode,
    instance_norm_network,
    make_trainer,
    make_validator,
    overflows,
    read,
    snapshot,
    state_of,
    steps_of,
)
from monai.engines.utils import IterationEvents
from torch import nn

from networks.dense_unet import DenseUNet
from pipeline.errors import TrainingStopped
from pipeline.training import flight_recorder
from pipeline.training.checkpoint import checkpoints, load_checkpoint
from pipeline.training.flight_recorder import FlightRecorder
from pipeline.training.logging_handlers import LoggingHandler
from pipeline.training.loss import SegmentationLoss

HALF = {"amp_dtype": "float16", "precision#init_scale": 1024.0}


def record(folder, precision, network=None, batches=None, **kwargs):
    """Train with a recorder; its lines and the trainer."""
    batches = [batch(0), batch(1, value=math.inf), batch(2)] if batches is None else batches
    handlers = [FlightRecorder(folder)]
    trainer = make_trainer(precision, batches, network=network, train_handlers=handlers, **kwargs)
    with contextlib.suppress(TrainingStopped):  # as it does where no step is applied
        trainer.run()
    return overflows(folder), trainer


# --- in a run


@pytest.mark.parametrize(
    ("changes", "value", "scales"),
    [({"amp": False}, math.nan, [1, 1]), (HALF, -math.inf, [1024, 512])],
    ids=["float32", "float16"],
)
def test_overflow_has_one_line_per_skipped_step(
    poisoned, samples, tmp_path, changes, value, scales
):
    """Samples 2 and 5 are the first of step 2 and the second of step 3, in epochs 1 and 2."""
    assert poisoned(tmp_path / "r", [2, 5], value=value, **changes) == 0
    lines = overflows(tmp_path / "r")
    assert [(line["step"], line["epoch"]) for line in lines] == [(2, 1), (3, 2)]
    assert [line["loss_scale"] for line in lines] == scales
    for line, numbers, bad in zip(lines, [(2, 3), (4, 5)], [2, 5], strict=True):
        assert line["samples"] == list(numbers)
        assert line["case_ids"] == [samples[n]["case_id"] for n in numbers]
        assert line["origins"] == [samples[n]["origin"] for n in numbers]
        assert (line["stage"], line["first_module"]) == ("input", "image")
        assert line["non_finite_cases"] == [samples[bad]["case_id"]]
        assert line["loss"] in ("nan", "inf")
        assert line["grad_norm"] in ("nan", "inf")
        assert datetime.fromisoformat(line["time"]).tzinfo
        assert (tmp_path / "r" / line["kept"]).is_file()
    assert steps_of(read(tmp_path / "r"), "weight_update/skipped_steps") == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [4, 5])
def test_overflow_names_the_case_of_the_poisoned_micro_batch(poisoned, samples, tmp_path, number):
    changes = {"batch_size": 1, "accumulation_steps": 2, **HALF}
    assert poisoned(tmp_path / "r", [number], value=1e6, **changes) == 0
    (line,) = overflows(tmp_path / "r")
    assert line["samples"] == [4, 5]
    assert line["case_ids"] == [samples[n]["case_id"] for n in (4, 5)]
    assert line["origins"] == [samples[n]["origin"] for n in (4, 5)]
    assert (line["step"], line["first_module"]) == (3, "encoders.0.conv1")
    assert line["non_finite_cases"] == [samples[number]["case_id"]]


def test_overflow_keep_limits_the_kept_files(poisoned, tmp_path):
    changes = {"amp": False, "overflow_keep": 3, "max_epochs": 3}
    assert poisoned(tmp_path / "r", range(8), **changes) == 0  # four steps of six
    names = [f"overflow/step_{n:09d}.pt" for n in (1, 2, 3)]
    assert [line["kept"] for line in overflows(tmp_path / "r")] == [*names, None]
    assert [name for name in snapshot(tmp_path / "r") if "overflow/" in name] == names


def test_finite_run_pays_nothing(run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        pytest.fail("looked although all was finite")

    monkeypatch.setattr(flight_recorder, "_compute_gradients", refuse)
    monkeypatch.setattr(nn.Module, "register_forward_hook", refuse)
    assert run(tmp_path / "r", **HALF) == 0
    assert not list((tmp_path / "r").glob("overflow*"))


# --- what it finds


def overflow_of(folder, network=None, given=None, mode="float32", **kwargs) -> dict:
    """The line of a trainer's only step."""
    precision = in_mode(mode, init_scale=kwargs.pop("scale", 1024.0))
    given = batch(0) if given is None else given
    (line,), _ = record(folder, precision, network, [given], **kwargs)
    return line


def place_of(line: dict) -> tuple[str, str]:
    return line["stage"], line["first_module"]


@pytest.mark.parametrize("name", ["encoders.0.conv2", "head"])
def test_overflow_names_the_module_that_left_the_range(tmp_path, name):
    network = DenseUNet(1, 2, 2, [2], num_dense_layers=1, growth_rate=4, seed=0)
    with torch.no_grad():
        network.get_submodule(name).weight.fill_(6e4)
    line = overflow_of(tmp_path, network, mode="float16")
    assert place_of(line) == ("forward", name)
    assert line["non_finite_cases"] == ["case_0_0", "case_0_1"]


def test_overflow_of_running_statistics_alone_names_their_layer(tmp_path):
    large = batch(0)
    large["image"] *= 1e20
    assert place_of(overflow_of(tmp_path, batch_norm_network(), large)) == ("statistics", "1")


def test_overflow_of_the_loss_alone_names_the_loss(tmp_path):
    def broken(logits, label):
        return logits.float().mean() + math.inf

    line = overflow_of(tmp_path, loss_function=broken)
    assert place_of(line) == ("loss", "loss_function")
    assert math.isfinite(line["grad_norm"])


def test_overflow_of_gradients_alone_names_a_module(tmp_path):
    """2^40 times the loss has no float16 gradient of the logits: the last layer comes first."""
    line = overflow_of(tmp_path, batch_norm_network(), mode="float16", scale=2.0**40)
    assert place_of(line) == ("backward", "4")
    assert math.isfinite(line["loss"])
    assert line["non_finite_cases"] == ["case_0_0", "case_0_1"]


def test_recorder_goes_on_when_a_step_cannot_be_run_again(tmp_path, monkeypatch, caplog):
    def no_room(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(flight_recorder, "first_non_finite", no_room)
    (line,), trainer = record(tmp_path, in_mode("float32"))
    assert (line["step"], line["stage"]) == (2, "not replayed")
    assert line["case_ids"] == ["case_1_0", "case_1_1"]
    assert trainer.progress.step == 3
    assert "The skipped step could not be run again: no room" in caplog.text


def test_record_of_a_run_that_starts_anew_is_removed(poisoned, tmp_path):
    run_dir = tmp_path / "r"
    for _ in range(2):  # no checkpoint comes of it
        with pytest.raises(SystemExit):
            poisoned(run_dir, [1], amp=False, max_consecutive_skips=1)
        assert [line["step"] for line in overflows(run_dir)] == [1]
        assert [path.name for path in (run_dir / "overflow").iterdir()] == ["step_000000001.pt"]


# --- what it leaves alone


@pytest.mark.parametrize(
    ("mode", "accumulation"), [("float16", 1), ("float16", 2), ("bfloat16", 1)]
)
def test_recorder_does_not_change_the_training(tmp_path, mode, accumulation):
    def train(folder=None):
        batches = [batch(n) for n in range(8)]
        batches[3]["image"][1, 0, 2, 2, 2] = math.nan
        handlers = [] if folder is None else [FlightRecorder(folder)]
        trainer = make_trainer(
            in_mode(mode, init_scale=1024.0), batches, accumulation=accumulation,
            network=batch_norm_network(), optimizer=torch.optim.AdamW, train_handlers=handlers,
        )  # fmt: skip
        trainer.run()
        return trainer

    recorded, plain = train(tmp_path), train()
    assert len(overflows(tmp_path)) == plain.progress.skipped_steps == 1
    assert differing(state_of(recorded), state_of(plain)) == []
    assert recorded.last_step == plain.last_step


POISON = {"numbers": [5], "value": 1e6}  # step 3; finite in float32 only
SAME = ("samples", "case_ids", "origins", "stage", "first_module", "non_finite_cases", "loss_scale")


# --- --replay_step


@pytest.mark.parametrize("group", [{}, {"batch_size": 1, "accumulation_steps": 2}], ids=str)
def test_replay_step_finds_the_same_and_writes_nothing(poisoned, tmp_path, capfd, group):
    changes = {**POISON, **HALF, **group}
    assert poisoned(tmp_path / "r", **changes) == 0
    (line,) = overflows(tmp_path / "r")
    before = snapshot(tmp_path / "r")
    capfd.readouterr()
    assert poisoned(tmp_path / "r", **changes, replay_step=3) == 0
    again = json.loads(capfd.readouterr().out)  # and nothing else
    assert (line["stage"], line["first_module"]) == ("forward", "encoders.0.conv1")
    assert {key: again[key] for key in SAME} == {key: line[key] for key in SAME}
    assert (again["recorded_in"], again["replayed_in"]) == ("float16", "float16")
    assert again["same_as_recorded"]

    assert poisoned(tmp_path / "r", **changes, amp=False, replay_step=3) == 0
    again = json.loads(capfd.readouterr().out)
    assert (again["recorded_in"], again["replayed_in"]) == ("float16", "float32")
    assert (again["stage"], again["first_module"], again["loss_scale"]) == (None, None, 1)
    assert again["case_ids"] == line["case_ids"]
    assert not again["same_as_recorded"]
    assert snapshot(tmp_path / "r") == before


def test_replay_of_what_is_not_there_is_one_line(poisoned, tmp_path, capfd):
    assert poisoned(tmp_path / "r", replay_step=3, **POISON) == 2
    assert "output_dir: expected a run directory, found none in" in capfd.readouterr().err
    assert not (tmp_path / "r").exists()
    assert poisoned(tmp_path / "r", **POISON, **HALF) == 0
    for step, changes, message in (
        (4, {}, "replay_step: expected a skipped step whose weights are in "),
        ("three", {}, "argument --replay_step: invalid int value: 'three'"),
        (3, {"seed": 1}, "got other values of seed"),
    ):
        capfd.readouterr()
        assert poisoned(tmp_path / "r", **POISON, **HALF, **changes, replay_step=step) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert message in line


# --- the curves


def test_tensorboard_has_the_largest_logit_of_each_step(tmp_path):
    seen, handler = [], LoggingHandler(tmp_path, make_validator(), log_every=1)
    batches = [batch(n) for n in range(4)]
    trainer = make_trainer(in_mode("float32"), batches, accumulation=2, train_handlers=[handler])
    trainer.add_event_handler(
        IterationEvents.FORWARD_COMPLETED,
        lambda engine: seen.append(engine.state.output["pred"].detach().abs().max().item()),
    )
    trainer.run()
    expected = [(1, max(seen[:2])), (2, max(seen[2:]))]
    assert curve(read(tmp_path), "weight_update/max_abs_logit") == expected


@pytest.mark.parametrize("accumulation", [1, 2])
def test_tensorboard_has_the_share_of_gradients_that_underflow(tmp_path, accumulation):
    """With a loss scale so small that float16 loses many of them."""
    scale, network = 2.0**-13, instance_norm_network()
    group = [batch(n) for n in range(accumulation)]

    def gradients(dtype, scale):
        network.zero_grad()
        for one in group:
            with torch.autocast("cpu", dtype=torch.float16, enabled=dtype == torch.float16):
                loss = SegmentationLoss()(network(one["image"]), one["label"])
            (loss * scale / accumulation).backward()
        return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])

    low, full = gradients(torch.float16, scale).clone(), gradients(torch.float32, 1.0)
    expected = ((low == 0) & (full != 0)).float().mean().item()
    handler = LoggingHandler(tmp_path, make_validator(), underflow_every=1)
    make_trainer(
        half(init_scale=scale), group, accumulation=accumulation, network=network,
        train_handlers=[handler],
    ).run()  # fmt: skip
    assert curve(read(tmp_path), "weight_update/underflow_fraction") == [
        (1, pytest.approx(expected))
    ]
    assert 0.02 < expected < 0.98


def test_measuring_underflow_does_not_change_the_training(run, tmp_path):
    changes = {**HALF, "network_def#norm": "batch", "network_def#dropout": 0.3}
    saved = []
    for every in (0, 1):
        out = tmp_path / f"every_{every}"
        group = {"batch_size": 1, "accumulation_steps": 2}
        assert run(out, underflow_every=every, **changes, **group) == 0
        saved.append(load_checkpoint(checkpoints(out / "checkpoints")[-1]))
        saved[-1]["progress"].pop("wall_time_s")
    assert steps_of(read(tmp_path / "every_1"), "weight_update/underflow_fraction") == [1, 2, 3, 4]
    assert differing(*saved) == []
