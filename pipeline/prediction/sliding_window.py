"""Sliding-window prediction that never holds all classes of a whole volume.

Windows are visited plane by plane along one axis. What no later window reaches is blended, handed
on and forgotten, so that memory grows with a slab of the volume and not with the volume. Where a
slab of all classes is too large still, the volume is cut across into lanes; windows on the border
of two lanes are then predicted twice.
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
from pipeline.prediction.sums import Box, WeightedSums, slices_in

SUMS_BYTES = 4 * 2**30  # that blending may hold
BATCH_VOXELS = 2**22  # with more a card is hardly faster: 4 instead of 2 windows of 128^3 by 5 %

Network = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Block:
    """Blended logits of a part of the volume.

    Attributes:
        first: Voxel of the volume that it begins with.
        logits: `(M, C, h, w, d)` float32, of each of M networks.
        along: Axis that blocks of a lane follow one another on, from 0 on.
        across: Axis that lanes follow one another on.
    """

    first: tuple[int, ...]
    logits: torch.Tensor
    along: int
    across: int


class SlidingWindow(SlidingWindowInferer):
    """MONAI's SlidingWindowInferer with Gaussian weights, by slabs, with mirror averaging.

    Windows, weights and padding are MONAI's; products and sums are float32 whatever the dtype of
    the network's output.

    Args:
        roi_size: Window in voxels.
        num_classes: Channels of the network's output.
        sw_batch_size: Windows in a forward pass, at most; of many classes or voxels fewer.
        overlap: Share of a window that the next one covers again, 0 to below 1.
        mirror: Whether logits are averaged over all mirror images along `flip_axes`.
        flip_axes: Of the volume, 0 to 2.
        max_blend_bytes: Memory for the sums of one slab; lanes are as wide as it allows.

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
        max_blend_bytes: int = SUMS_BYTES,
    ) -> None:
        if wrong := set(flip_axes) - {0, 1, 2}:
            raise ValueError(f"flip_axes: expected axes 0 to 2, got {sorted(wrong)}. Correct them.")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap: expected 0 to below 1, got {overlap}. Correct it.")
        super().__init__(list(roi_size), sw_batch_size, overlap, "gaussian")
        self.window, self.share = tuple(roi_size), overlap  # as MONAI keeps them they may be much
        self.num_classes, self.max_blend_bytes = num_classes, max_blend_bytes
        axes = sorted(flip_axes) if as_bool(mirror, "mirror") else []
        # dimensions of (B, C, H, W, D)
        self.mirrors = [
            tuple(axis + 2 for axis in some)
            for count in range(len(axes) + 1)
            for some in itertools.combinations(axes, count)
        ]

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Logits of whole volumes, for those who ask for all class channels.

        Args:
            inputs: `(B, C, H, W, D)`.
            network: Gives logits `(B, num_classes, *roi_size)` of windows.
            args: Passed on to the network.
            kwargs: Passed on to the network.

        Returns:
            `(B, num_classes, H, W, D)` float32, a MetaTensor if `inputs` is one.
        """

        def predict(windows: torch.Tensor) -> torch.Tensor:
            return network(windows, *args, **kwargs)

        volumes = convert_to_tensor(inputs)
        whole = torch.empty(
            (len(volumes), self.num_classes, *volumes.shape[2:]),
            device=self.device or volumes.device,
        )
        for volume, logits in zip(volumes, whole, strict=True):
            for block in self.blocks(volume, [predict]):
                ends = zip(block.first, block.logits.shape[2:], strict=True)
                logits[:, *(slice(a, a + n) for a, n in ends)] = block.logits[0]
        return convert_to_dst_type(whole, inputs, dtype=torch.float32)[0]

    def blocks(self, volume: torch.Tensor, networks: Sequence[Network]) -> Iterator[Block]:
        """Logits of one volume, block by block: lane by lane, and along a lane in rising order.

        Args:
            volume: `(C, H, W, D)` on the networks' device.
            networks: As for `__call__`; all see the same windows.
        """
        padded, inside = self._padded(volume)
        sizes = padded.shape[1:]
        starts = [
            window_starts(n, roi, self.share) for n, roi in zip(sizes, self.window, strict=True)
        ]
        along, across, rest = sorted(range(3), key=lambda axis: -sizes[axis] / self.window[axis])
        line = 4 * len(networks) * self.num_classes * self.window[along] * sizes[rest]
        # sums are where the weights are; `device` is what MONAI calls that of the stitched output
        weights = compute_importance_map(
            self.window, self.mode, device=self.device or volume.device
        )
        for lane in _lanes(starts[across], sizes[across], self.max_blend_bytes // line):
            touching = [
                s for s in starts[across] if s < lane[1] and s + self.window[across] > lane[0]
            ]
            course = {**dict(enumerate(starts)), across: touching}
            box = [(0, n) for n in sizes]
            box[across] = lane
            for slab, logits in self._lane(padded, networks, course, box, along, weights):
                ends = [(max(a, p), min(b, q)) for (a, b), (p, q) in zip(slab, inside, strict=True)]
                if any(a >= b for a, b in ends):  # nothing but what was padded
                    continue
                kept = slices_in(ends, [o for o, _ in slab])
                first = tuple(a - p for (a, _), (p, _) in zip(ends, inside, strict=True))
                yield Block(first, logits[:, :, *kept], along, across)

    def _lane(
        self,
        padded: torch.Tensor,
        networks: Sequence[Network],
        course: dict[int, list[int]],
        box: Box,
        along: int,
        weights: torch.Tensor,
    ) -> Iterator[tuple[Box, torch.Tensor]]:
        """Blended logits of a lane, handed on as soon as no window is left for them."""
        starts, roi = course[along], self.window[along]
        edges = sorted({*starts, *(start + roi for start in starts)})
        waiting = list(itertools.pairwise(edges))
        live: list[WeightedSums] = []
        for start, following in zip(starts, [*starts[1:], edges[-1]], strict=True):
            while waiting and waiting[0][0] < start + roi:
                slab = [*box]
                slab[along] = waiting.pop(0)
                live.append(WeightedSums(slab, len(networks), self.num_classes, weights))
            corners = list(itertools.product(*({**course, along: [start]}[n] for n in range(3))))
            for n in range(0, len(corners), self.batch_size):
                self._add(live, padded, corners[n : n + self.batch_size], networks)
            while live and live[0].box[along][1] <= following:
                yield from live.pop(0).blended(along)

    def _add(
        self,
        live: Sequence[WeightedSums],
        padded: torch.Tensor,
        corners: Sequence[tuple[int, ...]],
        networks: Sequence[Network],
    ) -> None:
        """Predict some windows and add them up."""
        windows = torch.stack([_cut(padded, corner, self.window) for corner in corners])
        for number, network in enumerate(networks):
            for corner, logits in zip(corners, self._mirrored(windows, network), strict=True):
                for sums in live:
                    sums.add(number, corner, logits)

    def _padded(self, volume: torch.Tensor) -> tuple[torch.Tensor, Box]:
        """The volume, of the size of a window at least, and where it lies in that."""
        missing = [max(r - n, 0) for r, n in zip(self.window, volume.shape[1:], strict=True)]
        margins = [(n // 2, n - n // 2) for n in missing]
        widths = [
            width for pair in margins[::-1] for width in pair
        ]  # torch pads the last axis first
        inside = [(m, m + n) for (m, _), n in zip(margins, volume.shape[1:], strict=True)]
        return torch.nn.functional.pad(volume, widths), inside

    @property
    def batch_size(self) -> int:
        """Windows at once: their logits take no more than an eighth of what sums may."""
        voxels = math.prod(self.window)
        fitting = self.max_blend_bytes // 8 // (4 * self.num_classes * voxels)
        return max(1, min(self.sw_batch_size, fitting, BATCH_VOXELS // voxels))

    def _mirrored(self, windows: torch.Tensor, network: Network) -> torch.Tensor:
        """Logits of windows `(B, C, *roi_size)`, averaged over the mirror images."""
        if self.mirrors == [()]:
            return network(windows)
        logits = [network(windows.flip(axes)).float().flip(axes) for axes in self.mirrors]
        return torch.stack(logits).mean(dim=0)


def window_starts(size: int, roi: int, overlap: float) -> list[int]:
    """First voxels of the windows along an axis, as MONAI places them: the last ends with it."""
    step = max(int(roi * (1 - overlap)), 1)
    count = math.ceil((size - roi) / step) + 1
    return [min(n * step, size - roi) for n in range(count)]


def _lanes(starts: Sequence[int], size: int, widest: int) -> list[tuple[int, int]]:
    """Ranges of an axis, as wide as they may be, that begin where windows do."""
    lanes, begin = [], 0
    while begin < size:
        ends = [end for end in (*starts[1:], size) if begin < end <= begin + widest]
        # no narrower than a step of the windows, however little memory there may be
        end = max(ends, default=min(e for e in (*starts[1:], size) if e > begin))
        lanes.append((begin, end))
        begin = end
    return lanes


def _cut(padded: torch.Tensor, corner: Sequence[int], roi: Sequence[int]) -> torch.Tensor:
    return padded[:, *(slice(a, a + n) for a, n in zip(corner, roi, strict=True))]
