"""Whether one variant of training is better than another: verdicts, class by class and overall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evaluation.difference import (
    MIN_PERSONS,
    MIN_SEEDS,
    Estimate,
    difference,
    holm,
    relative_ranks,
)

BETTER = "better"
WORSE = "worse"
NO_DIFFERENCE = "no difference shown"
TOO_FEW = "too few to tell"

POWER = 0.8  # with which the smallest difference would be shown


@dataclass(frozen=True)
class Arm:
    """Scores of the runs of one arm.

    Attributes:
        values: `(S, N, K)` float64, of S runs, N cases and K classes; `nan` where undefined.
        best: `(S, N, K)` bool: where it is undefined since it could not be better, as where a class
            is in neither label nor prediction. Undefined elsewhere is worse than any score.
    """

    values: np.ndarray
    best: np.ndarray


def compare(
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

    A case that is undefined alike in every run of both arms tells nothing of a class and is counted
    apart. If other scores of a class are undefined, it is compared by ranks: of all scores of all
    runs and cases, ties averaged, the undefined at their end. The estimate is then the mean rank in
    A minus that in B, over the number of ranks: the chance that a score of A is better than one of
    B, less one half. Resamples keep the ranks. The mean over classes is taken case by case, and is
    of ranks as soon as one class is.

    The overall verdict is one test and stands for itself; those on classes are corrected for their
    number by Holm's method. Interval and smallest difference of a class are of the level that
    Holm's method tested it at, so that 0 is outside the interval just where the verdict says so.

    Args:
        a: The one arm.
        b: The other, of the same cases and classes.
        persons: `N` names, of the person of each case.
        class_names: `K` names.
        higher_is_better: Which direction is good.
        confidence: Between 0 and 1.
        margin: Smallest difference that matters, above 0, in units of the score. With ranks, what
            shifting one arm by as much makes of the estimate. What could have gone unnoticed
            although it is larger is `TOO_FEW`.

    Returns:
        `overall`, and `classes` by name, each with `verdict` (of A), `reason` (why too few, or
        `None`); `mean_a`, `mean_b`, `difference` of the defined scores; `scale`, `difference` or
        `rank`, and on that scale `estimate` (of ranks, above 0 if A is better), `interval`,
        `interval_confidence`, `p_value`, `adjusted_p`, `smallest_difference` (shown with a
        probability of 80 %), `standard_errors`; `num_cases` and `num_persons` that tell something,
        `num_apart`, and `num_undefined` by arm. `None` where there is no number.
    """
    sign = 1 if higher_is_better else -1
    arms = [_in_order(arm) for arm in (a, b)]
    values = np.concatenate([arm.values for arm in arms])
    end = np.where(np.concatenate([arm.best for arm in arms]), np.inf, -np.inf)
    placed = np.where(np.isnan(values), end, sign * values)

    def judged(group: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """Verdicts that are corrected for one another, each on the mean over some classes."""
        found = [
            _look(values[..., k], placed[..., k], len(a.values), persons, margin) for k in group
        ]
        adjusted, levels = holm([estimate.p_value for estimate, _ in found], 1 - confidence)
        return [
            entry | {"adjusted_p": _plain(p)} | _verdict(estimate, level, entry, sign)
            for (estimate, entry), p, level in zip(found, adjusted, levels, strict=True)
        ]

    every = range(len(class_names))
    classes = dict(zip(class_names, judged([[k] for k in every]), strict=True))
    return {"overall": judged([every])[0], "classes": classes}


def _look(
    values: np.ndarray, placed: np.ndarray, num_a: int, persons: Sequence[str], margin: float | None
) -> tuple[Estimate, dict[str, Any]]:
    """Difference of the mean over classes, and all of an entry that needs no level.

    Args:
        values: `(S, N, K)` of the runs of A, then of B.
        placed: The same with better above worse, the undefined at ±inf.
        num_a: Runs of A.
        persons: `N` names.
        margin: As in `compare`.
    """
    undefined = np.isinf(placed)
    apart = undefined.all(axis=0) & (placed == placed[0]).all(axis=0)  # (N, K)
    undefined &= ~apart
    told = ~apart.all(axis=1)
    people = [person for person, tells in zip(persons, told, strict=True) if tells]
    shown = _mean(values, ~np.isnan(values), axis=-1)[:, told]
    rank = bool(undefined.any())
    if rank:
        counted = np.broadcast_to(~apart, placed.shape)
        by_shift = []
        for shift in (0.0, margin or 0.0, -(margin or 0.0)):
            shifted = np.concatenate([placed[:num_a] + shift, placed[num_a:]])
            ranks = _mean(relative_ranks(shifted, ~apart), counted, axis=-1)[:, told]
            by_shift.append(difference(ranks[:num_a], ranks[num_a:], people))
        estimate = by_shift[0]
        margin = margin and (by_shift[1].value - by_shift[2].value) / 2
    else:
        estimate = difference(shown[:num_a], shown[num_a:], people)
    means = [float(_mean(arm, ~np.isnan(arm), axis=None)) for arm in (shown[:num_a], shown[num_a:])]
    return estimate, {
        "mean_a": _plain(means[0]),
        "mean_b": _plain(means[1]),
        "difference": _plain(means[0] - means[1] if rank else estimate.value),
        "scale": "rank" if rank else "difference",
        "estimate": _plain(estimate.value),
        "p_value": _plain(estimate.p_value),
        "standard_errors": {name: _plain(error) for name, error in estimate.errors.items()},
        "margin": margin,
        "num_seeds": {"a": num_a, "b": len(values) - num_a},
        "num_cases": len(people),
        "num_persons": len(set(people)),
        "num_apart": int((~told).sum()),
        "num_undefined": {"a": int(undefined[:num_a].sum()), "b": int(undefined[num_a:].sum())},
    }


def _verdict(estimate: Estimate, level: float, entry: dict[str, Any], sign: int) -> dict[str, Any]:
    """Verdict, interval and smallest difference, at the level of the test."""
    reach = estimate.reach(level / 2)
    smallest = reach + estimate.reach(1 - POWER)
    favour = estimate.value * (1 if entry["scale"] == "rank" else sign)
    reason = None
    if np.isnan(reach):
        verdict, reason = TOO_FEW, _lacking(entry)
    elif estimate.p_value < level:
        verdict = BETTER if favour > 0 else WORSE
    elif entry["margin"] is not None and smallest > entry["margin"]:
        verdict, reason = TOO_FEW, "a difference of the margin could have gone unnoticed"
    else:
        verdict = NO_DIFFERENCE
    return {
        "verdict": verdict,
        "reason": reason,
        "interval": [_plain(estimate.value - reach), _plain(estimate.value + reach)],
        "interval_confidence": 1 - float(level),
        "smallest_difference": _plain(smallest),
    }


def _lacking(entry: dict[str, Any]) -> str:
    """What there is too little of."""
    counts = [(f"seeds of {arm.upper()}", n, MIN_SEEDS) for arm, n in entry["num_seeds"].items()]
    counts.append(("persons", entry["num_persons"], MIN_PERSONS))
    return ", ".join(f"{n} of at least {least} {what}" for what, n, least in counts if n < least)


def _in_order(arm: Arm) -> Arm:
    """Runs in an order that their scores alone decide, so that rounding does not tell files."""
    order = sorted(
        range(len(arm.values)), key=lambda r: (arm.values[r].tobytes(), arm.best[r].tobytes())
    )
    return Arm(arm.values[order], arm.best[order])


def _mean(values: np.ndarray, counted: np.ndarray, axis: int | None) -> np.ndarray:
    """Mean of what is counted; `nan` where nothing is."""
    number = counted.sum(axis=axis)
    total = np.where(counted, values, 0).sum(axis=axis)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else float(value)
