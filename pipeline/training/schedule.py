"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(
    optimizer: Optimizer, *, warmup_steps: int, max_epochs: int, steps_per_epoch: int
) -> LambdaLR:
    """Linear warm-up over `warmup_steps` steps, then a cosine to zero at the last step.

    The optimizer's learning rates are the peak; advance it once per applied optimizer step.

    Source: Loshchilov & Hutter, SGDR (ICLR 2017), equation 5, without restarts.
    """
    last = max(max_epochs * steps_per_epoch, warmup_steps + 1)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        fraction = min((step - warmup_steps) / (last - warmup_steps), 1.0)
        return 0.5 * (1.0 + math.cos(math.pi * fraction))

    return LambdaLR(optimizer, factor)
