"""Which tensors prediction by sliding windows holds beside the network's, in their order.

The rules are those of `pipeline.prediction` and `transforms.file_grid`, of which a test says that
they are the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.arena import Arena, Block
from pipeline.data.step_memory import Net, Walk, forward

SUMS_BYTES, BATCH_VOXELS = 4 * 2**30, 2**22  # of pipeline.prediction.sliding_window
CHUNK_BYTES = 2**28  # of pipeline.prediction.sums
CHUNK, PLACE = 2**25, 32  # of transforms.file_grid


@dataclass(frozen=True)
class Windows:
    """How a volume is predicted; see `pipeline.prediction.sliding_window.SlidingWindow`.

    Attributes:
        roi_size: Of a window.
        num_classes: Background included.
        at_once: Windows in a forward pass, at most.
        overlap: Share of a window that the next one covers again.
        max_blend_bytes: Memory for the sums of one slab.
    """

    roi_size: Sequence[int]
    num_classes: int
    at_once: int = 4
    overlap: float = 0.5
    max_blend_bytes: int = SUMS_BYTES

    @property
    def batch_size(self) -> int:
        """Windows in a forward pass."""
        voxels = math.prod(self.roi_size)
        fitting = self.max_blend_bytes // 8 // (4 * self.num_classes * voxels)
        return max(1, min(self.at_once, fitting, BATCH_VOXELS // voxels))

    def starts(self, axis: int, size: int) -> list[int]:
        """First voxels of the windows along an axis."""
        roi = self.roi_size[axis]
        stride = max(int(roi * (1 - self.overlap)), 1)
        count = math.ceil((size - roi) / stride) + 1
        return [min(n * stride, size - roi) for n in range(count)]


class Slabs:
    """Windows plane by plane along an axis, and what is made of what they leave behind.

    Args:
        net: The network.
        own: Where its tensors are.
        windows: How a volume is predicted.
        shape: Of the preprocessed volume in voxels.
    """

    def __init__(self, net: Net, own: Arena, windows: Windows, shape: Sequence[int]) -> None:
        self.net, self.own, self.windows, self.shape = net, own, windows, shape
        roi = windows.roi_size
        self.size = [max(n, r) for n, r in zip(shape, roi, strict=True)]
        self.along, self.across, self.rest = sorted(
            range(3), key=lambda axis: -self.size[axis] / roi[axis]
        )
        self.labels: Block | None = None  # of the whole volume
        # of the block before: blended, probabilities, the same joined with a plane, interpolated,
        # last plane; and last planes of the lane before
        self.held: list[list[Block]] = [[] for _ in range(6)]
        self.border: list[Block] = []  # last planes across of this lane

    def predict(self) -> None:
        """All of a volume."""
        own, roi, size = self.own, self.windows.roi_size, self.size
        kept = [own.hold(4 * self.net.in_channels * math.prod(n)) for n in (self.shape, size)]
        kept.append(own.hold(4 * math.prod(roi)))  # the windows' weights
        starts = [self.windows.starts(axis, n) for axis, n in enumerate(size)]
        line = 4 * self.windows.num_classes * roi[self.along] * size[self.rest]
        widest = self.windows.max_blend_bytes // line
        for begin, end in lanes(starts[self.across], size[self.across], widest):
            touching = [s for s in starts[self.across] if s < end and s + roi[self.across] > begin]
            extent = [*size]
            extent[self.across] = end - begin
            self._lane(starts[self.along], extent, len(touching) * len(starts[self.rest]))
        held = itertools.chain(*self.held, self.border, filter(None, [self.labels]))
        own.drop(*kept, *held)

    def _lane(self, starts: list[int], extent: list[int], count: int) -> None:
        """`count` windows at each start; `extent` is that of the lane in voxels."""
        roi = self.windows.roi_size[self.along]
        plane = math.prod(extent) // extent[self.along]
        edges = sorted({*starts, *(start + roi for start in starts)})
        waiting = [*itertools.pairwise(edges)]
        live: list[tuple[int, int, list[Block]]] = []
        for start, following in zip(starts, [*starts[1:], edges[-1]], strict=True):
            while waiting and waiting[0][0] < start + roi:
                begin, end = waiting.pop(0)
                voxels = 4 * (end - begin) * plane
                sums = [self.own.hold(voxels * self.windows.num_classes), self.own.hold(voxels)]
                live.append((begin, end, sums))
            most = min(count, self.windows.batch_size)
            # a third pass, and those after it, find the memory of the second
            for images in [most] * min(count // most, 3) + [count % most] * (count % most > 0):
                self._pass(images)
            while live and live[0][1] <= following:
                begin, end, sums = live.pop(0)
                self._blend(begin, end, extent)
                self.own.drop(*sums)

    def _pass(self, images: int) -> None:
        """A forward pass."""
        roi = self.windows.roi_size
        given = self.own.hold(4 * images * self.net.in_channels * math.prod(roi))
        logits = forward(Walk(self.net, self.own, roi, images))
        self.own.drop(given, logits)

    def _blend(self, begin: int, end: int, extent: Sequence[int]) -> None:
        """Means, probabilities and labels of a slab, a few planes at a time."""
        line = 4 * self.windows.num_classes * extent[self.rest]
        at_once = max(1, CHUNK_BYTES // (line * extent[self.across]))
        for first in range(begin, end, at_once):
            number = min(at_once, end - first)
            self._join(first, number, line, extent[self.across])
            begins = first == 0
            block = [*extent]
            block[self.along] = number - begins
            # a block is looked for a little beyond its ends
            reach = [min(n, m + 3) for n, m in zip(self.shape, block, strict=True)]
            low, high = max(0, first - 2), min(self.shape[self.along], first + number + 2)
            reach[self.along] = high - low
            self._interpolate(block, reach)

    def _join(self, first: int, number: int, line: int, width: int) -> None:
        """Probabilities of a block, with the last planes of those before it."""
        own = self.own
        if first == 0:  # a lane begins
            own.drop(*self.held[4])
            self.held[4] = []
            if self.border:
                self._put(5, line * self.size[self.along])
                own.drop(*self.border)
                self.border = []
        joins = first > 0 or bool(self.held[5])
        self._put(0, number * line * width)
        self._put(1 if joins else 2, number * line * width)
        self.border.append(own.hold(number * line))
        if self.held[5]:
            width += 1
            self._put(2, number * line * width)
        last = own.hold(line * width)
        if first > 0:
            self._put(2, (number + 1) * line * width)
        own.drop(*self.held[4])
        self.held[4] = [last]
        self.labels = self.labels or own.hold(math.prod(self.shape))

    def _put(self, place: int, size: int) -> None:
        """A tensor in the place of that of the block before."""
        before, self.held[place] = self.held[place], [self.own.hold(size)]
        self.own.drop(*before)

    def _interpolate(self, extent: Sequence[int], reach: Sequence[int]) -> None:
        """Values at the voxels of the file, a chunk at a time; see `transforms.file_grid`."""
        own, classes = self.own, self.windows.num_classes
        rows, width, depth = extent
        lines = max(1, CHUNK // ((classes + PLACE) * reach[2]))
        columns = min(reach[1], lines)
        for first in range(0, rows, lines // columns):
            for begin in range(0, width, columns):
                here = min(columns, width - begin)
                voxels = min(lines // columns, rows - first) * here * depth
                if voxels == 0:
                    continue
                found = own.hold(4 * classes * voxels)
                place = [own.hold(8 * voxels), own.hold(4 * voxels)]
                own.drop(own.hold(4 * classes * voxels))
                for size in (8, 4):  # of the next neighbours, before those of the first are gone
                    place.append(own.hold(size * voxels))
                    own.drop(place.pop(0))
                own.drop(own.hold(4 * classes * voxels))
                own.drop(*place, *self.held[3])
                labels = own.hold(8 * voxels), own.hold(voxels)  # as they are found, and as kept
                own.drop(*labels)
                self.held[3] = [found]


def lanes(starts: Sequence[int], size: int, widest: int) -> list[tuple[int, int]]:
    """Ranges of an axis, as wide as they may be, that begin where windows do."""
    found, begin = [], 0
    while begin < size:
        ends = [end for end in (*starts[1:], size) if begin < end <= begin + widest]
        end = max(ends, default=min(e for e in (*starts[1:], size) if e > begin))
        found.append((begin, end))
        begin = end
    return found
