"""How much GPU memory a training step takes: a formula for the plan, which needs no card.

The formula counts what a backward pass of the dense U-Net needs; four numbers are fitted to peaks
that `benchmarks/gpu_memory.py` read on a card. The trial step of a run measures what it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

FLOAT32 = "float32"
RESERVE = 0.15  # added to an estimate before it is compared with a budget
# fitted: copies of the activations at the peak, bytes per logit, and bytes of every process
COPIES_FLOAT32, COPIES_HALF, LOGIT_BYTES, PROCESS_BYTES = 18.3, 14.0, 3.5, 7.8e7
RECOMPUTED = 0.75  # share of these copies that a recomputed level takes
DENSE_LAYERS, GROWTH_RATE, INNER = 4, 32, 128  # the bottleneck of networks.dense_unet


@dataclass(frozen=True)
class TrainingStep:
    """A training step of the dense U-Net on one device."""

    roi_size: Sequence[int]  # in voxels
    batch_size: int
    strides: Sequence[Any]  # pooling per level, an int or a triple
    base_channels: int  # at full resolution
    num_classes: int  # background included
    in_channels: int = 1
    recompute_levels: int = 0  # finest levels that keep no activations
    mode: str = FLOAT32  # float32, float16 or bfloat16

    def estimate_bytes(self) -> float:
        """Estimate the memory that PyTorch reserves for it, weights and AdamW included."""
        known, activations, logits = self.terms()
        copies = COPIES_FLOAT32 if self.mode == FLOAT32 else COPIES_HALF
        return known + copies * activations + LOGIT_BYTES * logits + PROCESS_BYTES

    def terms(self) -> tuple[float, float, float]:
        """Compute what the fitted numbers are added to and multiplied with.

        Returns:
            Bytes of weights, images and the dense layers' activations; bytes of one copy of the
            activations of all levels; the number of logits.
        """
        widths = [self.base_channels * 2**level for level in range(len(self.strides) + 1)]
        voxels = [float(self.batch_size * math.prod(self.roi_size))]
        for step in triples(self.strides):
            voxels.append(voxels[-1] / math.prod(step))
        value_bytes = 4 if self.mode == FLOAT32 else 2
        levels = [n * width for n, width in zip(voxels, widths, strict=True)]
        again, kept = levels[: self.recompute_levels], levels[self.recompute_levels :]
        # channels that enter the dense layers, of all of them together
        entering = DENSE_LAYERS * widths[-1] + GROWTH_RATE * math.comb(DENSE_LAYERS, 2)
        dense = 2 * entering + DENSE_LAYERS * (2 * INNER + GROWTH_RATE)
        images = 16 * voxels[0] * self.in_channels  # float32: in use, a copy, the next, the graph's
        known = 16 * self._num_weights(widths, entering) + value_bytes * voxels[-1] * dense + images
        activations = value_bytes * (RECOMPUTED * sum(again) + sum(kept))
        return known, activations, voxels[0] * self.num_classes

    def _num_weights(self, widths: list[int], entering: int) -> int:
        above = [self.in_channels, *widths[:-1]]
        below = [*widths[1:-1], widths[-1] + DENSE_LAYERS * GROWTH_RATE]
        down = sum(27 * w * (a + w) for a, w in zip(above, widths, strict=True))
        up = sum(27 * w * (b + 2 * w) for w, b in zip(widths[:-1], below, strict=True))
        dense = INNER * entering + DENSE_LAYERS * 27 * INNER * GROWTH_RATE
        return down + up + dense + widths[0] * self.num_classes


def triples(strides: Sequence[Any]) -> list[tuple[int, ...]]:
    """Give every stride a value per axis, where one int stands for all three."""
    return [(s, s, s) if isinstance(s, int) else tuple(s) for s in strides]


def available_bytes(device: torch.device) -> int:
    """Return what this process can still have of a card: what is free, or left of its share."""
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - held
    share = torch.cuda.get_per_process_memory_fraction(device)
    return int(min(free + unused, share * total - held))
