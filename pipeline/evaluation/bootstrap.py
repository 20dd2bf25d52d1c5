"""Bootstrap interval of a paired difference between two training variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EQUIVALENT = "equivalent"
WORSE = "worse"
UNDECIDED = "not enough evidence"


@dataclass(frozen=True)
class Interval:
    """Estimate and ends of its percentile interval, in units of the score; `nan` if unknown."""

    mean: float
    low: float
    high: float


def paired_interval(
    delta: np.ndarray,
    persons: Sequence[str],
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    rng_seed: int = 0,
) -> Interval:
    """Mean difference and its percentile interval, from a crossed bootstrap of seeds and persons.

    Every resample draws as many seeds and as many persons as there are, with replacement and
    independently, all cases of a person together. Its mean is over the scored entries of drawn
    seeds × drawn cases; a resample without any is left out. One seed leaves a bootstrap over
    persons only.

    With few seeds the interval is too narrow: that of 3 seeds can reach no further than their
    lowest and highest, and covers 75 % instead of 95 % where the seeds make all the difference. A
    single seed or person adds no width at all. Noise that belongs to neither seed nor person
    counts about three times its variance (Owen, 2007), which errs on the wide side.

    Args:
        delta: `(S, N)` float64 differences of score, a row per training seed and a column per
            case; `nan` where the case has no score.
        persons: `N` names, of the person of each case.
        num_resamples: Resamples drawn.
        confidence: Share of the resamples between the ends, between 0 and 1.
        rng_seed: Seed of the draws.

    Returns:
        Mean over all scored entries, and the interval; all `nan` if there is no score.

    Raises:
        ValueError: If `delta` is not 2D, or has not one column per name.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13, for the
    percentile interval; Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1 (2007), for
    resampling rows and columns.
    """
    if delta.ndim != 2 or delta.shape[1] != len(persons):
        raise ValueError(
            f"delta: expected shape (seeds, {len(persons)}), got {delta.shape}. "
            "Give one row per seed, and one column and one person name per case."
        )
    scored = ~np.isnan(delta)
    if not scored.any():
        return Interval(np.nan, np.nan, np.nan)
    names, person_of_case = np.unique(np.asarray(persons), return_inverse=True)
    member = np.eye(len(names))[person_of_case]  # (N, P)
    sums = np.where(scored, delta, 0) @ member  # (S, P)
    counts = scored @ member

    # how often each is drawn is all that the mean needs: (resamples, S) and (resamples, P)
    rng = np.random.default_rng(rng_seed)
    seed_draws, person_draws = (
        rng.multinomial(n, np.full(n, 1 / n), size=num_resamples) for n in sums.shape
    )
    total, number = (
        np.einsum("rp,rp->r", seed_draws @ table, person_draws) for table in (sums, counts)
    )
    drawn = number > 0
    if not drawn.any():
        return Interval(float(sums.sum() / counts.sum()), np.nan, np.nan)
    tail = (1 - confidence) / 2
    low, high = np.quantile(total[drawn] / number[drawn], [tail, 1 - tail])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


def verdict(interval: Interval, margin: float) -> str:
    """What an interval of (variant minus reference) says, higher scores being better.

    Args:
        interval: Of the difference.
        margin: Largest difference that does not matter, above 0, in units of the score.

    Returns:
        `EQUIVALENT` if the interval lies strictly within ± margin, `WORSE` if strictly below
        -margin, else, and for `nan`, `UNDECIDED`.

    Raises:
        ValueError: If the margin is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"margin: expected more than 0, got {margin}. Give a difference of score.")
    # chained, so that a nan at either end is neither
    if -margin < interval.low <= interval.high < margin:
        return EQUIVALENT
    return WORSE if interval.low <= interval.high < -margin else UNDECIDED
