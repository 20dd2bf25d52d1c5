"""A step looked at again: `--replay_step`, and the measurement of underflow."""

from __future__ import annotations

import json
import math
from copy import deepcopy
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
from torch import nn

from pipeline.training import logging_handlers
from pipeline.training.checkpoint import checkpoints, load_checkpoint
from pipeline.training.logging_handlers import TensorBoardHandler
from pipeline.training.loss import SegmentationLoss
from pipeline.training.trainer import MixedPrecisionTrainer, max_abs

HALF = {"amp_dtype": "float16", "precision#init_scale": 1024.0}
POISON = {"numbers": [5], "value": 1e6}  # step 3; finite in float32 only
SAME = ("samples", "case_ids", "origins", "stage", "first_module", "non_finite_cases",
        "max_abs_activation", "loss_scale", "step")  # fmt: skip


def paths(folder: Path) -> dict[str, int]:
    """Everything in a folder, and when it changed."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def printed(capfd) -> dict:
    """What the command printed since the last look: JSON and nothing else."""
    return json.loads(capfd.readouterr().out)


# --- --replay_step


@pytest.mark.parametrize("group", [{}, {"batch_size": 1, "accumulation_steps": 2}], ids=str)
def test_replay_step_finds_the_same_and_writes_nothing(poisoned, tmp_path, capfd, group):
    changes = {**POISON, **HALF, **group}
    assert poisoned(tmp_path / "r", **changes) == 0
    (line,) = overflows(tmp_path / "r")
    before = snapshot(tmp_path / "r"), paths(tmp_path / "r")
    capfd.readouterr()
    assert poisoned(tmp_path / "r", **changes, replay_step=3) == 0
    again = printed(capfd)
    assert (line["stage"], line["first_module"]) == ("forward", "encoders.0.conv1")
    assert {key: again[key] for key in SAME} == {key: line[key] for key in SAME}
    assert (again["recorded_in"], again["replayed_in"]) == ("float16", "float16")
    assert (snapshot(tmp_path / "r"), paths(tmp_path / "r")) == before


def test_replay_step_can_be_done_in_another_precision(poisoned, samples, tmp_path, capfd):
    assert poisoned(tmp_path / "r", **POISON, **HALF) == 0
    capfd.readouterr()
    assert poisoned(tmp_path / "r", **POISON, **{**HALF, "amp": False}, replay_step=3) == 0
    again = printed(capfd)
    assert (again["recorded_in"], again["replayed_in"]) == ("float16", "float32")
    assert (again["stage"], again["first_module"], again["loss_scale"]) == (None, None, 1)
    assert again["case_ids"] == [samples[n]["case_id"] for n in (4, 5)]


WRONG_STEPS = {
    4: "replay_step: expected a skipped step whose weights were kept (3), got 4.",
    -1: "replay_step: expected a skipped step whose weights were kept (3), got -1.",
    "three": "--replay_step: expected the number of a skipped step, got 'three'.",
    3.5: "--replay_step: expected the number of a skipped step, got 3.5.",
    True: "--replay_step: expected the number of a skipped step, got True.",
}


def test_replay_step_of_a_wrong_number_is_one_line(poisoned, tmp_path, capfd):
    assert poisoned(tmp_path / "r", **POISON, **HALF) == 0
    before = snapshot(tmp_path / "r")
    for step, message in WRONG_STEPS.items():
        capfd.readouterr()
        assert poisoned(tmp_path / "r", **POISON, **HALF, replay_step=step) == 2, step
        error = capfd.readouterr().err
        assert error.startswith(message)
        assert error.count("\n") == 1
    assert snapshot(tmp_path / "r") == before


def test_replay_step_null_does_not_train(run, tmp_path):
    assert run(tmp_path / "r", replay_step=None) == 2
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overflow_keep": 0}, "weights were kept (there is none), got 3."),
        ({"seed": 1}, "got other values of seed"),
        ({"output_dir": "elsewhere"}, "output_dir: expected a run directory, found none in"),
        ({"dataset_dir": "elsewhere"}, "dataset_dir: expected a folder with dataset.json"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_replay_step_of_another_run_is_one_line(poisoned, tmp_path, capfd, changes, message):
    keep = {"overflow_keep": changes.get("overflow_keep", 5)}
    assert poisoned(tmp_path / "r", **POISON, **HALF, **keep) == 0
    before = snapshot(tmp_path / "r")
    capfd.readouterr()
    moved = {k: str(tmp_path / v) if v == "elsewhere" else v for k, v in changes.items()}
    place = Path(moved.pop("output_dir", tmp_path / "r"))
    assert poisoned(place, **POISON, **HALF, **moved, replay_step=3) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert snapshot(tmp_path / "r") == before
    assert not (tmp_path / "elsewhere").exists()


# --- the curves


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_tensorboard_has_the_largest_logit_of_each_step(run, tmp_path, monkeypatch, dtype):
    seen = []
    forward = MixedPrecisionTrainer._forward

    def spy(self, images, labels, network, output, *rest):
        loss = forward(self, images, labels, network, output, *rest)
        seen.append(max(level.detach().abs().max().item() for level in output["pred"]))
        return loss

    monkeypatch.setattr(MixedPrecisionTrainer, "_forward", spy)
    changes = {"network_def#deep_supervision": True, "network_def#strides": [[2, 2, 2]] * 3}
    assert run(tmp_path / "r", accumulation_steps=2, amp_dtype=dtype, **changes) == 0
    assert len(seen) == 8
    points = curve(read(tmp_path / "r"), "AMP/max_abs_logit")
    assert points == [(n + 1, max(seen[2 * n : 2 * n + 2])) for n in range(4)]


@pytest.mark.parametrize(
    ("logits", "largest"),
    [
        (torch.tensor([1.0, -7.0, 3.0]), 7.0),
        (torch.tensor([6e4, -1.0], dtype=torch.float16), 6e4),
        ([torch.tensor([1.0]), torch.tensor([2.0, -9.0]), torch.tensor([3.0])], 9.0),
        ([torch.tensor([1.0]), torch.tensor([math.nan])], math.nan),
        (torch.tensor([1.0, -math.inf]), math.inf),
    ],
)
def test_max_abs_is_the_largest_of_all_levels(logits, largest):
    found = max_abs(logits)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(largest, nan_ok=True)


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
    handler = TensorBoardHandler(tmp_path, make_validator(), underflow_every=1)
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


def test_underflow_counts_what_float32_has_in_any_micro_batch(tmp_path):
    """Of four channels one never lives, and one in the first micro-batch only; all is lost."""
    network = nn.Sequential(nn.Conv3d(1, 4, 1), nn.ReLU(), nn.Conv3d(4, 2, 1))
    with torch.no_grad():
        network[0].weight.fill_(1.0)
        network[0].bias.copy_(torch.tensor([0.1, -1000.0, -10.0, 0.2]))
    bright, plain = batch(0), batch(1)
    bright["image"] *= 10
    handler = TensorBoardHandler(tmp_path, make_validator(), underflow_every=1)
    make_trainer(
        half(init_scale=2.0**-60), [bright, plain], accumulation=2, network=network,
        train_handlers=[handler],
    ).run()  # fmt: skip
    # weight and bias of the dead channel, and the two weights that lead from it
    expected = (18 - 4) / 18
    ((_, value),) = curve(read(tmp_path), "AMP/underflow_fraction")
    assert value == pytest.approx(expected)


def test_underflow_is_zero_in_float32(tmp_path):
    handler = TensorBoardHandler(tmp_path, make_validator(), underflow_every=1)
    trainer = make_trainer(in_mode("float32"), [batch(0), batch(1)], train_handlers=[handler])
    trainer.run()
    assert curve(read(tmp_path), "AMP/underflow_fraction") == [(1, 0), (2, 0)]


@pytest.mark.parametrize(
    ("every", "steps"), [(None, None), (1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3])]
)
def test_underflow_is_measured_every_so_many_steps(run, tmp_path, every, steps):
    changes = {} if every is None else {"underflow_every": every, "log_every": 4}
    assert run(tmp_path / "r", amp=False, **changes) == 0
    events = read(tmp_path / "r")
    if steps is None:
        assert "AMP/underflow_fraction" not in events.Tags()["scalars"]
    else:
        assert steps_of(events, "AMP/underflow_fraction") == steps


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


def test_underflow_is_measured_when_a_layer_is_frozen(tmp_path):
    network = batch_norm_network()
    network[0].requires_grad_(False)
    handler = TensorBoardHandler(tmp_path, make_validator(), underflow_every=1)
    trainer = make_trainer(
        in_mode("float32"), [batch(0)], network=network, train_handlers=[handler]
    )
    trainer.run()
    assert curve(read(tmp_path), "AMP/underflow_fraction") == [(1, 0)]


def test_measuring_underflow_of_a_step_that_is_skipped_changes_nothing(tmp_path):
    def train(handlers):
        batches = [batch(0), batch(1, value=math.nan), batch(2)]
        trainer = make_trainer(
            half(init_scale=1024.0), batches, network=batch_norm_network(), train_handlers=handlers
        )
        trainer.run()
        return trainer

    measured = train([TensorBoardHandler(tmp_path, make_validator(), underflow_every=1)])
    assert measured.progress.skipped_steps == 1
    assert differing(state_of(measured), state_of(train([]))) == []


def test_underflow_is_not_measured_where_there_is_no_memory_for_it(tmp_path, monkeypatch, caplog):
    def no_room(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(logging_handlers, "underflow_fraction", no_room)
    handler = TensorBoardHandler(tmp_path, make_validator(), underflow_every=1)
    trainer = make_trainer(half(), [batch(0), batch(1)], train_handlers=[handler])
    trainer.run()
    assert trainer.progress.step == 2
    assert "Step 2: no memory to measure underflow" in caplog.text
    assert "AMP/underflow_fraction" not in read(tmp_path).Tags()["scalars"]
