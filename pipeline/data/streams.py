"""Statistics of values that pass by in pieces."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

SKETCH_SIZE = 256  # values, chosen by hash, that stand for all
FEW = 2**13


class Moments:
    """Mean and deviation of values that pass by in pieces, far from 0 as well.

    Source: Chan, Golub and LeVeque, Updating formulae, Stanford STAN-CS-79-773, 1979.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        """Take in a piece, float64."""
        if not len(values):
            return
        share = len(values) / (self.count + len(values))
        shift = values.mean() - self.mean
        self.squares += np.square(values - values.mean()).sum() + shift**2 * self.count * share
        self.mean += shift * share
        self.count += len(values)

    def facts(self, prefix: str = "") -> dict[str, Any]:
        """`count`, `mean`, `std`, with a prefix; `None` where nothing was added."""
        known = self.count > 0
        return {
            f"{prefix}count": self.count,
            f"{prefix}mean": float(self.mean) if known else None,
            f"{prefix}std": math.sqrt(self.squares / self.count) if known else None,
        }


def smallest_hashes(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The `SKETCH_SIZE` smallest hashes of the values so far (bottom-k sketch), zero left out.

    Source: Broder, On the resemblance and containment of documents, 1997; the hash is the
    finalizer of SplitMix64 (Steele et al., OOPSLA 2014).
    """
    x = (values[values != 0] + 0.0).view(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    for part in (x[:FEW], x[FEW:]):  # of a few values comes a bound, below which few others are
        if len(known) == SKETCH_SIZE:
            part = part[part < known[-1]]
        known = np.unique(np.concatenate([known, part]))[:SKETCH_SIZE]
    return known
