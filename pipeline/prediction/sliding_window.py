"""Sliding-window prediction that never holds the logits of all classes for a whole volume.

Windows are visited plane by plane along the axis with the most windows. Once no later window
reaches a slab of the volume, the slab is blended, yielded and forgotten: memory grows with the
cross-section of the volume and not with its length.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.data.utils import compute_importance_map
from monai.inferers import SlidingWindowInferer
from monai.utils import convert_to_dst_type, convert_to_tensor

from pipeline.errors import as_bool

BLEND_BYTES = 4 * 2**30  # for the sums of a slab
CHUNK_BYTES = 2**28  # of blended planes that are yielded at once
# A larger batch is hardly faster on a card: 4 instead of 2 windows of 128^3 by 5 %.
BATCH_VOXELS = 2**22

Network = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Slab:
    """Blended logits of consecutive planes of a volume, from `start` on along `axis` (0 to 2).

    `logits` are `(M, C, h, w, d)` float32, of M networks; slabs follow in rising order.
    """

    axis: int
    start: int
    logits: torch.Tensor


class SlidingWindow(SlidingWindowInferer):
    """MONAI's SlidingWindowInferer with Gaussian weights, slab by slab, with mirror averaging.

    Windows, weights and padding are MONAI's; products and sums are float32.

    Args:
        roi_size: Window in voxels.
        num_classes: Channels of the network's output.
        sw_batch_size: Most windows in a forward pass; fewer where classes or voxels are many.
        overlap: Fraction of a window that the next one covers again, 0 to below 1.
        mirror: Whether logits are averaged over all mirror images along `flip_axes`.
        flip_axes: Axes of the volume, 0 to 2.
        max_blend_bytes: Device memory for the sums of one slab. Larger slabs are blended in the
            host's memory.

    Raises:
        ValueError: If an axis or the overlap is out of range.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        num_classes: int,
        sw_batch_size: int = 4,
        overlap: float = 0.5,
        mirror: bool | str = False,
        flip_axes: Sequence[int] = (),
        max_blend_bytes: int = BLEND_BYTES,
    ) -> None:
        if wrong := set(flip_axes) - {0, 1, 2}:
            raise ValueError(f"flip_axes: expected axes 0 to 2, got {sorted(wrong)}. Correct them.")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap: expected 0 to below 1, got {overlap}. Correct it.")
        super().__init__(list(roi_size), sw_batch_size, overlap, "gaussian")
        self.window, self.window_overlap = tuple(roi_size), overlap  # MONAI's allow other types
        self.num_classes, self.max_blend_bytes = num_classes, max_blend_bytes
        axes = sorted(flip_axes) if as_bool(mirror, "mirror") else []
        # dimensions of (B, C, H, W, D), for each mirror image
        self.mirrors = [
            tuple(axis + 2 for axis in some)
            for count in range(len(axes) + 1)
            for some in itertools.combinations(axes, count)
        ]

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict the logits of whole volumes.

        Args:
            inputs: `(B, C, H, W, D)`.
            network: Returns logits `(B, num_classes, *roi_size)` of windows.
            args: Passed on to the network, as are `kwargs`.
            kwargs: See there.

        Returns:
            `(B, num_classes, H, W, D)` float32, a MetaTensor if `inputs` is one.
        """
        volumes = convert_to_tensor(inputs)
        shape = (len(volumes), self.num_classes, *volumes.shape[2:])
        whole = torch.empty(shape, device=self.device or volumes.device)
        for volume, logits in zip(volumes, whole, strict=True):
            for slab in self.slabs(volume, [lambda windows: network(windows, *args, **kwargs)]):
                length = slab.logits.shape[slab.axis + 2]
                logits.narrow(slab.axis + 1, slab.start, length).copy_(slab.logits[0])
        return convert_to_dst_type(whole, inputs, dtype=torch.float32)[0]

    def slabs(self, volume: torch.Tensor, networks: Sequence[Network]) -> Iterator[Slab]:
        """Predict the logits of one volume, slab by slab.

        Args:
            volume: `(C, H, W, D)` on the networks' device.
            networks: As for `__call__`; all are given the same windows.
        """
        missing = [max(r - n, 0) for r, n in zip(self.window, volume.shape[1:], strict=True)]
        margins = [n // 2 for n in missing]
        # torch pads the last axis first
        widths = [width for n in missing[::-1] for width in (n // 2, n - n // 2)]
        padded = torch.nn.functional.pad(volume, widths)
        sizes = padded.shape[1:]
        pairs = zip(sizes, self.window, strict=True)
        starts = [window_starts(n, roi, self.window_overlap) for n, roi in pairs]
        axis = max(range(3), key=lambda a: sizes[a] / self.window[a])
        plane = math.prod(sizes) // sizes[axis]
        needed = 4 * len(networks) * self.num_classes * self.window[axis] * plane
        is_small = needed <= self.max_blend_bytes
        device = self.device or (volume.device if is_small else "cpu")
        weights = compute_importance_map(self.window, self.mode, device=device)
        inside = [slice(m, m + n) for m, n in zip(margins, volume.shape[1:], strict=True)]
        across = [slice(None) if a == axis else part for a, part in enumerate(inside)]
        for start, blended in self._blend(padded, networks, starts, axis, weights):
            stop = start + blended.shape[axis + 2]
            first, last = max(start, inside[axis].start), min(stop, inside[axis].stop)
            if first < last:  # else there is nothing but padding
                kept = blended[:, :, *across].narrow(axis + 2, first - start, last - first)
                yield Slab(axis, first - margins[axis], kept)

    def _blend(
        self,
        padded: torch.Tensor,
        networks: Sequence[Network],
        starts: Sequence[Sequence[int]],
        axis: int,
        weights: torch.Tensor,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield first plane and logits of slabs as soon as no window is left for them."""
        roi = self.window[axis]
        edges = sorted({*starts[axis], *(start + roi for start in starts[axis])})
        waiting = list(itertools.pairwise(edges))
        live: list[_SlabSums] = []
        channels = len(networks), self.num_classes
        for start, following in itertools.pairwise([*starts[axis], edges[-1]]):
            while waiting and waiting[0][0] < start + roi:
                shape = list(padded.shape[1:])
                first, stop = waiting.pop(0)
                shape[axis] = stop - first
                live.append(_SlabSums(axis, first, shape, channels, weights))
            here = [[start] if a == axis else of_axis for a, of_axis in enumerate(starts)]
            corners = list(itertools.product(*here))
            for n in range(0, len(corners), self.batch_size):
                self._predict_windows(live, padded, corners[n : n + self.batch_size], networks)
            while live and live[0].stop <= following:
                yield from live.pop(0).blend()

    def _predict_windows(
        self,
        live: Sequence[_SlabSums],
        padded: torch.Tensor,
        corners: Sequence[tuple[int, ...]],
        networks: Sequence[Network],
    ) -> None:
        """Add the logits of some windows, averaged over the mirror images, to all slabs."""
        ends = [zip(corner, self.window, strict=True) for corner in corners]
        cuts = [tuple(slice(start, start + n) for start, n in of_window) for of_window in ends]
        windows = torch.stack([padded[:, *cut] for cut in cuts])
        for number, network in enumerate(networks):
            if self.mirrors == [()]:
                logits = network(windows)
            else:
                images = [network(windows.flip(a)).float().flip(a) for a in self.mirrors]
                logits = torch.stack(images).mean(dim=0)
            for cut, of_window in zip(cuts, logits, strict=True):
                for sums in live:
                    sums.add(number, cut, of_window)

    @property
    def batch_size(self) -> int:
        """Windows at once: their logits take at most an eighth of what sums may take."""
        voxels = math.prod(self.window)
        fitting = self.max_blend_bytes // 8 // (4 * self.num_classes * voxels)
        return max(1, min(self.sw_batch_size, fitting, BATCH_VOXELS // voxels))


class _SlabSums:
    """Weighted sums of window logits in a slab of the padded volume, and sums of the weights."""

    def __init__(
        self, axis: int, start: int, shape: Sequence[int], channels: tuple[int, int], weights: Any
    ) -> None:
        self.axis, self.start, self.stop = axis, start, start + shape[axis]
        self.weights, (num_networks, num_classes) = weights, channels
        # classes last in memory, as networks in channels-last format return them
        self.logits = weights.new_zeros((num_networks, *shape, num_classes)).movedim(-1, 1)
        self.total = weights.new_zeros(tuple(shape))

    def add(self, number: int, cut: tuple[slice, ...], logits: torch.Tensor) -> None:
        """Add the part of a window, `cut` from the padded volume, that lies in this slab."""
        first, last = max(self.start, cut[self.axis].start), min(self.stop, cut[self.axis].stop)
        if first >= last:
            return
        here, there = list(cut), [slice(None)] * 3
        here[self.axis] = slice(first - self.start, last - self.start)
        there[self.axis] = slice(first - cut[self.axis].start, last - cut[self.axis].start)
        part = logits[:, *there].to(self.weights.device)
        self.logits[number][:, *here].addcmul_(part, self.weights[*there])
        if number == 0:
            self.total[*here] += self.weights[*there]

    def blend(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield weighted means and their first plane, a few planes at a time, as new tensors."""
        num_planes = self.stop - self.start
        step = max(1, CHUNK_BYTES // (4 * self.logits.numel() // num_planes))
        for first in range(0, num_planes, step):
            count = min(step, num_planes - first)
            logits = self.logits.narrow(self.axis + 2, first, count)
            yield self.start + first, logits / self.total.narrow(self.axis, first, count)


def window_starts(size: int, roi: int, overlap: float) -> list[int]:
    """Return the first voxels of the windows along an axis; as in MONAI, the last ends with it."""
    step = max(int(roi * (1 - overlap)), 1)
    count = math.ceil((size - roi) / step) + 1
    return [min(n * step, size - roi) for n in range(count)]
