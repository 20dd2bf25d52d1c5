"""A step whose numbers are not finite leaves everything as it was, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from engines import batch, batch_norm_network, differing, in_mode, make_trainer, state_of
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from torch import nn

from pipeline.training.trainer import MixedPrecisionTrainer, StepEvents

PLACES = ["input", "forward", "loss", "backward", "gradient"]
VOXEL = (0, 0, 0, 0, 0)
SCALE = 1024.0
GOOD = 2  # steps before the poisoned one


def poison(trainer: MixedPrecisionTrainer, place: str, value: float, iteration: int) -> None:
    """Let `value` come up once, in micro-batch number `iteration`."""

    def replace(tensor: torch.Tensor) -> torch.Tensor:
        if trainer.state.iteration != iteration:
            return tensor
        changed = tensor.detach().clone() if tensor.is_leaf else tensor.clone()
        changed[VOXEL] = value
        return changed

    def add_to_loss(engine: MixedPrecisionTrainer) -> None:
        if trainer.state.iteration == iteration:  # whose gradients stay finite
            engine.state.output["loss"] = engine.state.output["loss"] + value

    def set_gradient(engine: MixedPrecisionTrainer) -> None:
        if trainer.state.iteration == iteration:
            engine.network[0].weight.grad[VOXEL] = value

    if place == "input":
        trainer.data_loader.batches[iteration - 1]["image"][VOXEL] = value
    elif place == "forward":
        trainer.network[0].register_forward_hook(lambda module, args, output: replace(output))
    elif place == "loss":
        trainer.add_event_handler(IterationEvents.LOSS_COMPLETED, add_to_loss)
    elif place == "backward":
        trainer.add_event_handler(
            IterationEvents.FORWARD_COMPLETED,
            lambda engine: engine.state.output["pred"].register_hook(replace),
        )
    else:
        trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, set_gradient)


def check_one_skipped_step(device, mode, place, value, accumulation=1, poisoned=0):
    """Train with micro-batch `poisoned` of the step after `GOOD` ones spoilt, and look at it."""
    precision = in_mode(mode, device, init_scale=SCALE)
    batches = [batch(n) for n in range((GOOD + 2) * accumulation)]
    trainer = make_trainer(
        precision, batches, accumulation=accumulation, network=batch_norm_network(),
        optimizer=torch.optim.AdamW,
    )  # fmt: skip
    poison(trainer, place, value, GOOD * accumulation + poisoned + 1)
    before, after, scalers, steps = [], [], [], []

    def look_before(engine):
        if (engine.state.iteration - 1) % accumulation == 0:
            before.append(state_of(engine))
            scalers.append(precision.scaler.state_dict() if precision.scaler else None)

    def look_after(engine):
        after.append(state_of(engine))
        steps.append(engine.last_step)

    trainer.add_event_handler(Events.ITERATION_STARTED, look_before)
    trainer.add_event_handler(StepEvents.STEP_COMPLETED, look_after)
    trainer.run()

    assert [step.applied for step in steps] == [True, True, False, True]
    assert differing(before[GOOD], after[GOOD]) == []
    assert before[GOOD]["optimizer"]["state"]  # there was something to lose
    changed = " ".join(differing(before[GOOD + 1], after[GOOD + 1]))
    for part in ("/network/0.weight", "running_var", "num_batches", "exp_avg_sq", "last_epoch"):
        assert part in changed, part
    assert math.isfinite(steps[GOOD].loss) is (place in ("backward", "gradient"))
    assert math.isfinite(steps[GOOD].grad_norm) is (place == "loss")
    progress = trainer.progress
    assert (progress.step, progress.skipped_steps, progress.consecutive_skips) == (4, 1, 0)
    assert trainer.lr_scheduler.last_epoch == 3
    if mode == "float16":
        assert [(state["scale"], state["_growth_tracker"]) for state in scalers] == [
            (SCALE, 0), (SCALE, 1), (SCALE, 2), (SCALE / 2, 0)
        ]  # fmt: skip
    else:
        assert precision.scaler is None


@pytest.mark.parametrize(
    ("mode", "value"), [("float16", math.nan), ("bfloat16", -math.inf), ("float32", math.inf)]
)
@pytest.mark.parametrize("place", PLACES)
def test_skipped_step_leaves_everything_as_it_was(mode, place, value):
    check_one_skipped_step("cpu", mode, place, value)


@pytest.mark.parametrize("poisoned", [0, 2], ids=["first", "last"])
@pytest.mark.parametrize("place", PLACES)
def test_skipped_step_leaves_everything_as_it_was_when_accumulating(place, poisoned):
    check_one_skipped_step("cpu", "float16", place, math.nan, accumulation=3, poisoned=poisoned)


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("mode", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("place", PLACES)
def test_skipped_step_leaves_everything_as_it_was_on_cuda(mode, place, accumulation):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    check_one_skipped_step("cuda", mode, place, math.nan, accumulation, accumulation - 1)


def test_norm_that_overflows_alone_skips_the_step_and_lowers_the_scale():
    """Every gradient is finite, but not the sum of their squares; the scaler sees nothing."""
    precision = in_mode("float16", init_scale=SCALE, growth_interval=1)
    trainer = make_trainer(precision, [batch(0)])

    def enlarge(engine):
        for parameter in engine.network.parameters():
            parameter.grad.fill_(3e38)

    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, enlarge)
    before = state_of(trainer)
    trainer.run()
    assert not trainer.last_step.applied
    assert trainer.last_step.grad_norm == math.inf
    assert differing(before, state_of(trainer)) == []
    assert precision.scaler.state_dict()["scale"] == SCALE / 2


def test_step_that_spoils_running_statistics_alone_is_skipped():
    """The variance of 1e20 leaves float32, while what BatchNorm returns is well in range."""
    batches = [batch(n) for n in range(3)]
    batches[1]["image"] *= 1e20
    trainer = make_trainer(in_mode("float32"), batches, network=batch_norm_network())
    states, steps = [], []
    trainer.add_event_handler(StepEvents.STEP_COMPLETED, lambda e: states.append(state_of(e)))
    trainer.add_event_handler(StepEvents.STEP_COMPLETED, lambda e: steps.append(e.last_step))
    trainer.run()
    assert [step.applied for step in steps] == [True, False, True]
    assert math.isfinite(steps[1].loss)
    assert math.isfinite(steps[1].grad_norm)
    assert differing(states[0], states[1]) == []


class Buffers(nn.Module):
    """Counts in buffers of several dtypes, one of which is not saved and one infinite by design."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("sum", torch.zeros(2), persistent=False)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]), persistent=False)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen[int(self.calls) % 3] = True
        self.sum += image.mean()
        self.mean = 0.9 * self.mean + image.mean()  # another tensor
        return self.conv(image)


def test_skipped_step_restores_buffers_of_every_kind():
    network, kept = Buffers(), []
    trainer = make_trainer(
        in_mode("float32"), [batch(0), batch(1, value=math.nan)], network=network
    )
    trainer.add_event_handler(
        StepEvents.STEP_COMPLETED,
        lambda e: kept.append({n: b.clone() for n, b in network.named_buffers()}),
    )
    trainer.run()
    assert trainer.progress.skipped_steps == 1
    assert differing(kept[0], kept[1]) == []
    assert (network.calls, bool(network.mean)) == (1, True)
