"""The event handler that shows how training goes: TensorBoard, `validation.json`, the console."""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter, defaultdict
from pathlib import Path

import nibabel as nib
import numpy as np
from ignite.engine import Events
from monai.engines import Evaluator
from monai.engines.utils import IterationEvents
from monai.transforms import Orientation
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline import distributed
from pipeline.data.dataset import Cases
from pipeline.drawing import CaseVolumes, draw_plane
from pipeline.errors import as_bool
from pipeline.files import nan_to_none, write_json
from pipeline.progress_bar import ProgressBar, format_duration
from pipeline.training.evaluator import metric_at_end_of
from pipeline.training.flight_recorder import underflow_fraction
from pipeline.training.progress import EPOCH_END_PENDING
from pipeline.training.trainer import MixedPrecisionTrainer, StepEvents

log = logging.getLogger(__name__)

UPDATE = "weight_update/"  # group of tags that stands after `train` and `val`
NUM_WEIGHTS = 2  # best and last, with which the final scores predict each case


class TimeLeft:
    """Estimates the time that a run still takes, from this session's steps and validations.

    Validations are every `val_interval` epochs; `scored` has the cases of the final scores. Scoring
    a case is taken to last as long as validating it.
    """

    def __init__(self, val_interval: int, scored: Cases | None) -> None:
        self.val_interval, self.scored = val_interval, scored
        self._began: float | None = None
        self._spent_s, self._number = defaultdict[str, float](float), Counter[str]()

    def count(self, what: str) -> None:
        """End what began at the last call; the first step, in which much is set up, is left out."""
        now = time.monotonic()
        if self._began is not None:
            self._spent_s[what] += now - self._began
            self._number[what] += 1
        self._began = now

    def describe(self, trainer: MixedPrecisionTrainer) -> str:
        """Return the estimate in words; validations are in it when one was timed."""
        step_s, validation_s = (
            self._spent_s[what] / max(self._number[what], 1) for what in ("step", "validation")
        )
        progress, epochs, scored = trainer.progress, trainer.state.max_epochs, self.scored
        num_validations: float = epochs // self.val_interval - progress.epoch // self.val_interval
        has_scores = bool(validation_s and scored and scored.validation)
        if scored and has_scores:
            num_validations += NUM_WEIGHTS * (1 + len(scored.test) / len(scored.validation))
        num_steps = epochs * trainer.steps_per_epoch - progress.step
        left_s = num_steps * step_s + num_validations * validation_s
        words = f"about {format_duration(left_s)} left{' with scores' * has_scores}"
        return words if left_s >= 0.5 else ""


class LoggingHandler:
    """Shows training and validation. It is attached before the checkpoint handler.

    TensorBoard, over optimizer steps: every `log_every` steps, at each skipped one and at the last
    one of an epoch, `train/loss`, and under `weight_update/` `lr` (that the step used),
    `loss_scale`, `skipped_steps` (cumulative), `grad_norm` and `max_abs_logit`; every
    `underflow_every` steps (0: never) `underflow_fraction`, for which the group is run in float32
    too; at each validation `val/mean_dice`, `val/mean_dice_<class name>` and an image of one slice
    of the first case, the label outlined in green and the prediction in red. TensorBoard sorts
    groups and tags by name and opens the first two groups: loss and mean Dice.

    `validation.json`, of the latest validation: `epoch`, `step`, and under `cases` for each case id
    the Dice of each class by name, null where the class is in neither label nor prediction.

    The console: a progress bar on a terminal, and one line per epoch. Both say how much time is
    left, with that of the `final_scores` of `cases`; see `TimeLeft`.
    """

    def __init__(
        self,
        run_dir: str | Path,
        validator: Evaluator,
        *,
        log_every: int = 10,
        underflow_every: int = 0,
        val_interval: int = 1,
        cases: Cases | None = None,
        final_scores: bool | str = False,
    ) -> None:
        self.run_dir, self.validator = Path(run_dir), validator
        self.log_every, self.underflow_every = log_every, underflow_every
        scored = cases if as_bool(final_scores, "final_scores") else None
        self.time_left = TimeLeft(val_interval, scored)
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
            self.writer.add_scalar(UPDATE + "underflow_fraction", underflow_fraction(trainer), step)

    def _after_step(self, trainer: MixedPrecisionTrainer) -> None:
        stats, progress = trainer.last_step, trainer.progress
        assert stats is not None
        ends_epoch = progress.phase == EPOCH_END_PENDING
        if not stats.applied or progress.step % self.log_every == 0 or ends_epoch:
            points = {"train/loss": stats.loss, f"{UPDATE}lr": self._lr}
            points[f"{UPDATE}skipped_steps"] = progress.skipped_steps
            for name in ("loss_scale", "grad_norm", "max_abs_logit"):
                points[f"{UPDATE}{name}"] = getattr(stats, name)
            self._write(points)
        self.time_left.count("step")
        if stats.applied:  # the loss of a skipped step may be NaN
            self._losses.append(stats.loss)
        if self.bar is None:
            total, done = trainer.state.max_epochs * trainer.steps_per_epoch, progress.step - 1
            self.bar = ProgressBar(desc="Training", total=total, initial=done, unit="step")
        self.bar.left = self.time_left.describe(trainer)
        self.bar.set_postfix_str(f"loss {stats.loss:.3f}", refresh=False)
        self.bar.update()

    def _after_first_case(self, validator: Evaluator) -> None:
        case = validator.state.output[0]
        to_ras = Orientation(axcodes="RAS", labels=None)  # files have any orientation
        volumes = [to_ras(case[key]) for key in ("image", "label", "pred")]
        image, label, pred = (volume[0].cpu().numpy() for volume in volumes)
        spacing_mm = nib.affines.voxel_sizes(np.asarray(getattr(volumes[0], "affine", np.eye(4))))
        picture = draw_plane(CaseVolumes(image, label, pred, spacing_mm), "axial")
        step = self.trainer.progress.step
        self.writer.add_image("val/first_case", np.array(picture), step, dataformats="HWC")

    def _after_epoch(self, trainer: MixedPrecisionTrainer) -> None:
        state, progress = self.validator.state, trainer.progress
        metric = metric_at_end_of(progress.epoch, self.validator)
        if metric is not None:
            details = state.metric_details[state.key_metric_name]
            classes = details["classes"]
            by_class = {f"val/mean_dice_{name}": classes[name] for name in classes}
            self._write({"val/mean_dice": metric} | by_class)
            cases = {
                case_id: dict(zip(classes, map(nan_to_none, dice), strict=True))
                for case_id, dice in details["cases"].items()
            }
            content = {"epoch": progress.epoch, "step": progress.step, "cases": cases}
            write_json(self.run_dir / "validation.json", content)
        self.writer.flush()
        self._present = set()
        self.time_left.count("rest" if metric is None else "validation")
        parts = [
            f"epoch {progress.epoch}/{trainer.state.max_epochs}, step {progress.step}",
            f"loss {statistics.fmean(self._losses):.4f}" if self._losses else "",
            f"mean Dice {metric:.4f}" if metric is not None else "",
            f"skipped steps {progress.skipped_steps}" if progress.skipped_steps else "",
            format_duration(trainer.elapsed_s),
            self.time_left.describe(trainer),
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
