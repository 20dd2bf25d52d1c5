"""Training cases in a device's memory, where they fit: a sample costs no file and no transfer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pipeline.data.cache import CachedCases
from pipeline.data.entry import common
from pipeline.errors import InputError

VOLUMES = ("image", "label")
SHARE = 4  # `auto` takes no more than a quarter of what is free: network and activations come later
CHOICES: dict[Any, bool | None] = {
    "auto": None, True: True, False: False, "true": True, "false": False,
}  # fmt: skip


class ResidentCase:
    """The tensors of one case: volumes on the device, positions on the host."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self._tensors = tensors
        self.names = tensors.keys()

    def __getitem__(self, name: str) -> Any:
        return self._tensors[name]


class ResidentCases:
    """All tensors of some cached cases in memory.

    Args:
        cached: The cases; equal ones are there once.
        device: Where their volumes are put.

    Raises:
        InputError: If a case that was removed from the cache cannot be made anew.
    """

    def __init__(self, cached: CachedCases, device: torch.device) -> None:
        self.device = device
        made: dict[str, ResidentCase] = {}
        for number, key in enumerate(cached.keys):
            if key not in made:
                with cached.open(number) as entry:
                    read = {name: entry[name][:] for name in entry.names}
                volumes = {name: read.pop(name).to(device) for name in VOLUMES}
                positions = {name: tensor.numpy() for name, tensor in read.items()}
                made[key] = ResidentCase(volumes | positions)
        self._cases = [made[key] for key in cached.keys]

    def __getitem__(self, number: int) -> ResidentCase:
        return self._cases[number]

    def cut(
        self, numbers: Sequence[int], origins: Sequence[np.ndarray], size: np.ndarray
    ) -> dict[str, torch.Tensor]:
        """Patches of some cases on the device, zero outside the volumes.

        Args:
            numbers: B cases.
            origins: First voxel `(3,)` of each patch, negative outside the volume.
            size: Of a patch, `(3,)`; each must have a voxel in common with its volume.

        Returns:
            `image` `(B, C, *size)` and `label` `(B, 1, *size)`, in their own dtypes.
        """
        like = self._cases[0]
        batch = {
            name: like[name].new_zeros((len(numbers), len(like[name]), *size.tolist()))
            for name in VOLUMES
        }
        for place, (number, origin) in enumerate(zip(numbers, origins, strict=True)):
            case = self._cases[number]
            source, target = common(origin, size, case["label"].shape[1:])
            for name in VOLUMES:
                batch[name][(place, *target)] = case[name][source]
        return batch


class DeviceCache:
    """Whether the cases are on the device: decided once, when the first batch is asked for.

    Args:
        cache_on_device: `auto`: on CUDA, if the volumes take no more than a quarter of its free
            memory;
            `true`: in any case, on a CPU in this process's memory; `false`: never.
        device: That the patches are for.
        num_workers: Asked for; none is started where the cases are on the device.

    Raises:
        InputError: If `cache_on_device` is none of these.
    """

    def __init__(
        self, cache_on_device: bool | str, device: str | torch.device, num_workers: int
    ) -> None:
        if cache_on_device not in CHOICES:
            raise InputError(
                f"cache_on_device: expected auto, true or false, got {cache_on_device!r}."
            )
        self.requested, self.num_workers = cache_on_device, num_workers
        self.asked, self.device = CHOICES[cache_on_device], torch.device(device)
        self._cases: ResidentCases | None = None
        self._effective: dict[str, Any] = {}

    def of(self, cached: CachedCases) -> ResidentCases | None:
        """The cases on the device, or `None` where they are read from the cache.

        Raises:
            InputError: If they are to be there and do not fit.
        """
        if not self.is_decided:
            self._decide(cached)
        return self._cases

    @property
    def is_decided(self) -> bool:
        """Whether it is known where the cases are."""
        return bool(self._effective)

    def describe(self) -> dict[str, dict[str, Any]]:
        """What was asked for and what is in force; `None` where that is not yet known."""
        nothing = dict.fromkeys(("cache_on_device", "bytes", "num_workers", "reason"))
        return {
            "requested": {"cache_on_device": self.requested, "num_workers": self.num_workers},
            "effective": {**nothing, **self._effective},
        }

    def __str__(self) -> str:
        """One line: what is in force, and what was asked for."""
        cache_on_device, reason = (
            self._effective.get("cache_on_device"),
            self._effective.get("reason"),
        )
        where = f"in the memory of {self.device}" if cache_on_device else "in the cache on disk"
        workers = f"num_workers {self.num_workers}{' (not used)' if cache_on_device else ''}"
        asked = f"cache_on_device {self.requested}, {workers}"
        return f"Training cases in force: {where} ({reason}); asked for: {asked}"

    def _decide(self, cached: CachedCases) -> None:
        cuda = self.device.type == "cuda"
        size = size_bytes(cached) if self.asked or (self.asked is None and cuda) else None
        free = torch.cuda.mem_get_info(self.device)[0] if cuda else None
        cache_on_device, reason = decision(self.asked, size, free)
        if cache_on_device:
            try:
                self._cases = ResidentCases(cached, self.device)
            except torch.OutOfMemoryError:
                if self.asked:
                    raise self._too_large(size, free) from None
                cache_on_device, reason = False, "the device's memory was taken meanwhile"
        workers = 0 if cache_on_device else self.num_workers
        self._effective = {
            "cache_on_device": cache_on_device,
            "bytes": size,
            "num_workers": workers,
            "reason": reason,
        }

    def _too_large(self, size: int | None, free: int | None) -> InputError:
        return InputError(
            f"cache_on_device: expected {_mb(size)} free on {self.device} for the training cases, "
            f"got {_mb(free)}. Use cache_on_device=auto or false."
        )


def decision(asked: bool | None, size: int | None, free: int | None) -> tuple[bool, str]:
    """Whether cases are put on a device, and why.

    Args:
        asked: `None` for `auto`.
        size: Bytes of their volumes.
        free: Bytes of the device's memory; `None` on a CPU.
    """
    if asked is not None:
        return asked, "as asked for"
    if size is None or free is None:
        return False, "on a CPU the system keeps what is read often"
    fits = size * SHARE <= free
    return fits, f"{_mb(size)} of {_mb(free)} free, {'at most' if fits else 'more than'} a quarter"


def size_bytes(cached: CachedCases) -> int:
    """Bytes of all volumes, equal cases counted once; their files are opened, not read."""
    total = 0
    for number in {key: n for n, key in enumerate(cached.keys)}.values():
        with cached.open(number) as entry:
            for name in VOLUMES:
                voxel = entry[name][:1, :1, :1, :1]
                total += int(np.prod(entry[name].shape)) * voxel.element_size()
    return total


def _mb(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:.0f} MB"
