"""A precision on one batch: how near its gradients are to float32's, and what a step costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.files import load
from pipeline.precision import Precision
from pipeline.training.flight_recorder import Batch, gradients
from pipeline.training.trainer import MixedPrecisionTrainer

Weights = Mapping[str, torch.Tensor]
WARM_UP, MEASURED = 5, 15  # steps


def measure(
    trainer: MixedPrecisionTrainer, precisions: Mapping[str, Mapping[str, Any]], last: Path
) -> dict[str, Any]:
    """Gradients, step time and memory of several precisions on the first batch of a run.

    Args:
        trainer: Of the run, its weights untrained.
        precisions: Name to arguments of `Precision`; the first is what the others are held to.
        last: File with the run's weights after training.

    Returns:
        For each name what `step_cost` returns, and under `gradient` the `agreement` of gradients
        with the `first` and with the `last` weights.
    """
    now = trainer.precision
    made = {
        name: Precision(now.device, cudnn_benchmark=now.cudnn_benchmark, **arguments)
        for name, arguments in precisions.items()
    }
    batches = first_group(trainer)
    weights = {
        "first": {k: v.to("cpu", copy=True) for k, v in trainer.network.state_dict().items()},
        "last": load(last),
    }
    references: dict[str, torch.Tensor] = {}
    result = {}
    for name, precision in made.items():
        # on the host, so that they do not count as memory of the steps
        found = {key: gradient(trainer, precision, batches, w).cpu() for key, w in weights.items()}
        references = references or found
        agreements = {key: agreement(found[key], references[key]) for key in found}
        result[name] = {"gradient": agreements, **step_cost(trainer, precision, batches)}
    return result


def first_group(trainer: MixedPrecisionTrainer) -> list[Batch]:
    """Micro-batches of the run's first step."""
    loader: Any = trainer.data_loader
    loader.sampler.start = 0
    return [batch for _, batch in zip(range(trainer.accumulation_steps), loader, strict=False)]


def gradient(
    trainer: MixedPrecisionTrainer, precision: Precision, batches: Sequence[Batch], weights: Weights
) -> torch.Tensor:
    """All gradients of a group as one float64 vector, in a precision and with given weights.

    Where the loss scale lets gradients overflow it is halved until they do not, as in training;
    where they are not finite even with a scale of 1 they are returned so.
    """
    trainer.use(precision)
    trainer.network.load_state_dict(weights)
    scale = precision.scaler.get_scale() if precision.scaler else 1.0
    while True:
        parts = gradients(trainer, batches, precision.autocast, scale)
        whole = torch.cat([part.flatten().double() for part in parts])
        if whole.isfinite().all() or scale <= 1:
            return whole
        scale /= 2


def agreement(value: torch.Tensor, reference: torch.Tensor) -> dict[str, float | None]:
    """Cosine of the angle between two vectors, and the 2-norm of their difference over its own.

    `None` for both where `value` is not finite.

    Args:
        value: `(N,)` float64.
        reference: `(N,)` float64, not zero.
    """
    if not value.isfinite().all():
        return {"cosine": None, "relative_error": None}
    cosine = torch.nn.functional.cosine_similarity(value, reference, dim=0)
    error = torch.linalg.vector_norm(value - reference) / torch.linalg.vector_norm(reference)
    return {"cosine": cosine.item(), "relative_error": error.item()}


def step_cost(
    trainer: MixedPrecisionTrainer, precision: Precision, batches: Sequence[Batch]
) -> dict[str, Any]:
    """Time and memory of whole optimizer steps; the trainer's weights change.

    Returns:
        `step_ms`: median; `step_ms_quartiles`; `peak_memory_bytes`: on CUDA, else `None`.
    """
    trainer.use(precision)
    cuda = precision.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(precision.device)
    times = []
    for _ in range(WARM_UP + MEASURED):
        started = time.perf_counter()
        trainer.take_step(batches)
        if cuda:
            torch.cuda.synchronize(precision.device)
        times.append(1000 * (time.perf_counter() - started))
    low, middle, high = statistics.quantiles(times[WARM_UP:], n=4)
    return {
        "step_ms": middle,
        "step_ms_quartiles": [low, high],
        "peak_memory_bytes": torch.cuda.max_memory_allocated(precision.device) if cuda else None,
    }
