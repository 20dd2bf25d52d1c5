"""Trainers over a handful of given batches, engines that only count, and comparison of states."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ignite.engine import Engine
from monai.inferers import SimpleInferer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from pipeline.precision import Precision, StepStats
from pipeline.training.loss import SegmentationLoss
from pipeline.training.progress import Progress
from pipeline.training.schedule import warmup_cosine
from pipeline.training.trainer import MixedPrecisionTrainer, StepEvents


class Samples:
    """A loader of given batches; `start` is what the trainer tells the sampler."""

    def __init__(self, batches: list[dict]) -> None:
        self.batches, self.start, self.sampler = batches, 0, self

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def batch(seed: int, size: int = 2, value: float | None = None) -> dict:
    """Noise with bright voxels as foreground; `value` is put into the first sample."""
    rng = torch.Generator().manual_seed(seed)
    image = torch.randn(size, 1, 8, 8, 8, generator=rng)
    label = (image > 0.5).to(torch.uint8)
    if value is not None:
        image[0, 0, 0, 0, 0] = value
    return {
        "image": image,
        "label": label,
        "seed": torch.full((size,), seed),
        "number": torch.arange(size) + size * seed,
        "case_id": [f"case_{seed}_{n}" for n in range(size)],
        "origin": torch.arange(3 * size).reshape(size, 3) + seed,
    }


def instance_norm_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, 1)
    )


def batch_norm_network() -> nn.Module:
    """Has running statistics and draws random numbers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv3d(4, 2, 1),
    )


def make_trainer(
    precision: Precision,
    batches: list[dict] | Samples,
    *,
    accumulation: int = 1,
    epochs: int = 1,
    network: nn.Module | None = None,
    decay_steps: int | None = None,
    **kwargs: Any,
) -> MixedPrecisionTrainer:
    network = (instance_norm_network() if network is None else network).to(precision.device)
    steps = len(batches) // accumulation
    optimizer = kwargs.pop("optimizer", torch.optim.SGD)(network.parameters(), lr=0.1)
    scheduler = warmup_cosine(
        optimizer, warmup_steps=2, max_epochs=epochs, steps_per_epoch=decay_steps or steps
    )
    return MixedPrecisionTrainer(
        precision=precision,
        max_epochs=epochs,
        train_data_loader=batches if isinstance(batches, Samples) else Samples(batches),
        network=network,
        optimizer=optimizer,
        loss_function=kwargs.pop("loss_function", SegmentationLoss()),
        lr_scheduler=scheduler,
        steps_per_epoch=steps,
        accumulation_steps=accumulation,
        inferer=SimpleInferer(),
        **kwargs,
    )


def half(device: str = "cpu", **kwargs: Any) -> Precision:
    return Precision(device, amp=True, amp_dtype="float16", **kwargs)


def in_mode(mode: str, device: str = "cpu", **kwargs: Any) -> Precision:
    amp = mode != "float32"
    return Precision(device, amp=amp, amp_dtype=mode if amp else "auto", **kwargs)


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}


# --- states


def state_of(trainer: MixedPrecisionTrainer) -> dict[str, Any]:
    """Copy of everything that an optimizer step may change."""
    parts = ("network", "optimizer", "lr_scheduler")
    return deepcopy({name: getattr(trainer, name).state_dict() for name in parts})


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Path to tensor or plain value."""
    if not isinstance(tree, dict | list | tuple):
        return {path: tree}
    children = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for name, child in children for k, v in leaves(child, f"{path}/{name}").items()}


def differing(a: Any, b: Any) -> list[str]:
    """Paths at which two states are not equal bit for bit; NaN is unequal to all."""
    a, b = leaves(a), leaves(b)

    def is_same(one: Any, other: Any) -> bool:
        if isinstance(one, torch.Tensor):
            return torch.equal(one, other) and one.dtype == other.dtype
        return one == other

    paths = a.keys() | b.keys()
    return sorted(p for p in paths if not (p in a and p in b and is_same(a[p], b[p])))


# --- engines that only count


class StubTrainer(Engine):
    """Counts steps as the trainer does; step n takes `results[n]`, or has a loss of n."""

    def __init__(self, handlers, *, step=0, steps_per_epoch=4, max_epochs=2, results=None):
        super().__init__(self.take_step)
        self.register_events(*StepEvents)
        self.progress = Progress(step=step, epoch=step // steps_per_epoch)
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
        self.steps_per_epoch = steps_per_epoch
        self.results = results or {}
        self.elapsed_s, self.rate_factor = 20.0, 1.0
        self.last_step = None
        self.state.max_epochs, self.state.epoch_length = max_epochs, steps_per_epoch
        self.state.epoch, self.state.iteration = self.progress.epoch, step
        for handler in handlers:
            handler.attach(self)

    def take_step(self, engine, batch):
        number = self.progress.step + 1
        default = StepStats(applied=True, loss=number, grad_norm=2, loss_scale=1, max_abs_logit=3)
        self.last_step = self.results.get(number, default)
        self.optimizer.param_groups[0]["lr"] += 1  # as the scheduler, before the event
        self.progress.record_step(
            self.last_step.applied, samples=1, steps_per_epoch=self.steps_per_epoch
        )
        self.fire_event(StepEvents.STEP_COMPLETED)


def make_validator(dice=None, epoch=1, case=None, cases=None):
    """An evaluator that has scored `dice` in `epoch`, and whose every output is `case`."""
    validator = Engine(lambda engine, batch: [case])
    metrics = {} if dice is None else {"mean_dice": dice}
    details = {"mean_dice": {"classes": {"dim": dice, "bright": 1.0}, "cases": cases or {}}}
    validator.state = SimpleNamespace(
        key_metric_name="mean_dice", metrics=metrics, metric_details=details, epoch=epoch
    )
    return validator


# --- what a run wrote


def strict_json(text: str) -> Any:
    """What a parser reads that knows neither NaN nor Infinity."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def overflows(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of the flight recorder."""
    return [strict_json(line) for line in (run_dir / "overflow.jsonl").read_text().splitlines()]


def read(run_dir: Path) -> EventAccumulator:
    """What TensorBoard shows, with nothing thinned out."""
    everything = dict.fromkeys(("scalars", "images"), 0)
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance=everything).Reload()


def curve(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    """Pairs of step and value, as they were written."""
    return [(point.step, point.value) for point in events.Scalars(tag)]


def steps_of(events: EventAccumulator, tag: str) -> list[int]:
    return [step for step, _ in curve(events, tag)]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file's content, by its path from the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
