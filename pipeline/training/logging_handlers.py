"""Event handlers that show how training goes: TensorBoard, `validation.json` and the console."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.engines import Evaluator
from monai.engines.utils import IterationEvents
from monai.transforms import Orientation
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline import distributed
from pipeline.drawing import outline_slice
from pipeline.files import nan_to_none, write_json
from pipeline.training.evaluator import metric_at_end_of
from pipeline.training.flight_recorder import underflow_fraction
from pipeline.training.progress import EPOCH_END_PENDING
from pipeline.training.trainer import MixedPrecisionTrainer, StepEvents

log = logging.getLogger(__name__)


class TensorBoardHandler:
    """Writes training and validation to TensorBoard, over optimizer steps.

    Every `log_every` steps, and at each skipped one: `train/loss`, `LR` (that the step used),
    `AMP/loss_scale`, `AMP/skipped_steps` (cumulative), `AMP/grad_norm` and `AMP/max_abs_logit`.
    Every `underflow_every` steps: `AMP/underflow_fraction`, the share of gradient elements that
    are zero although a float32 backward pass of the same batch gives them a value.

    At each validation: `val/mean_dice`, `val/dice_<class name>` and an image of one slice of the
    first case, the label outlined in green and the prediction in red.

    Args:
        run_dir: The event files go into its `tensorboard/`.
        validator: Its key metric and `state.metric_details` are shown.
        log_every: Optimizer steps between two points of the training curves.
        underflow_every: Optimizer steps between two measurements of underflow, each of which
            costs a step in float32; 0 makes none.
    """

    def __init__(
        self,
        run_dir: str | Path,
        validator: Evaluator,
        *,
        log_every: int = 10,
        underflow_every: int = 0,
    ) -> None:
        self.directory, self.validator = Path(run_dir) / "tensorboard", validator
        self.log_every, self.underflow_every = log_every, underflow_every
        self._writer: SummaryWriter | None = None
        self._present: set[str] = set()  # tags that have a point at the current step

    def attach(self, trainer: MixedPrecisionTrainer) -> None:
        """Listen to steps and epochs of `trainer`, and to the first case of each validation."""
        if not distributed.is_main():
            return
        self.trainer = trainer
        trainer.add_event_handler(Events.ITERATION_STARTED, self.before_step)
        if self.underflow_every > 0:
            trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.after_backward)
        trainer.add_event_handler(StepEvents.STEP_COMPLETED, self.after_step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.after_epoch)
        # what a checkpoint says was done is in the file before it
        trainer.add_event_handler(StepEvents.CHECKPOINT_STARTED, lambda _: self.writer.flush())
        trainer.add_event_handler(Events.COMPLETED, self.close)
        self.validator.add_event_handler(Events.ITERATION_COMPLETED(once=1), self.after_first_case)

    @property
    def writer(self) -> SummaryWriter:
        """The event file, opened when the trainer has been restored and its first step is known."""
        if self._writer is None:
            progress = self.trainer.progress
            if progress.phase == EPOCH_END_PENDING:
                self._present = self._tags_at(progress.step)
            # points after this step were written by a session whose steps were lost
            self._writer = SummaryWriter(str(self.directory), purge_step=progress.step + 1)
        return self._writer

    def _tags_at(self, step: int) -> set[str]:
        """Tags that have a point at `step`: a validation lost to a kill may have left some."""
        logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it logs every file
        events = EventAccumulator(str(self.directory), {"scalars": 0, "images": 0})
        events.Reload()
        tags = [(tag, events.Scalars) for tag in events.Tags()["scalars"]]
        tags += [(tag, events.Images) for tag in events.Tags()["images"]]
        return {tag for tag, points in tags if any(point.step == step for point in points(tag))}

    def before_step(self, trainer: MixedPrecisionTrainer) -> None:
        """Open the writer before the first step, and note the step's learning rate."""
        _ = self.writer
        self._lr = trainer.optimizer.param_groups[0]["lr"]

    def after_backward(self, trainer: MixedPrecisionTrainer) -> None:
        """Measure underflow where it is due, while weights and gradients belong together."""
        step = trainer.progress.step + 1
        if len(trainer.group) == trainer.accumulation_steps and step % self.underflow_every == 0:
            try:
                self.writer.add_scalar("AMP/underflow_fraction", underflow_fraction(trainer), step)
            except torch.OutOfMemoryError:
                log.warning("Step %d: no memory to measure underflow beside training", step)

    def after_step(self, trainer: MixedPrecisionTrainer) -> None:
        """Write one point of each training curve."""
        stats, progress = trainer.last_step, trainer.progress
        assert stats is not None
        if stats.applied and progress.step % self.log_every:
            return
        points = {"train/loss": stats.loss, "LR": self._lr}
        points["AMP/skipped_steps"] = progress.skipped_steps
        for name in ("loss_scale", "grad_norm", "max_abs_logit"):
            points[f"AMP/{name}"] = getattr(stats, name)
        for tag, value in points.items():
            self.writer.add_scalar(tag, value, progress.step)

    def after_first_case(self, validator: Evaluator) -> None:
        """Write a slice of the validation's first case."""
        writer, tag = self.writer, "val/first_case"
        if tag in self._present:
            return
        case = validator.state.output[0]
        to_ras = Orientation(axcodes="RAS", labels=None)  # files have any orientation
        volumes = [to_ras(case[key])[0].cpu().numpy() for key in ("image", "label", "pred")]
        picture = outline_slice(*volumes)
        writer.add_image(tag, picture, self.trainer.progress.step, dataformats="HWC")

    def after_epoch(self, trainer: MixedPrecisionTrainer) -> None:
        """Write the validation's metrics, if there was one at the end of this epoch."""
        metric = metric_at_end_of(trainer.progress.epoch, self.validator)
        if metric is not None:
            classes = _details(self.validator)["classes"]
            points = {"val/mean_dice": metric} | {f"val/dice_{n}": v for n, v in classes.items()}
            for tag, value in points.items():
                if tag not in self._present:
                    self.writer.add_scalar(tag, value, trainer.progress.step)
        self.writer.flush()
        self._present = set()

    def close(self, trainer: MixedPrecisionTrainer) -> None:
        """Close the event file; further training opens another."""
        self.writer.close()
        self._writer = None


def _details(validator: Evaluator) -> dict[str, Any]:
    return validator.state.metric_details[validator.state.key_metric_name]


class ScoreHandler:
    """Writes the Dice of every case at the latest validation to `validation.json`.

    Attached before the checkpoint handler, so that an epoch whose end is saved has its scores.

    Args:
        run_dir: Gets `validation.json`: `epoch`, `step`, and under `cases` for each case id the
            Dice of each class by name, null where the class is in neither label nor prediction.
        validator: Its `state.metric_details` has the scores.
    """

    def __init__(self, run_dir: str | Path, validator: Evaluator) -> None:
        self.path, self.validator = Path(run_dir) / "validation.json", validator

    def attach(self, trainer: MixedPrecisionTrainer) -> None:
        """Listen to epochs of `trainer`."""
        if distributed.is_main():
            trainer.add_event_handler(Events.EPOCH_COMPLETED, self.after_epoch)

    def after_epoch(self, trainer: MixedPrecisionTrainer) -> None:
        """Write the scores, if there was a validation at the end of this epoch."""
        progress = trainer.progress
        if metric_at_end_of(progress.epoch, self.validator) is None:
            return
        details = _details(self.validator)
        cases = {
            case_id: dict(zip(details["classes"], map(nan_to_none, dice), strict=True))
            for case_id, dice in details["cases"].items()
        }
        write_json(self.path, {"epoch": progress.epoch, "step": progress.step, "cases": cases})


class ConsoleHandler:
    """Shows a progress bar on a terminal, and prints one line per epoch.

    Args:
        validator: Its key metric is shown.
    """

    def __init__(self, validator: Evaluator) -> None:
        self.validator = validator
        self.bar: tqdm | None = None
        self._losses: list[float] = []

    def attach(self, trainer: MixedPrecisionTrainer) -> None:
        """Listen to steps and epochs of `trainer`."""
        if distributed.is_main():
            trainer.add_event_handler(StepEvents.STEP_COMPLETED, self.after_step)
            trainer.add_event_handler(Events.EPOCH_COMPLETED, self.after_epoch)
            trainer.add_event_handler(Events.COMPLETED, self.close)

    def after_step(self, trainer: MixedPrecisionTrainer) -> None:
        """Move the bar by one step."""
        assert trainer.last_step is not None
        if trainer.last_step.applied:  # the loss of a skipped step may be NaN
            self._losses.append(trainer.last_step.loss)
        if self.bar is None and sys.stderr.isatty():
            total = trainer.state.max_epochs * trainer.steps_per_epoch
            initial = trainer.progress.step - 1
            self.bar = tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{trainer.last_step.loss:.3f}", refresh=False)
            self.bar.update()

    def after_epoch(self, trainer: MixedPrecisionTrainer) -> None:
        """Print one line about the epoch that ended."""
        progress, max_epochs = trainer.progress, trainer.state.max_epochs
        metric = metric_at_end_of(progress.epoch, self.validator)
        remaining = trainer.elapsed_s / progress.epoch * (max_epochs - progress.epoch)
        parts = [
            f"epoch {progress.epoch}/{max_epochs}, step {progress.step}",
            f"loss {np.mean(self._losses):.4f}" if self._losses else "",
            f"mean Dice {metric:.4f}" if metric is not None else "",
            f"skipped steps {progress.skipped_steps}" if progress.skipped_steps else "",
            f"{trainer.elapsed_s:.0f} s, about {remaining:.0f} s left",
        ]
        self._losses.clear()
        with tqdm.external_write_mode():
            log.info(", ".join(filter(None, parts)))

    def close(self, trainer: MixedPrecisionTrainer) -> None:
        """Close the bar, so that what follows begins on a line of its own."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
