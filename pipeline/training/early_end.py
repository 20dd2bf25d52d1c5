"""Ending a run early and properly: `stop.json` in its directory, or SIGUSR2, asks for it.

Where the run ends is decided once, at the first step that sees the request, and kept in the file:
a run that is killed in between ends at the same step. The learning rates fall to zero until then.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.optim import Optimizer

from pipeline import distributed
from pipeline.files import write_json
from pipeline.signals import END_REQUESTS

log = logging.getLogger(__name__)

STOP_FILE = "stop.json"  # of a run directory: {} asks for an early end; it becomes an `EarlyEnd`


@dataclass(frozen=True)
class EarlyEnd:
    """Where a run ends that was asked to end early."""

    step: int  # after which it was decided
    epoch: int  # the last one
    max_epochs: int  # that were planned

    @classmethod
    def decide(cls, step: int, steps_per_epoch: int, max_epochs: int) -> EarlyEnd:
        """Take the end of this epoch if half of it or more is left, else that of the next one."""
        epoch = -(-step // steps_per_epoch)
        is_near = 2 * (epoch * steps_per_epoch - step) < steps_per_epoch
        return cls(step, min(epoch + is_near, max_epochs), max_epochs)

    def rate_factor(self, step: int, steps_per_epoch: int) -> float:
        """Factor of the learning rates after `step` steps: from 1 linearly to 0 at the end."""
        last = self.epoch * steps_per_epoch
        return (last - step) / (last - self.step) if self.step <= step < last else 1.0


def read_early_end(run_dir: Path, max_epochs: int = 0) -> EarlyEnd | None:
    """Read where the run there ends early; `None` if nowhere, or if more epochs are wanted now."""
    file = run_dir / STOP_FILE
    decided = json.loads(file.read_text()) if file.exists() else {}
    end = EarlyEnd(**decided) if decided else None
    return None if end and max_epochs > end.max_epochs else end


class EarlyEnding:
    """The early end of a training, if it is asked for. All ranks have to make one.

    Args:
        run_dir: Its `stop.json` is looked for and written by rank 0; `None`: only signals ask.
        max_epochs: Epochs that are planned.
    """

    def __init__(self, run_dir: Path | None, max_epochs: int) -> None:
        self.file = run_dir and Path(run_dir) / STOP_FILE
        self.end: EarlyEnd | None = None
        if run_dir:
            self.end = distributed.run_on_main(lambda: read_early_end(Path(run_dir), max_epochs))

    def is_asked(self) -> bool:
        """Return whether this rank is asked to end early, and nothing is decided yet."""
        if self.end is not None:
            return False
        is_there = self.file and distributed.is_main() and os.path.exists(self.file)
        return bool(is_there or END_REQUESTS)

    def decide(self, step: int, steps_per_epoch: int, max_epochs: int) -> int:
        """Decide which epoch is the last one, on all ranks alike, and keep it in the file."""
        self.end = end = EarlyEnd.decide(step, steps_per_epoch, max_epochs)
        END_REQUESTS.clear()
        if self.file and distributed.is_main():
            write_json(self.file, asdict(end))
        log.info(
            "Asked to end early at step %d: epoch %d of %d is the last one", *asdict(end).values()
        )
        return end.epoch

    @contextmanager
    def lowered_rates(self, optimizer: Optimizer, factor: float) -> Iterator[None]:
        """Multiply the learning rates inside; a scheduler may derive the next ones from them."""
        groups = optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups if factor != 1 else ():
            group["lr"] = factor * group["lr"]
        try:
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
