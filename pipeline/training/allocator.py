"""Keeping the memory of freed tensors on a CPU."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt(3)
CHOSEN_BY_USER = ("MALLOC_MMAP_", "MALLOC_TRIM_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for those of the next step.

    glibc returns tensors of more than 32 MB to the system when they are freed, so that in every
    step each of their pages is mapped and zeroed again: 7 to 14 % of a step's processor time.

    Returns:
        Whether it does: not without glibc, nor if the user has chosen otherwise.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name.startswith(CHOSEN_BY_USER) for name in os.environ):
        return False
    # with the second alone, glibc would no longer raise the first one's value by itself
    return bool(mallopt(MMAP_THRESHOLD, 2**30) and mallopt(TRIM_THRESHOLD, 2**31 - 1))
