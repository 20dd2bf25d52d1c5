"""Steps by a time budget: the arithmetic, and that it is decided once and leaves no trace."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from pipeline.data.plan import Plan
from pipeline.errors import InputError
from pipeline.lifecycle import lifecycle
from pipeline.lifecycle.time_budget import Costs, fit_time_budget, read_duration

PLAN = Plan((1, 1, 1), False, "zscore", (8, 8, 8), [2], ["a", "b"], 1, 2, warmup_steps=100)
AUTO = dict.fromkeys(("max_epochs", "steps_per_epoch", "warmup_steps"), "auto")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400)]
)
def test_duration_is_read(text, seconds):
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["30", "", "0s", "m", "30m1h", "-5m", "1 day"])
def test_duration_without_unit_is_refused(text):
    with pytest.raises(InputError, match="units, such as 90s, 30m, 2h or 1h30m, got"):
        read_duration(text)


@pytest.mark.parametrize("budget", ["90s", "30m", "8h"])
@pytest.mark.parametrize("step", [0.02, 0.6])
@pytest.mark.parametrize(("validation", "interval"), [(1.5, 1), (12, 2), (0, 5)])
def test_budget_is_used_and_not_exceeded(budget, step, validation, interval):
    costs = Costs(start=1.0, step=step, epoch=0.3, validation=validation, scores=20.0)
    plan = fit_time_budget(PLAN, budget, 15.0, costs, interval)
    seconds = 15.0 + costs.start  # as the run goes, piece by piece
    for epoch in range(1, plan.max_epochs + 1):
        seconds += plan.steps_per_epoch * step + costs.epoch
        seconds += validation if epoch % interval == 0 else 0
    validations = plan.max_epochs // interval
    seconds += costs.scores * (1.5 if validations > 1 else 1)  # of one network or of two
    assert read_duration(budget) - plan.max_epochs * step - 1e-6 <= seconds
    assert seconds <= read_duration(budget) + 1e-6
    steps = plan.max_epochs * plan.steps_per_epoch
    assert plan.max_epochs % interval == 0
    assert plan.warmup_steps == min(100, steps // 10)
    assert plan.reasons["max_epochs"].startswith(f"{budget}: {steps:,} steps of {step:.3g} s, ")


def test_budget_that_is_too_small_is_refused_with_the_least():
    costs = Costs(start=1.0, step=2.0, epoch=0.5, validation=3.0, scores=10.0)
    with pytest.raises(InputError, match="expected 40s or more here, for 10 steps, got 39s"):
        fit_time_budget(PLAN, "39s", 5.0, costs, 2)  # 5 + 1 + 10 * 2 + 2 * 0.5 + 3 + 10
    plan = fit_time_budget(PLAN, "40s", 5.0, costs, 2)
    assert plan.max_epochs * plan.steps_per_epoch == 10


def test_steps_are_decided_once_and_stored(train, tmp_path, monkeypatch):
    measured = []

    def measure(*arguments):
        measured.append(arguments)
        return Costs(start=0.0, step=3000.0, epoch=0.0, validation=0.0, scores=0.0)

    monkeypatch.setattr(lifecycle, "measure_costs", measure)
    status, told = train(tmp_path / "r", **AUTO, time_budget="10h")
    assert status == 0, told
    plan = json.loads((tmp_path / "r/plan.json").read_text())
    assert (plan["max_epochs"], plan["steps_per_epoch"], plan["warmup_steps"]) == (3, 3, 0)
    assert plan["reasons"]["steps_per_epoch"].startswith("10h: 9 steps of 3e+03 s")
    assert json.loads((tmp_path / "r/summary.json").read_text())["steps"] == 9
    assert "This run is finished" in train(tmp_path / "r", **AUTO, time_budget="10h")[1]
    status, told = train(tmp_path / "r", **{**AUTO, "max_epochs": 4}, time_budget="20h")
    assert (status, len(measured)) == (0, 1)
    assert "time_budget 20h is not used" in told
    assert json.loads((tmp_path / "r/summary.json").read_text())["steps"] == 12


def test_measuring_leaves_no_trace(train, tmp_path, monkeypatch):
    steps = {"max_epochs": 1, "steps_per_epoch": 2, "warmup_steps": 1}
    monkeypatch.setattr(lifecycle, "fit_time_budget", lambda plan, *_: replace(plan, **steps))
    given = {"final_scores": True, "network_def#dropout": 0.3}
    assert train(tmp_path / "measured", **given, **AUTO, time_budget="1s")[0] == 0
    assert train(tmp_path / "given", **given, **steps)[0] == 0
    files = [
        {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*.*")}
        for name in ("measured", "given")
    ]
    files = [{name for name in found if "tensorboard" not in name} for found in files]
    assert files[0] == files[1]
    one, other = (
        torch.load(tmp_path / name / "models/last.pt", weights_only=True)
        for name in ("measured", "given")
    )
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_steps_that_are_given_are_refused_beside_a_budget(train, tmp_path):
    status, told = train(tmp_path / "r", time_budget="30m")
    assert status == 2
    assert told.splitlines()[-1].startswith("time_budget: expected auto for steps_per_epoch, max_")
    assert not (tmp_path / "r").exists()
