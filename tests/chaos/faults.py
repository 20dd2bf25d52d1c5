"""Datasets whose workers misbehave at one sample."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from torch.utils.data import get_worker_info

from pipeline.data.sampling import PatchDataset

SAMPLE = 5


class DyingDataset(PatchDataset):
    def _sample(self, number: int) -> dict[str, Any]:
        if number == SAMPLE and get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._sample(number)


class HangingDataset(PatchDataset):
    def _sample(self, number: int) -> dict[str, Any]:
        if number == SAMPLE:
            time.sleep(3600)
        return super()._sample(number)
