"""The event handler that shows how training goes: TensorBoard, `validation.json`, the console."""

from __future__ import annotations

import logging
import statistics
from pathlib import Path

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
from pipeline.progress_bar import ProgressBar
from pipeline.training.evaluator import metric_at_end_of
from pipeline.training.flight_recorder import underflow_fraction
from pipeline.training.progress import EPOCH_END_PENDING
from pipeline.training.trainer import MixedPrecisionTrainer, StepEvents

log = logging.getLogger(__name__)


class LoggingHandler:
    """Shows training and validation. It is attached before the checkpoint handler.

    TensorBoard, over optimizer steps: every `log_every` steps, and at each skipped one,
    `train/loss`, `LR` (that the step used), `AMP/loss_scale`, `AMP/skipped_steps` (cumulative),
    `AMP/grad_norm` and `AMP/max_abs_logit`; every `underflow_every` steps (0: never)
    `AMP/underflow_fraction`, for which the group is run in float32 too; at each validation
    `val/mean_dice`, `val/dice_<class name>` and an image of one slice of the first case, the label
    outlined in green and the prediction in red.

    `validation.json`, of the latest validation: `epoch`, `step`, and under `cases` for each case id
    the Dice of each class by name, null where the class is in neither label nor prediction.

    The console: a progress bar on a terminal, and one line per epoch.
    """

    def __init__(
        self,
        run_dir: str | Path,
        validator: Evaluator,
        *,
        log_every: int = 10,
        underflow_every: int = 0,
    ) -> None:
        self.run_dir, self.validator = Path(run_dir), validator
        self.log_every, self.underflow_every = log_every, underflow_every
        self.bar: ProgressBar | None = None  # shows nothing where there is no terminal
        self._losses: list[float] = []  # of the epoch
        self._writer: SummaryWriter | None = None
        self._present: set[str] = set()  # tags that have a point at the current step

    def attach(self, trainer: MixedPrecisionTrainer) -> None:
        """Listen to steps and epochs of `trainer`, and to the first case of each validation."""
        if not distributed.is_main():
            return
        self.trainer = trainer
        trainer.add_event_handler(Events.ITERATION_STARTED, self._before_step)
        if self.underflow_every > 0:
            trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._after_backward)
        trainer.add_event_handler(StepEvents.STEP_COMPLETED, self._after_step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._after_epoch)
        # what a checkpoint says was done is in the file before it
        trainer.add_event_handler(StepEvents.CHECKPOINT_STARTED, lambda _: self.writer.flush())
        trainer.add_event_handler(Events.COMPLETED, self._close)
        once = Events.ITERATION_COMPLETED(once=1)
        self.validator.add_event_handler(once, self._after_first_case)

    @property
    def writer(self) -> SummaryWriter:
        """The event file, opened when the trainer has been restored and its first step is known."""
        if self._writer is None:
            progress, directory = self.trainer.progress, str(self.run_dir / "tensorboard")
            if progress.phase == EPOCH_END_PENDING:
                self._present = _tags_at(directory, progress.step)
            # points after this step were written by a session whose steps were lost
            self._writer = SummaryWriter(directory, purge_step=progress.step + 1)
        return self._writer

    def _write(self, points: dict[str, float]) -> None:
        for tag, value in points.items():
            if tag not in self._present:
                self.writer.add_scalar(tag, value, self.trainer.progress.step)

    def _before_step(self, trainer: MixedPrecisionTrainer) -> None:
        _ = self.writer  # opened before the first step is counted
        self._lr = trainer.optimizer.param_groups[0]["lr"] * trainer.rate_factor

    def _after_backward(self, trainer: MixedPrecisionTrainer) -> None:
        """Measure underflow where it is due, while weights and gradients belong together."""
        step = trainer.progress.step + 1
        if len(trainer.group) == trainer.accumulation_steps and step % self.underflow_every == 0:
            self.writer.add_scalar("AMP/underflow_fraction", underflow_fraction(trainer), step)

    def _after_step(self, trainer: MixedPrecisionTrainer) -> None:
        stats, progress = trainer.last_step, trainer.progress
        assert stats is not None
        if not stats.applied or progress.step % self.log_every == 0:
            points = {"train/loss": stats.loss, "LR": self._lr}
            points["AMP/skipped_steps"] = progress.skipped_steps
            for name in ("loss_scale", "grad_norm", "max_abs_logit"):
                points[f"AMP/{name}"] = getattr(stats, name)
            self._write(points)
        if stats.applied:  # the loss of a skipped step may be NaN
            self._losses.append(stats.loss)
        if self.bar is None:
            total, done = trainer.state.max_epochs * trainer.steps_per_epoch, progress.step - 1
            self.bar = ProgressBar(total=total, initial=done, unit="step", dynamic_ncols=True)
        self.bar.set_postfix(loss=f"{stats.loss:.3f}", refresh=False)
        self.bar.update()

    def _after_first_case(self, validator: Evaluator) -> None:
        case = validator.state.output[0]
        to_ras = Orientation(axcodes="RAS", labels=None)  # files have any orientation
        volumes = [to_ras(case[key])[0].cpu().numpy() for key in ("image", "label", "pred")]
        picture, step = outline_slice(*volumes), self.trainer.progress.step
        self.writer.add_image("val/first_case", picture, step, dataformats="HWC")

    def _after_epoch(self, trainer: MixedPrecisionTrainer) -> None:
        state, progress = self.validator.state, trainer.progress
        metric = metric_at_end_of(progress.epoch, self.validator)
        if metric is not None:
            details = state.metric_details[state.key_metric_name]
            classes = details["classes"]
            self._write({"val/mean_dice": metric, **{f"val/dice_{n}": classes[n] for n in classes}})
            cases = {
                case_id: dict(zip(classes, map(nan_to_none, dice), strict=True))
                for case_id, dice in details["cases"].items()
            }
            content = {"epoch": progress.epoch, "step": progress.step, "cases": cases}
            write_json(self.run_dir / "validation.json", content)
        self.writer.flush()
        self._present = set()
        epochs, elapsed_s = trainer.state.max_epochs, trainer.elapsed_s
        remaining_s = elapsed_s / progress.epoch * (epochs - progress.epoch)
        parts = [
            f"epoch {progress.epoch}/{epochs}, step {progress.step}",
            f"loss {statistics.fmean(self._losses):.4f}" if self._losses else "",
            f"mean Dice {metric:.4f}" if metric is not None else "",
            f"skipped steps {progress.skipped_steps}" if progress.skipped_steps else "",
            f"{elapsed_s:.0f} s, about {remaining_s:.0f} s left",
        ]
        self._losses.clear()
        with tqdm.external_write_mode():
            log.info(", ".join(filter(None, parts)))

    def _close(self, trainer: MixedPrecisionTrainer) -> None:
        self.writer.close()
        if self.bar is not None:
            self.bar.close()
        self._writer = self.bar = None  # further training opens others


def _tags_at(directory: str, step: int) -> set[str]:
    """Tags that have a point at `step`: a validation lost to a kill may have left some."""
    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it logs every file
    events = EventAccumulator(directory, {"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {tag for tag in tags if step in [point.step for point in events.Scalars(tag)]}
