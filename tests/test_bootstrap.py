from itertools import product

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluation.bootstrap import (
    EQUIVALENT,
    UNDECIDED,
    WORSE,
    Interval,
    paired_interval,
    verdict,
)

NAN = float("nan")
NUM_RESAMPLES = 40_000
# standard deviation of an estimated 2.5 % quantile of a normal, in standard deviations of that
QUANTILE_ERROR = np.sqrt(0.025 * 0.975 / NUM_RESAMPLES) / stats.norm.pdf(stats.norm.ppf(0.025))


def names(number):
    return [f"person_{i:03d}" for i in range(number)]


def width(interval):
    return interval.high - interval.low


def every_resample(delta, persons):
    """Means of all equally likely resamples, entry by entry: the bootstrap without chance."""
    people = list(dict.fromkeys(persons))
    means = []
    for seeds in product(range(len(delta)), repeat=len(delta)):
        for drawn in product(people, repeat=len(people)):
            entries = [
                delta[seed][case]
                for seed in seeds
                for person in drawn
                for case, name in enumerate(persons)
                if name == person and delta[seed][case] == delta[seed][case]
            ]
            if entries:
                means.append(sum(entries) / len(entries))
    return means


SEEDS_AND_CASES = [
    # 3 seeds; persons of 1 to 3 cases, not in a row; nan for a seed's case and for a whole case
    (
        [
            [0.30, -0.10, 0.05, NAN, 0.71, -0.42, NAN],
            [0.11, NAN, -0.25, 0.37, 0.93, -0.64, NAN],
            [-0.50, 0.20, 0.16, 0.08, 0.33, -0.87, NAN],
        ],
        ["cat", "ann", "bob", "ann", "dan", "cat", "ann"],
    ),
    # scores so rare that many resamples have none
    ([[0.4, NAN, NAN], [NAN, -0.3, NAN], [NAN, NAN, 0.1]], ["a", "b", "c"]),
    # one person without any score is still drawn
    ([[0.4, NAN, NAN, -0.2], [0.1, NAN, NAN, -0.3]], ["a", "b", "b", "c"]),
    # one seed
    ([[0.3, -0.1, 0.6, NAN, 0.8, -0.7]], ["a", "b", "c", "b", "d", "a"]),
]


@pytest.mark.parametrize("confidence", [0.95, 0.6])
@pytest.mark.parametrize(("delta", "persons"), SEEDS_AND_CASES)
def test_paired_interval_agrees_with_every_possible_resample(delta, persons, confidence):
    got = paired_interval(
        np.array(delta), persons, num_resamples=NUM_RESAMPLES, confidence=confidence
    )
    scores = [value for row in delta for value in row if value == value]
    assert got.mean == pytest.approx(sum(scores) / len(scores), abs=1e-12)
    exact = every_resample(delta, persons)
    for end, share in ((got.low, (1 - confidence) / 2), (got.high, (1 + confidence) / 2)):
        # the share of drawn resamples below a value is binomial, here with a few left out
        error = 5 * np.sqrt(share * (1 - share) / (0.5 * NUM_RESAMPLES))
        below, above = np.quantile(exact, [share - error, share + error])
        assert below - 1e-12 <= end <= above + 1e-12


def test_paired_interval_agrees_with_scipy_when_one_seed_and_one_case_per_person():
    # few and skewed, so that other intervals and other variances would be elsewhere
    delta = np.random.default_rng(1).exponential(size=15)
    got = paired_interval(delta[None], names(15), num_resamples=NUM_RESAMPLES)
    theirs = stats.bootstrap(
        (delta,), np.mean, n_resamples=NUM_RESAMPLES, method="percentile", rng=2
    )
    assert got.mean == pytest.approx(delta.mean())
    # both ends of both sides have the error; skewness makes that of the upper end larger
    tolerance = 5 * np.sqrt(2) * 1.2 * QUANTILE_ERROR * theirs.standard_error
    expected = theirs.confidence_interval
    assert [got.low, got.high] == pytest.approx([*expected], abs=tolerance)


def test_paired_interval_has_the_variance_of_theory():
    """Of seeds, of persons and of neither, all three contributing alike to the variance."""
    num_seeds, num_persons = 40, 50
    rng = np.random.default_rng(3)
    of_seed, of_person, rest = (
        rng.normal(0, np.sqrt(variance), shape)
        for variance, shape in (
            (num_seeds, (num_seeds, 1)),
            (num_persons, (1, num_persons)),
            (num_seeds * num_persons, (num_seeds, num_persons)),
        )
    )
    # exactly without main effects, so that the variance is known
    rest += rest.mean() - rest.mean(axis=0, keepdims=True) - rest.mean(axis=1, keepdims=True)
    delta = 7 + of_seed + of_person + rest
    variance = (
        of_seed.var() / num_seeds
        + of_person.var() / num_persons
        + (rest**2).mean() / (num_seeds * num_persons)
    )
    got = paired_interval(delta, names(num_persons), num_resamples=NUM_RESAMPLES)
    # so many are drawn that the mean is nearly normal; any part missing would be 15 % or more
    half = stats.norm.ppf(0.975) * np.sqrt(variance)
    assert width(got) == pytest.approx(2 * half, rel=0.04)
    assert [got.low, got.high] == pytest.approx(
        [delta.mean() - half, delta.mean() + half], abs=0.08 * half
    )


def test_paired_interval_is_as_wide_as_three_seeds_when_persons_agree():
    """Three of the same are drawn in 1 of 27, more than the 2.5 % of a tail."""
    got = paired_interval(np.array([[0.2] * 5, [0.5] * 5, [-0.4] * 5]), names(5))
    assert [got.mean, got.low, got.high] == pytest.approx([0.1, -0.4, 0.5])


def test_paired_interval_is_wider_when_cases_belong_to_one_person():
    delta = np.random.default_rng(4).normal(size=(1, 60))
    single = paired_interval(delta, names(60))
    four_alike = np.tile(delta, 4)
    together = paired_interval(four_alike, names(60) * 4)
    # four copies tell nothing new
    assert [together.low, together.high] == pytest.approx([single.low, single.high])
    # of 4 times the persons, each end's error being twice the usual for a quarter of the resamples
    apart = paired_interval(four_alike, names(240))
    assert width(together) / width(apart) == pytest.approx(2, rel=8 * QUANTILE_ERROR)


def test_paired_interval_has_no_width_when_there_is_one_score():
    assert paired_interval(np.array([[0.25]]), ["a"]) == Interval(0.25, 0.25, 0.25)


def test_paired_interval_does_not_depend_on_order_of_cases():
    delta = np.random.default_rng(5).normal(size=(3, 8))
    delta[1, 2] = delta[0, 5] = NAN
    persons = np.array(list("abacdbca"))
    order = np.array([6, 2, 7, 0, 5, 1, 4, 3])
    got, shuffled = (
        paired_interval(delta[:, o], persons[o].tolist()) for o in (slice(None), order)
    )
    assert [got.mean, got.low, got.high] == pytest.approx(
        [shuffled.mean, shuffled.low, shuffled.high], abs=1e-12
    )


def test_paired_interval_is_deterministic():
    delta = np.random.default_rng(6).normal(size=(3, 8))
    first, second = (paired_interval(delta, names(8), rng_seed=1) for _ in range(2))
    other = paired_interval(delta, names(8), rng_seed=2)
    assert first == second
    assert first.mean == other.mean
    assert (first.low, first.high) != (other.low, other.high)


def test_paired_interval_leaves_out_resamples_without_score():
    """The unscored person alone is drawn in every fourth: neither 0 nor `nan`."""
    assert paired_interval(np.array([[NAN, 0.25]]), ["a", "b"]) == Interval(0.25, 0.25, 0.25)


def test_paired_interval_has_mean_alone_when_no_resample_has_a_score():
    delta = np.full((1, 500), NAN)
    delta[0, 0] = 0.25
    # some 2 of 3 resamples hold the only scored person
    ends = [
        (got.mean, got.low, got.high)
        for seed in range(20)
        for got in [paired_interval(delta, names(500), num_resamples=1, rng_seed=seed)]
    ]
    assert {end for end in ends if end[1] == end[1]} == {(0.25, 0.25, 0.25)}
    (without, *_) = [end for end in ends if end[1] != end[1]]
    np.testing.assert_array_equal(without, [0.25, NAN, NAN])


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (3, 0), (0, 4), (0, 0)])
def test_paired_interval_is_nan_when_there_is_no_score(shape):
    got = paired_interval(np.full(shape, NAN), names(shape[1]))
    np.testing.assert_array_equal([got.mean, got.low, got.high], [NAN, NAN, NAN])


@pytest.mark.parametrize("shape", [(4,), (4, 1), (1, 3), (3, 5), (1, 4, 1), ()])
def test_paired_interval_refuses_shapes_that_do_not_fit(shape):
    match = r"^delta: expected shape \(seeds, 4\), got \(.*\)\. Give one row per seed"
    with pytest.raises(ValueError, match=match):
        paired_interval(np.zeros(shape), names(4))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.005, 0.005, EQUIVALENT),
        (-0.009, -0.001, EQUIVALENT),  # a difference, but none that matters
        (0, 0, EQUIVALENT),
        (-0.03, -0.02, WORSE),
        (-0.03, -0.0101, WORSE),
        (-0.03, 0.03, UNDECIDED),
        (-0.03, 0.005, UNDECIDED),
        (-0.005, 0.03, UNDECIDED),
        (0.02, 0.03, UNDECIDED),  # better is not asked for
        # on the margin
        (-0.01, 0.005, UNDECIDED),
        (-0.005, 0.01, UNDECIDED),
        (-0.03, -0.01, UNDECIDED),
        (np.nextafter(-0.01, 0), np.nextafter(0.01, 0), EQUIVALENT),
        (-0.03, np.nextafter(-0.01, -1), WORSE),
        (NAN, NAN, UNDECIDED),
        (NAN, 0.005, UNDECIDED),
        (-0.005, NAN, UNDECIDED),
        (NAN, -0.03, UNDECIDED),
    ],
)
def test_verdict_compares_interval_with_margin(low, high, expected):
    # the estimate has no say
    for mean in (-1, (low + high) / 2, 1):
        assert verdict(Interval(mean, low, high), 0.01) == expected


def test_verdict_has_the_words_of_the_report():
    assert (EQUIVALENT, WORSE, UNDECIDED) == ("equivalent", "worse", "not enough evidence")


@pytest.mark.parametrize("margin", [0, -0.01, NAN])
def test_verdict_refuses_margin_not_above_zero(margin):
    with pytest.raises(ValueError, match=f"^margin: expected more than 0, got {margin}. Give"):
        verdict(Interval(0, 0, 0), margin)
