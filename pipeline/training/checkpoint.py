"""Checkpoints: what is saved, when, and how a trainer is restored from one.

A checkpoint is one file that `torch.load(weights_only=True)` accepts: tensors and plain values.

    schema_version   of this layout
    progress         the run's `Progress`, from which every counter is derived
    network          state_dict
    optimizer        state_dict
    learning_rate    that the optimizer was made with
    lr_scheduler     state_dict
    scaler           state_dict of the gradient scaler, or None where none was in force
"""

from __future__ import annotations

import inspect
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import Evaluator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pipeline import distributed
from pipeline.errors import STOPS, InputError
from pipeline.files import CheckpointStore, WriteError, load, make_directory, save
from pipeline.training.evaluator import metric_at_end_of
from pipeline.training.progress import EPOCH_END_PENDING, SCHEMA_VERSION
from pipeline.training.trainer import MixedPrecisionTrainer, StepEvents

log = logging.getLogger(__name__)

RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # of a parameter group
# of a group too, where the scheduler cycles the momentum
MOMENTA = ("base_momentum", "max_momentum", "momentum", "betas")


def checkpoints(directory: Path) -> list[Path]:
    """Return the acknowledged checkpoints in `directory`, oldest first."""
    return CheckpointStore(directory).acknowledged()


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
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: expected checkpoint schema version {SCHEMA_VERSION}, got {version}. "
            "Continue the run with the version of this project that wrote it."
        )
    return content


class CheckpointHandler:
    """Saves and restores a trainer, and keeps the best network.

    Attached last, it saves every `every` steps, when a run is interrupted, and twice at the end of
    an epoch: after the last step, so that a validation lost to a kill is repeated, and after the
    validation. What is not finite, or does not fit on the disk, is not written: training stops, and
    the files from before stay. Of several ranks all restore, and the first one saves.

    Args:
        run_dir: Gets `checkpoints/`, `models/model.pt` (best; the last one where no validation ever
            was, as with fold `all`) and `models/last.pt`.
        validator: Its key metric decides which network is the best.
        keep: Checkpoints to keep, at least 2.
        every: Optimizer steps between two checkpoints, beside those at the ends of epochs.
        checkpoint: File to continue from.
        lost: Returns who has taken the run directory from this process, `None` if nobody has.
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
        self.store = CheckpointStore(Path(run_dir) / "checkpoints", keep=keep)
        self.models, self.validator = Path(run_dir) / "models", validator
        self.every, self.checkpoint, self.lost = every, checkpoint, lost

    def attach(self, trainer: MixedPrecisionTrainer) -> None:
        """Restore the trainer if there is something to continue, then save on its events."""
        with distributed.sync_errors():
            if distributed.is_main():
                make_directory(self.models)
                self._check_room(trainer)
        if self.checkpoint is not None:
            restore(trainer, load_checkpoint(self.checkpoint))
            log.info("Continuing from %s (step %d)", self.checkpoint.name, trainer.progress.step)
            if trainer.progress.phase != EPOCH_END_PENDING and _is_through(trainer):
                self._save_last(trainer)  # max_epochs may have been lowered
                trainer.agree()
        trainer.add_event_handler(StepEvents.STEP_COMPLETED, self.after_step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.after_epoch)

    def _check_room(self, trainer: MixedPrecisionTrainer) -> None:
        """Refuse to start where the files to come do not fit: weights, and Adam's two moments."""
        weights = 4 * sum(p.numel() for p in trainer.network.parameters())
        present = [*self.store.acknowledged(), *self.models.glob("*.pt")]
        wanted = 3 * weights * (self.store.keep + 1) + 2 * weights
        wanted -= sum(path.stat().st_size for path in present)
        if (free := shutil.disk_usage(self.models).free) < wanted:
            raise InputError(
                f"{self.models.parent}: expected {wanted} bytes free for checkpoints and models, "
                f"got {free}. Make room or choose another output_dir."
            )

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
        weights = trainer.network.state_dict()
        self._write(trainer, weights, name, lambda: save(weights, self.models / name))

    def _save_checkpoint(self, trainer: MixedPrecisionTrainer, suffix: str = "") -> None:
        name = f"step_{trainer.progress.step:09d}{suffix}.pt"
        trainer.progress.wall_time_s = trainer.elapsed_s
        content = {
            "schema_version": SCHEMA_VERSION,
            "progress": trainer.progress.state_dict(),
            "network": trainer.network.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "learning_rate": configured_rate(trainer.optimizer),
            "lr_scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": trainer.scaler.state_dict() if trainer.scaler else None,
        }
        trainer.fire_event(StepEvents.CHECKPOINT_STARTED)
        self._write(trainer, content, name, lambda: self.store.save(content, name))

    def _write(
        self, trainer: MixedPrecisionTrainer, content: Any, name: str, write: Callable[[], object]
    ) -> None:
        """Call `write`, or stop training where `content` is not finite or cannot be written."""
        if not distributed.is_main():
            return
        if holder := self.lost():
            trainer.stop(
                f"output_dir: expected {self.models.parent} to be held by this process, got: "
                f"{holder} has taken it over. The run ends; nothing was written. The same command "
                "goes on from the newest checkpoint."
            )
        elif names := non_finite(content):
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
            trainer.stop(
                f"{name}: expected finite values, got NaN or infinity in {shown}. {STOPS}; "
                "nothing was written, the files from before stay. Lower learning_rate, or "
                "look at the range of the images."
            )
        else:
            try:
                write()
            except WriteError as error:
                trainer.stop(f"{error} The run ends; the files from before stay as they were.")


def _is_through(trainer: MixedPrecisionTrainer) -> bool:
    return trainer.progress.epoch >= trainer.state.max_epochs


def restore(trainer: MixedPrecisionTrainer, checkpoint: dict[str, Any]) -> None:
    """Put a checkpoint's content into a trainer, and say where their precisions differ."""
    trainer.network.load_state_dict(checkpoint["network"])
    _restore_optimizer(trainer, checkpoint)
    scaler, mode = checkpoint.get("scaler"), checkpoint["progress"]["mode"]
    if trainer.scaler and scaler:
        trainer.scaler.load_state_dict(scaler)
    elif trainer.scaler:
        text = "The checkpoint has no scaler state (trained in %s): the loss scale starts at %g"
        log.warning(text, mode, trainer.scaler.get_scale())
    elif scaler:
        text = "The checkpoint's scaler state is not used: training goes on in %s (it was %s)"
        log.warning(text, trainer.precision.mode, mode)
    trainer.restore(checkpoint["progress"])


def _restore_optimizer(trainer: MixedPrecisionTrainer, checkpoint: dict[str, Any]) -> None:
    """Restore moments and schedule; rates and weight decay become those of the config."""
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    given = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    arguments = inspect.signature(type(scheduler)).parameters.keys() - {"last_epoch"}
    settings = {name: value for name, value in vars(scheduler).items() if name in arguments}
    base_rates = list(getattr(scheduler, "base_lrs", ()))
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["lr_scheduler"])
    vars(scheduler).update(settings)  # such as total_iters, where it is @warmup_steps
    if isinstance(scheduler, LambdaLR):
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        scheduler.base_lrs = base_rates
        for group, options, base, factor in zip(
            optimizer.param_groups, given, base_rates, factors, strict=True
        ):
            group.update(options, lr=base * factor)
        return
    for group, options in zip(optimizer.param_groups, given, strict=True):
        kept = (*RATES, *MOMENTA) if "max_momentum" in group else RATES
        group.update({name: value for name, value in options.items() if name not in kept})
    before, now = checkpoint.get("learning_rate"), configured_rate(optimizer)
    if before and now != before:
        _scale_rates(optimizer.param_groups, scheduler, now / before)


def configured_rate(optimizer: Optimizer) -> float:
    """Return the learning rate that the optimizer was made with, before any schedule."""
    return float(optimizer.defaults["lr"])


def _scale_rates(groups: list[dict[str, Any]], scheduler: Any, factor: float) -> None:
    """Multiply the current rates and those that a scheduler, or one inside it, starts from."""
    for group in groups:
        group.update({name: group[name] * factor for name in RATES if name in group})
    for one in (scheduler, *getattr(scheduler, "_schedulers", ())):
        for name in ("base_lrs", "max_lrs", "_last_lr"):
            if name in vars(one):
                setattr(one, name, [rate * factor for rate in getattr(one, name)])


def non_finite(content: Any, name: str = "") -> list[str]:
    """Name the floats and tensors in nested dictionaries and lists that are not finite.

    Returns:
        Names such as `network.head.weight`, below that of `content`; empty if all is finite.
    """
    if isinstance(content, dict | list | tuple):
        children = content.items() if isinstance(content, dict) else enumerate(content)
        prefix = f"{name}." if name else ""
        return [found for key, child in children for found in non_finite(child, f"{prefix}{key}")]
    if isinstance(content, torch.Tensor):
        finite = not content.is_floating_point() or bool(content.isfinite().all())
    else:
        finite = not isinstance(content, float) or math.isfinite(content)
    return [] if finite else [name]
