"""What a figure was read on, as every benchmark's JSON says it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import monai
import torch

from pipeline.training.trainer import MixedPrecisionTrainer


def facts() -> dict[str, str | None]:
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "monai": monai.__version__,
        "python": platform.python_version(),
    }


def take_step(trainer: MixedPrecisionTrainer, batch: dict[str, Any]) -> None:
    """One micro-batch of a trainer, outside of a run."""
    trainer.state.iteration += 1
    trainer._iteration(trainer, batch)


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")
