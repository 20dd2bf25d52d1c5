"""What memory of a card training, validation and prediction with the dense U-Net reserve.

The tensors are counted in the order in which they come and go, and PyTorch's allocator is
computed. Nothing is fitted but what cuDNN takes for itself (`step_memory.workspace`). Readings, of
configurations that were looked at for that and of others, are in benchmarks/gpu_memory.json.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pipeline.data.arena import Arena
from pipeline.data.step_memory import FLOAT32, Net, Walk, step
from pipeline.data.window_memory import Slabs, Windows

SMALL_BYTES = 4 * 2**20  # of norms, losses and the like, all of them together


class Process:
    """The pools of a process that trains or predicts.

    Args:
        net: The network, whose weights are there from the beginning.
    """

    def __init__(self, net: Net) -> None:
        self.net = net
        self.own, self.beside, self.graph = Arena(), Arena(), Arena()
        self._peak = 0
        for number in net.weights():
            self.own.hold(4 * number)
            if net.mode != FLOAT32:  # brought to channels last
                self.own.drop(self.own.hold(4 * number))

    @property
    def peak(self) -> int:
        """Most bytes that were reserved, of all pools together."""
        others = self.beside.reserved + self.graph.reserved
        return max(self._peak, self.own.peak + others) + SMALL_BYTES

    def train(self, roi_size: Sequence[int], batch_size: int) -> None:
        """Steps without a graph, the optimizer's moments after the first, then those of a graph."""
        voxels, own = batch_size * math.prod(roi_size), self.own
        batch = 4 * voxels * self.net.in_channels, voxels  # image and label
        given = [own.hold(size) for size in batch]
        gradients, logits = step(Walk(self.net, own, roi_size, batch_size))
        for size in (*batch, *batch):
            self.beside.hold(size)  # the next one and that in use, on a stream of its own
        for number in self.net.weights():
            own.hold(4 * number)
            own.hold(4 * number)
        own.drop(*gradients, *given, logits)
        gradients, logits = step(Walk(self.net, own, roi_size, batch_size))
        own.drop(*gradients, logits)
        self._peak = own.peak + self.beside.reserved
        for size in batch:
            own.hold(size)  # what the graph reads
        own.trim()
        own.peak = own.reserved
        step(Walk(self.net, self.graph, roi_size, batch_size))

    def predict(self, windows: Windows, shape: Sequence[int]) -> None:
        """A volume by sliding windows, to labels.

        Args:
            windows: How.
            shape: Of the preprocessed volume in voxels.
        """
        Slabs(self.net, self.own, windows, shape).predict()


def step_bytes(
    roi_size: Sequence[int],
    batch_size: int,
    strides: Sequence[Any],
    base_channels: int,
    num_classes: int,
    in_channels: int = 1,
    recompute_levels: int = 0,
    mode: str = FLOAT32,
) -> int:
    """Peak of the memory that training steps reserve, weights and AdamW included, in bytes.

    Args:
        roi_size: Patch in voxels.
        batch_size: Patches.
        strides: Pooling per level, an int or a triple.
        base_channels: Of the network.
        num_classes: Background included.
        in_channels: Of the images.
        recompute_levels: Levels that keep no activations.
        mode: `float32`, `float16` or `bfloat16`.
    """
    steps = triples(strides)
    levels = min(recompute_levels, len(steps))
    process = Process(Net(steps, base_channels, num_classes, in_channels, levels, mode))
    process.train(roi_size, batch_size)
    return process.peak


def run_bytes(net: Net, batch_size: int, windows: Windows, shape: Sequence[int]) -> dict[str, int]:
    """Peaks of a run on a CUDA device: of `training`, and of `validation` with its graph in place.

    Args:
        net: The network.
        batch_size: Patches of a micro-batch.
        windows: How volumes are validated; patches have their size.
        shape: Of the largest preprocessed volume.
    """
    process = Process(net)
    process.train(windows.roi_size, batch_size)
    training = process.peak
    process.predict(windows, shape)
    return {"training": training, "validation": process.peak}


def triples(strides: Sequence[Any]) -> list[tuple[int, ...]]:
    """Strides with a value per axis, where one stands for all three."""
    return [(s, s, s) if isinstance(s, int) else tuple(s) for s in strides]
