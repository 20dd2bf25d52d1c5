"""How PyTorch's caching allocator divides a card's memory, as arithmetic.

What a process reserves is more than what its tensors take: a freed block is kept for the next
tensor that fits, and what is left of it may be of use to none. That depends on sizes and order
alone, so that it can be computed without a card.

Source: torch/c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.11, with its default settings.
"""

from __future__ import annotations

import bisect

MIB = 2**20
ROUND, SMALL = 512, MIB  # bytes that sizes are multiples of; of the largest small block
SMALL_SEGMENT, LARGE_SEGMENT, LEAST_OWN = 2 * MIB, 20 * MIB, 10 * MIB
FAR = 2**50  # between segments: blocks of two are never neighbours


class Block:
    """A part of a segment; `before` and `after` are its neighbours there."""

    __slots__ = ("after", "before", "is_free", "place", "size")

    def __init__(self, place: int, size: int) -> None:
        self.place, self.size, self.is_free = place, size, False
        self.before: Block | None = None
        self.after: Block | None = None


class Arena:
    """One pool of the allocator: that of a stream, or of a CUDA graph.

    Attributes:
        reserved: Bytes of all segments.
        peak: The most that they were.
    """

    def __init__(self) -> None:
        self.reserved = self.peak = 0
        self._next = 0
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}

    def hold(self, size: float) -> Block:
        """A block for a tensor of `size` bytes: the smallest free one that is large enough."""
        wanted = max(1, -(-int(size) // ROUND)) * ROUND
        is_small = wanted <= SMALL
        free = self._free[is_small]
        index = bisect.bisect_left(free, (wanted, -1))
        block = free.pop(index)[2] if index < len(free) else self._segment(wanted)
        block.is_free = False
        rest = block.size - wanted
        if rest >= ROUND if is_small else rest > SMALL:
            other = Block(block.place + wanted, rest)
            other.before, other.after, block.after = block, block.after, other
            if other.after is not None:
                other.after.before = other
            block.size = wanted
            self._put(other, is_small)
        return block

    def drop(self, *blocks: Block) -> None:
        """The tensors of these are gone."""
        for block in blocks:
            is_small = block.place % (2 * FAR) < FAR
            for other in (block.before, block.after):
                if other is not None and other.is_free:
                    self._take(other, is_small)
                    first, second = (other, block) if other is block.before else (block, other)
                    first.size += second.size
                    first.after = second.after
                    if first.after is not None:
                        first.after.before = first
                    block = first
            self._put(block, is_small)

    def trim(self) -> None:
        """Give back segments in which there is nothing, as `torch.cuda.empty_cache` does."""
        for is_small, free in self._free.items():
            whole = [b for _, _, b in free if b.before is None and b.after is None]
            self.reserved -= sum(block.size for block in whole)
            for block in whole:
                self._take(block, is_small)

    def _segment(self, wanted: int) -> Block:
        if wanted <= SMALL:
            size = SMALL_SEGMENT
        else:
            own = -(-wanted // SMALL_SEGMENT) * SMALL_SEGMENT
            size = LARGE_SEGMENT if wanted < LEAST_OWN else own
        self.reserved += size
        self.peak = max(self.peak, self.reserved)
        self._next += 1
        return Block((2 * self._next + (wanted > SMALL)) * FAR, size)

    def _put(self, block: Block, is_small: bool) -> None:
        block.is_free = True
        bisect.insort(self._free[is_small], (block.size, block.place, block))

    def _take(self, block: Block, is_small: bool) -> None:
        free = self._free[is_small]
        del free[bisect.bisect_left(free, (block.size, block.place))]
        block.is_free = False
