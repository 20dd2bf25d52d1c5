"""Event handlers that tell people how training goes: TensorBoard and the console."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
from ignite.engine import Events
from monai.engines import Evaluator
from monai.transforms import Orientation
from scipy import ndimage
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline.training.trainer import MixedPrecisionTrainer, StepEvents

log = logging.getLogger(__name__)


class TensorBoardHandler:
    """Writes training and validation to TensorBoard, over optimizer steps.

    Every `log_every` steps, and at each skipped one: `train/loss`, `LR` (that the step used),
    `AMP/loss_scale`, `AMP/skipped_steps` (cumulative) and `AMP/grad_norm`. At each validation:
    `val/mean_dice`, `val/dice_<class name>` and an image of one slice of the first case, the
    label outlined in green and the prediction in red.

    Args:
        run_dir: The event files go into its `tensorboard/`.
        validator: Its key metric is `val/mean_dice`; details of the classes come from its
            `state.metric_details`.
        log_every: Optimizer steps between two points of the training curves.
    """

    def __init__(self, run_dir: str | Path, validator: Evaluator, *, log_every: int = 10) -> None:
        self.directory = Path(run_dir) / "tensorboard"
        self.validator = validator
        self.log_every = log_every
        self._writer: SummaryWriter | None = None

    def attach(self, trainer: MixedPrecisionTrainer) -> None:
        """Listen to steps and epochs of `trainer`, and to the first case of each validation."""
        self.trainer = trainer
        trainer.add_event_handler(Events.ITERATION_STARTED, self.before_step)
        trainer.add_event_handler(StepEvents.STEP_COMPLETED, self.after_step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.after_epoch)
        trainer.add_event_handler(Events.COMPLETED, self.close)
        self.validator.add_event_handler(Events.ITERATION_COMPLETED(once=1), self.after_first_case)

    @property
    def writer(self) -> SummaryWriter:
        """Opened late: where it starts is known only when the trainer has been restored."""
        if self._writer is None:
            # points after this step were written by a session whose steps were lost
            purge = self.trainer.progress.step + 1
            self._writer = SummaryWriter(str(self.directory), purge_step=purge)
        return self._writer

    def before_step(self, trainer: MixedPrecisionTrainer) -> None:
        """Open the writer before the first step, and note the step's learning rate."""
        _ = self.writer
        self._lr = trainer.optimizer.param_groups[0]["lr"]

    def after_step(self, trainer: MixedPrecisionTrainer) -> None:
        """Write one point of each training curve."""
        stats, progress = trainer.last_step, trainer.progress
        assert stats is not None
        if stats.applied and progress.step % self.log_every:
            return
        points = {
            "train/loss": stats.loss,
            "LR": self._lr,
            "AMP/loss_scale": stats.loss_scale,
            "AMP/skipped_steps": progress.skipped_steps,
            "AMP/grad_norm": stats.grad_norm,
        }
        for tag, value in points.items():
            self.writer.add_scalar(tag, value, progress.step)

    def after_first_case(self, validator: Evaluator) -> None:
        """Write a slice of the validation's first case."""
        case = validator.state.output[0]
        to_ras = Orientation(axcodes="RAS", labels=None)  # files have any orientation
        volumes = [to_ras(case[key])[0].cpu().numpy() for key in ("image", "label", "pred")]
        picture = outline_slice(*volumes)
        self.writer.add_image(
            "val/first_case", picture, self.trainer.progress.step, dataformats="HWC"
        )

    def after_epoch(self, trainer: MixedPrecisionTrainer) -> None:
        """Write the validation's metrics, if there was one at the end of this epoch."""
        state, step = self.validator.state, trainer.progress.step
        if state.key_metric_name in state.metrics and state.epoch == trainer.progress.epoch:
            self.writer.add_scalar("val/mean_dice", state.metrics[state.key_metric_name], step)
            for name, dice in state.metric_details[state.key_metric_name]["classes"].items():
                self.writer.add_scalar(f"val/dice_{name}", dice, step)
        self.writer.flush()

    def close(self, trainer: MixedPrecisionTrainer) -> None:
        """Close the event file; training on opens another."""
        self.writer.close()
        self._writer = None


def outline_slice(image: np.ndarray, label: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Picture of the axial slice with most foreground, label and prediction outlined.

    Args:
        image: `(H, W, D)` intensities; all three in RAS orientation.
        label: `(H, W, D)` integer reference, outlined in green.
        pred: `(H, W, D)` integer prediction, outlined in red; yellow where both run together.

    Returns:
        `(4 W, 4 H, 3)` uint8, anterior at the top, the patient's left on the left.
    """
    k = int((label > 0).sum(axis=(0, 1)).argmax())
    plane = image[:, :, k].astype(np.float32)
    low, high = np.percentile(plane, [1, 99])
    grey = np.clip((plane - low) / max(float(high - low), 1e-6), 0, 1) * 255
    rgb = np.repeat(_enlarge(grey)[..., None], 3, axis=2)
    outlines = [_outline(_enlarge(labels[:, :, k])) for labels in (label, pred)]
    rgb[outlines[0] | outlines[1]] = 0
    rgb[outlines[0], 1] = 255
    rgb[outlines[1], 0] = 255
    # the second voxel axis runs to the patient's anterior, which is drawn upwards
    return np.rot90(rgb).astype(np.uint8).copy()


def _enlarge(plane: np.ndarray, factor: int = 4) -> np.ndarray:
    return plane.repeat(factor, axis=0).repeat(factor, axis=1)


def _outline(labels: np.ndarray) -> np.ndarray:
    """Voxels whose neighbourhood holds another label and that are foreground themselves."""
    inner = ndimage.minimum_filter(labels, size=3) == ndimage.maximum_filter(labels, size=3)
    return (labels > 0) & ~inner


class ConsoleHandler:
    """A progress bar on a terminal, one plain line per epoch elsewhere.

    Args:
        validator: Its key metric is shown.
    """

    def __init__(self, validator: Evaluator) -> None:
        self.validator = validator
        self.bar: tqdm | None = None
        self._losses: list[float] = []

    def attach(self, trainer: MixedPrecisionTrainer) -> None:
        """Listen to steps and epochs of `trainer`."""
        trainer.add_event_handler(StepEvents.STEP_COMPLETED, self.after_step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.after_epoch)
        trainer.add_event_handler(Events.COMPLETED, self.close)

    def after_step(self, trainer: MixedPrecisionTrainer) -> None:
        """Move the bar by one step."""
        assert trainer.last_step is not None
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
        progress, state = trainer.progress, self.validator.state
        parts = [f"epoch {progress.epoch}/{trainer.state.max_epochs}", f"step {progress.step}"]
        if self._losses:
            parts.append(f"loss {np.mean(self._losses):.4f}")
        if state.key_metric_name in state.metrics and state.epoch == progress.epoch:
            parts.append(f"mean Dice {state.metrics[state.key_metric_name]:.4f}")
        if progress.skipped_steps:
            parts.append(f"skipped steps {progress.skipped_steps}")
        seconds = trainer.elapsed_s
        remaining = seconds / progress.epoch * (trainer.state.max_epochs - progress.epoch)
        parts.append(f"{seconds:.0f} s, about {remaining:.0f} s left")
        self._losses.clear()
        with tqdm.external_write_mode():
            log.info(", ".join(parts))

    def close(self, trainer: MixedPrecisionTrainer) -> None:
        """Leave the terminal tidy."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
