"""Estimates, intervals and verdicts, against SciPy, slow bootstraps and numbers by hand."""

import itertools
import random

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluation.statistics import (
    BETTER,
    EQUIVALENT,
    NO_DIFFERENCE,
    TOO_FEW,
    WORSE,
    bootstrap_interval,
    compare_arms,
    correct_by_holm,
    estimate_difference,
)

NAN = float("nan")


def arm(values):
    values = np.asarray(values, dtype=float)
    return values[..., None] if values.ndim == 2 else values


def judge(a, b, persons=None, **options):
    """Comparison of two arms; persons are cases unless said otherwise."""
    a, b = arm(a), arm(b)
    names = persons or [f"case_{n:03d}" for n in range(a.shape[1])]
    classes = [f"class_{k}" for k in range(a.shape[2])]
    return compare_arms(a, b, names, classes, **options)


def noisy(seed, num_cases=12, num_seeds=3, num_classes=2, gap=0.0):
    """Scores of two arms, `(S, N, K)` each; A is better by `gap`."""
    rng = np.random.default_rng(seed)
    case = 0.8 + 0.03 * rng.normal(size=(1, num_cases, num_classes))
    shape = (num_seeds, num_cases, num_classes)
    return [
        case
        + 0.004 * rng.normal(size=(num_seeds, 1, num_classes))
        + 0.015 * rng.normal(size=shape)
        + add
        for add in (gap, 0.0)
    ]


# ---- arithmetic


@pytest.mark.parametrize("num_seeds", [(3, 3), (2, 5)])
def test_interval_is_that_of_welch_when_only_seeds_matter(num_seeds):
    rng = np.random.default_rng(1)
    runs = [0.8 + 0.01 * (n + 1) * rng.normal(size=n) for n in num_seeds]
    case = 0.1 * rng.normal(size=9)
    a, b = (of_arm[:, None] + case for of_arm in runs)
    welch = stats.ttest_ind(*runs, equal_var=False)
    for entry in judge(a, b, confidence=0.9)["classes"].values():
        assert entry["difference"] == pytest.approx(runs[0].mean() - runs[1].mean())
        assert entry["p_value"] == pytest.approx(welch.pvalue)
        ends = welch.confidence_interval(0.9)
        assert entry["interval"] == pytest.approx([ends.low, ends.high], abs=1e-9)
    persons = [str(n) for n in range(9)]
    assert estimate_difference(a, b, persons).freedom == pytest.approx(welch.df)


def test_standard_error_of_persons_is_that_of_a_slow_bootstrap():
    persons = list("aaaabbcdddefgggggg")
    a, b = (scores[..., 0] for scores in noisy(4, num_cases=len(persons)))
    b = b + 0.05 * np.array([ord(name) % 3 for name in persons])  # persons differ in their gap
    rng = random.Random(5)
    people = sorted(set(persons))
    resampled = []
    for _ in range(6000):
        drawn = [
            case
            for who in rng.choices(people, k=7)
            for case, name in enumerate(persons)
            if name == who
        ]
        resampled.append(sum(a[:, c].mean() - b[:, c].mean() for c in drawn) / len(drawn))
    expected = np.std(resampled) * np.sqrt(7 / 6)
    assert estimate_difference(a, b, persons).errors["persons"] == pytest.approx(expected, rel=0.05)


def test_smallest_difference_is_shown_with_a_probability_of_80_percent():
    a, b = noisy(7, num_classes=1)
    entry = judge(a, b)["overall"]
    found = estimate_difference(a[..., 0], b[..., 0], [f"case_{n:03d}" for n in range(12)])
    # where the true difference is as large, 80 % of estimates are beyond the end of the interval
    beyond = stats.t.ppf(0.975, found.freedom) - entry["smallest_difference"] / found.total
    assert stats.t.sf(beyond, found.freedom) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "p_values", [[0.01, 0.04, 0.03, 0.2], [0.02, 0.02], [0.5], [0.9, 0.001, 0.6], [0.04, 0.03]]
)
def test_holm_is_the_closure_of_bonferroni(p_values):
    number = len(p_values)
    subsets = [s for n in range(1, number + 1) for s in itertools.combinations(range(number), n)]
    expected = [
        min(1, max(len(s) * min(p_values[k] for k in s) for s in subsets if i in s))
        for i in range(number)
    ]
    adjusted, levels = correct_by_holm(p_values, 0.05)
    assert adjusted == pytest.approx(expected)
    assert ((np.array(p_values) < levels) == (adjusted < 0.05)).all()


def test_mean_over_classes_is_taken_in_each_case():
    a, b = noisy(8, num_classes=3)
    for scores in (a, b):
        scores[:, 2, 1] = NAN  # absent everywhere
    found = judge(a, b)["overall"]
    per_case = [
        [np.mean([x for x in case if x == x]) for run in scores for case in run]
        for scores in (a, b)
    ]
    assert found["scale"] == "difference"
    assert found["difference"] == pytest.approx(np.mean(per_case[0]) - np.mean(per_case[1]))


# ---- verdicts


def test_verdict_names_the_better_arm_by_the_direction():
    a, b = noisy(20, gap=0.05)
    assert judge(a, b)["overall"]["verdict"] == BETTER
    assert judge(b, a)["overall"]["verdict"] == WORSE
    assert judge(a, b, higher_is_better=False)["overall"]["verdict"] == WORSE
    assert judge(a, a)["overall"]["verdict"] == NO_DIFFERENCE


@pytest.mark.parametrize(
    ("seeds", "cases", "lacking"),
    [
        ((1, 3), 12, "1 of at least 2 seeds of A"),
        ((3, 1), 12, "1 of at least 2 seeds of B"),
        ((3, 3), 4, "4 of at least 5 persons"),
    ],
)
def test_verdict_is_too_few_without_an_interval(seeds, cases, lacking):
    a, b = noisy(21, num_cases=cases, gap=0.1)
    entry = judge(a[: seeds[0]], b[: seeds[1]])["overall"]
    assert (entry["verdict"], entry["reason"]) == (TOO_FEW, lacking)
    assert (entry["interval"], entry["p_value"]) == ([None, None], None)
    assert entry["smallest_difference"] is None
    assert entry["difference"] == pytest.approx(a[: seeds[0]].mean() - b[: seeds[1]].mean())


def test_verdict_counts_persons_not_cases():
    a, b = noisy(22, num_cases=12, gap=0.1)
    persons = [f"person_{n // 3}" for n in range(12)]
    assert judge(a, b)["overall"]["verdict"] == BETTER
    assert judge(a, b, persons)["overall"]["verdict"] == TOO_FEW


def test_margin_asks_whether_it_would_have_been_seen():
    a, b = noisy(23)
    smallest = judge(a, b)["overall"]["smallest_difference"]
    assert judge(a, b, margin=1.01 * smallest)["overall"]["verdict"] == EQUIVALENT
    entry = judge(a, b, margin=0.4 * smallest)["overall"]
    assert entry["verdict"] == TOO_FEW
    a, b = noisy(23, gap=0.1)
    assert judge(a, b, margin=1e-6)["overall"]["verdict"] == BETTER


def test_margin_becomes_what_a_shift_makes_of_ranks():
    a, b = (scores[..., 0] for scores in noisy(24, num_cases=30))
    b[0, 0] = NAN
    entry = judge(a, b, margin=0.01)["overall"]

    def chance(shift):
        wins = [
            1.0 if x + shift > y or y != y else 0.5 * (x + shift == y)
            for x in a.flat
            for y in b.flat
        ]
        return np.mean(wins)

    assert entry["margin"] == pytest.approx((chance(0.01) - chance(-0.01)) / 2)
    assert judge(a, b, margin=1e-4)["overall"]["verdict"] == TOO_FEW
    assert judge(a, b, margin=0.2)["overall"]["verdict"] == EQUIVALENT


@pytest.mark.parametrize("constant", [0.1, 0.7, 1 / 3, 123.4])
def test_rounding_is_no_difference(constant):
    a, b = np.full((3, 7), constant), np.full((10, 7), constant)
    persons = [f"person_{n % 6}" for n in range(7)]
    entry = judge(a, b, persons)["overall"]
    assert (entry["verdict"], entry["interval"], entry["p_value"]) == (NO_DIFFERENCE, [0, 0], 1)


# ---- undefined scores


def test_undefined_scores_are_the_worst_in_the_chance_to_be_better():
    a, b = (scores[..., 0] for scores in noisy(30, num_cases=8))
    a[0, 1] = b[1, 1] = b[2, 4] = b[2, 5] = NAN
    a[2, 3] = b[0, 0]  # a tie
    for higher in (True, False):
        entry = judge(a, b, higher_is_better=higher)["overall"]
        placed = [
            [(x if higher else -x) if x == x else -99.0 for x in scores.flat] for scores in (a, b)
        ]
        wins = [1.0 if x > y else 0.5 * (x == y) for x in placed[0] for y in placed[1]]
        assert entry["scale"] == "rank"
        assert entry["estimate"] == pytest.approx(np.mean(wins) - 0.5)
        assert entry["num_undefined"] == {"a": 1, "b": 3}
        assert entry["difference"] == pytest.approx(np.nanmean(a) - np.nanmean(b))


def test_undefined_for_the_best_reason_ranks_best():
    a, b = (scores[..., :1] for scores in noisy(32, num_cases=10))
    b[:, :8] = 0
    for undefined, verdict in ((np.inf, BETTER), (NAN, WORSE)):
        a[:, :8] = undefined
        assert judge(a, b)["overall"]["verdict"] == verdict


def test_cases_undefined_everywhere_are_counted_apart():
    a, b = noisy(33, num_cases=20, gap=0.03)
    without = judge(a[:, 3:], b[:, 3:])
    a[:, :3, :] = b[:, :3, :] = NAN
    found = judge(a, b)
    entry = found["classes"]["class_0"]
    assert (entry["num_apart"], entry["num_cases"], entry["scale"]) == (3, 17, "difference")
    for name in ("interval", "difference", "verdict", "p_value"):
        assert found["overall"][name] == without["overall"][name]


def test_class_without_any_score_is_too_few():
    a, b = noisy(35)
    a[..., 0] = b[..., 0] = NAN
    found = judge(a, b)
    entry = found["classes"]["class_0"]
    assert (entry["verdict"], entry["mean_a"], entry["num_apart"]) == (TOO_FEW, None, 12)
    assert found["classes"]["class_1"]["adjusted_p"] == found["classes"]["class_1"]["p_value"]
    assert found["overall"]["difference"] == found["classes"]["class_1"]["difference"]


# ---- equivalence


@pytest.mark.parametrize("higher", [True, False])
def test_arms_are_equivalent_if_the_interval_is_strictly_within_the_margin(higher):
    a, b = noisy(26, num_classes=1, num_cases=30)
    edge = np.abs(judge(a, b)["overall"]["interval"]).max()
    for factor in (1.001, 1):
        entry = judge(a, b, margin=factor * edge, higher_is_better=higher)["overall"]
        assert (entry["verdict"] == EQUIVALENT) == (factor > 1)
    shifted = judge(a + 0.9 * edge, b, margin=3 * edge)["overall"]  # a difference, but a small one
    assert (shifted["verdict"], shifted["interval"][0] > 0) == (EQUIVALENT, True)


def test_equivalence_of_a_class_is_not_corrected_for_the_number_of_classes():
    a, b = noisy(27, num_classes=4, num_cases=30)
    alone = judge(a[..., :1], b[..., :1])["classes"]["class_0"]["interval"]
    together = judge(a, b, margin=1.001 * np.abs(alone).max())["classes"]["class_0"]
    assert together["verdict"] == EQUIVALENT
    assert np.abs(together["interval"]).max() > np.abs(alone).max()


# ---- the interval of one run


def test_bootstrap_interval_is_that_of_every_possible_resample():
    values, persons = [0.3, -0.1, 0.6, NAN, 0.8, -0.7], ["a", "b", "c", "b", "d", "a"]
    means = []
    for drawn in itertools.product("abcd", repeat=4):
        named = [*zip(values, persons, strict=True)]
        scores = [v for who in drawn for v, person in named if person == who and v == v]
        means.append(sum(scores) / len(scores))
    found = bootstrap_interval(np.array(values), persons)
    for end, share in zip(found, (0.025, 0.975), strict=True):
        # the share of drawn resamples below a value is binomial
        error = 4 * np.sqrt(share * (1 - share) / 2000)
        below, above = np.quantile(means, [max(share - error, 0), min(share + error, 1)])
        assert below <= end <= above


def test_bootstrap_interval_takes_two_persons_with_scores():
    assert bootstrap_interval(np.array([0.1, 0.2]), ["a", "a"]) is None
    assert bootstrap_interval(np.array([0.1, NAN]), ["a", "b"]) is None
    assert bootstrap_interval(np.array([0.1, 0.1, NAN]), ["a", "b", "c"]) == pytest.approx(
        [0.1] * 2
    )
