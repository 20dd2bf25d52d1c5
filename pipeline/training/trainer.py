"""MONAI's SupervisedTrainer with one owner of precision.

Events, state and handlers are MONAI's. The iteration is our own, because MONAI's hard-codes CUDA
autocast, never unscales or clips, and makes a new scaler for each run.
"""

from __future__ import annotations

import errno
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from ignite.engine import EventEnum, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.engines.workflow import Workflow
from monai.utils.enums import CommonKeys as Keys
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from networks import fused_layers
from networks.dense_unet import DenseUNet
from networks.kernels import self_check
from pipeline import distributed, errors
from pipeline.distributed import SummedDDP
from pipeline.files import NO_ROOM
from pipeline.precision import BufferSnapshot, Precision, StepStats, require_float32
from pipeline.progress_bar import details
from pipeline.signals import interruptible
from pipeline.training import protocols
from pipeline.training.allocator import keep_freed_memory
from pipeline.training.early_end import EarlyEnding
from pipeline.training.graph import GRAPH_MODES, StepGraph, compare_replay, has_hooks
from pipeline.training.prefetch import Batch, PrefetchingLoader, Prepared
from pipeline.training.progress import EPOCH_END_PENDING, FINALIZING, STEPPING, Progress

log = logging.getLogger(__name__)

NOT_WRITTEN = (*NO_ROOM, errno.EROFS, errno.EACCES, errno.EIO)


class StepEvents(EventEnum):
    """Events of optimizer steps, beside MONAI's iteration events of micro-batches."""

    STEP_COMPLETED = "step_completed"
    CHECKPOINT_STARTED = "checkpoint_started"


class MixedPrecisionTrainer(SupervisedTrainer):
    """SupervisedTrainer whose numerics belong to a `Precision`.

    An ignite iteration is one micro-batch; an optimizer step takes `accumulation_steps` of them;
    an epoch is `steps_per_epoch` steps. If the loss or a gradient of a step is not finite, the step
    is skipped: weights, optimizer, scheduler and buffers are afterwards what they were before it.

    Each of several ranks has a part of every micro-batch, with loss and gradients of the whole one.
    Weights, optimizer, scheduler, scaler and `progress` are the same on all ranks, which stop, skip
    and are interrupted at the same step.

    `pipeline.training.protocols` lists what a network, loss or loader of your own may offer.

    Args:
        network: On its device, with float32 weights; `ValueError` for others.
        loss_function: `(logits, label) -> scalar`, a mean over samples.
        train_data_loader: Yields dictionaries with `image` `(B, C, H, W, D)` and `label`
            `(B, 1, H, W, D)`. If they have `seed` `(B,)` int64, torch's generator starts from it,
            so that dropout does not depend on the steps before.
        max_epochs: Epochs to train, in all sessions together.
        precision: By default mixed precision on the network's device.
        lr_scheduler: Advanced once per applied step; by default the learning rates stay.
        steps_per_epoch: By default as many as the loader has.
        accumulation_steps: Micro-batches in an optimizer step; the loss is their mean.
        grad_clip: Largest global 2-norm of the gradients; 0 turns clipping off.
        grace_s: Seconds within which the process ends after SIGTERM, SIGINT or SIGUSR1.
        cuda_graph: `auto` (on CUDA with one rank), `cuda_graphs` or `none`: whether forward pass,
            loss and backward pass are replayed as a CUDA graph (`StepGraph`), which they are not
            while a module has a hook, or an event between them has a handler.
        run_dir: Where `stop.json` asks for an early end; see `EarlyEnding`.
        initial_weights: Replace the network's weights of these names, before any checkpoint.
        kwargs: As SupervisedTrainer takes them, such as `inferer` or `prepare_batch`:
            `(batch, device, non_blocking) -> (image, label)`, augmentation included.
    """

    def __init__(
        self,
        *,
        network: torch.nn.Module,
        optimizer: Optimizer,
        loss_function: Callable,
        train_data_loader: Iterable,
        max_epochs: int,
        precision: Precision | None = None,
        lr_scheduler: LRScheduler | None = None,
        steps_per_epoch: int | None = None,
        accumulation_steps: int = 1,
        grad_clip: float = 12.0,
        grace_s: float = 25.0,
        replica: SummedDDP | None = None,
        cuda_graph: str = "auto",
        run_dir: Path | None = None,
        initial_weights: Mapping[str, torch.Tensor] | None = None,
        train_handlers: list | None = None,
        **kwargs: Any,
    ) -> None:
        require_float32(network)
        if initial_weights:
            network.load_state_dict({**network.state_dict(), **initial_weights})
        if steps_per_epoch is None:
            steps_per_epoch = len(train_data_loader) // accumulation_steps  # type: ignore[arg-type]
        self.precision = precision = precision or Precision(next(network.parameters()).device)
        self.lr_scheduler = lr_scheduler or LambdaLR(optimizer, lambda step: 1.0)
        rates = [group["lr"] for group in optimizer.param_groups]
        self._schedule = deepcopy(self.lr_scheduler.state_dict()), rates  # where a round begins
        self.steps_per_epoch, self.grad_clip = steps_per_epoch, grad_clip
        self.grace_s, self.replica = grace_s, replica
        self.progress = Progress(mode=precision.mode)  # ignite's counters are derived from it
        self.last_step: StepStats | None = None
        self.group: list[Batch] = []  # micro-batches of the step, as the loader gave them
        self.diagnosis: str | None = None  # why training stops before its end
        self.peak_memory_bytes: int | None = None  # of training and validation on a CUDA device
        self.peak_reserved_bytes: int | None = None  # with what the allocator keeps for later
        self.trial_step: dict[str, int | None] | None = None  # as `TrialStep` leaves it
        # whether training ends here, decided before handlers of a step or epoch save the state
        self.interrupted = self._is_told_to_end = False
        self.early = EarlyEnding(run_dir, max_epochs)
        spans_ranks = isinstance(loss_function, protocols.SpansRanks)
        self._spans_ranks = spans_ranks and loss_function.is_over_ranks  # type: ignore[attr-defined]
        self._buffers = BufferSnapshot(network)
        self._batches = PrefetchingLoader(train_data_loader, self._prepare, precision.device)
        super().__init__(
            device=precision.device,
            max_epochs=min(max_epochs, self.early.end.epoch) if self.early.end else max_epochs,
            train_data_loader=train_data_loader,
            network=network,
            optimizer=optimizer,
            loss_function=loss_function,
            epoch_length=steps_per_epoch * accumulation_steps,
            accumulation_steps=accumulation_steps,
            amp=precision.amp,
            decollate=False,
            non_blocking=True,
            event_names=[StepEvents],
            **kwargs,
        )
        self.scaler = precision.scaler  # type: ignore[assignment]
        self._cuda_graph, self._graph = cuda_graph, self._make_graph(cuda_graph)
        self.describe()  # refuses a backend that cannot serve here
        self.add_event_handler(Events.EPOCH_STARTED, _begin_epoch)
        self._register_handlers(train_handlers or [])

    # --- a step

    def _iteration(self, engine: SupervisedTrainer, batchdata: Batch) -> dict[str, torch.Tensor]:
        """One micro-batch, and after the last one of an accumulation group the optimizer step."""
        if (self.state.iteration - 1) % self.accumulation_steps == 0:
            self.optimizer.zero_grad(set_to_none=True)
            self._buffers.take()  # put back if the step is skipped
            self.group = []
            self._loss = self._max_logit = torch.zeros((), device=self.precision.device)
        self.group.append(batchdata)
        ends_group = len(self.group) == self.accumulation_steps
        images, labels = self._batches.take(batchdata)  # (B, C, H, W, D), augmented, on the device
        _seed_torch(batchdata)
        output = self.state.output = {Keys.IMAGE: images, Keys.LABEL: labels}
        if self._graph and not self._is_watched():
            output[Keys.PRED], output[Keys.LOSS] = self._graph(images, labels)
        else:
            with self.replica.no_sync() if self.replica and not ends_group else nullcontext():
                with self.precision.autocast():
                    network = self.replica or self.network
                    loss = self._forward(network, output, self.fire_event)
                self.precision.backward(loss / self.accumulation_steps)
        self._loss = self._loss + output[Keys.LOSS].detach() / self.accumulation_steps
        self._max_logit = torch.maximum(self._max_logit, max_abs(output[Keys.PRED]))
        self.fire_event(IterationEvents.BACKWARD_COMPLETED)
        self._batches.prefetch()  # while the device works; the host waits for it in the step
        if ends_group:
            samples = len(images) * self.accumulation_steps
            with self.early.lowered_rates(self.optimizer, self.rate_factor):
                step = self.last_step = self.precision.step(
                    self.optimizer,
                    self._loss,
                    self._max_logit,
                    self._buffers.norm(self.precision.device),
                    grad_clip=self.grad_clip,
                    counts=(samples, self._is_told_to_end, self.early.is_asked()),
                )
            if not step.applied:
                self._buffers.restore()
            else:
                self.lr_scheduler.step()
                if self.replica:
                    self.replica.average_running_stats()
            all_samples, told_to_end, asked_to_end_early = step.sums
            self.progress.record_step(step.applied, round(all_samples), self.steps_per_epoch)
            if asked_to_end_early > 0:
                where = self.progress.step, self.steps_per_epoch, self.state.max_epochs
                self.state.max_epochs = self.early.decide(*where)
            self._end_if(told_to_end > 0)
            self.fire_event(StepEvents.STEP_COMPLETED)
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return output

    def _forward(
        self, network: torch.nn.Module, output: Batch, notify: Callable = lambda event: None
    ) -> torch.Tensor:
        """Loss of a micro-batch in train mode; `output` has images and labels, and receives it."""
        network.train()
        output[Keys.PRED] = self.inferer(output[Keys.IMAGE], network)
        notify(IterationEvents.FORWARD_COMPLETED)
        loss = self.loss_function(output[Keys.PRED], output[Keys.LABEL])
        if distributed.size() > 1 and not self._spans_ranks:
            loss = distributed.mean_over_ranks(loss, len(output[Keys.IMAGE]))
        output[Keys.LOSS] = loss
        notify(IterationEvents.LOSS_COMPLETED)
        return output[Keys.LOSS]

    def forward(self, batchdata: Batch, autocast: AbstractContextManager) -> torch.Tensor:
        """Loss of one micro-batch in train mode, as a step computes it but without its events."""
        images, labels = self._prepare(batchdata)
        _seed_torch(batchdata)
        with autocast:
            return self._forward(self.network, {Keys.IMAGE: images, Keys.LABEL: labels})

    def _prepare(self, batchdata: Batch) -> Prepared:
        _seed_torch(batchdata)  # `prepare_batch` may draw from torch's generator
        return self.prepare_batch(batchdata, self.state.device, self.non_blocking)

    # --- as a CUDA graph

    def _make_graph(self, mode: str) -> StepGraph | None:
        errors.require_choice(mode, GRAPH_MODES, "cuda_graph")
        required, accumulates = mode == "cuda_graphs", self.accumulation_steps > 1
        is_possible = self.precision.device.type == "cuda" and not self.replica
        if required and not is_possible:
            expected = "expected a CUDA device and one rank for cuda_graphs"
            raise errors.InputError(f"cuda_graph: {expected}. Use auto.")
        if mode == "none" or not is_possible:
            return None
        return StepGraph(self._work, self.network, accumulates=accumulates, required=required)

    def _work(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Detached logits and loss of a micro-batch, after its backward pass."""
        output: Batch = {Keys.IMAGE: images, Keys.LABEL: labels}
        with self.precision.autocast():
            loss = self._forward(self.network, output)
        self.precision.backward(loss / self.accumulation_steps)
        pred = output[Keys.PRED]
        detached = [level.detach() for level in pred] if isinstance(pred, list) else pred.detach()
        return detached, loss.detach()

    def _is_watched(self) -> bool:
        events = IterationEvents.FORWARD_COMPLETED, IterationEvents.LOSS_COMPLETED
        return any(self._event_handlers.get(event) for event in events) or has_hooks(self.network)

    # --- a run

    def run(self) -> None:  # type: ignore[override]
        """Train to `max_epochs`, from wherever a restored `progress` says.

        A federated client calls it once a round, with `state.max_epochs` raised in between: each
        round has the learning rates from their beginning, and the rest from the round before.

        Raises `TrainingStopped` after `stop`, and `TrainingInterrupted` after `interrupt`.
        """
        requested, effective = self.describe().values()
        log.info("Training in %s", describe_in_words(self))
        details.info("%s", self.precision)
        for name in ("loss_backend", "cuda_graph"):
            details.info("%s in force: %s; asked for: %s", name, effective[name], requested[name])
        if self.precision.device.type == "cpu":
            keep_freed_memory()
        if self.progress.phase == FINALIZING and self.progress.epoch < self.state.max_epochs:
            self._begin_round()
        self._started = time.monotonic() - self.progress.wall_time_s
        try:
            with interruptible(self.interrupt, self.grace_s):
                self._train()
        finally:
            if self._graph:  # its memory is for what comes after training
                self._graph.end()
                self.optimizer.zero_grad(set_to_none=True)
        if self.precision.device.type == "cuda":  # before anything else is done there
            self.peak_memory_bytes = torch.cuda.max_memory_allocated(self.precision.device)
            self.peak_reserved_bytes = torch.cuda.max_memory_reserved(self.precision.device)
        if self.diagnosis is not None:
            log.log(self._level, "%s", self.diagnosis)
            raise errors.TrainingStopped(self.diagnosis)
        if self.interrupted:
            log.info("Interrupted at step %d; the same command continues.", self.progress.step)
            raise errors.TrainingInterrupted()

    def _train(self) -> None:
        try:
            if self.progress.phase == EPOCH_END_PENDING:
                self.fire_event(Events.EPOCH_COMPLETED)
            is_unfinished = self.progress.epoch < self.state.max_epochs
            goes_on = self.diagnosis is None and not self.interrupted
            if is_unfinished and goes_on and self.progress.phase == STEPPING:
                # not Trainer.run, which would put a new scaler in the place of the policy's
                super(Workflow, self).run(self._batches, self.state.max_epochs)
        except Exception as caught:
            error: Any = caught
            reason = distributed.explain_lost_rank(error) or errors.describe_worker_failure(error)
            if isinstance(error, OSError) and error.errno in NOT_WRITTEN:
                reason = f"{error} The run ends; the checkpoints are as they were."
            if reason is None:
                step = self.progress.step
                cases = [case for batch in self.group for case in batch.get("case_id", ())]
                note = f"step {step + 1}, cases {', '.join(cases) or 'unknown'}"
                is_over = self.progress.phase == EPOCH_END_PENDING
                error.add_note(f"validation after step {step}" if is_over else note)
                raise
            self.stop(reason)

    def _begin_round(self) -> None:
        self.early.end = None
        self.progress.phase = STEPPING
        schedule, rates = self._schedule
        self.lr_scheduler.load_state_dict(deepcopy(schedule))
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def describe(self) -> dict[str, dict[str, Any]]:
        """`requested` and `effective` settings; `InputError` if the loss's backend cannot serve."""
        described, loss, network = self.precision.describe(), self.loss_function, self.network
        asked = in_force = None
        if isinstance(loss, protocols.HasBackend):
            classes = network.out_channels if isinstance(network, protocols.HasOutChannels) else 2
            asked, in_force = loss.backend, loss.in_force(self.precision.device, classes)
        graph = "cuda_graphs" if self._graph and self._graph.captures else "none"
        described["requested"] |= {"loss_backend": asked, "cuda_graph": self._cuda_graph}
        described["effective"] |= {"loss_backend": in_force, "cuda_graph": graph}
        return described

    # --- its end

    def stop(self, diagnosis: str, level: int = logging.ERROR) -> None:
        """End training after this step, because of what the first `diagnosis` says."""
        if self.diagnosis is None:
            self.diagnosis, self._level = diagnosis, level
        self.terminate()

    def agree(self) -> None:
        """End training on all ranks if one was told to `stop`; all have to call it."""
        reasons = [reason for reason in distributed.all_gather_object(self.diagnosis) if reason]
        if reasons:
            self.stop(reasons[0], logging.INFO)

    def interrupt(self) -> None:
        """End training at the next step or epoch's end; the same command continues it."""
        self._is_told_to_end = True

    def _end_if(self, told_to_end: bool) -> None:
        self.interrupted = told_to_end
        if told_to_end:
            self.terminate()

    def restore(self, progress: dict[str, Any]) -> None:
        """Take over a saved progress record, and derive ignite's counters from it."""
        self.progress.load_state_dict(progress)
        self.progress.mode = self.precision.mode
        if self.progress.phase == FINALIZING and self.progress.epoch < self.state.max_epochs:
            self.progress.phase = STEPPING  # max_epochs was raised
        self.state.epoch = self.progress.epoch
        self.state.iteration = self.progress.step * self.accumulation_steps

    @property
    def rate_factor(self) -> float:
        """What multiplies the scheduler's learning rates in the next step."""
        end = self.early.end
        return end.rate_factor(self.progress.step, self.steps_per_epoch) if end else 1.0

    @property
    def elapsed_s(self) -> float:
        """Seconds in training and validation, over all sessions of the run."""
        return time.monotonic() - self._started

    def end_epoch(self) -> None:
        """Mark the epoch's end work (validation) as done."""
        last = self.progress.epoch >= self.state.max_epochs
        self.progress.phase = FINALIZING if last else STEPPING
        if not last:
            self._end_if(any(distributed.all_gather_object(self._is_told_to_end)))


def describe_in_words(trainer: MixedPrecisionTrainer) -> str:
    """Return what is in force: precision, device, and what makes steps fast there."""
    precision, effective = trainer.precision, trainer.describe()["effective"]
    device, ranks, threads = precision.device, distributed.size(), torch.get_num_threads()
    where = f"a CPU ({threads} thread{'s' * (threads > 1)})"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else where
    x = torch.zeros((1, 2, 2, 2, 2), device=device, dtype=precision.dtype)  # as activations are
    layers = fused_layers.serves(x.contiguous(memory_format=precision.memory_format))
    fused = ["layers"] * (layers and isinstance(trainer.network, DenseUNet))
    fused += ["loss"] * (effective["loss_backend"] == "triton")
    words = f"{precision.mode}{' with loss scaling' * effective['loss_scaling']} on "
    words += where if ranks == 1 else f"{ranks} ranks, each on {where}"
    words += ("", f", fused {''.join(fused)}", ", fused kernels")[len(fused)]
    if trainer._graph and not self_check.find_fault(compare_replay, device):
        words += ", CUDA graph"
    is_missed = precision.amp and precision.dtype == torch.float32
    return words + "; mixed precision was asked for, a CPU trains in float32" * is_missed


def max_abs(logits: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Largest |logit|, float32 scalar on the device; NaN if there is one. One pass, no copy."""
    levels = [logits] if isinstance(logits, torch.Tensor) else logits
    inf, float32 = math.inf, torch.float32
    norms = [torch.linalg.vector_norm(level.detach(), inf, dtype=float32) for level in levels]
    return torch.stack(norms).max()


def _seed_torch(batch: dict[str, Any]) -> None:
    if "seed" in batch:
        torch.manual_seed(int(batch["seed"][0]))


def _begin_epoch(trainer: MixedPrecisionTrainer) -> None:
    sampler = getattr(trainer.data_loader, "sampler", None)  # a plain iterable has none
    if isinstance(sampler, protocols.ResumableSampler):
        sampler.start = trainer.progress.samples
