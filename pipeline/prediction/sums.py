"""Weighted sums of window logits in a part of a volume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

CHUNK_BYTES = 2**28  # of blended planes that are handed on at once

Box = list[tuple[int, int]]  # first voxel and last + 1, for each axis


class WeightedSums:
    """Weighted sums of logits in a box of the padded volume, and the sums of their weights."""

    def __init__(
        self, box: Box, num_networks: int, num_classes: int, weights: torch.Tensor
    ) -> None:
        self.box, self.weights = box, weights
        shape = [b - a for a, b in box]
        # classes last in memory, as networks in channels last give them
        self.logits = weights.new_zeros((num_networks, *shape, num_classes)).movedim(-1, 1)
        self.total = weights.new_zeros(shape)

    def add(self, number: int, corner: Sequence[int], logits: torch.Tensor) -> None:
        """Add what a window of one network has in this box."""
        ends = [
            (max(a, start), min(b, start + n))
            for (a, b), start, n in zip(self.box, corner, self.weights.shape, strict=True)
        ]
        if any(a >= b for a, b in ends):
            return
        here = slices_in(ends, [o for o, _ in self.box])
        there = slices_in(ends, corner)
        part = logits[:, *there].to(self.weights.device)
        self.logits[number][:, *here].addcmul_(part, self.weights[there])
        if number == 0:
            self.total[here] += self.weights[there]

    def blended(self, along: int) -> Iterator[tuple[Box, torch.Tensor]]:
        """Weighted means and their place, a few planes at a time; new tensors, not views."""
        start, stop = self.box[along]
        plane = 4 * self.logits.numel() // (stop - start)
        step = max(1, CHUNK_BYTES // plane)
        for n in range(start, stop, step):
            part = [*self.box]
            part[along] = (n, min(n + step, stop))
            here = slices_in(part, [o for o, _ in self.box])
            yield part, self.logits[:, :, *here] / self.total[here]


def slices_in(box: Box, origin: Sequence[int]) -> tuple[slice, ...]:
    """A box, in a tensor that begins at `origin`."""
    return tuple(slice(a - o, b - o) for (a, b), o in zip(box, origin, strict=True))
