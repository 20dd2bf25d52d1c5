"""A handler that kills its process, once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from pipeline import distributed
from pipeline.training.trainer import StepEvents


class DiesOnce:
    """Kills rank `rank` after step `step`, unless the file `mark` says that it did."""

    def __init__(self, rank: int, step: int, mark: str) -> None:
        self.rank, self.step, self.mark = rank, step, Path(mark)

    def attach(self, trainer) -> None:
        trainer.add_event_handler(StepEvents.STEP_COMPLETED, self.after_step)

    def after_step(self, trainer) -> None:
        due = distributed.rank() == self.rank and trainer.progress.step == self.step
        if due and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
