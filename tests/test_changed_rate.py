"""A learning rate and weight decay that were changed are in force in a run that goes on.

All through commands: no test here knows a module of the package by its path.
"""

from __future__ import annotations

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim import lr_scheduler

RATE, CHANGED = 1e-3, 1e-4
SCHEDULES = {
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.StepLR(optimizer, 3, 0.5)]
    ),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, 1, 3), lr_scheduler.ExponentialLR(optimizer, 0.5)],
        [3],
    ),
}


def target(name, **arguments):
    return {"_target_": f"torch.optim.lr_scheduler.{name}", "optimizer": "@optimizer", **arguments}


CONFIGS = {
    "ChainedScheduler": {
        "_target_": "torch.optim.lr_scheduler.ChainedScheduler",
        "schedulers": [
            target("ExponentialLR", gamma=0.9),
            target("StepLR", step_size=3, gamma=0.5),
        ],
    },
    "SequentialLR": target(
        "SequentialLR",
        schedulers=[
            target("LinearLR", start_factor=0.1, end_factor=1, total_iters=3),
            target("ExponentialLR", gamma=0.5),
        ],
        milestones=[3],
    ),
}


def rates_of(schedule, num_steps: int) -> list[float]:
    """Learning rate of each step, as torch makes it of the first rate."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    scheduler, rates = schedule(optimizer), []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_changed_rate_and_weight_decay_are_in_force_with_a_schedule_of_torch(train, tmp_path, name):
    overlay, out = tmp_path / "mine.json", tmp_path / "r"
    overlay.write_text(json.dumps({"lr_scheduler": CONFIGS[name]}))
    assert train(out, overlay, learning_rate=RATE, max_epochs=1, steps_per_epoch=3)[0] == 0
    changed = {"learning_rate": CHANGED, "weight_decay": 0.3, "steps_per_epoch": 3}
    status, told = train(out, overlay, max_epochs=2, **changed)
    assert status == 0, told
    assert "Continuing with a changed learning_rate" in told
    assert "Continuing with a changed weight_decay" in told
    assert train(out, overlay, max_epochs=3, **changed)[0] == 0  # once more, with what it has now
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    logged = [point.value for point in events.Scalars("weight_update/lr")]
    rates = rates_of(SCHEDULES[name], 9)
    assert logged[:3] == pytest.approx(rates[:3], rel=1e-5)
    assert logged[3:] == pytest.approx([CHANGED / RATE * rate for rate in rates[3:]], rel=1e-5)
    newest = sorted((out / "checkpoints").glob("*.pt"))[-1]
    (group,) = torch.load(newest, weights_only=True)["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.3
