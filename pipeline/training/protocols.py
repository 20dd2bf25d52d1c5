"""Attributes and methods that a network, loss, loader or metric of your own may have, or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class HasOutChannels(Protocol):
    """A network that says how many classes its logits have, background included."""

    out_channels: int


@runtime_checkable
class HasReduction(Protocol):
    """A network whose exports take sizes in multiples of `reduction`, in voxels for each axis."""

    reduction: Sequence[int]


@runtime_checkable
class SpansRanks(Protocol):
    """A loss over the samples of all ranks, if `is_over_ranks`; others are averaged over ranks."""

    is_over_ranks: bool


@runtime_checkable
class HasBackend(Protocol):
    """A loss that can be computed in several ways; `backend` is the one asked for."""

    backend: str

    def in_force(self, device: torch.device, num_classes: int) -> str:
        """The backend for logits of `num_classes` on `device`; raises if none can serve."""


@runtime_checkable
class ResumableSampler(Protocol):
    """A sampler that begins at sample `start` of the run; others begin the epoch anew."""

    start: int


@runtime_checkable
class DescribesItself(Protocol):
    """A loader that says for `summary.json` where its data are."""

    def describe(self) -> dict[str, Any]:
        """`requested` and `effective` settings, as plain values."""


@runtime_checkable
class LabelMapMetric(Protocol):
    """A metric that can be tried on one patch before training."""

    def try_on(self, pred: torch.Tensor, label: torch.Tensor) -> object:
        """Compare label maps `(H, W, D)` and forget them; `ValueError` for unknown values."""
