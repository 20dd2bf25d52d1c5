"""Datasets whose workers misbehave at one sample."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from torch.utils.data import get_worker_info

from pipeline.data.sampling import PatchDataset

SAMPLE, BATCH = 5, 2


class DyingDataset(PatchDataset):
    def __getitem__(self, number: int) -> dict[str, Any]:
        if number == SAMPLE and get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


class HangingDataset(PatchDataset):
    """Its sample is fetched while the step of SAMPLE is taken, which then does not end."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number == SAMPLE + BATCH:
            time.sleep(3600)
        return super().__getitem__(number)
