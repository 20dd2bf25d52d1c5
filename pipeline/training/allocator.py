"""Keeping the memory of freed tensors on a CPU."""

from __future__ import annotations

import ctypes
import os
import sys

CHOSEN_BY_USER = ("MALLOC_MMAP_", "MALLOC_TRIM_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Keep the memory of freed tensors for those of the next step; returns whether it is kept.

    glibc would return what is larger than 32 MB, so that in every step its pages are mapped and
    zeroed again: 7 to 14 % of a step's processor time. What the user has chosen is left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name.startswith(CHOSEN_BY_USER) for name in os.environ):
        return False
    # M_MMAP_THRESHOLD, and M_TRIM_THRESHOLD, which glibc no longer raises by itself then
    return bool(mallopt(-3, 2**30) and mallopt(-1, 2**31 - 1))
