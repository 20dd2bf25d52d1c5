"""The network as a MONAI user has it: of torch's own layers, in torch's default layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from networks import fused_layers


@contextlib.contextmanager
def torchs_own_layers() -> Iterator[None]:
    """The network as it is written with torch's operations, in torch's default layout."""
    with mock.patch.multiple(fused_layers, serves=_never, channels_last=_as_it_is):
        yield


def _never(*tensors: torch.Tensor) -> bool:
    return False


def _as_it_is(image: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return image
