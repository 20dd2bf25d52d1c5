"""A run that is asked to end early ends properly, at a step that is decided once."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import finished_run
from engines import batch, curve, in_mode, make_trainer, read
from in_ranks import in_ranks
from test_checkpoint import digest, killed_at, newest, run_and_die  # noqa: F401 (a fixture)

from pipeline.commands.stop import main
from pipeline.training.early_end import STOP_FILE, EarlyEnd, EarlyEnding

LONG = {"max_epochs": 3, "steps_per_epoch": 4, "checkpoint_every": 1, "learning_rate": 0.01}


@pytest.mark.parametrize(
    ("step", "epoch"), [(1, 1), (5, 1), (6, 2), (10, 2), (11, 2), (15, 2), (16, 3), (30, 3)]
)
def test_early_end_is_that_of_an_epoch_of_which_half_is_left(step, epoch):
    """Of 3 epochs of 10 steps; 1 to 5 leave half of the first epoch or more."""
    assert EarlyEnd.decide(step, 10, 3) == EarlyEnd(step, epoch, 3)


@pytest.fixture
def asked(monkeypatch):
    """Ask the run in a directory to end when it takes step `step`, in one of two ways."""

    def arrange(run_dir: Path, step: int, way: str) -> None:
        is_asked, steps = EarlyEnding.is_asked, []

        def ask(self: EarlyEnding) -> bool:
            steps.append(1)
            if len(steps) == step and way == "command":
                assert main([str(run_dir)]) == 0
            elif len(steps) == step:
                os.kill(os.getpid(), signal.SIGUSR2)
            return is_asked(self)

        monkeypatch.setattr(EarlyEnding, "is_asked", ask)

    return arrange


@pytest.mark.parametrize("way", ["command", "signal"])
def test_stopped_run_ends_properly_and_goes_on_when_raised(train, tmp_path, asked, capfd, way):
    run_dir = tmp_path / "r"
    asked(run_dir, 3, way)
    status, told = train(run_dir, **LONG, report=True, final_scores=True)
    assert status == 0, told
    if way == "command":
        assert f"process {os.getpid()} on " in told
        assert "ends the run with this epoch or the next" in told
    assert "Asked to end early at step 3: epoch 2 of 3 is the last one" in told
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["epochs"], summary["steps"]) == (2, 8)
    assert (run_dir / "report/index.html").is_file()
    assert (run_dir / "scores/validation_last/summary.json").is_file()
    # warm-up over one step, a cosine over the other 11 of 12, and from step 3 to 8 a line on top
    cosine = [1.0] + [0.5 * (1 + math.cos(math.pi * n / 11)) for n in range(7)]
    line = [1.0] * 3 + [(5 - n) / 5 for n in range(5)]
    rates = [0.01 * c * f for c, f in zip(cosine, line, strict=True)]
    assert [rate for _, rate in curve(read(run_dir), "weight_update/lr")] == pytest.approx(
        rates, rel=1e-5
    )

    assert "This run is finished" in train(run_dir, **LONG)[1]
    assert main([str(run_dir)]) == 0
    assert "the run is finished, with 2 epochs" in capfd.readouterr().out
    assert train(run_dir, **{**LONG, "max_epochs": 4})[0] == 0
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 16
    assert not (run_dir / STOP_FILE).exists()


def test_stopped_run_that_is_killed_ends_as_one_that_is_not(run, tmp_path, asked, killed_at):  # noqa: F811
    for name in ("whole", "parts"):
        asked(tmp_path / name, 1, "command")
        if name == "parts":
            killed_at(3)
            run_and_die(run, tmp_path / name, **LONG)
        assert run(tmp_path / name, **LONG) == 0
    whole, parts = (newest(tmp_path / name) for name in ("whole", "parts"))
    assert whole["progress"]["step"] == parts["progress"]["step"] == 4
    assert digest(whole["network"]) == digest(parts["network"])


def end_of_rank(run_dir: Path) -> tuple[int, list[str]]:
    trainer = make_trainer(
        in_mode("float32"), [batch(n) for n in range(4)], epochs=3, run_dir=run_dir
    )
    trainer.run()
    return trainer.progress.step, sorted(path.name for path in run_dir.iterdir())


def test_all_ranks_end_at_the_same_step(tmp_path):
    (tmp_path / STOP_FILE).write_text("{}")
    assert in_ranks(end_of_rank, tmp_path) == [(4, [STOP_FILE])] * 2


def test_stop_answers_in_one_line_where_no_run_is_at_work(dataset, tmp_path, capfd):
    assert main([str(tmp_path)]) == 2
    assert capfd.readouterr().err.startswith("RUN: expected a run directory, got ")
    run_dir = finished_run(dataset, tmp_path / "r", max_epochs=1)
    shutil.copytree(run_dir / "checkpoints", tmp_path / "kept")
    (run_dir / "summary.json").unlink()
    capfd.readouterr()
    assert main([str(run_dir)]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    assert line.endswith("the run ends with this epoch or the next once it is continued.")
    assert json.loads((run_dir / STOP_FILE).read_text()) == {}
