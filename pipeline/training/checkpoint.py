"""Checkpoints by event handlers: what is saved, when, how it reaches the disk, how it returns.

A checkpoint is one file that `torch.load(weights_only=True)` accepts: tensors and plain values.

    schema_version   of this layout
    progress         the run's `Progress`, from which every counter is derived
    network          state_dict
    optimizer        state_dict
    lr_scheduler     state_dict
    scaler           state_dict of the gradient scaler, or None where none was in force
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import Evaluator

from pipeline.errors import InputError
from pipeline.training.progress import EPOCH_END_PENDING, SCHEMA_VERSION
from pipeline.training.trainer import MixedPrecisionTrainer, StepEvents

log = logging.getLogger(__name__)


def save_atomically(content: Any, path: Path) -> None:
    """`torch.save` that leaves either the old file or the whole new one, whatever happens."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def checkpoint_path(directory: Path, step: int) -> Path:
    """File name of the checkpoint after `step` optimizer steps; sorts by step."""
    return directory / f"step_{step:09d}.pt"


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints in `directory`, oldest first."""
    return sorted(directory.glob("step_*.pt"))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; nothing but tensors and plain values is accepted.

    Raises:
        InputError: If the file is not a checkpoint that this version can read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content.get("schema_version")
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: expected a checkpoint, got: {reason}. Remove it.") from error
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: expected checkpoint schema version {SCHEMA_VERSION}, got {version}. "
            "Continue the run with the version of this project that wrote it."
        )
    return content


class CheckpointHandler:
    """Saves and restores a trainer, and keeps the best network.

    Attached after the validation handler, it saves twice per epoch: when the last step is taken
    (so that a validation lost to a kill is caught up) and when the epoch's end is done.

    Args:
        run_dir: Gets `checkpoints/`, `models/model.pt` (best) and `models/last.pt`.
        validator: Its key metric decides which network is the best.
        keep: Checkpoints to keep.
        resume: Whether to continue from the newest checkpoint in `run_dir`.
    """

    def __init__(
        self, run_dir: str | Path, validator: Evaluator, *, keep: int = 2, resume: bool = True
    ) -> None:
        self.directory = Path(run_dir) / "checkpoints"
        self.models = Path(run_dir) / "models"
        self.validator = validator
        self.keep = keep
        self.resume = resume

    def attach(self, trainer: MixedPrecisionTrainer) -> None:
        """Restore the trainer if there is something to continue, then save on its events."""
        for directory in (self.directory, self.models):
            directory.mkdir(parents=True, exist_ok=True)
        found = checkpoints(self.directory) if self.resume else []
        if found:
            restore(trainer, load_checkpoint(found[-1]))
            log.info("Continuing from %s (step %d)", found[-1].name, trainer.progress.step)
        trainer.add_event_handler(StepEvents.STEP_COMPLETED, self.after_step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.after_epoch)

    def after_step(self, trainer: MixedPrecisionTrainer) -> None:
        """Save when the step was an epoch's last."""
        if trainer.progress.phase == EPOCH_END_PENDING:
            self.save(trainer)

    def after_epoch(self, trainer: MixedPrecisionTrainer) -> None:
        """Keep the network if validation found it the best, and save the epoch as complete."""
        state = self.validator.state
        # the evaluator's epoch tells whether it ran at the end of this one
        validated = state.key_metric_name in state.metrics and state.epoch == trainer.progress.epoch
        if validated and trainer.progress.record_metric(state.metrics[state.key_metric_name]):
            save_atomically(trainer.network.state_dict(), self.models / "model.pt")
        trainer.end_epoch()
        self.save(trainer)
        if trainer.progress.epoch >= trainer.state.max_epochs:
            save_atomically(trainer.network.state_dict(), self.models / "last.pt")

    def save(self, trainer: MixedPrecisionTrainer) -> None:
        """Write a checkpoint, then remove all but the newest `keep`."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "progress": trainer.progress.state_dict(),
            "network": trainer.network.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "lr_scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": trainer.scaler.state_dict() if trainer.scaler else None,
        }
        save_atomically(content, checkpoint_path(self.directory, trainer.progress.step))
        for old in checkpoints(self.directory)[: -self.keep]:
            old.unlink()


def restore(trainer: MixedPrecisionTrainer, checkpoint: dict[str, Any]) -> None:
    """Put a checkpoint's content into a trainer, and say where their precisions differ."""
    trainer.network.load_state_dict(checkpoint["network"])
    trainer.optimizer.load_state_dict(checkpoint["optimizer"])
    trainer.lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
    scaler, mode = checkpoint.get("scaler"), checkpoint["progress"]["mode"]
    if trainer.scaler and scaler:
        trainer.scaler.load_state_dict(scaler)
    elif trainer.scaler:
        log.warning(
            "The checkpoint has no scaler state (trained in %s): the loss scale starts at %g",
            mode,
            trainer.scaler.get_scale(),
        )
    elif scaler:
        log.warning(
            "The checkpoint's scaler state is not used: training goes on in %s without loss "
            "scaling (it was %s)",
            trainer.precision.mode,
            mode,
        )
    trainer.restore(checkpoint["progress"])
