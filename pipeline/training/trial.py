"""The trial step: one batch goes through everything before training begins.

What does not fit together or into the card's memory is named in one line. Weights, buffers,
optimizer, gradient scaler and random states are afterwards bit for bit what they were.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy, deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from pipeline import distributed
from pipeline.data.memory import available_bytes
from pipeline.data.plan import Plan
from pipeline.errors import InputError, innermost
from pipeline.precision import buffers_kept
from pipeline.progress_bar import details
from pipeline.training.allocator import keep_freed_memory
from pipeline.training.protocols import LabelMapMetric
from pipeline.training.trainer import MixedPrecisionTrainer

log = logging.getLogger(__name__)

GIB = 2**30
SHARE_OF_CARD = 0.75  # of what is free: cases that are kept on the card may take the rest
LONG_S = 600  # steps that take longer are told of before they begin
SAMPLE = 64  # largest side of a patch with which a step is timed on a CPU
TIMED_S = 3  # after which no further step is timed
STRIDE = 32  # what most networks divide a patch by, or less


class MemoryLimitError(InputError):
    """A batch is too large for the card's memory."""


class TrialStep:
    """Handler of the trainer that tries the first batch of a new run.

    Args:
        metrics: Metrics of the validation by name; each that is a `LabelMapMetric` is tried.
    """

    def __init__(self, metrics: Mapping[str, Any] | None = None) -> None:
        self.metrics = metrics or {}

    def attach(self, trainer: MixedPrecisionTrainer) -> None:
        """Listen to the beginning of training."""
        trainer.add_event_handler(Events.STARTED, self.run)

    def run(self, trainer: MixedPrecisionTrainer) -> None:
        """Try one batch of a new run, for `trainer.trial_step`; `InputError` if one rank fails."""
        if trainer.progress.step > 0:
            return
        device = trainer.precision.device
        metrics = [one for one in self.metrics.values() if isinstance(one, LabelMapMetric)]
        with distributed.sync_errors(), _state_kept(trainer.network, trainer.optimizer, device):
            for _ in range(2):
                began = time.monotonic()
                batch = _first_batch(trainer.data_loader)
                images, labels = trainer.prepare_batch(batch, device, trainer.non_blocking)
                where = f"trial step with {', '.join(batch.get('case_id', ['the first batch']))}"
                peak = try_step(trainer, images, labels, metrics, where)
                step_s = trainer.accumulation_steps * (time.monotonic() - began)
                num_steps = trainer.state.max_epochs * trainer.steps_per_epoch
                if device.type == "cuda" or num_steps * step_s < LONG_S:
                    break  # else once more, since the first step is the slowest
        trainer.trial_step = {"batch_size": len(images), "peak_bytes": peak}
        reserved = "" if peak is None else f", {peak / GIB:.2f} GiB reserved"
        details.info("Trial step with %d patches: all fits together%s", len(images), reserved)
        if device.type == "cpu" and num_steps * step_s > LONG_S:
            said = (
                "%d steps of %.2g s take about %.1f hours on this CPU; --time_budget 1h limits them"
            )
            log.info(said, num_steps, step_s, num_steps * step_s / 3600)


def try_step(
    parts: Any,
    images: torch.Tensor,
    labels: torch.Tensor,
    metrics: Iterable[LabelMapMetric] = (),
    where: str = "trial step",
) -> int | None:
    """Take a training step, and try `metrics` on its prediction; `InputError` if one fails.

    Args:
        parts: Has `network`, `loss_function`, `optimizer` and `precision`, as a trainer.
        images: `(B, C, H, W, D)` float32 on the device.
        labels: `(B, 1, H, W, D)` on the device.
        where: Beginning of messages.

    Returns:
        Bytes that PyTorch reserved for the step on a CUDA device; `None` on a CPU.
    """
    network, optimizer, precision = parts.network, parts.optimizer, parts.precision
    batch = f"images {tuple(images.shape)} and labels {tuple(labels.shape)}"
    with _peak(precision.device, images) as peak, distributed.local_only(network):
        network.train()
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            with _named(where, f"a network that takes {batch}", _roi_remedy(images)):
                logits = network(images)
                finest = logits[0] if isinstance(logits, list | tuple) else logits
                finest = finest[:, 0] if finest.ndim == 6 else finest  # stacked levels
                if finest.shape[2:] != images.shape[2:]:
                    raise ValueError(f"logits of shape {tuple(finest.shape)}")
            expected = f"a loss that takes logits {tuple(finest.shape)} and {batch}"
            highest = int(labels.max())
            with _named(where, expected, _loss_remedy(logits, highest)):
                if finest.is_cuda and highest >= finest.shape[1]:
                    _try_on_cpu(parts.loss_function, logits, labels)
                loss = parts.loss_function(logits, labels)
        with _named(where, "a scalar loss that can be differentiated", "Correct the loss."):
            precision.backward(loss)
        unused = [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
        if unused and distributed.size() > 1:  # they would differ between ranks
            raise InputError(
                "network: expected all parameters to take part in a step of several ranks, got no "
                f"gradient of {', '.join(unused[:5])}. Freeze them, or train in one process."
            )
        optimizer.zero_grad(set_to_none=False)  # gradients need not be finite here
        optimizer.step()
        with _named(where, "a metric that takes the prediction", "Correct its class_names."):
            for metric in metrics:
                metric.try_on(finest[0].argmax(0), torch.as_tensor(labels[0, 0]))
        return peak()


def fit_batch_size(objects: Mapping[str, Any], plan: Plan) -> Plan:
    """Lower the batch size of a plan, and say so in it, until a step fits into the card's memory.

    It is tried with `network`, `loss_function`, `optimizer` and `precision` of `objects`, which
    change. Raises `InputError` if not even one patch for each rank fits.
    """
    device, ranks, size = objects["precision"].device, distributed.size(), plan.batch_size
    limit = SHARE_OF_CARD * available_bytes(device)
    while True:
        shape = (-(-size // ranks), plan.in_channels, *plan.roi_size)
        images, parts = torch.zeros(shape, device=device), SimpleNamespace(**objects)
        with contextlib.nullcontext() if size == ranks else contextlib.suppress(MemoryLimitError):
            if (try_step(parts, images, images[:, :1].byte()) or 0) <= limit or size == ranks:
                break
        size = max(size * 3 // 4, ranks)
    if size == plan.batch_size:
        return plan
    reason = f"what fits: a trial step with {plan.batch_size} took more than {limit / GIB:.2f} GiB"
    return replace(plan, batch_size=size, reasons={**plan.reasons, "batch_size": reason})


def time_step(objects: Mapping[str, Any], plan: Plan) -> float:
    """Return about how many seconds a step of a plan takes here, with random patches.

    On a CPU it is one patch, of `SAMPLE` voxels a side at most, of which the rest is concluded.
    It is tried with `network`, `loss_function`, `optimizer` and `precision` of `objects`.
    """
    network, optimizer, precision = (objects[k] for k in ("network", "optimizer", "precision"))
    on_cpu = precision.device.type == "cpu"
    roi_size = [min(n, SAMPLE) for n in plan.roi_size] if on_cpu else plan.roi_size
    shape = (1 if on_cpu else plan.batch_size, plan.in_channels, *roi_size)
    images = torch.rand(shape, device=precision.device)
    labels = (plan.num_classes * images[:, :1]).byte()
    network.train()
    if on_cpu:
        keep_freed_memory()
    seconds = list[float]()
    while len(seconds) < 2 or (len(seconds) < 5 and sum(seconds) < TIMED_S):
        began = time.monotonic()
        optimizer.zero_grad()
        with precision.autocast():
            loss = objects["loss_function"](network(images), labels)
        precision.backward(loss)
        optimizer.step()
        next(iter(network.parameters())).sum().item()  # waits for the device
        seconds.append(time.monotonic() - began)
    # the first one is the slowest
    part = shape[0] * math.prod(roi_size) / (plan.batch_size * math.prod(plan.roi_size))
    return min(seconds[1:]) / part


def _first_batch(loader: Any) -> dict[str, Any]:
    """Load a batch in this process: workers would be started for it, and ended again."""
    if isinstance(loader, DataLoader):
        loader = copy(loader)
        loader.num_workers = loader.timeout = 0
    return next(iter(loader))


def _try_on_cpu(loss_function: Any, logits: Any, labels: torch.Tensor) -> None:
    """Try labels that are no class where an error does not make the card unusable."""
    loss = deepcopy(loss_function)
    loss = loss.cpu() if isinstance(loss, nn.Module) else loss
    is_tensor = isinstance(logits, torch.Tensor)
    loss(logits.float().cpu() if is_tensor else [x.float().cpu() for x in logits], labels.cpu())


def _roi_remedy(images: torch.Tensor) -> str:
    sizes = [-(-n // STRIDE) * STRIDE for n in images.shape[2:]]
    advice = "Choose roi_size in multiples of the network's total stride, such as"
    return f"{advice} {sizes}, and a network of {images.shape[1]} channels."


def _loss_remedy(logits: Any, highest: int) -> str:
    if not isinstance(logits, torch.Tensor) or logits.ndim == 6:
        return "Use a loss that takes a list, as SegmentationLoss, or turn deep supervision off."
    if highest >= logits.shape[1]:
        return f"Use a loss that ignores label {highest}, as SegmentationLoss with ignore_value."
    return f"Use a loss for {logits.shape[1]} classes; class weights need a value for each."


@contextlib.contextmanager
def _named(where: str, expected: str, remedy: str) -> Iterator[None]:
    """Turn an error of somebody's network, loss or metric into one line."""
    try:
        yield
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:
        text = (str(innermost(error)) or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"{where}: expected {expected}, got: {text}. {remedy}") from error


@contextlib.contextmanager
def _peak(device: torch.device, images: torch.Tensor) -> Iterator[Callable[[], int | None]]:
    """Measure the memory that is reserved on a CUDA device; `MemoryLimitError` if it is full."""
    if device.type != "cuda":
        yield lambda: None
        return
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    available = available_bytes(device)
    try:
        yield lambda: torch.cuda.max_memory_reserved(device)
    except torch.OutOfMemoryError:
        raise MemoryLimitError(
            f"batch_size: expected a training step that fits into {available / GIB:.2f} GiB, free "
            f"on {device}, got one of {len(images)} patches of {tuple(images.shape[2:])} voxels. "
            "Lower batch_size, roi_size or memory_budget_bytes, or raise recompute_levels."
        ) from None
    finally:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@contextlib.contextmanager
def _state_kept(network: nn.Module, optimizer: Optimizer, device: torch.device) -> Iterator[None]:
    """Put back weights, buffers, optimizer and random states at the end."""
    weights = [parameter.detach().to("cpu", copy=True) for parameter in network.parameters()]
    moments = {parameter: deepcopy(state) for parameter, state in optimizer.state.items()}
    with random_states_kept(device), buffers_kept(network):
        try:
            yield
        finally:
            for parameter, saved in zip(network.parameters(), weights, strict=True):
                parameter.data.copy_(saved)
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()
            optimizer.state.update(moments)


@contextlib.contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Put back the random states of Python, NumPy, PyTorch and the device at the end."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
