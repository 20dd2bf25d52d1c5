"""Sliding-window prediction that never holds the logits of all classes for a whole volume.

Windows are visited plane by plane along one axis. Once no later window reaches a slab, it is
blended, yielded and forgotten: memory grows with the volume's cross-section, not with its length.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import SlidingWindowInferer
from monai.utils import convert_to_dst_type, convert_to_tensor

from pipeline.errors import as_bool

BLEND_BYTES = 4 * 2**30  # for the sums of a slab
CHUNK_BYTES = 2**28  # of blended planes that are yielded at once
# A larger batch is hardly faster on a card: 4 instead of 2 windows of 128^3 by 5 %.
BATCH_VOXELS = 2**22

Network = Callable[[torch.Tensor], torch.Tensor]


class Slab(NamedTuple):
    """Consecutive planes of a volume, from `start` on along `axis` (0 to 2), in rising order."""

    axis: int
    start: int
    logits: torch.Tensor  # (M, C, h, w, d) float32, blended, of M networks


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

    A `ValueError` says that an axis or the overlap is out of range.
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
        """Predict logits `(B, num_classes, H, W, D)` float32 of volumes `(B, C, H, W, D)`.

        `network` returns logits `(B, num_classes, *roi_size)` of windows, and is given `args` and
        `kwargs`. The result is a MetaTensor if `inputs` is one.
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
        """Predict the logits of one volume `(C, H, W, D)` on the networks' device, slab by slab.

        All networks, as for `__call__`, are given the same windows.
        """
        shape = volume.shape[1:]
        missing = [max(roi - n, 0) for roi, n in zip(self.window, shape, strict=True)]
        # torch pads the last axis first
        widths = [width for n in missing[::-1] for width in (n // 2, n - n // 2)]
        padded = torch.nn.functional.pad(volume, widths)
        axis = max(range(3), key=lambda a: padded.shape[a + 1] / self.window[a])
        inside = [slice(m // 2, m // 2 + n) for m, n in zip(missing, shape, strict=True)]
        whole = inside[axis]
        for start, blended in self._blend(padded, networks, axis):
            inside[axis] = slice(max(whole.start - start, 0), max(whole.stop - start, 0))
            logits = blended[:, :, *inside]
            if logits.shape[axis + 2]:  # else there is nothing but padding
                yield Slab(axis, max(start - whole.start, 0), logits)

    def _blend(
        self, padded: torch.Tensor, networks: Sequence[Network], axis: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield first plane and weighted means of logits as soon as no window is left for them."""
        shape, roi = list(padded.shape[1:]), self.window[axis]
        steps = [max(int(n * (1 - self.window_overlap)), 1) for n in self.window]
        patches = dense_patch_slices(shape, self.window, steps)
        starts = [sorted({patch[a].start for patch in patches}) for a in range(3)]
        end, shape[axis] = shape[axis], roi
        is_small = 4 * len(networks) * self.num_classes * math.prod(shape) <= self.max_blend_bytes
        device = self.device or (padded.device if is_small else "cpu")
        weights = compute_importance_map(self.window, self.mode, device=device)
        # sums of as many planes as a window has; classes last, as in channels-last networks
        sums = weights.new_zeros((len(networks), *shape, self.num_classes)).movedim(-1, 1)
        total = weights.new_zeros(shape)
        step = max(1, CHUNK_BYTES // (4 * sums.numel() // roi))
        edges = sorted({*starts[axis], *(start + roi for start in starts[axis])})
        for start, following in itertools.pairwise([*starts[axis], end]):
            starts[axis] = [start]
            self._add_windows(padded, networks, starts, axis, (sums, total, weights))
            done = following - start
            parts = [edge - start for edge in edges if start <= edge <= following]
            for one, stop in itertools.pairwise(parts):
                for first in range(one, stop, step):
                    count = min(step, stop - first)
                    planes = sums.narrow(axis + 2, first, count)
                    yield start + first, planes / total.narrow(axis, first, count)
            for values, dim in ((sums, axis + 2), (total, axis)) if following < end else ():
                left = roi - done
                rest = values.narrow(dim, done, left)
                values.narrow(dim, 0, left).copy_(rest.clone() if left > done else rest)
                values.narrow(dim, left, done).zero_()

    def _add_windows(
        self,
        padded: torch.Tensor,
        networks: Sequence[Network],
        starts: Sequence[Sequence[int]],
        axis: int,
        sums_of: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> None:
        """Add windows of one place on `axis` to sums of logits and of weights, both in place."""
        sums, total, weights = sums_of
        cuts = [
            [slice(start, start + n) for start, n in zip(corner, self.window, strict=True)]
            for corner in itertools.product(*starts)
        ]
        for n in range(0, len(cuts), self.batch_size):
            batch = cuts[n : n + self.batch_size]
            windows = torch.stack([padded[:, *cut] for cut in batch])
            for number, network in enumerate(networks):
                if self.mirrors == [()]:
                    logits = network(windows)
                else:
                    images = [network(windows.flip(a)).float().flip(a) for a in self.mirrors]
                    logits = torch.stack(images).mean(dim=0)
                for cut, of_window in zip(batch, logits, strict=True):
                    place = [slice(None) if a == axis else part for a, part in enumerate(cut)]
                    sums[number][:, *place].addcmul_(of_window.to(sums.device), weights)
                    if number == 0:
                        total[*place] += weights

    @property
    def batch_size(self) -> int:
        """Windows at once: their logits take at most an eighth of what sums may take."""
        voxels = math.prod(self.window)
        fitting = self.max_blend_bytes // 8 // (4 * self.num_classes * voxels)
        return max(1, min(self.sw_batch_size, fitting, BATCH_VOXELS // voxels))
