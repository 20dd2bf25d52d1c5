"""MONAI's supervised engines with one owner of precision.

Both are thin: events, state and handlers are MONAI's. What is ours is the iteration, since
MONAI's own hard-codes CUDA autocast, never unscales or clips, and makes a new scaler on each run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from ignite.engine import EventEnum, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer, Trainer
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeline.precision import Precision, StepStats
from pipeline.training.progress import DONE, EPOCH_END_PENDING, FINALIZING, STEPPING, Progress

log = logging.getLogger(__name__)


class StepEvents(EventEnum):
    """Events of optimizer steps, beside MONAI's iteration events of micro-batches."""

    STEP_COMPLETED = "step_completed"


class MixedPrecisionTrainer(SupervisedTrainer):
    """SupervisedTrainer whose numerics belong to a `Precision`.

    An ignite iteration is one micro-batch; an optimizer step takes `accumulation_steps` of them;
    an epoch is `steps_per_epoch` steps. `progress` is the truth about how far training is, and
    ignite's counters are set from it when a run continues.

    Args:
        precision: Owns device, autocast, scaler, clipping and the finite check.
        max_epochs: Epochs to train, in all sessions together.
        train_data_loader: Yields dictionaries with `image`, `label` and `seed`; its sampler has
            an attribute `start`, the number of the next sample.
        network: Network on the precision's device, with float32 weights.
        optimizer: Optimizer of its parameters.
        loss_function: `(logits, label) -> scalar`.
        lr_scheduler: Advanced once per applied step, never on a skipped one.
        steps_per_epoch: Optimizer steps in an epoch.
        accumulation_steps: Micro-batches in an optimizer step; the loss is their mean.
        grad_clip: Largest global 2-norm of the gradients; 0 turns clipping off.
        roi_size: Network input in voxels; given, it is checked before training starts.
        prepare_batch: `(batch, device, non_blocking) -> (image, label)`, augmentation included.
        inferer: MONAI inferer for the training patches.
        train_handlers: MONAI and ignite handlers, attached in this order.

    Attributes:
        progress: The run's `Progress`.
        last_step: `StepStats` of the latest optimizer step.

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
        train_handlers: list | None = None,
        **kwargs: Any,
    ) -> None:
        dtypes = {p.dtype for p in network.parameters()}
        if dtypes != {torch.float32}:
            raise ValueError(
                f"network: expected float32 weights, got {sorted(map(str, dtypes))}. "
                "Autocast lowers the precision by itself; do not call half()."
            )
        limit: Any = getattr(network, "minimum_size", None)  # networks of others may have none
        smallest = limit() if roi_size and limit else ()
        if roi_size and any(n < least for n, least in zip(roi_size, smallest, strict=False)):
            raise ValueError(
                f"roi_size: expected at least {list(smallest)} for this network, got {roi_size}. "
                "Choose a larger roi_size or smaller strides."
            )
        self.precision = precision
        self.lr_scheduler = lr_scheduler
        self.steps_per_epoch = steps_per_epoch
        self.grad_clip = grad_clip
        self.progress = Progress(mode=precision.mode)
        self.last_step: StepStats | None = None
        self._group_loss: torch.Tensor | None = None
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
        self.add_event_handler(Events.EPOCH_STARTED, _start_epoch)
        self._register_handlers(train_handlers or [])

    def run(self) -> None:  # type: ignore[override]
        """Train to `max_epochs`, from wherever a restored `progress` says.

        An epoch whose steps were all taken before an interruption, but whose end was not, is
        ended first. A finished run returns at once.
        """
        for what, settings in self.precision.describe().items():
            log.info("Precision %s: %s", what, ", ".join(f"{k} {v}" for k, v in settings.items()))
        self._started = time.monotonic() - self.progress.wall_time_s
        if self.progress.phase == EPOCH_END_PENDING:
            self.fire_event(Events.EPOCH_COMPLETED)
        if self.progress.epoch < self.state.max_epochs and self.progress.phase == STEPPING:
            # not Trainer.run, which would put a new scaler in the place of the policy's
            super(Trainer, self).run()

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
        self.progress.wall_time_s = self.elapsed_s

    def finish(self) -> None:
        """Mark the run as done: it never trains again."""
        self.progress.phase = DONE

    def _iteration(
        self, engine: SupervisedTrainer, batchdata: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        micro_batch = (self.state.iteration - 1) % self.accumulation_steps
        # dropout draws from torch's own generator: a function of the samples, not of the past
        torch.manual_seed(int(batchdata["seed"][0]))
        images, labels = self.prepare_batch(batchdata, self.state.device, self.non_blocking)
        output = self.state.output = {Keys.IMAGE: images, Keys.LABEL: labels}
        self.network.train()
        if micro_batch == 0:
            self.optimizer.zero_grad(set_to_none=True)
            self._group_loss = torch.zeros((), device=self.state.device)
        with self.precision.autocast():
            output[Keys.PRED] = self.inferer(images, self.network)
            self.fire_event(IterationEvents.FORWARD_COMPLETED)
            output[Keys.LOSS] = self.loss_function(output[Keys.PRED], labels)
            self.fire_event(IterationEvents.LOSS_COMPLETED)
        loss = output[Keys.LOSS] / self.accumulation_steps
        self.precision.backward(loss)
        self._group_loss += loss.detach()
        self.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if micro_batch == self.accumulation_steps - 1:
            self._optimizer_step(samples=len(images) * self.accumulation_steps)
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return output

    def _optimizer_step(self, *, samples: int) -> None:
        assert self._group_loss is not None
        self.last_step = self.precision.step(
            self.optimizer, self._group_loss, grad_clip=self.grad_clip
        )
        if self.last_step.applied:
            self.lr_scheduler.step()
        self.progress.record_step(
            self.last_step.applied, samples=samples, steps_per_epoch=self.steps_per_epoch
        )
        self.fire_event(StepEvents.STEP_COMPLETED)


def _start_epoch(trainer: MixedPrecisionTrainer) -> None:
    """Let the sampler go on where the progress record stands."""
    loader: Any = trainer.data_loader
    loader.sampler.start = trainer.progress.samples


class MixedPrecisionEvaluator(SupervisedEvaluator):
    """SupervisedEvaluator that predicts in the precision the trainer trains in.

    Args:
        precision: Owns device and autocast.
        kwargs: As SupervisedEvaluator takes them.
    """

    def __init__(self, precision: Precision, **kwargs: Any) -> None:
        self.precision = precision
        super().__init__(device=precision.device, amp=precision.amp, non_blocking=True, **kwargs)

    def _iteration(
        self, engine: SupervisedEvaluator, batchdata: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        images, labels = self.prepare_batch(batchdata, self.state.device, self.non_blocking)
        output = self.state.output = {Keys.IMAGE: images, Keys.LABEL: labels}
        with self.mode(self.network), self.precision.autocast():
            output[Keys.PRED] = self.inferer(images, self.network)
        self.fire_event(IterationEvents.FORWARD_COMPLETED)
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return self.state.output  # not `output`: handlers have put the decollated one in its place
