"""A run that ends itself before it does damage, and says why."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY
from engines import curve, differing, overflows, read, strict_json
from forked import monai_bundle

from pipeline.errors import TrainingStopped
from pipeline.training.checkpoint import checkpoints, load_checkpoint, non_finite
from pipeline.training.flight_recorder import diagnosis
from pipeline.training.trainer import MixedPrecisionTrainer

LATE = range(4, 16)  # every sample after step 2, which ends the first epoch
HALF = {"amp_dtype": "float16", "precision#init_scale": 1024.0}


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that ran."""
    seen = []
    run = MixedPrecisionTrainer.run
    monkeypatch.setattr(MixedPrecisionTrainer, "run", lambda self: (seen.append(self), run(self)))
    return seen


def stop(start, *args, **changes) -> str:
    """Run until it ends itself; the diagnosis."""
    with pytest.raises(SystemExit) as exit:
        start(*args, **changes)
    assert isinstance(exit.value, TrainingStopped)
    assert exit.value.code == 1
    return str(exit.value)


def files_of(run_dir: Path) -> dict[str, dict]:
    return {path.name: torch.load(path, weights_only=True) for path in run_dir.rglob("*.pt")}


# --- skipped steps in a row


@pytest.mark.parametrize(
    ("changes", "value"),
    [({"amp": False}, math.nan), (HALF, math.inf)],
    ids=["float32-nan", "float16-inf"],
)
def test_run_stops_after_max_consecutive_skips(
    poisoned, samples, trainers, tmp_path, capfd, changes, value
):
    run_dir = tmp_path / "r"
    told = stop(
        poisoned, run_dir, LATE, value=value, max_epochs=4, max_consecutive_skips=3, **changes
    )
    lines = told.splitlines()
    assert lines[0].startswith("step 5: expected finite loss and gradients, got 3 skipped steps")
    assert lines[1] == "  first module not finite: image (input, 3x)"
    cases = [samples[n]["case_id"] for n in range(4, 10)]
    assert lines[2].startswith("  cases: ")
    assert all(f"{case} ({cases.count(case)}x)" in lines[2] for case in cases)
    assert lines[3].startswith("  what to try: The network's input is not finite")

    assert told in capfd.readouterr().out
    assert told in (run_dir / "log.txt").read_text()
    assert "Traceback" not in (run_dir / "log.txt").read_text()
    assert [line["step"] for line in overflows(run_dir)] == [3, 4, 5]
    assert curve(read(run_dir), "weight_update/skipped_steps") == [
        (1, 0),
        (2, 0),
        (3, 1),
        (4, 2),
        (5, 3),
    ]

    files = files_of(run_dir)
    assert {"step_000000002.pt", "step_000000004.pt", "model.pt"} <= set(files)
    assert non_finite(files) == []
    good = files["step_000000002.pt"]
    (trainer,) = trainers
    assert differing(trainer.network.state_dict(), good["network"]) == []
    assert differing(trainer.optimizer.state_dict(), good["optimizer"]) == []
    assert not (run_dir / "summary.json").exists()
    assert not (run_dir / "models/last.pt").exists()


# --- the loss scale


def test_run_stops_when_the_loss_scale_falls_below_one(poisoned, tmp_path):
    changes = {"amp_dtype": "float16", "precision#init_scale": 4.0}
    told = stop(poisoned, tmp_path / "r", None, value=1e6, **changes)
    assert "step 3: expected finite" in told
    assert "got 3 skipped steps in a row and a loss scale of 0.5." in told
    assert "first module not finite: encoders.0.conv1 (forward, 3x)" in told
    assert "amp_dtype=bfloat16 or amp=false" in told
    assert [line["loss_scale"] for line in overflows(tmp_path / "r")] == [4, 2, 1]


# --- what follows


@pytest.mark.parametrize(
    ("skips", "kept"), [(2, (2, 0)), (3, (4, 2))], ids=["at an epoch's end", "within an epoch"]
)
def test_stopped_run_goes_on_as_the_diagnosis_advises(poisoned, tmp_path, skips, kept):
    """1e6 is out of float16's range, and not of float32's."""
    changes = {"value": 1e6, "max_epochs": 4, "max_consecutive_skips": skips}
    stop(poisoned, tmp_path / "r", LATE, **changes, **HALF)
    before = load_checkpoint(checkpoints(tmp_path / "r/checkpoints")[-1])["progress"]
    assert (before["step"], before["skipped_steps"]) == kept
    assert poisoned(tmp_path / "r", LATE, **changes, **{**HALF, "amp": False}) == 0
    summary = strict_json((tmp_path / "r/summary.json").read_text())
    assert (summary["steps"], summary["skipped_steps"]) == (8, kept[1])


def test_monai_bundle_run_stops_with_status_1_and_no_traceback(dataset, tmp_path):
    overlay = {"train#augment#_target_": "poison.PoisonedAugment"}
    (tmp_path / "poisoned.json").write_text(json.dumps(overlay))
    values = {"dataset_dir": str(dataset), "output_dir": str(tmp_path / "r"), **TINY,
              "amp": False, "max_consecutive_skips": 2}  # fmt: skip
    words = [
        w
        for key, value in values.items()
        for w in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]
    files = str(["configs/amp.json", str(tmp_path / "poisoned.json")])
    done = monai_bundle("--config_file", files, *words)
    assert done.returncode == 1, done.stderr
    assert (
        "step 2: expected finite loss and gradients, got 2 skipped steps in a row." in done.stdout
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert curve(read(tmp_path / "r"), "weight_update/skipped_steps") == [(1, 1), (2, 2)]


# --- the diagnosis


def skipped(step: int, stage: str | None, module: str | None, cases=(), group=("a", "b")) -> dict:
    return {
        "step": step, "precision": "float16", "stage": stage, "first_module": module,
        "non_finite_cases": list(cases), "case_ids": list(group),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "advice"),
    [
        ("input", "mend them or leave the cases out"),
        ("forward", "An activation left the range of float16: "),
        ("loss", "look at the cases' labels"),
        ("backward", "Only gradients left the range"),
        (None, "Run again, the step was finite"),
    ],
)
def test_diagnosis_advises_by_the_stage_that_came_up_most(stage, advice):
    others = [skipped(1, "forward" if stage == "input" else "input", "x", ["c"])]
    told = diagnosis([*others, skipped(2, stage, "m"), skipped(3, stage, "m")], 1.0, 3)
    assert advice in told.splitlines()[3]
    assert "step 3" in told
    assert f"m ({stage or 'finite'}, 2x)" in told


# --- a metric that is NaN


def undefined(run, run_dir: Path, validations: list[int]) -> None:
    """A run whose metric is NaN at the validations of these numbers."""
    overlay = {
        "validate#key_metric#mean_dice#_target_": "poison.UndefinedDice",
        "validate#key_metric#mean_dice#undefined_at": validations,
    }
    file = run_dir.with_suffix(".json")
    file.write_text(json.dumps(overlay))
    assert run(run_dir, str(file), amp=False, allow="poison.UndefinedDice") == 0


@pytest.mark.parametrize(
    ("validations", "best_epoch", "best_file"),
    [([1], 2, "step_000000004.pt"), ([2], 1, "step_000000002.pt"), ([1, 2], None, None)],
)
def test_nan_metric_never_becomes_the_best(
    run, tmp_path, capfd, validations, best_epoch, best_file
):
    undefined(run, tmp_path / "r", validations)
    summary = strict_json((tmp_path / "r/summary.json").read_text())
    assert summary["best_epoch"] == best_epoch
    assert (summary["best_mean_dice"] is None) is (best_epoch is None)
    assert (summary["last_mean_dice"] is None) is (2 in validations)
    assert summary["progress"]["last_metric"] == summary["last_mean_dice"]
    files = files_of(tmp_path / "r")
    assert ("model.pt" in files) is (best_file is not None)
    if best_file:
        assert differing(files["model.pt"], files[best_file]["network"]) == []
    assert non_finite(files) == []
    for path in (tmp_path / "r").rglob("*.json"):
        strict_json(path.read_text())
    said = capfd.readouterr().out.count("The validation metric is nan; it is not counted")
    assert said == len(validations)
