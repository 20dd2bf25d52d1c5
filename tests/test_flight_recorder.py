"""The flight recorder: what it says of a skipped step, that it changes nothing, and replays."""

from __future__ import annotations

import contextlib
import errno
import json
import math
from copy import deepcopy
from datetime import datetime
from pathlib import Path

import pytest
import torch
from conftest import further
from engines import (
    batch,
    batch_norm_network,
    curve,
    differing,
    half,
    in_mode,
    make_trainer,
    make_validator,
    overflows,
    read,
    snapshot,
    state_of,
    steps_of,
)
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from torch import nn

from networks.dense_unet import DenseUNet
from pipeline import files
from pipeline.errors import TrainingStopped
from pipeline.training import flight_recorder
from pipeline.training.checkpoint import checkpoints, load_checkpoint
from pipeline.training.flight_recorder import FlightRecorder, NonFiniteProbe
from pipeline.training.logging_handlers import LoggingHandler
from pipeline.training.loss import SegmentationLoss

HALF = {"amp_dtype": "float16", "precision#init_scale": 1024.0}
KEYS = {
    "time", "step", "epoch", "precision", "loss_scale", "loss", "grad_norm", "samples", "case_ids",
    "origins", "stage", "first_module", "non_finite_cases", "max_abs_activation", "kept", "rank",
}  # fmt: skip


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
        assert set(line) == KEYS
        assert line["samples"] == list(numbers)
        assert line["case_ids"] == [samples[n]["case_id"] for n in numbers]
        assert line["origins"] == [samples[n]["origin"] for n in numbers]
        assert (line["stage"], line["first_module"]) == ("input", "image")
        assert line["non_finite_cases"] == [samples[bad]["case_id"]]
        assert line["loss"] in ("nan", "inf")
        assert line["grad_norm"] in ("nan", "inf")
        assert datetime.fromisoformat(line["time"]).tzinfo
        assert (tmp_path / "r" / line["kept"]).is_file()
    assert steps_of(read(tmp_path / "r"), "AMP/skipped_steps") == [1, 2, 3, 4]


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


@pytest.mark.parametrize("keep", [0, 3])
def test_overflow_keep_limits_the_kept_files(poisoned, tmp_path, keep):
    changes = {"amp": False, "overflow_keep": keep, "max_epochs": 3}
    assert poisoned(tmp_path / "r", range(8), **changes) == 0  # four steps of six
    names = [f"overflow/step_{n:09d}.pt" for n in range(1, keep + 1)]
    assert [line["kept"] for line in overflows(tmp_path / "r")] == names + [None] * (4 - keep)
    found = sorted((tmp_path / "r").glob("overflow/*"))
    assert [str(path.relative_to(tmp_path / "r")) for path in found] == names


def test_finite_run_pays_nothing(run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        pytest.fail("looked although all was finite")

    for owner, name in (
        (NonFiniteProbe, "__init__"),
        (flight_recorder, "_compute_gradients"),
        (nn.Module, "register_forward_hook"),
        (torch.Tensor, "register_hook"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    assert run(tmp_path / "r", **HALF) == 0
    assert not (tmp_path / "r/overflow.jsonl").exists()
    assert not (tmp_path / "r/overflow").exists()


# --- what it finds


def dense_unet() -> nn.Module:
    return DenseUNet(1, 2, base_channels=2, strides=[[2, 2, 2]], num_dense_layers=1, growth_rate=4,
                     seed=0)  # fmt: skip


def overflow_of(folder, network=None, given=None, mode="float32", **kwargs) -> dict:
    """The line of a trainer's only step."""
    precision = in_mode(mode, init_scale=kwargs.pop("scale", 1024.0))
    given = batch(0) if given is None else given
    (line,), _ = record(folder, precision, network, [given], **kwargs)
    return line


def place_of(line: dict) -> tuple[str, str]:
    return line["stage"], line["first_module"]


def test_overflow_has_each_modules_largest_finite_activation(tmp_path):
    """Batch norm leaves nothing finite of a poisoned batch."""
    network, group = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)), [batch(0), batch(1)]
    with torch.no_grad():
        outputs = [network[0](one["image"]) for one in group]
        normalized = network[1](outputs[0])
    group[1]["image"][:, 0, 0, 0, 0] = math.inf
    outputs[1][:, :, 0, 0, 0] = 0
    (line,), _ = record(tmp_path, in_mode("float32"), network, group, accumulation=2)
    found = line["max_abs_activation"]
    assert found == pytest.approx(
        {"0": torch.cat(outputs).abs().max().item(), "1": normalized.abs().max().item()}
    )


@pytest.mark.parametrize("name", ["encoders.0.conv2", "bottleneck.0.conv1", "head"])
def test_overflow_names_the_module_that_left_the_range(tmp_path, name):
    network = dense_unet()
    with torch.no_grad():
        network.get_submodule(name).weight.fill_(6e4)
    line = overflow_of(tmp_path, network, mode="float16")
    assert place_of(line) == ("forward", name)
    assert line["non_finite_cases"] == ["case_0_0", "case_0_1"]


def test_overflow_names_the_weights_when_they_are_not_finite_themselves(tmp_path):
    network = dense_unet()
    with torch.no_grad():
        network.get_submodule("bottleneck.0.conv1").weight[0] = math.nan
    assert place_of(overflow_of(tmp_path, network)) == ("weights", "bottleneck.0.conv1")


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
    assert "Step 2 skipped: not finite first in None (not replayed)" in caplog.text


def test_full_disk_while_weights_are_kept_stops_training_with_one_line(tmp_path, monkeypatch):
    def full(path, content, flags):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_write", full)
    batches = [batch(0), batch(1, value=math.inf)]
    trainer = make_trainer(in_mode("float32"), batches, train_handlers=[FlightRecorder(tmp_path)])
    with pytest.raises(TrainingStopped, match=r"step_000000002.pt: expected to write \d+ bytes"):
        trainer.run()


def test_record_follows_a_line_that_a_crash_has_torn(tmp_path):
    (tmp_path / "overflow.jsonl").write_text('{"step": 1, "ti')
    trainer = make_trainer(in_mode("float32"), [batch(0), batch(1, value=math.inf)])
    FlightRecorder(tmp_path).attach(trainer)
    trainer.progress.step = 10  # of a run that goes on
    trainer.run()
    first, second = (tmp_path / "overflow.jsonl").read_text().splitlines()
    assert first == '{"step": 1, "ti'
    assert json.loads(second)["stage"] == "input"


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
SAME = ("samples", "case_ids", "origins", "stage", "first_module", "non_finite_cases",
        "max_abs_activation", "loss_scale", "step")  # fmt: skip


def paths(folder: Path) -> dict[str, int]:
    """Everything in a folder, and when it changed."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


# --- --replay_step


@pytest.mark.parametrize("group", [{}, {"batch_size": 1, "accumulation_steps": 2}], ids=str)
def test_replay_step_finds_the_same_and_writes_nothing(poisoned, tmp_path, capfd, group):
    changes = {**POISON, **HALF, **group}
    assert poisoned(tmp_path / "r", **changes) == 0
    (line,) = overflows(tmp_path / "r")
    before = snapshot(tmp_path / "r"), paths(tmp_path / "r")
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
    assert (snapshot(tmp_path / "r"), paths(tmp_path / "r")) == before


def test_replay_of_what_is_not_there_is_one_line(poisoned, tmp_path, capfd):
    assert poisoned(tmp_path / "r", replay_step=3, **POISON) == 2
    assert "output_dir: expected a run directory, found none in" in capfd.readouterr().err
    assert not (tmp_path / "r").exists()
    assert poisoned(tmp_path / "r", **POISON, **HALF) == 0
    for step, changes, message in (
        (4, {}, "replay_step: expected a skipped step whose weights were kept (3), got 4."),
        ("three", {}, "--replay_step: expected the number of a skipped step, got 'three'."),
        (3, {"seed": 1}, "got other values of seed"),
    ):
        capfd.readouterr()
        assert poisoned(tmp_path / "r", **POISON, **HALF, **changes, replay_step=step) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert message in line


# --- the curves


def test_tensorboard_has_the_largest_logit_of_each_step(tmp_path):
    seen = []
    trainer = make_trainer(
        in_mode("float32"), [batch(n) for n in range(4)], accumulation=2,
        train_handlers=[LoggingHandler(tmp_path, make_validator(), log_every=1)],
    )  # fmt: skip
    trainer.add_event_handler(
        IterationEvents.FORWARD_COMPLETED,
        lambda engine: seen.append(engine.state.output["pred"].detach().abs().max().item()),
    )
    trainer.run()
    points = curve(read(tmp_path), "AMP/max_abs_logit")
    assert points == [(n + 1, max(seen[2 * n : 2 * n + 2])) for n in range(2)]


def gradients_of(network: nn.Module, group: list[dict], dtype, scale: float) -> list[torch.Tensor]:
    """Scaled gradients of a group's mean loss, on a copy of the network."""
    network = deepcopy(network).train()
    network.zero_grad()
    for micro_batch in group:
        torch.manual_seed(int(micro_batch["seed"][0]))
        with torch.autocast("cpu", dtype=torch.float16, enabled=dtype == torch.float16):
            loss = SegmentationLoss()(network(micro_batch["image"]), micro_batch["label"])
        (loss * scale / len(group)).backward()
    return [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_tensorboard_has_the_share_of_gradients_that_underflow(tmp_path, accumulation):
    """With a loss scale so small that float16 loses many of them."""
    scale = 2.0**-13
    batches = [batch(n) for n in range(3 * accumulation)]
    handler = LoggingHandler(tmp_path, make_validator(), underflow_every=1)
    trainer = make_trainer(
        half(init_scale=scale), batches, accumulation=accumulation,
        network=batch_norm_network(), train_handlers=[handler],
    )  # fmt: skip
    expected = []

    def measure(engine):
        if (engine.state.iteration - 1) % accumulation:
            return
        step = len(expected)
        group = batches[step * accumulation : (step + 1) * accumulation]
        low = gradients_of(trainer.network, group, torch.float16, scale)
        full = gradients_of(trainer.network, group, torch.float32, 1.0)
        lost = sum(((a == 0) & (b != 0)).sum().item() for a, b in zip(low, full, strict=True))
        expected.append(lost / sum(grad.numel() for grad in full))

    trainer.add_event_handler(Events.ITERATION_STARTED, measure)
    trainer.run()
    points = curve(read(tmp_path), "AMP/underflow_fraction")
    assert [step for step, _ in points] == [1, 2, 3]
    assert [value for _, value in points] == pytest.approx(expected, rel=1e-6)
    assert all(0.02 < value < 0.98 for value in expected)
    assert len(set(expected)) > 1


@pytest.mark.parametrize("changes", [HALF, further({"amp": False})], ids=["float16", "float32"])
def test_measuring_underflow_does_not_change_the_training(run, tmp_path, changes):
    changes = {**changes, "network_def#norm": "batch", "network_def#dropout": 0.3}
    saved = []
    for every in (0, 1):
        out = tmp_path / f"every_{every}"
        group = {"batch_size": 1, "accumulation_steps": 2}
        assert run(out, underflow_every=every, **changes, **group) == 0
        saved.append(load_checkpoint(checkpoints(out / "checkpoints")[-1]))
        saved[-1]["progress"].pop("wall_time_s")
    assert steps_of(read(tmp_path / "every_1"), "AMP/underflow_fraction") == [1, 2, 3, 4]
    assert differing(*saved) == []
