"""Datasets whose workers misbehave at one sample."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from torch.utils.data import default_collate, get_worker_info

from pipeline.data.sampling import PatchDataset, PatchLoader

SAMPLE, BATCH = 5, 2


class DyingDataset(PatchDataset):
    def __getitem__(self, number: int) -> dict[str, Any]:
        if number == SAMPLE and get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


class HangingDataset(PatchDataset):
    at = SAMPLE

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number == self.at:
            time.sleep(3600)
        return super().__getitem__(number)


class HangingAheadDataset(HangingDataset):
    at = SAMPLE + BATCH  # is fetched while the step of SAMPLE is taken, which then does not end


def die_in_collate(samples: list[dict[str, Any]]) -> Any:
    """As a worker does for which shared memory is too small: after its samples."""
    if get_worker_info() and any(sample["number"] == SAMPLE for sample in samples):
        os.kill(os.getpid(), signal.SIGBUS)
    return default_collate(samples)


class DyingLoader(PatchLoader):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.collate_fn = die_in_collate
