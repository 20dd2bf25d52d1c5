"""What memory a training step of the dense U-Net takes, as a formula with measured factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# bytes per term of `activation_terms` in float32: the fit of ten readings on an NVIDIA H200, each
# met within 4 % (benchmarks/gpu_memory.json)
BYTES = (56.0, 17.5, 85e3)


def step_bytes(
    roi_size: Sequence[int],
    batch_size: int,
    strides: Sequence[Any],
    base_channels: int,
    num_classes: int,
) -> float:
    """Peak memory of a training step in float32, weights and AdamW included, in bytes.

    Args:
        roi_size: Patch in voxels.
        batch_size: Patches.
        strides: Pooling per level, an int or a triple.
        base_channels: Of the network.
        num_classes: Background included.
    """
    terms = activation_terms(roi_size, batch_size, triples(strides), base_channels, num_classes)
    return sum(term * factor for term, factor in zip(terms, BYTES, strict=True))


def activation_terms(
    roi_size: Sequence[int],
    batch_size: int,
    strides: Sequence[Sequence[int]],
    base_channels: int,
    num_classes: int,
) -> tuple[float, float, float]:
    """What the memory of a training step of the dense U-Net grows with.

    Returns:
        Values in feature maps of all levels (voxels x channels), in logits, and, in proportion,
        in weights.
    """
    voxels = batch_size * math.prod(roi_size)
    reduction, widths = 1, 1.0
    for level, stride in enumerate(strides):
        reduction *= math.prod(stride)
        widths += 2 ** (level + 1) / reduction
    return voxels * base_channels * widths, float(voxels * num_classes), float(base_channels**2)


def triples(strides: Sequence[Any]) -> list[tuple[int, ...]]:
    """Strides with a value per axis, where one stands for all three."""
    return [(s, s, s) if isinstance(s, int) else tuple(s) for s in strides]
