"""How far a run has come: the record that is saved and that all counters are derived from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

SCHEMA_VERSION = 1

STEPPING = "stepping"  # inside an epoch, or between two
EPOCH_END_PENDING = "epoch_end_pending"  # all steps of the epoch done, its validation not yet
FINALIZING = "finalizing"  # the last epoch is complete, the summary is not written
DONE = "done"


@dataclass
class Progress:
    """Progress of a run. A step is one optimizer step, applied or skipped."""

    phase: str = STEPPING
    step: int = 0  # optimizer steps taken, skipped ones included
    epoch: int = 0  # epochs whose steps are all taken
    samples: int = 0  # samples consumed
    skipped_steps: int = 0  # steps whose loss or gradients were not finite
    consecutive_skips: int = 0  # of these, the ones since the last applied step
    best_metric: float | None = None  # highest finite validation metric
    best_epoch: int | None = None
    last_metric: float | None = None  # of the latest validation; `None` if it was not finite
    wall_time_s: float = 0.0  # seconds in training and validation, over all sessions
    mode: str = "float32"  # effective dtype of training: `float32`, `float16` or `bfloat16`
    schema_version: int = SCHEMA_VERSION  # of this record and of the checkpoint around it

    def record_step(self, applied: bool, samples: int, steps_per_epoch: int) -> None:
        """Count one optimizer step over `samples` samples."""
        self.step += 1
        self.samples += samples
        self.skipped_steps += not applied
        self.consecutive_skips = 0 if applied else self.consecutive_skips + 1
        if self.step % steps_per_epoch == 0:
            self.epoch = self.step // steps_per_epoch
            self.phase = EPOCH_END_PENDING

    def record_metric(self, metric: float) -> bool:
        """Record a validation metric; returns whether it is the best so far, which NaN never is."""
        self.last_metric = metric if math.isfinite(metric) else None
        best = -math.inf if self.best_metric is None else self.best_metric
        if self.last_metric is None or metric <= best:
            return False
        self.best_metric, self.best_epoch = metric, self.epoch
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain values, which `torch.load(weights_only=True)` accepts."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the values of a saved record, of a checkpoint of this schema version."""
        for key, value in state.items():
            setattr(self, key, value)
