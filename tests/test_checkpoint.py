"""Checkpoints: what they hold, how they reach the disk, and that a resumed run is the same run."""

from __future__ import annotations

import copy
import errno
import functools
import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import finished_run, further
from engines import batch, curve, in_mode, make_trainer, make_validator, read, snapshot
from ignite.engine import Events

from pipeline import files
from pipeline.errors import InputError, TrainingInterrupted, TrainingStopped
from pipeline.files import save
from pipeline.training import checkpoint
from pipeline.training.checkpoint import (
    CheckpointHandler,
    checkpoints,
    load_checkpoint,
    non_finite,
)
from pipeline.training.progress import SCHEMA_VERSION
from pipeline.training.trainer import StepEvents

HALF = {"amp_dtype": "float16"}


def newest(run_dir: Path) -> dict:
    return load_checkpoint(checkpoints(run_dir / "checkpoints")[-1])


def digest(state: dict[str, torch.Tensor]) -> str:
    value = hashlib.sha256()
    for name in sorted(state):
        value.update(name.encode() + state[name].numpy().tobytes())
    return value.hexdigest()


class KilledError(BaseException):
    """Stands for a kill: nothing after it runs."""


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch):
    """Let the process die when the `n`-th checkpoint has been written."""

    def arrange(n: int) -> None:
        save = checkpoint.CheckpointHandler._save_checkpoint
        written = []

        def save_then_die(self, *args):
            save(self, *args)
            written.append(1)
            if len(written) == n:
                monkeypatch.setattr(checkpoint.CheckpointHandler, "_save_checkpoint", save)
                raise KilledError

        monkeypatch.setattr(checkpoint.CheckpointHandler, "_save_checkpoint", save_then_die)

    return arrange


def run_and_die(run, run_dir: Path, **changes) -> None:
    with pytest.raises(KilledError):
        run(run_dir, **changes)


# --- content


def test_checkpoint_holds_everything_when_float16(run, tmp_path):
    assert run(tmp_path / "r", **HALF) == 0
    content = newest(tmp_path / "r")
    assert content.keys() == {
        "schema_version", "progress", "network", "optimizer", "lr_scheduler", "scaler",
    }  # fmt: skip
    assert content["schema_version"] == SCHEMA_VERSION
    assert content["scaler"]["scale"] > 0
    assert content["progress"]["mode"] == "float16"
    assert (content["progress"]["step"], content["progress"]["samples"]) == (4, 8)
    assert content["lr_scheduler"]["last_epoch"] == 4 - content["progress"]["skipped_steps"]
    assert all("module." not in name and "_orig_mod." not in name for name in content["network"])


# --- resume


CONTINUED = {"max_epochs": 3, "network_def#dropout": 0.2}
MODES = {"float32": {"amp": False}, "float16": HALF}


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """The last checkpoint of a run that nothing happened to, in a mode."""

    @functools.cache
    def made(mode: str) -> dict:
        out = tmp_path_factory.mktemp("whole") / "r"
        return newest(finished_run(dataset, out, **CONTINUED, **MODES[mode]))

    return made


@pytest.mark.parametrize(
    ("mode", "after"),
    [*(further("float32", n) for n in (1, 3, 5)), ("float32", 2), ("float32", 4), ("float16", 3)],
)
def test_continued_run_has_the_same_weights(run, tmp_path, killed_at, whole, mode, after):
    """Checkpoints are written twice per epoch: before and after its validation."""
    changes = {**CONTINUED, **MODES[mode]}
    expected = copy.deepcopy(whole(mode))
    killed_at(after)
    run_and_die(run, tmp_path / "parts", **changes)
    assert run(tmp_path / "parts", **changes) == 0
    parts = newest(tmp_path / "parts")
    assert digest(expected["network"]) == digest(parts["network"])
    assert expected["scaler"] == parts["scaler"]
    assert expected["lr_scheduler"]["last_epoch"] == parts["lr_scheduler"]["last_epoch"]
    for record in (expected, parts):
        record["progress"].pop("wall_time_s")
    assert expected["progress"] == parts["progress"]


def test_lost_validation_is_done_after_resuming(run, tmp_path, killed_at):
    killed_at(1)  # the checkpoint of the first epoch's last step, before its validation
    run_and_die(run, tmp_path / "r")
    assert newest(tmp_path / "r")["progress"]["phase"] == "epoch_end_pending"
    assert newest(tmp_path / "r")["progress"]["last_metric"] is None
    assert not (tmp_path / "r/models/model.pt").exists()
    assert run(tmp_path / "r", max_epochs=1) == 0
    assert newest(tmp_path / "r")["progress"]["last_metric"] is not None
    assert (tmp_path / "r/models/model.pt").exists()
    assert newest(tmp_path / "r")["progress"]["step"] == 2


def test_run_killed_before_its_summary_finalises_without_training(run, tmp_path, monkeypatch):
    assert run(tmp_path / "r") == 0
    (tmp_path / "r/summary.json").unlink()
    before = digest(newest(tmp_path / "r")["network"])
    monkeypatch.setattr(
        "pipeline.training.trainer.MixedPrecisionTrainer._iteration",
        lambda *_: pytest.fail("trained again"),
    )
    assert run(tmp_path / "r") == 0
    assert json.loads((tmp_path / "r/summary.json").read_text())["progress"]["phase"] == "done"
    assert digest(newest(tmp_path / "r")["network"]) == before


@pytest.mark.parametrize(
    ("before", "after"), [({"amp": False}, HALF), (HALF, {"amp": False})], ids=["absent", "unused"]
)
def test_scaler_state_that_does_not_fit_is_said(run, tmp_path, killed_at, before, after):
    killed_at(2)
    run_and_die(run, tmp_path / "r", **before)
    assert run(tmp_path / "r", **after) == 0
    assert "the checkpoint's loss scale (trained in float" in (tmp_path / "r/log.txt").read_text()
    assert (newest(tmp_path / "r")["scaler"] is None) is (after is not HALF)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a checkpoint, got: "),
        ({"schema_version": 99}, "expected checkpoint schema version 1, got 99"),
    ],
)
def test_file_that_is_no_checkpoint_of_this_version_is_one_line(tmp_path, content, message):
    path = tmp_path / "step_000000001.pt"
    path.write_bytes(b"not a checkpoint") if content is None else save(content, path)
    with pytest.raises(InputError, match=rf"step_000000001.pt: {message}"):
        load_checkpoint(path)


def test_continued_run_takes_the_learning_rate_and_weight_decay_of_its_config(run, tmp_path):
    def rates(folder):
        return curve(read(folder), "weight_update/lr")

    assert run(tmp_path / "r", max_epochs=1, learning_rate=0.1, weight_decay=0.1) == 0
    assert run(tmp_path / "r", max_epochs=3, learning_rate=0.001, weight_decay=0.2) == 0
    assert run(tmp_path / "whole", max_epochs=3, learning_rate=0.001) == 0
    assert rates(tmp_path / "r")[2:] == rates(tmp_path / "whole")[2:]
    assert newest(tmp_path / "r")["optimizer"]["param_groups"][0]["weight_decay"] == 0.2


# --- nothing that is not finite


@pytest.mark.parametrize(
    ("part", "find"),
    [
        ("network.3.bias", lambda trainer: trainer.network.state_dict()["3.bias"]),
        ("optimizer.state.0.exp_avg", lambda t: t.optimizer.state_dict()["state"][0]["exp_avg"]),
    ],
)
@pytest.mark.parametrize("epochs", [2, 3], ids=["last epoch", "before"])
def test_non_finite_value_is_never_written(tmp_path, part, find, epochs):
    """At the end of the second epoch's last step, before the checkpoint handler."""
    before = {}

    def damage(trainer):
        if trainer.progress.step == 4:
            find(trainer).view(-1)[0] = math.nan
            before.update(snapshot(tmp_path))

    trainer = make_trainer(
        in_mode("float32"), [batch(0), batch(1)], epochs=epochs, optimizer=torch.optim.AdamW
    )
    trainer.add_event_handler(StepEvents.STEP_COMPLETED, damage)
    CheckpointHandler(tmp_path, make_validator()).attach(trainer)
    with pytest.raises(TrainingStopped) as stopped:
        trainer.run()
    assert stopped.value.code == 1
    message = "step_000000004_pending.pt: expected finite values, got NaN or infinity in "
    assert str(stopped.value).startswith(f"{message}{part}. Training stops")
    after = {path: data for path, data in snapshot(tmp_path).items() if "models" not in path}
    assert after == {path: data for path, data in before.items() if "models" not in path}
    assert "checkpoints/step_000000002.pt" in before


def test_non_finite_names_every_place_in_nested_content():
    bad = {
        "network": {"head.weight": torch.tensor([[0.0, math.nan], [1.0, 2.0]])},
        "param_groups": [{"lr": 0.1}, {"lr": 10**400, "betas": (0.9, math.nan)}],
        "scaler": {"scale": math.inf, "steps": torch.tensor([2**62]), "mode": "nan"},
    }
    assert non_finite(bad) == ["network.head.weight", "param_groups.1.betas.1", "scaler.scale"]


# --- interruption


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("moment", ["before the checkpoint handler", "after it"])
def test_interrupted_trainer_ends_at_a_step_that_is_saved(tmp_path, moment, step):
    """A signal comes whenever it likes: what is saved last is where training ends."""
    trainer = make_trainer(in_mode("float32"), [batch(n) for n in range(4)], epochs=2)
    handler = CheckpointHandler(tmp_path, make_validator(), every=100)

    def interrupt(engine):
        if engine.progress.step == step:
            engine.interrupt()

    if moment == "after it":
        handler.attach(trainer)
    trainer.add_event_handler(StepEvents.STEP_COMPLETED, interrupt)
    if moment == "before the checkpoint handler":
        handler.attach(trainer)
    with pytest.raises(TrainingInterrupted):
        trainer.run()
    assert trainer.progress.step <= step + 1
    assert newest(tmp_path)["progress"]["step"] == trainer.progress.step


def test_trainer_interrupted_in_validation_ends_with_its_epoch(tmp_path):
    trainer = make_trainer(in_mode("float32"), [batch(0), batch(1)], epochs=3)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda engine: engine.interrupt())
    CheckpointHandler(tmp_path, make_validator(), every=100).attach(trainer)
    with pytest.raises(TrainingInterrupted):
        trainer.run()
    assert trainer.progress.step == 4
    assert newest(tmp_path)["progress"]["phase"] == "stepping"


# --- what else may go wrong around a run


@pytest.mark.parametrize(
    ("name", "status"),
    [("run.json", 2), ("train.json", 2), ("validation.json", 1), ("summary.json", 1)],
)
def test_full_disk_at_any_file_is_told_in_one_line(run, tmp_path, monkeypatch, capfd, name, status):
    write = files._write

    def full(path, content, flags):
        if path.name == f"{name}.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content, flags)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write", full)
        with pytest.raises(SystemExit) as ended:
            run(tmp_path / "r")
    assert ended.value.code == status
    said = capfd.readouterr()
    assert f"{name}: expected to write" in said.out + said.err
    assert "Traceback" not in said.out + said.err
    assert run(tmp_path / "r") == 0
    assert (tmp_path / "r/models/last.pt").exists()


def test_what_cut_off_writes_left_is_removed(run, tmp_path):
    assert run(tmp_path / "r", max_epochs=1) == 0
    for folder in (".", "configs", "models", "checkpoints"):
        (tmp_path / "r" / folder / "step_000000001.pt.tmp").touch()
    assert run(tmp_path / "r") == 0
    assert not list((tmp_path / "r").rglob("*.tmp"))


def test_run_whose_end_was_brought_forward_has_its_last_weights(run, tmp_path, killed_at):
    killed_at(3)  # in the second epoch of four
    run_and_die(run, tmp_path / "r", max_epochs=4)
    assert run(tmp_path / "r", max_epochs=1) == 0
    last = torch.load(tmp_path / "r/models/last.pt", weights_only=True)
    assert digest(last) == digest(newest(tmp_path / "r")["network"])


def test_run_directory_that_was_taken_gets_nothing_more(tmp_path):
    holder = []
    trainer = make_trainer(in_mode("float32"), [batch(n) for n in range(4)])
    handler = CheckpointHandler(
        tmp_path, make_validator(), every=1, lost=lambda: holder[0] if holder else None
    )
    handler.attach(trainer)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=2), lambda engine: holder.append("process 7 on elsewhere")
    )
    with pytest.raises(TrainingStopped, match="process 7 on elsewhere has taken it over"):
        trainer.run()
    assert newest(tmp_path)["progress"]["step"] == 2
