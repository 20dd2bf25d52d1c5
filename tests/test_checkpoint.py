"""Checkpoints: what they hold, how they reach the disk, and that a resumed run is the same run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from pipeline.errors import InputError
from pipeline.training import checkpoint
from pipeline.training.checkpoint import checkpoints, load_checkpoint, save_atomically
from pipeline.training.progress import SCHEMA_VERSION, Progress

HALF = {"amp_dtype": "float16"}


def newest(run_dir: Path) -> dict:
    return load_checkpoint(checkpoints(run_dir / "checkpoints")[-1])


def digest(state: dict[str, torch.Tensor]) -> str:
    value = hashlib.sha256()
    for name in sorted(state):
        value.update(name.encode() + state[name].numpy().tobytes())
    return value.hexdigest()


class KilledError(Exception):
    """Stands for a kill: nothing after it runs."""


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch):
    """Let the process die when the `n`-th checkpoint has been written."""

    def arrange(n: int) -> None:
        save = checkpoint.CheckpointHandler.save
        written = []

        def save_then_die(self, trainer):
            save(self, trainer)
            written.append(1)
            if len(written) == n:
                monkeypatch.setattr(checkpoint.CheckpointHandler, "save", save)
                raise KilledError

        monkeypatch.setattr(checkpoint.CheckpointHandler, "save", save_then_die)

    return arrange


def run_and_die(run, run_dir: Path, **changes) -> None:
    with pytest.raises(RuntimeError) as error:
        run(run_dir, **changes)
    assert isinstance(error.value.__cause__, KilledError)


# --- content


def test_checkpoint_holds_everything_when_float16(run, tmp_path):
    assert run(tmp_path / "r", **HALF) == 0
    content = newest(tmp_path / "r")
    assert content.keys() == {
        "schema_version", "progress", "network", "optimizer", "lr_scheduler", "scaler"
    }  # fmt: skip
    assert content["schema_version"] == SCHEMA_VERSION
    assert content["scaler"]["scale"] > 0
    assert content["progress"]["mode"] == "float16"
    assert (content["progress"]["step"], content["progress"]["samples"]) == (4, 8)
    assert content["lr_scheduler"]["last_epoch"] == 4 - content["progress"]["skipped_steps"]
    assert all("module." not in name and "_orig_mod." not in name for name in content["network"])


def test_checkpoint_has_no_scaler_when_amp_is_false(run, tmp_path):
    assert run(tmp_path / "r", amp=False) == 0
    assert newest(tmp_path / "r")["scaler"] is None


def test_models_are_plain_state_dicts(run, tmp_path):
    assert run(tmp_path / "r") == 0
    last = torch.load(tmp_path / "r/models/last.pt", weights_only=True)
    assert digest(last) == digest(newest(tmp_path / "r")["network"])
    best = torch.load(tmp_path / "r/models/model.pt", weights_only=True)
    assert best.keys() == last.keys()


def test_two_newest_checkpoints_are_kept(run, tmp_path):
    assert run(tmp_path / "r", max_epochs=4) == 0
    names = [path.name for path in checkpoints(tmp_path / "r/checkpoints")]
    assert names == ["step_000000006.pt", "step_000000008.pt"]


# --- resume


@pytest.mark.parametrize("mode", [{"amp": False}, HALF], ids=["float32", "float16"])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_continued_run_has_the_same_weights(run, tmp_path, killed_at, mode, after):
    """Checkpoints are written twice per epoch: before and after its validation."""
    changes = {**mode, "max_epochs": 3, "network_def#dropout": 0.2}
    assert run(tmp_path / "whole", **changes) == 0
    killed_at(after)
    run_and_die(run, tmp_path / "parts", **changes)
    assert run(tmp_path / "parts", **changes) == 0
    whole, parts = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert digest(whole["network"]) == digest(parts["network"])
    assert whole["scaler"] == parts["scaler"]
    assert whole["lr_scheduler"]["last_epoch"] == parts["lr_scheduler"]["last_epoch"]
    for record in (whole, parts):
        record["progress"].pop("wall_time_s")
    assert whole["progress"] == parts["progress"]


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


def test_scaler_state_is_restored(run, tmp_path, killed_at):
    killed_at(2)
    run_and_die(run, tmp_path / "r", **HALF)
    path = checkpoints(tmp_path / "r/checkpoints")[-1]
    content = load_checkpoint(path)
    content["scaler"]["scale"] = 128.0
    save_atomically(content, path)
    assert run(tmp_path / "r", **HALF) == 0
    assert newest(tmp_path / "r")["scaler"]["scale"] == 128.0


def test_absent_scaler_state_loads_and_is_said(run, tmp_path, killed_at):
    killed_at(2)
    run_and_die(run, tmp_path / "r", amp=False)
    assert run(tmp_path / "r", **HALF) == 0
    assert "no scaler state (trained in float32)" in (tmp_path / "r/log.txt").read_text()
    assert newest(tmp_path / "r")["scaler"] is not None


def test_unused_scaler_state_is_said(run, tmp_path, killed_at):
    killed_at(2)
    run_and_die(run, tmp_path / "r", **HALF)
    assert run(tmp_path / "r", amp=False) == 0
    assert "scaler state is not used" in (tmp_path / "r/log.txt").read_text()


def test_broken_checkpoint_is_one_line(tmp_path):
    path = tmp_path / "step_000000001.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"step_000000001.pt: expected a checkpoint"):
        load_checkpoint(path)


def test_checkpoint_of_another_schema_is_refused(tmp_path):
    path = tmp_path / "step_000000001.pt"
    save_atomically({"schema_version": 99}, path)
    with pytest.raises(InputError, match="expected checkpoint schema version 1, got 99"):
        load_checkpoint(path)


# --- the disk


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    save_atomically({"a": torch.ones(1)}, path)

    def write_half(content, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match="no space"):
        save_atomically({"a": torch.zeros(1)}, path)
    assert torch.load(path, weights_only=True)["a"].item() == 1


# --- the record


def test_progress_never_takes_nan_for_the_best():
    progress = Progress()
    assert not progress.record_metric(float("nan"))
    assert progress.record_metric(0.5)
    assert not progress.record_metric(float("nan"))
    assert not progress.record_metric(float("inf"))
    assert not progress.record_metric(0.4)
    assert (progress.best_metric, progress.last_metric) == (0.5, 0.4)


def test_progress_of_another_schema_is_refused():
    with pytest.raises(ValueError, match="expected schema version 1, got 0"):
        Progress().load_state_dict({"schema_version": 0})


def test_worse_epoch_after_resuming_does_not_replace_the_best(run, tmp_path, killed_at):
    killed_at(2)
    run_and_die(run, tmp_path / "r")
    path = checkpoints(tmp_path / "r/checkpoints")[-1]
    content = load_checkpoint(path)
    content["progress"]["best_metric"] = 2.0  # no epoch can be better
    save_atomically(content, path)
    before = (tmp_path / "r/models/model.pt").read_bytes()
    assert run(tmp_path / "r") == 0
    assert (tmp_path / "r/models/model.pt").read_bytes() == before
    assert json.loads((tmp_path / "r/summary.json").read_text())["best_epoch"] == 1
