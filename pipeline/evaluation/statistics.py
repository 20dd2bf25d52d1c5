"""Differences between two arms of several runs each, and the verdicts on them.

An *arm* is a variant, trained once per seed; a *run* is one of these trainings. All runs are scored
on the same cases. Seeds vary by chance within each arm, persons are the same in both arms.
`benchmarks/equivalence_simulation.json` has error rates and power.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
MIN_PERSONS = 5  # of fewer, the interval is too narrow where persons make most of the difference
NUM_RESAMPLES = 5000  # tells a standard error to 1 %
SOURCES = ("seeds_a", "seeds_b", "persons")  # of variance
POWER = 0.8  # with which the smallest difference would be shown
ROUNDING = 1e-12  # of the largest score; less than that is no difference


@dataclass(frozen=True)
class Estimate:
    """A difference of means, A minus B, and its standard errors; `nan` where unknown.

    `errors` are those from each of `SOURCES`, `total` from all three; `freedom` are its degrees of
    freedom. They are not known with fewer than `MIN_SEEDS` or `MIN_PERSONS`.
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

    Seeds are drawn within each arm: every run has the same weight. Persons are drawn with all of
    their cases: their variance is that over drawn resamples of the difference, paired by case. Each
    variance is multiplied by n/(n-1), since resamples of n vary too little by that factor, and
    quantiles are those of t. Noise that belongs to neither seed nor person counts twice, which
    makes intervals wider than necessary. Arms are `(S, N)` float64, complete; `persons` `N` names.

    Source: Hesterberg, The American Statistician 69 (2015), for n/(n-1) and t; Owen, Annals of
    Applied Statistics 1 (2007), for what counts twice; Satterthwaite, Biometrics Bulletin 2 (1946),
    and Welch, Biometrika 34 (1947), for the degrees of freedom.
    """
    if not persons:
        return Estimate(np.nan, dict.fromkeys(SOURCES, np.nan), np.nan, np.nan)
    runs = [arm.mean(axis=1) for arm in (a, b)]
    units = [len(a), len(b), len(set(persons))]
    variances = [float(np.var(of, ddof=1) / len(of)) if len(of) > 1 else np.nan for of in runs]
    means = _resample_persons(a.mean(axis=0) - b.mean(axis=0), persons, NUM_RESAMPLES)
    variances.append(float(np.var(means) * units[2] / (units[2] - 1)) if units[2] > 1 else np.nan)
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
    errors = dict(zip(SOURCES, map(math.sqrt, variances), strict=True))
    return Estimate(value if abs(value) > negligible else 0.0, errors, total, freedom)


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
    """Compute the 95 % percentile interval of the mean of `(N,)` scores that are not `nan`.

    Persons, of which `N` names are given, are drawn with all of their cases. With scores of fewer
    than two persons the result is `None`.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    if len(np.unique(np.asarray(persons)[~np.isnan(values)])) < 2:
        return None
    # ends vary by 6 % of a standard error with so few draws, of some hundred intervals
    return np.quantile(_resample_persons(values, persons, 2_000), [0.025, 0.975]).tolist()


def correct_by_holm(p_values: Sequence[float], alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Correct p-values by Holm's method, for a probability `alpha` of any false rejection.

    A p-value of `nan` is no test and does not count.

    Returns:
        Adjusted p-values, and the level at which each was tested; after the first test that fails,
        the level stays.

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


def compare_arms(
    a: np.ndarray,
    b: np.ndarray,
    persons: Sequence[str],
    class_names: Sequence[str],
    *,
    higher_is_better: bool = True,
    confidence: float = 0.95,
    margin: float | None = None,
) -> dict[str, Any]:
    """Compare two arms, of the same N cases and K classes, in every class and in their mean.

    A case that is undefined alike in every run of both arms says nothing about a class and is
    counted apart. If other scores of a class are undefined, it is compared by ranks of all scores
    of all runs and cases, the undefined at their end; the estimate is then the probability that a
    score of A is better than one of B, less one half. The mean over classes is taken case by case,
    and is of ranks as soon as one class is. The overall verdict is one test; those on classes are
    corrected by Holm's method, which gives the level of their intervals.

    Args:
        a: Scores of the S runs of one arm, `(S, N, K)` float64. An undefined one is `inf` if it
            could not be better, as where a class is in neither label nor prediction, else `nan`.
        persons: `N` names, of the person of each case.
        confidence: Arms are equivalent if the interval at it lies strictly within the margin.
        margin: Smallest difference that matters, above 0. With ranks, it is the change of the
            estimate when one arm is shifted by as much. With it, the verdict is `TOO_FEW` if a
            larger difference could have gone unnoticed.

    Returns:
        `overall`, and `classes` by name, each with `verdict` on A, means and `difference` of the
        defined scores; `scale`, `difference` or `rank`, and on it `estimate` (of ranks, above 0 if
        A is better), `interval`, `p_value`, `smallest_difference` (shown with a probability of
        80 %), `standard_errors`, `margin`; and counts. `None` where there is no number.

    Source: Schuirmann, J Pharmacokinet Biopharm 15 (1987), for equivalence; Brunner & Munzel,
    Biometrical Journal 42 (2000), for the difference of ranks.
    """
    sign = 1 if higher_is_better else -1
    scores = np.concatenate([a, b])
    values = np.where(np.isinf(scores), np.nan, scores)
    placed = np.where(np.isnan(scores), -np.inf, np.where(np.isinf(scores), np.inf, sign * scores))
    num_a, columns = len(a), [[k] for k in range(len(class_names))]
    overall, *classes = (
        _estimate(values[..., k], placed[..., k], num_a, persons, margin)
        for k in (range(len(columns)), *columns)
    )
    judged = _judge([overall], sign, confidence) + _judge(classes, sign, confidence)
    return {"overall": judged[0], "classes": dict(zip(class_names, judged[1:], strict=True))}


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

    def estimate_shifted(shift: float) -> Estimate:
        shifted = np.concatenate([placed[:num_a] + shift, placed[num_a:]])
        ranks = mean_of_defined(_rank(np.where(apart, np.nan, shifted)), axis=-1)[:, used]
        return estimate_difference(ranks[:num_a], ranks[num_a:], people)

    if by_rank and margin:
        margin = (estimate_shifted(margin).value - estimate_shifted(-margin).value) / 2
    arms = shown[:num_a], shown[num_a:]
    estimate = estimate_shifted(0) if by_rank else estimate_difference(*arms, people)
    means = [float(mean_of_defined(arm)) for arm in arms]
    return estimate, {
        "mean_a": nan_to_none(means[0]),
        "mean_b": nan_to_none(means[1]),
        "difference": nan_to_none(means[0] - means[1] if by_rank else estimate.value),
        "scale": "rank" if by_rank else "difference",
        "margin": margin,
        "num_seeds": {"a": num_a, "b": len(values) - num_a},
        "num_cases": len(people),
        "num_persons": len(set(people)),
        "num_apart": int((~used).sum()),
        "num_undefined": {"a": int(undefined[:num_a].sum()), "b": int(undefined[num_a:].sum())},
    }


def _rank(placed: np.ndarray) -> np.ndarray:
    """Return ranks of `(S, N, K)` scores within each class, over their number; `nan` stays."""
    ranks = rankdata(placed.reshape(-1, placed.shape[-1]), axis=0, nan_policy="omit")
    return (ranks / (~np.isnan(ranks)).sum(axis=0)).reshape(placed.shape)


def _judge(
    found: Sequence[tuple[Estimate, dict[str, Any]]], sign: int, confidence: float
) -> list[dict[str, Any]]:
    """Add verdict, interval and smallest difference, at the level that Holm's method gives."""
    tests = correct_by_holm([estimate.p_value for estimate, _ in found], 1 - confidence)
    judged = []
    for (estimate, entry), adjusted, level in zip(found, *tests, strict=True):
        reach, margin = estimate.reach(level / 2), entry["margin"]
        smallest = reach + estimate.reach(1 - POWER)
        favour = estimate.value * (1 if entry["scale"] == "rank" else sign)
        reason = None
        if np.isnan(reach):
            verdict, reason = TOO_FEW, _find_lacking(entry)
        elif margin is not None and estimate.is_within(margin, confidence):
            verdict = EQUIVALENT
        elif estimate.p_value < level:
            verdict = BETTER if favour > 0 else WORSE
        elif margin is not None and smallest > margin:
            verdict, reason = TOO_FEW, "a difference of the margin could have gone unnoticed"
        else:
            verdict = NO_DIFFERENCE
        judged.append(entry | {
            "estimate": nan_to_none(estimate.value),
            "standard_errors": {name: nan_to_none(of) for name, of in estimate.errors.items()},
            "p_value": nan_to_none(estimate.p_value),
            "adjusted_p": nan_to_none(float(adjusted)),
            "verdict": verdict,
            "reason": reason,
            "interval": [nan_to_none(estimate.value + end) for end in (-reach, reach)],
            "interval_confidence": 1 - float(level),
            "smallest_difference": nan_to_none(smallest),
        })  # fmt: skip
    return judged


def _find_lacking(entry: dict[str, Any]) -> str:
    counts = [(f"seeds of {a.upper()}", n, MIN_SEEDS) for a, n in entry["num_seeds"].items()]
    counts.append(("persons", entry["num_persons"], MIN_PERSONS))
    return ", ".join(f"{n} of at least {least} {what}" for what, n, least in counts if n < least)
