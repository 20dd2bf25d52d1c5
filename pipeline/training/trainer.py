"""MONAI's SupervisedTrainer with one owner of precision.

It is thin: events, state and handlers are MONAI's. What is ours is the iteration, since MONAI's
own hard-codes CUDA autocast, never unscales or clips, and makes a new scaler on each run.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from ignite.engine import EventEnum, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.engines.workflow import Workflow
from monai.utils.enums import CommonKeys as Keys
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeline import distributed
from pipeline.errors import (
    InputError,
    TrainingInterrupted,
    TrainingStopped,
    describe_worker_failure,
    nearest,
)
from pipeline.files import NO_ROOM
from pipeline.precision import Precision, StepStats, require_float32
from pipeline.training.allocator import keep_freed_memory
from pipeline.training.graph import MODES, StepGraph, has_hooks
from pipeline.training.prefetch import Prefetcher, Prepared
from pipeline.training.progress import DONE, EPOCH_END_PENDING, FINALIZING, STEPPING, Progress
from pipeline.training.replica import SummedDDP, mean_over_ranks, require_equal_ranks
from pipeline.training.signals import interruptible
from pipeline.training.snapshot import BufferSnapshot

log = logging.getLogger(__name__)


NOT_WRITTEN = (*NO_ROOM, errno.EROFS, errno.EACCES, errno.EIO)


class StepEvents(EventEnum):
    """Events of optimizer steps, beside MONAI's iteration events of micro-batches."""

    STEP_COMPLETED = "step_completed"
    CHECKPOINT_STARTED = "checkpoint_started"


class MixedPrecisionTrainer(SupervisedTrainer):
    """SupervisedTrainer whose numerics belong to a `Precision`.

    An ignite iteration is one micro-batch; an optimizer step takes `accumulation_steps` of them;
    an epoch is `steps_per_epoch` steps. `progress` is the truth about how far training is, and
    ignite's counters are set from it when a run continues.

    A step is a transaction: where the loss or a gradient of its group is not finite, weights,
    optimizer, scheduler and the network's buffers are afterwards what they were before it.

    Of several ranks each has a part of every micro-batch. Loss and gradients are those of the whole
    one; weights, optimizer, scheduler, scaler and `progress` are the same on all of them, and all
    stop, skip and are interrupted at the same step.

    Args:
        precision: Owns device, autocast, scaler, clipping and the finite check.
        max_epochs: Epochs to train, in all sessions together.
        train_data_loader: Yields dictionaries with `image`, `label` and `seed`; its sampler has
            an attribute `start`, the number of the next sample.
        network: Network on the precision's device, with float32 weights.
        optimizer: Optimizer of its parameters.
        loss_function: `(logits, label) -> scalar`; one that does not say of itself that it
            `is_over_ranks` is taken to be a mean over samples.
        lr_scheduler: Advanced once per applied step, never on a skipped one.
        steps_per_epoch: Optimizer steps in an epoch.
        accumulation_steps: Micro-batches in an optimizer step; the loss is their mean.
        grad_clip: Largest global 2-norm of the gradients; 0 turns clipping off.
        roi_size: Network input in voxels; given, it is checked before training starts.
        grace_s: Seconds within which a process ends after it got SIGTERM, SIGINT or SIGUSR1.
        replica: Of the network, where there are ranks; gradients pass through it.
        cuda_graph: `auto`, `cuda_graphs` or `none`: whether forward, loss and backward are replayed
            as a CUDA graph (`StepGraph`); `auto` does so on CUDA with one rank. Where a hook of a
            module or a handler of what is between wants to see it, there is no graph.
        initial_weights: Put in the place of the network's own of these names; a checkpoint's, which
            a handler restores, come after them.
        prepare_batch: `(batch, device, non_blocking) -> (image, label)`, augmentation included.
        inferer: MONAI inferer for the training patches.
        train_handlers: MONAI and ignite handlers, attached in this order.

    Attributes:
        progress: The run's `Progress`.
        last_step: `StepStats` of the latest optimizer step.
        group: Micro-batches of the current accumulation group, as the loader gave them.
        diagnosis: Why training stops before its end; `None` where it does not.
        peak_memory_bytes: Of training and validation on a CUDA device, when they have ended.
        trial_step: `TrialResult` of a new run, if a `TrialStep` is among the handlers.
        peak_reserved_bytes: The same with what the allocator keeps for later.
        interrupted: Whether training ends here, to be continued: decided before the handlers of a
            step, or of an epoch's end, save what it ends with.

    Raises:
        ValueError: If the network's weights are not float32, or `roi_size` is too small for it.
    """

    def __init__(
        self,
        precision: Precision,
        max_epochs: int,
        train_data_loader: Iterable,
        network: torch.nn.Module,
        optimizer: Optimizer,
        loss_function: Callable,
        lr_scheduler: LRScheduler,
        steps_per_epoch: int,
        accumulation_steps: int = 1,
        grad_clip: float = 12.0,
        roi_size: Sequence[int] | None = None,
        grace_s: float = 25.0,
        replica: SummedDDP | None = None,
        cuda_graph: str = "auto",
        initial_weights: Mapping[str, torch.Tensor] | None = None,
        train_handlers: list | None = None,
        **kwargs: Any,
    ) -> None:
        require_float32(network)
        limit: Any = getattr(network, "minimum_size", None)  # networks of others may have none
        smallest = limit() if roi_size and limit else ()
        if roi_size and any(n < least for n, least in zip(roi_size, smallest, strict=False)):
            raise ValueError(
                f"roi_size: expected at least {list(smallest)} for this network, got {roi_size}. "
                "Choose a larger roi_size or smaller strides."
            )
        if initial_weights:
            network.load_state_dict({**network.state_dict(), **initial_weights})
        self.precision = precision
        self.lr_scheduler = lr_scheduler
        rates = [group["lr"] for group in optimizer.param_groups]
        self._schedule = deepcopy(lr_scheduler.state_dict()), rates  # where a round begins
        self.steps_per_epoch = steps_per_epoch
        self.grad_clip = grad_clip
        self.grace_s, self.replica = grace_s, replica
        self.progress = Progress(mode=precision.mode)
        self.last_step: StepStats | None = None
        self.group: list[dict[str, Any]] = []
        self.diagnosis: str | None = None
        self.peak_memory_bytes: int | None = None
        self.peak_reserved_bytes: int | None = None
        self.trial_step: Any = None
        self.interrupted = self._told_to_end = False
        self._level = logging.ERROR  # of the diagnosis, on the rank that stops
        self._group_loss = self._max_abs_logit = torch.zeros((), device=precision.device)
        self._buffers = BufferSnapshot(network)
        self._cuda_graph = cuda_graph
        self._ahead = Prefetcher(lambda: self.data_loader, self._prepare, precision.device)
        super().__init__(
            device=precision.device,
            max_epochs=max_epochs,
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
        self._graph = self._step_graph()
        self.describe()  # refuses a backend that cannot serve here
        self.add_event_handler(Events.EPOCH_STARTED, _start_epoch)
        self._register_handlers(train_handlers or [])

    def run(self) -> None:  # type: ignore[override]
        """Train to `max_epochs`, from wherever a restored `progress` says.

        An epoch whose steps were all taken before an interruption, but whose end was not, is
        ended first. A finished run returns at once.

        A federated client calls it once a round, `state.max_epochs` raised in between: each round
        has the learning rates from their beginning, and the optimizer's moments, the loss scale
        and all counters from the round before.

        Raises:
            TrainingStopped: If a handler called `stop`.
            TrainingInterrupted: If a signal came, or a handler called `interrupt`.
        """
        log.info("%s", self.precision)
        asked, in_force = self.describe().values()
        for name in ("loss_backend", "cuda_graph"):
            log.info("%s in force: %s; asked for: %s", name, in_force[name], asked[name])
        if self.precision.device.type == "cpu":
            keep_freed_memory()
        require_equal_ranks(self.network, self.progress.step)
        if self.progress.phase == FINALIZING and self.progress.epoch < self.state.max_epochs:
            self._begin_round()
        self._started = time.monotonic() - self.progress.wall_time_s
        try:
            with interruptible(self.interrupt, self.grace_s):
                self._train()
        finally:
            self._end_graph()
        if self.precision.device.type == "cuda":  # before anything else is done there
            self.peak_memory_bytes = torch.cuda.max_memory_allocated(self.precision.device)
            self.peak_reserved_bytes = torch.cuda.max_memory_reserved(self.precision.device)
        if self.diagnosis is not None:
            log.log(self._level, "%s", self.diagnosis)
            raise TrainingStopped(self.diagnosis)
        if self.interrupted:
            log.info("Interrupted at step %d; the same command continues.", self.progress.step)
            raise TrainingInterrupted()

    def describe(self) -> dict[str, dict[str, Any]]:
        """What was asked for and what is in force: precision, backend of the loss, compilation.

        Raises:
            InputError: If the backend asked for cannot serve on this device.
        """
        described = self.precision.describe()
        backend: Any = getattr(self.loss_function, "in_force", None)
        classes: Any = getattr(self.network, "out_channels", 2)
        described["requested"] |= {
            "loss_backend": getattr(self.loss_function, "backend", None),
            "cuda_graph": self._cuda_graph,
        }
        described["effective"] |= {
            "loss_backend": backend(self.precision.device, classes) if backend else None,
            "cuda_graph": "cuda_graphs" if self._graph and self._graph.is_used else "none",
        }
        return described

    def _begin_round(self) -> None:
        self.progress.phase = STEPPING
        schedule, rates = self._schedule
        self.lr_scheduler.load_state_dict(deepcopy(schedule))
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def use(self, precision: Precision) -> None:
        """Go on in another precision, with the same weights and a fresh optimizer state."""
        precision.place(self.network)
        self.precision, self.amp = precision, precision.amp
        self.scaler = precision.scaler  # type: ignore[assignment]
        self.progress.mode = precision.mode
        self.optimizer.state.clear()
        self._graph = self._step_graph()
        self._buffers = BufferSnapshot(self.network)

    def _step_graph(self) -> StepGraph | None:
        if self._cuda_graph not in MODES:
            raise InputError(
                f"cuda_graph: expected one of {', '.join(MODES)}, got {self._cuda_graph!r}. "
                + nearest(str(self._cuda_graph), MODES)
            )
        possible = self.precision.device.type == "cuda" and not self.replica
        if self._cuda_graph == "cuda_graphs" and not possible:
            raise InputError(
                "cuda_graph: expected a CUDA device and one rank for cuda_graphs. Use auto."
            )
        if self._cuda_graph == "none" or not possible:
            return None
        return StepGraph(
            self._work,
            self.network,
            accumulates=self.accumulation_steps > 1,
            required=self._cuda_graph == "cuda_graphs",
        )

    def _end_graph(self) -> None:
        """Leave its memory to what comes after training."""
        if self._graph:
            self._graph.end()
            self.optimizer.zero_grad(set_to_none=True)

    def take_step(self, batches: Sequence[dict[str, Any]]) -> None:
        """One optimizer step over the micro-batches of one group, outside of a run."""
        for batch in batches:
            self.state.iteration += 1
            self._iteration(self, batch)

    def _train(self) -> None:
        try:
            if self.progress.phase == EPOCH_END_PENDING:
                self.fire_event(Events.EPOCH_COMPLETED)
            unfinished = self.progress.epoch < self.state.max_epochs
            going = self.diagnosis is None and not self.interrupted
            if unfinished and self.progress.phase == STEPPING and going:
                # not Trainer.run, which would put a new scaler in the place of the policy's
                super(Workflow, self).run(self._ahead, self.state.max_epochs)
        except RuntimeError as error:
            reason = distributed.loss_of(error) or describe_worker_failure(error)
            if reason is None:
                raise
            self.stop(reason)
        except OSError as error:
            if error.errno not in NOT_WRITTEN:
                raise
            self.stop(f"{error} The run ends; the checkpoints are as they were.")

    def stop(self, diagnosis: str) -> None:
        """End training after this step, because of what the first `diagnosis` says."""
        self.diagnosis = self.diagnosis or diagnosis
        self.terminate()

    def agree(self) -> None:
        """End training on all ranks where one was told to `stop`; all have to call it."""
        told = [
            diagnosis for diagnosis in distributed.all_gather_object(self.diagnosis) if diagnosis
        ]
        if told and self.diagnosis is None:
            self._level = logging.INFO
            self.stop(told[0])

    def interrupt(self) -> None:
        """End training at the next step or epoch's end; the same command continues it."""
        self._told_to_end = True

    def _heed(self, told_to_end: bool) -> None:
        """End here if any rank is told to; what comes later is for the next boundary."""
        self.interrupted = told_to_end
        if self.interrupted:
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
    def elapsed_s(self) -> float:
        """Seconds in training and validation so far, over all sessions of the run."""
        return time.monotonic() - self._started

    def end_epoch(self) -> None:
        """Mark the epoch's end work (validation) as done."""
        last = self.progress.epoch >= self.state.max_epochs
        self.progress.phase = FINALIZING if last else STEPPING
        if not last:
            self._heed(any(distributed.all_gather_object(self._told_to_end)))

    def finish(self) -> None:
        """Mark the run as done: it never trains again."""
        self.progress.phase = DONE

    def forward(
        self,
        batchdata: dict[str, Any],
        autocast: contextlib.AbstractContextManager,
        output: dict[str, Any],
        notify: Callable[[IterationEvents], object] = lambda event: None,
        network: torch.nn.Module | None = None,
        prepared: Prepared | None = None,
    ) -> torch.Tensor:
        """Loss of one micro-batch in train mode, which is a function of the batch and the weights.

        Args:
            batchdata: A micro-batch of the loader.
            autocast: Context for network and loss.
            output: Receives `image`, `label`, `pred` and `loss` as they come to be.
            notify: Called with MONAI's events.
            network: In the place of the trainer's own: its replica.
            prepared: What `prepare_batch` makes of the micro-batch, where it is there already.
        """
        network = network or self.network
        images, labels = self._inputs(batchdata, output, prepared)
        network.train()
        with autocast:
            output[Keys.PRED] = self.inferer(images, network)
            notify(IterationEvents.FORWARD_COMPLETED)
            loss = self.loss_function(output[Keys.PRED], labels)
            if distributed.size() > 1 and not getattr(self.loss_function, "is_over_ranks", False):
                loss = mean_over_ranks(loss, len(images))
            output[Keys.LOSS] = loss
            notify(IterationEvents.LOSS_COMPLETED)
        return output[Keys.LOSS]

    def _prepare(self, batchdata: dict[str, Any]) -> Prepared:
        """`prepare_batch`, which is to be a function of the batch, should it draw from torch."""
        torch.manual_seed(int(batchdata["seed"][0]))
        return self.prepare_batch(batchdata, self.state.device, self.non_blocking)

    def _inputs(
        self, batchdata: dict[str, Any], output: dict[str, Any], prepared: Prepared | None
    ) -> Prepared:
        """Image and label of a micro-batch, with torch's generator where its forward begins."""
        images, labels = prepared or self._prepare(batchdata)
        # dropout draws from torch's own generator: a function of the samples, not of the past
        torch.manual_seed(int(batchdata["seed"][0]))
        output |= {Keys.IMAGE: images, Keys.LABEL: labels}
        return images, labels

    def _work(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor | list[torch.Tensor], torch.Tensor]:
        """Forward, loss and backward with nothing in between, for `StepGraph`."""
        with self.precision.autocast():
            pred = self.inferer(images, self.network)
            loss = self.loss_function(pred, labels) / self.accumulation_steps
        self.precision.backward(loss)
        detached = [level.detach() for level in pred] if isinstance(pred, list) else pred.detach()
        return detached, loss.detach()

    def _backpropagate(self, batchdata: dict[str, Any], output: dict[str, Any]) -> torch.Tensor:
        """Loss of a micro-batch, its gradients added to the parameters'."""
        prepared = self._ahead.take(batchdata)
        events = IterationEvents.FORWARD_COMPLETED, IterationEvents.LOSS_COMPLETED
        watched = any(self._event_handlers.get(event) for event in events)
        if self._graph and not watched and not has_hooks(self.network):
            images, labels = self._inputs(batchdata, output, prepared)
            self.network.train()
            output[Keys.PRED], loss = self._graph(images, labels)
            output[Keys.LOSS] = loss * self.accumulation_steps
            for event in events:
                self.fire_event(event)
            return loss
        last = len(self.group) == self.accumulation_steps
        with self.replica.no_sync() if self.replica and not last else contextlib.nullcontext():
            autocast = self.precision.autocast()
            loss = self.forward(
                batchdata, autocast, output, self.fire_event, self.replica, prepared
            )
            loss = loss / self.accumulation_steps
            self.precision.backward(loss)
        return loss

    def _iteration(
        self, engine: SupervisedTrainer, batchdata: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if (self.state.iteration - 1) % self.accumulation_steps == 0:
            self._begin_step()
        self.group.append(batchdata)
        output: dict[str, Any] = {}
        self.state.output = output
        loss = self._backpropagate(batchdata, output)
        self._group_loss = self._group_loss + loss.detach()
        largest = torch.maximum(self._max_abs_logit, max_abs(output[Keys.PRED]))
        self._max_abs_logit = largest
        self.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if len(self.group) == self.accumulation_steps:
            self._optimizer_step(samples=len(output[Keys.IMAGE]) * self.accumulation_steps)
        else:
            self._ahead.fetch()
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return output

    def _begin_step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._buffers.take()
        self.group = []
        self._group_loss = self._max_abs_logit = torch.zeros((), device=self.state.device)

    def _optimizer_step(self, *, samples: int) -> None:
        if self.replica:
            self.replica.require_all_used()
        self.last_step = self.precision.step(
            self.optimizer,
            self._group_loss,
            self._max_abs_logit,
            self._buffers.norm(self.precision.device),
            grad_clip=self.grad_clip,
            counts=(samples, self._told_to_end),
            meanwhile=self._ahead.fetch,
        )
        applied, (samples_of_all, told_to_end) = self.last_step.applied, self.last_step.sums
        if applied:
            self.lr_scheduler.step()
            if self.replica:
                self.replica.settle()
        else:
            self._buffers.restore()
        self.progress.record_step(
            applied, samples=round(samples_of_all), steps_per_epoch=self.steps_per_epoch
        )
        self._heed(told_to_end > 0)
        self.fire_event(StepEvents.STEP_COMPLETED)


def max_abs(logits: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Largest |logit|, float32 scalar on the device; NaN if there is one. One pass, no copy."""
    levels = [logits] if isinstance(logits, torch.Tensor) else logits
    norms = [
        torch.linalg.vector_norm(level.detach(), math.inf, dtype=torch.float32) for level in levels
    ]
    return torch.stack(norms).max()


def _start_epoch(trainer: MixedPrecisionTrainer) -> None:
    """Let the sampler go on where the progress record stands."""
    loader: Any = trainer.data_loader
    loader.sampler.start = trainer.progress.samples
