"""Training cases in a device's memory, where they fit: a sample costs no file and no transfer."""

from __future__ import annotations

import logging
from typing import Any

import torch

from pipeline import distributed
from pipeline.data.cache import CachedCases
from pipeline.errors import InputError, require

log = logging.getLogger(__name__)

VOLUMES = ("image", "label")
SHARE = 4  # `auto` takes no more than a quarter of what is free: network and activations come later
CHOICES = {"auto": None, "true": True, "false": False}

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
        word = str(cache_on_device).lower()
        expected = "auto, true or false"
        require(word in CHOICES, "cache_on_device", expected, repr(cache_on_device), "Correct it.")
        self.choice, self.device = CHOICES[word], torch.device(device)
        self.requested = {"cache_on_device": cache_on_device, "num_workers": num_workers}
        self.effective: dict[str, Any] = {**dict.fromkeys([*self.requested, "bytes", "reason"])}
        self._cases: list[CaseTensors] | None = None

    def load(self, cached: CachedCases) -> list[CaseTensors] | None:
        """Return the cases on the device, or `None` where they are read from the cache.

        All ranks have to call it the first time.

        Raises:
            InputError: If they are to be there and do not fit.
        """
        if self.effective["reason"] is None:
            with distributed.sync_errors():
                self._decide(cached)
            log.info("Training cases in force: %s; asked for: %s", *self.describe().values())
        return self._cases

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return what is in force, `None` where not yet known, and what was asked for."""
        return {"effective": self.effective, "requested": self.requested}

    def _decide(self, cached: CachedCases) -> None:
        cuda = self.device.type == "cuda"
        size = size_bytes(cached) if self.choice or (self.choice is None and cuda) else None
        free = torch.cuda.mem_get_info(self.device)[0] if cuda else None
        on_device, reason = decide(self.choice, size, free)
        try:
            self._cases = load_cases_on(self.device, cached) if on_device else None
        except torch.OutOfMemoryError:
            if self.choice:
                raise InputError(
                    f"cache_on_device: expected {_mb(size)} free on {self.device} for the training "
                    f"cases, got {_mb(free)}. Use cache_on_device=auto or false."
                ) from None
            on_device, reason = False, "the device's memory was taken meanwhile"
        workers = 0 if on_device else self.requested["num_workers"]
        self.effective = {
            "cache_on_device": on_device, "bytes": size, "num_workers": workers, "reason": reason,
        }  # fmt: skip


def decide(choice: bool | None, size: int | None, free: int | None) -> tuple[bool, str]:
    """Decide whether `size` bytes are put where `free` bytes are, `None` on a CPU, and say why."""
    if choice is not None:
        return choice, "as asked for"
    if size is None or free is None:
        return False, "on a CPU the system keeps what is read often"
    fits = size * SHARE <= free
    return fits, f"{_mb(size)} of {_mb(free)} free, {'at most' if fits else 'more than'} a quarter"


def load_cases_on(device: torch.device, cached: CachedCases) -> list[CaseTensors]:
    """Read all tensors of cached cases, volumes to the device; equal cases are there once."""
    loaded: dict[str, CaseTensors] = {}
    for number, key in enumerate(cached.keys):
        if key not in loaded:
            with cached.open(number) as entry:
                loaded[key] = {
                    name: tensor[:].to(device) if name in VOLUMES else tensor[:].numpy()
                    for name, tensor in entry.items()
                }
    return [loaded[key] for key in cached.keys]


def size_bytes(cached: CachedCases) -> int:
    """Count the bytes of all entries, equal cases once."""
    paths = map(cached.cache.path, {*cached.keys})
    return sum(path.stat().st_size for path in paths if path.exists())


def _mb(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:.0f} MB"
