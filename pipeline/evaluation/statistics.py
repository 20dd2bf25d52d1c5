"""Differences between two arms of several runs each, and the verdicts on them.

An *arm* is a variant, trained once per seed; a *run* is one of these trainings. All runs are scored
on the same cases. What varies by chance are seeds, within each arm, and persons, the same in both.
`estimate_difference` adds up their variances, `compare_arms` tests the difference.
`benchmarks/equivalence_simulation.json` has error rates and power.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit
from scipy.stats import rankdata

from pipeline.evaluation.metrics import mean_of_defined
from pipeline.files import nan_to_none

EQUIVALENT = "equivalent"
BETTER = "better"
WORSE = "worse"
NO_DIFFERENCE = "no difference shown"
TOO_FEW = "too few to tell"

MIN_SEEDS = 2
# Where persons make most of the difference, the interval of few is too narrow: of equal pairs of
# five normal seeds it calls 12 % different with two persons, 7 % with three, 5 % from five on.
MIN_PERSONS = 5
NUM_RESAMPLES = 5000  # tells a standard error to 1 %
POWER = 0.8  # with which the smallest difference would be shown
ROUNDING = 1e-12  # of the largest score; less than that is no difference


@dataclass(frozen=True)
class Arm:
    """Scores of the S runs of one arm, on N cases of K classes, `(S, N, K)` float64 and bool.

    A score that is undefined is `nan`; `best` says where that is because it could not be better, as
    where a class is in neither label nor prediction. Other undefined scores are worse than any.
    """

    values: np.ndarray
    best: np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A difference of means, A minus B, and its standard errors; `nan` where unknown.

    `errors` are those from `seeds_a`, `seeds_b` and `persons`, `total` from all three, which is not
    known with fewer than `MIN_SEEDS` or `MIN_PERSONS`; `freedom` are its degrees of freedom.
    """

    value: float
    errors: dict[str, float]
    total: float
    freedom: float

    @property
    def p_value(self) -> float:
        """Two-sided p-value of no difference."""
        if self.total == 0:  # nothing varies: the difference is what it is
            return float(self.value == 0)
        return float(2 * stdtr(self.freedom, -abs(self.value) / self.total))

    def reach(self, tail: float) -> float:
        """Return how far the difference may lie off by chance, but for a probability `tail`."""
        return float(self.total and -stdtrit(self.freedom, tail) * self.total)

    def is_within(self, margin: float, confidence: float) -> bool:
        """Return whether the interval lies strictly within ± margin."""
        return abs(self.value) + self.reach((1 - confidence) / 2) < margin  # false for nan


def estimate_difference(a: np.ndarray, b: np.ndarray, persons: Sequence[str]) -> Estimate:
    """Estimate mean of A minus mean of B, over runs and cases, with its standard errors.

    Seeds are drawn within each arm: every run has the same weight, so the variance over all
    resamples of n runs is s² (n-1)/n², where s² is that of the run means. Persons are drawn with
    all of their cases, whose numbers differ: their variance is that over drawn resamples of the
    difference, paired by case. Each variance is multiplied by n/(n-1), since resamples of n vary
    too little by that factor, and quantiles are those of t: those of the resamples of three seeds
    cover 75 % instead of 95 %. Noise that belongs to neither seed nor person counts twice, which
    makes intervals wider than necessary.

    Args:
        a: `(S_A, N)` float64, complete.
        b: `(S_B, N)` float64, complete.
        persons: `N` names, of the person of each case.

    Source: Hesterberg, The American Statistician 69 (2015), for n/(n-1) and t; Owen, Annals of
    Applied Statistics 1 (2007), for what counts twice; Satterthwaite, Biometrics Bulletin 2 (1946),
    and Welch, Biometrika 34 (1947), for the degrees of freedom.
    """
    if not persons:
        nothing = dict.fromkeys(("seeds_a", "seeds_b", "persons"), np.nan)
        return Estimate(np.nan, nothing, np.nan, np.nan)
    runs = [arm.mean(axis=1) for arm in (a, b)]
    units = [len(a), len(b), len(set(persons))]
    means = _resample_persons(a.mean(axis=0) - b.mean(axis=0), persons, NUM_RESAMPLES)
    variances = [
        *(
            float(np.var(of_runs, ddof=1) / n) if n > 1 else np.nan
            for of_runs, n in zip(runs, units, strict=False)
        ),
        float(np.var(means) * units[2] / (units[2] - 1)) if units[2] > 1 else np.nan,
    ]
    value = float(runs[0].mean() - runs[1].mean())
    total, freedom = math.sqrt(sum(variances)), np.nan
    negligible = ROUNDING * max(np.abs(a).max(), np.abs(b).max())
    if min(units[:2]) < MIN_SEEDS or units[2] < MIN_PERSONS:
        total = np.nan
    elif total <= negligible:
        total = 0.0
    else:
        shares = [variance / total**2 for variance in variances]
        freedom = 1 / sum(share**2 / (n - 1) for share, n in zip(shares, units, strict=True))
    errors = zip(("seeds_a", "seeds_b", "persons"), map(math.sqrt, variances), strict=True)
    return Estimate(value if abs(value) > negligible else 0.0, dict(errors), total, freedom)


def _resample_persons(values: np.ndarray, persons: Sequence[str], num_resamples: int) -> np.ndarray:
    """Return means of `(N,)` values that are not `nan`, of all cases of drawn persons."""
    names, person_of_case = np.unique(np.asarray(persons), return_inverse=True)
    known = ~np.isnan(values)
    sums = np.bincount(person_of_case, np.where(known, values, 0), len(names))
    counts = np.bincount(person_of_case, known, len(names))
    draws = _draw_persons(len(names), num_resamples)
    draws = draws[draws @ counts > 0]
    return (draws @ sums) / (draws @ counts)


@lru_cache(maxsize=8)
def _draw_persons(number: int, num_resamples: int) -> np.ndarray:
    """`(num_resamples, number)` float64: how often each resample draws each; always the same."""
    rng = np.random.default_rng(0)
    return rng.multinomial(number, np.full(number, 1 / number), size=num_resamples).astype(float)


def bootstrap_interval(values: np.ndarray, persons: Sequence[str]) -> list[float] | None:
    """Compute the 95 % percentile interval of a mean over cases when persons are drawn.

    Args:
        values: `(N,)` float64 scores; `nan` where the case has none.
        persons: `N` names; all cases of a person are drawn together.

    Returns:
        Both ends; `None` with scores of fewer than two persons.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    if len(np.unique(np.asarray(persons)[~np.isnan(values)])) < 2:
        return None
    # ends vary by 6 % of a standard error with so few draws, of some hundred intervals
    return np.quantile(_resample_persons(values, persons, 2_000), [0.025, 0.975]).tolist()


def correct_by_holm(p_values: Sequence[float], alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Correct p-values for the number of tests by Holm's method.

    Args:
        p_values: `nan` where there is no test, which does not count.
        alpha: Probability of any false rejection.

    Returns:
        Adjusted p-values, and the level of each: the one it was tested at, or for the tests after
        the first that failed, that one's.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    given = np.asarray(p_values, dtype=float)
    order = np.argsort(given, kind="stable")  # nan last
    number = int((~np.isnan(given)).sum())
    steps = np.maximum(number - np.arange(len(given)), 1)
    stepped = np.minimum(np.maximum.accumulate(given[order] * steps), 1)
    passed = int((stepped < alpha).sum())
    steps[passed:] = steps[passed : passed + 1]
    back = np.argsort(order)
    return stepped[back], (alpha / steps)[back]


def rank_scores(placed: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Return ranks within each class, over their number; 1 where `counted`, `(N, K)`, is false."""
    ranks = np.ones(placed.shape)
    for k, cases in enumerate(counted.T):
        if cases.any():
            ranks[:, cases, k] = rankdata(placed[:, cases, k]).reshape(len(placed), -1)
            ranks[:, cases, k] /= ranks[:, cases, k].size
    return ranks


def compare_arms(
    a: Arm,
    b: Arm,
    persons: Sequence[str],
    class_names: Sequence[str],
    *,
    higher_is_better: bool = True,
    confidence: float = 0.95,
    margin: float | None = None,
) -> dict[str, Any]:
    """Compare two arms in every class, and in the mean over classes.

    A case that is undefined alike in every run of both arms says nothing about a class and is
    counted apart. If other scores of a class are undefined, it is compared by ranks: of all scores
    of all runs and cases, ties averaged, the undefined at their end. The estimate is then the
    probability that a score of A is better than one of B, less one half. The mean over classes is
    taken case by case, and is of ranks as soon as one class is.

    The overall verdict is one test by itself; those on classes are corrected by Holm's method, and
    their intervals and smallest differences are of the level that it tested them at. Arms are
    equivalent if the interval at `confidence` lies strictly within the margin.

    Args:
        a: The one arm.
        b: The other, of the same N cases and K classes.
        persons: `N` names, of the person of each case.
        class_names: `K` names.
        higher_is_better: Which direction is good.
        confidence: Between 0 and 1.
        margin: Smallest difference that matters, above 0, in units of the score. With ranks, it is
            the change of the estimate when one arm is shifted by as much. With it, the verdict is
            `TOO_FEW` if a larger difference could have gone unnoticed.

    Returns:
        `overall`, and `classes` by name, each with `verdict` (on A), `reason` (why too few, or
        `None`); `mean_a`, `mean_b`, `difference` of the defined scores; `scale`, `difference` or
        `rank`, and on that scale `estimate` (of ranks, above 0 if A is better), `interval`,
        `interval_confidence`, `p_value`, `adjusted_p`, `smallest_difference` (shown with a
        probability of 80 %), `standard_errors`, `margin`; `num_cases` and `num_persons` that say
        something, `num_apart`, and `num_undefined` by arm. `None` where there is no number.

    Source: Schuirmann, J Pharmacokinet Biopharm 15 (1987), for equivalence; Brunner & Munzel,
    Biometrical Journal 42 (2000), for the difference of ranks.
    """
    sign = 1 if higher_is_better else -1
    values = np.concatenate([a.values, b.values])
    end = np.where(np.concatenate([a.best, b.best]), np.inf, -np.inf)
    placed = np.where(np.isnan(values), end, sign * values)

    def judge(group: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
        """Judge the means over some classes each; verdicts are corrected for one another."""
        found = [
            _estimate(values[..., k], placed[..., k], len(a.values), persons, margin)
            for k in group.values()
        ]
        tests = correct_by_holm([estimate.p_value for estimate, _ in found], 1 - confidence)
        return {
            name: entry
            | {"adjusted_p": nan_to_none(float(p))}
            | _judge(estimate, level, entry, sign, confidence)
            for name, (estimate, entry), p, level in zip(group, found, *tests, strict=True)
        }

    classes = {name: [k] for k, name in enumerate(class_names)}
    return judge({"overall": range(len(classes))}) | {"classes": judge(classes)}


def _estimate(
    values: np.ndarray, placed: np.ndarray, num_a: int, persons: Sequence[str], margin: float | None
) -> tuple[Estimate, dict[str, Any]]:
    """Estimate the difference of the mean over classes; also return what needs no level.

    Args:
        values: `(S, N, K)` of the runs of A, the first `num_a`, then of B.
        placed: The same with better above worse, the undefined at ±inf.
    """
    undefined = np.isinf(placed)
    apart = undefined.all(axis=0) & (placed == placed[0]).all(axis=0)  # (N, K)
    undefined &= ~apart
    used = ~apart.all(axis=1)
    people = [person for person, is_used in zip(persons, used, strict=True) if is_used]
    shown = mean_of_defined(values, axis=-1)[:, used]
    by_rank = bool(undefined.any())
    if by_rank:
        counted = np.broadcast_to(~apart, placed.shape)

        def estimate_shifted(shift: float) -> Estimate:
            shifted = np.concatenate([placed[:num_a] + shift, placed[num_a:]])
            ranks = mean_of_defined(rank_scores(shifted, ~apart), -1, counted)[:, used]
            return estimate_difference(ranks[:num_a], ranks[num_a:], people)

        estimate = estimate_shifted(0)
        if margin:
            margin = (estimate_shifted(margin).value - estimate_shifted(-margin).value) / 2
    else:
        estimate = estimate_difference(shown[:num_a], shown[num_a:], people)
    means = [float(mean_of_defined(arm)) for arm in (shown[:num_a], shown[num_a:])]
    return estimate, {
        "mean_a": nan_to_none(means[0]),
        "mean_b": nan_to_none(means[1]),
        "difference": nan_to_none(means[0] - means[1] if by_rank else estimate.value),
        "scale": "rank" if by_rank else "difference",
        "estimate": nan_to_none(estimate.value),
        "p_value": nan_to_none(estimate.p_value),
        "standard_errors": {name: nan_to_none(error) for name, error in estimate.errors.items()},
        "margin": margin,
        "num_seeds": {"a": num_a, "b": len(values) - num_a},
        "num_cases": len(people),
        "num_persons": len(set(people)),
        "num_apart": int((~used).sum()),
        "num_undefined": {"a": int(undefined[:num_a].sum()), "b": int(undefined[num_a:].sum())},
    }


def _judge(
    estimate: Estimate, level: float, entry: dict[str, Any], sign: int, confidence: float
) -> dict[str, Any]:
    """Return verdict, interval and smallest difference, at the level of the test."""
    reach, margin = estimate.reach(level / 2), entry["margin"]
    smallest = reach + estimate.reach(1 - POWER)
    favour = estimate.value * (1 if entry["scale"] == "rank" else sign)
    reason = None
    if np.isnan(reach):
        counts = [(f"seeds of {a.upper()}", n, MIN_SEEDS) for a, n in entry["num_seeds"].items()]
        counts.append(("persons", entry["num_persons"], MIN_PERSONS))
        lacking = [f"{n} of at least {least} {what}" for what, n, least in counts if n < least]
        verdict, reason = TOO_FEW, ", ".join(lacking)
    elif margin is not None and estimate.is_within(margin, confidence):
        verdict = EQUIVALENT
    elif estimate.p_value < level:
        verdict = BETTER if favour > 0 else WORSE
    elif margin is not None and smallest > margin:
        verdict, reason = TOO_FEW, "a difference of the margin could have gone unnoticed"
    else:
        verdict = NO_DIFFERENCE
    return {
        "verdict": verdict,
        "reason": reason,
        "interval": [nan_to_none(estimate.value + end) for end in (-reach, reach)],
        "interval_confidence": 1 - float(level),
        "smallest_difference": nan_to_none(smallest),
    }
