"""Training cases in a device's memory, where they fit: a sample costs no file and no transfer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline.data.cache import CachedCases
from pipeline.errors import InputError

VOLUMES = ("image", "label")
SHARE = 4  # `auto` takes no more than a quarter of what is free: network and activations come later
CHOICES: dict[Any, bool | None] = {
    "auto": None, True: True, False: False, "true": True, "false": False,
}  # fmt: skip

CaseTensors = dict[str, Any]  # volumes on the device, positions as arrays on the host


class DeviceCache:
    """Puts training cases on the device; whether it does is decided when they are first asked for.

    Args:
        cache_on_device: `auto`: on CUDA, if the volumes take no more than a quarter of its free
            memory; `true`: in any case, on a CPU in this process's memory; `false`: never.
        device: Device that the patches are for.
        num_workers: Loader workers that were asked for; cases on the device need none.

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
        self.choice, self.device = CHOICES[cache_on_device], torch.device(device)
        self._cases: list[CaseTensors] | None = None
        self._effective: dict[str, Any] = {}

    def load(self, cached: CachedCases) -> list[CaseTensors] | None:
        """Return the cases on the device, or `None` where they are read from the cache.

        Raises:
            InputError: If they are to be there and do not fit.
        """
        if not self.is_decided:
            cuda = self.device.type == "cuda"
            size = size_bytes(cached) if self.choice or (self.choice is None and cuda) else None
            free = torch.cuda.mem_get_info(self.device)[0] if cuda else None
            on_device, reason = decide(self.choice, size, free)
            if on_device:
                try:
                    self._cases = load_cases_on(self.device, cached)
                except torch.OutOfMemoryError:
                    if self.choice:
                        raise InputError(
                            f"cache_on_device: expected {_mb(size)} free on {self.device} for the "
                            f"training cases, got {_mb(free)}. Use cache_on_device=auto or false."
                        ) from None
                    on_device, reason = False, "the device's memory was taken meanwhile"
            workers = 0 if on_device else self.num_workers
            self._effective = {"cache_on_device": on_device, "bytes": size, "num_workers": workers}
            self._effective["reason"] = reason
        return self._cases

    @property
    def is_decided(self) -> bool:
        """Whether it is known where the cases are."""
        return bool(self._effective)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return what was asked for and what is in force; `None` where that is not yet known."""
        nothing = dict.fromkeys(("cache_on_device", "bytes", "num_workers", "reason"))
        return {
            "requested": {"cache_on_device": self.requested, "num_workers": self.num_workers},
            "effective": {**nothing, **self._effective},
        }

    def __str__(self) -> str:
        on_device = self._effective.get("cache_on_device")
        where = f"in the memory of {self.device}" if on_device else "in the cache on disk"
        workers = f"num_workers {self.num_workers}{' (not used)' if on_device else ''}"
        asked = f"cache_on_device {self.requested}, {workers}"
        reason = self._effective.get("reason")
        return f"Training cases in force: {where} ({reason}); asked for: {asked}"


def decide(choice: bool | None, size: int | None, free: int | None) -> tuple[bool, str]:
    """Decide whether cases are put on a device, and say why.

    Args:
        choice: What was asked for; `None` for `auto`.
        size: Bytes of their volumes.
        free: Bytes of the device's memory that are free; `None` on a CPU.
    """
    if choice is not None:
        return choice, "as asked for"
    if size is None or free is None:
        return False, "on a CPU the system keeps what is read often"
    fits = size * SHARE <= free
    return fits, f"{_mb(size)} of {_mb(free)} free, {'at most' if fits else 'more than'} a quarter"


def load_cases_on(device: torch.device, cached: CachedCases) -> list[CaseTensors]:
    """Read all tensors of cached cases, volumes to the device; equal cases are there once.

    Raises:
        InputError: If a case that was removed from the cache cannot be made anew.
    """
    loaded: dict[str, CaseTensors] = {}
    for number, key in enumerate(cached.keys):
        if key not in loaded:
            with cached.open(number) as entry:
                tensors = {name: entry[name][:] for name in entry.names}
            loaded[key] = {
                name: tensor.to(device) if name in VOLUMES else tensor.numpy()
                for name, tensor in tensors.items()
            }
    return [loaded[key] for key in cached.keys]


def size_bytes(cached: CachedCases) -> int:
    """Count the bytes of all volumes, equal cases once; their files are opened, not read."""
    total = 0
    for number in {key: n for n, key in enumerate(cached.keys)}.values():
        with cached.open(number, verify=False) as entry:
            for name in VOLUMES:
                voxel = entry[name][:1, :1, :1, :1]
                total += int(np.prod(entry[name].shape)) * voxel.element_size()
    return total


def _mb(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:.0f} MB"
