"""What a figure was read on, as every benchmark's JSON says it."""

from __future__ import annotations

import platform

import monai
import torch


def facts() -> dict[str, str | None]:
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "monai": monai.__version__,
        "python": platform.python_version(),
    }
