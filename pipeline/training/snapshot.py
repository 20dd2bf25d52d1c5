"""A copy of a network's buffers, put back where a forward pass must leave no trace."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator

import torch


class BufferSnapshot:
    """Copy of a network's buffers, such as BatchNorm's running statistics.

    A forward pass in train mode changes them before it is known whether the step is applied. They
    are copied now, and at each `take`, by a few kernels; the host does not wait. A module may
    replace a buffer by another tensor of the same shape and dtype.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        by_dtype = defaultdict(list)  # tensors of one dtype take one kernel
        for module in network.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    by_dtype[buffer.dtype].append((module._buffers, name, buffer.clone()))
        self._groups = list(by_dtype.values())
        floating = [group for dtype, group in by_dtype.items() if dtype.is_floating_point]
        # a buffer that is infinite from the beginning, such as a mask, is meant to be
        self._finite = [[one for one in group if one[2].isfinite().all()] for group in floating]

    @torch.no_grad()
    def take(self) -> None:
        """Copy the buffers as they are now."""
        for group in self._groups:
            torch._foreach_copy_([copy for *_, copy in group], _present(group))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copies back."""
        for group in self._groups:
            torch._foreach_copy_(_present(group), [copy for *_, copy in group])

    @torch.no_grad()
    def norm(self, device: torch.device) -> torch.Tensor:
        """Sum of |value| over the buffers that were finite at first: finite if all still are."""
        total = torch.zeros((), device=device)
        for group in filter(None, self._finite):
            total = total + torch.stack(torch._foreach_norm(_present(group), 1)).sum()
        return total.float()


def _present(group: list[tuple[dict, str, torch.Tensor]]) -> list[torch.Tensor]:
    return [buffers[name] for buffers, name, _ in group]


@contextlib.contextmanager
def buffers_kept(network: torch.nn.Module) -> Iterator[None]:
    """Restore the network's buffers afterwards, whatever forward passes inside do to them."""
    snapshot = BufferSnapshot(network)
    try:
        yield
    finally:
        snapshot.restore()
