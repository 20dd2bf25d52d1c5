"""Checkpoints: what is saved, when, and how a trainer is restored from one.

A checkpoint is a file of tensors and plain values: `schema_version`, `progress`, from which every
counter is derived, and the states of `network`, `optimizer`, `lr_scheduler` and `scaler` (or None).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import Evaluator

from pipeline import distributed
from pipeline.errors import STOPS, InputError, require, some
from pipeline.files import WriteError, load, make_directory, save
from pipeline.training.evaluator import metric_at_end_of
from pipeline.training.progress import EPOCH_END_PENDING, SCHEMA_VERSION
from pipeline.training.trainer import MixedPrecisionTrainer, StepEvents

log = logging.getLogger(__name__)


def checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints in a directory, oldest first."""
    return sorted(directory.glob("step_*.pt"), key=_order)


def _order(path: Path) -> tuple[str, bool]:
    step, _, pending = path.stem.removeprefix("step_").partition("_")
    return step, not pending


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest checkpoint that is whole, by the checksums of its ZIP archive, if any.

    A damaged one is renamed to `<name>.damaged`, with a warning, and the one before is tried.
    """
    for path in reversed(checkpoints(directory)):
        try:
            with zipfile.ZipFile(path) as archive:
                fault = archive.testzip()
        except Exception as error:  # zipfile raises many kinds
            fault = str(error)
        if fault is None:
            return path
        with contextlib.suppress(OSError):
            os.replace(path, f"{path}.damaged")
        log.warning(
            "%s IS DAMAGED (%s). It is set aside as %s.damaged, and the checkpoint before it is "
            "used.", path, fault, path.name,
        )  # fmt: skip
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; nothing but tensors and plain values is accepted.

    Raises:
        InputError: If the file is not a checkpoint that this version can read.
    """
    try:
        content = load(path)
        version = content.get("schema_version")
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: expected a checkpoint, got: {reason}. Remove it.") from error
    expected = f"checkpoint schema version {SCHEMA_VERSION}"
    remedy = "Continue the run with the version of this project that wrote it."
    require(version == SCHEMA_VERSION, path, expected, version, remedy)
    return content


class CheckpointHandler:
    """Saves and restores a trainer, and keeps the best network.

    Attached last, it saves every `every` steps, when a run is interrupted, and twice at the end of
    an epoch: after the last step, so that a validation lost to a kill is repeated, and after the
    validation. A value that is not finite, or a full disk, ends training, and the files from before
    stay. All ranks restore, and the first one saves.

    Args:
        run_dir: Gets `checkpoints/`, `models/model.pt` (best; the last one where no validation ever
            was, as with fold `all`) and `models/last.pt`.
        validator: Its key metric decides which network is the best.
        keep: Checkpoints to keep, at least 2.
        every: Optimizer steps between two checkpoints, beside those at the ends of epochs.
        checkpoint: File to continue from.
        lost: Returns who has taken the run directory from this process, if anybody.
    """

    def __init__(
        self,
        run_dir: str | Path,
        validator: Evaluator,
        *,
        keep: int = 2,
        every: int = 500,
        checkpoint: Path | None = None,
        lost: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.directory, self.models = Path(run_dir) / "checkpoints", Path(run_dir) / "models"
        self.validator, self.keep = validator, max(keep, 2)  # the newest may turn out damaged
        self.every, self.checkpoint, self.lost = every, checkpoint, lost

    def attach(self, trainer: MixedPrecisionTrainer) -> None:
        """Restore the trainer if there is something to continue, then save on its events."""
        if distributed.is_main():
            make_directory(self.models)
            make_directory(self.directory)
        if self.checkpoint is not None:
            restore(trainer, load_checkpoint(self.checkpoint))
            log.info("Continuing from %s (step %d)", self.checkpoint.name, trainer.progress.step)
            if trainer.progress.phase != EPOCH_END_PENDING and _is_through(trainer):
                self._save_last(trainer)  # max_epochs may have been lowered
                trainer.agree()
        trainer.add_event_handler(StepEvents.STEP_COMPLETED, self.after_step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.after_epoch)

    def after_step(self, trainer: MixedPrecisionTrainer) -> None:
        """Save by count, at an epoch's last step, and before an interruption."""
        progress = trainer.progress
        pending = progress.phase == EPOCH_END_PENDING
        if pending or progress.step % self.every == 0 or trainer.interrupted:
            if trainer.diagnosis is None:  # a run that stops is not continued behind the stop
                self._save_checkpoint(trainer, "_pending" if pending else "")
            trainer.agree()

    def after_epoch(self, trainer: MixedPrecisionTrainer) -> None:
        """Keep the network if validation found it the best, and save the epoch as complete."""
        metric = metric_at_end_of(trainer.progress.epoch, self.validator)
        if metric is not None and not math.isfinite(metric):
            log.warning("The validation metric is %g; it is not counted", metric)
        if metric is not None and trainer.progress.record_metric(metric):
            self._save_model(trainer, "model.pt")
        if _is_through(trainer):
            self._save_last(trainer)  # before the checkpoint after which nothing is left to do
        trainer.end_epoch()
        self._save_checkpoint(trainer)
        trainer.agree()

    def _save_last(self, trainer: MixedPrecisionTrainer) -> None:
        self._save_model(trainer, "last.pt")
        if trainer.progress.best_metric is None and not self.validator.state.metrics:
            self._save_model(trainer, "model.pt")  # which a bundle predicts with

    def _save_model(self, trainer: MixedPrecisionTrainer, name: str) -> None:
        self._save(trainer, trainer.network.state_dict(), self.models / name)

    def _save_checkpoint(self, trainer: MixedPrecisionTrainer, suffix: str = "") -> None:
        trainer.progress.wall_time_s = trainer.elapsed_s
        content = {
            "schema_version": SCHEMA_VERSION,
            "progress": trainer.progress.state_dict(),
            "network": trainer.network.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "lr_scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": trainer.scaler.state_dict() if trainer.scaler else None,
        }
        trainer.fire_event(StepEvents.CHECKPOINT_STARTED)
        name = f"step_{trainer.progress.step:09d}{suffix}.pt"
        self._save(trainer, content, self.directory / name)

    def _save(self, trainer: MixedPrecisionTrainer, content: Any, path: Path) -> None:
        """Write a file, or stop training where it is not finite or cannot be written."""
        if not distributed.is_main():
            return
        if holder := self.lost():
            trainer.stop(
                f"output_dir: expected {self.models.parent} to be held by this process, got: "
                f"{holder} has taken it over. Nothing was written; the same command continues."
            )
        elif names := non_finite(content):
            trainer.stop(
                f"{path.name}: expected finite values, got NaN or infinity in {some(names)}. "
                f"{STOPS}; the files from before stay. Lower learning_rate, or look at the range "
                "of the images."
            )
        else:
            try:
                save(content, path)
                self._remove_old()
            except WriteError as error:
                trainer.stop(f"{error} The run ends; the files from before stay as they were.")

    def _remove_old(self) -> None:
        """Remove all checkpoints but the latest of each of the `keep` newest steps."""
        present = checkpoints(self.directory)
        latest = {_order(path)[0]: path for path in present}
        for path in {*present} - {*[*latest.values()][-self.keep :]}:
            path.unlink(missing_ok=True)


def _is_through(trainer: MixedPrecisionTrainer) -> bool:
    return trainer.progress.epoch >= trainer.state.max_epochs


def restore(trainer: MixedPrecisionTrainer, checkpoint: dict[str, Any]) -> None:
    """Put a checkpoint's content into a trainer, and say where their precisions differ."""
    trainer.network.load_state_dict(checkpoint["network"])
    _restore_optimizer(trainer, checkpoint)
    scaler, mode = checkpoint.get("scaler"), checkpoint["progress"]["mode"]
    if trainer.scaler and scaler:
        trainer.scaler.load_state_dict(scaler)
    elif trainer.scaler or scaler:
        text = "Training goes on in %s; the checkpoint's loss scale (trained in %s) is not used"
        log.warning(text, trainer.precision.mode, mode)
    trainer.restore(checkpoint["progress"])


def _restore_optimizer(trainer: MixedPrecisionTrainer, checkpoint: dict[str, Any]) -> None:
    """Restore the moments; rates and other options are those of the config at this step."""
    optimizer, state = trainer.optimizer, checkpoint["lr_scheduler"]
    progress = checkpoint["progress"]
    given = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(checkpoint["optimizer"])
    for group, options in zip(optimizer.param_groups, given, strict=True):
        group.update(options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        for _ in range(state.get("last_epoch", progress["step"] - progress["skipped_steps"])):
            trainer.lr_scheduler.step()


def non_finite(content: Any, name: str = "") -> list[str]:
    """Name the floats and tensors of nested content that are not finite: `network.head.weight`."""
    if isinstance(content, dict | list | tuple):
        children = content.items() if isinstance(content, dict) else enumerate(content)
        prefix = f"{name}." if name else ""
        return [found for key, child in children for found in non_finite(child, f"{prefix}{key}")]
    if isinstance(content, torch.Tensor):
        finite = not content.is_floating_point() or bool(content.isfinite().all())
    else:
        finite = not isinstance(content, float) or math.isfinite(content)
    return [] if finite else [name]
