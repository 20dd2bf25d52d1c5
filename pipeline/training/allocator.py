"""What the C library does with memory that a tensor on a CPU has given back."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGEST_KEPT_BYTES = 2**30
WORDS = ("MALLOC_MMAP_", "MALLOC_TRIM_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors, for those of the next step.

    glibc takes tensors of more than 32 MB from the system one by one and gives them back when they
    are freed, so that in every training step each of their pages is mapped and zeroed again: an
    eighth of a step's processor time at 32 channels and 48³.

    Returns:
        Whether it is so: not without glibc, nor where the user has chosen otherwise.
    """
    if not sys.platform.startswith("linux") or any(name.startswith(WORDS) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # the second alone would do harm: with it glibc no longer raises the first one's value by itself
    kept = mallopt(MMAP_THRESHOLD, LARGEST_KEPT_BYTES) and mallopt(TRIM_THRESHOLD, 2**31 - 1)
    return bool(kept)
