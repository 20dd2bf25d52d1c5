import csv
import itertools
import json
import random

import numpy as np
import pytest
from scipy import stats

from pipeline.commands.compare import main
from pipeline.errors import InputError
from pipeline.evaluation.comparison import BETTER, NO_DIFFERENCE, TOO_FEW, WORSE, Arm, compare
from pipeline.evaluation.difference import difference, holm, relative_ranks
from pipeline.evaluation.score_tables import Columns, direction, read_table

NAN = float("nan")
OURS = ["case_id", "person", "class", "status", "dice", "iou", "hd95_mm", "volume_difference_ml"]
CONFIDENT = {BETTER, WORSE}
MIRRORED = {BETTER: WORSE, WORSE: BETTER, NO_DIFFERENCE: NO_DIFFERENCE, TOO_FEW: TOO_FEW}


def arm(values, best=None):
    values = np.asarray(values, dtype=float)
    values = values[..., None] if values.ndim == 2 else values
    return Arm(values, np.zeros(values.shape, bool) if best is None else np.asarray(best))


def judge(a, b, persons=None, **options):
    """Comparison of two arms; persons are cases unless said otherwise."""
    a, b = (side if isinstance(side, Arm) else arm(side) for side in (a, b))
    names = persons or [f"case_{n:03d}" for n in range(a.values.shape[1])]
    classes = [f"class_{k}" for k in range(a.values.shape[2])]
    return compare(a, b, names, classes, **options)


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
    assert difference(a, b, persons).freedom == pytest.approx(welch.df)


def test_interval_is_that_of_a_paired_t_test_when_only_persons_matter():
    rng = np.random.default_rng(2)
    a, b = (np.tile(0.8 + 0.02 * rng.normal(size=25), (3, 1)) for _ in range(2))
    paired = stats.ttest_rel(a[0], b[0])
    ends = paired.confidence_interval()
    entry = judge(a, b)["overall"]
    # the bootstrap is drawn, and tells a standard error to 1 %
    half = (ends.high - ends.low) / 2
    assert entry["interval"] == pytest.approx([ends.low, ends.high], abs=0.04 * half)
    assert entry["p_value"] == pytest.approx(paired.pvalue, rel=0.2)
    assert difference(a, b, [str(n) for n in range(25)]).freedom == pytest.approx(24)


def test_standard_error_of_seeds_is_that_of_all_resamples():
    a, b = (scores[..., 0] for scores in noisy(3, num_seeds=4))
    found = difference(a, b[:3], list("abcdefghijkl")).errors
    for name, runs in (("seeds_a", a), ("seeds_b", b[:3])):
        number = len(runs)
        resamples = itertools.product(runs.mean(axis=1), repeat=number)
        variance = np.var([np.mean(means) for means in resamples]) * number / (number - 1)
        assert found[name] == pytest.approx(np.sqrt(variance))


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
    assert difference(a, b, persons).errors["persons"] == pytest.approx(expected, rel=0.05)


def test_total_adds_variances_and_their_degrees_of_freedom():
    a, b = (scores[..., 0] for scores in noisy(6, num_seeds=3))
    found = difference(a, b[:2], list("abcdefghijkl"))
    parts = [
        (found.errors["seeds_a"], 3),
        (found.errors["seeds_b"], 2),
        (found.errors["persons"], 12),
    ]
    variance = sum(error**2 for error, _ in parts)
    assert found.total == pytest.approx(np.sqrt(variance))
    assert found.freedom == pytest.approx(
        variance**2 / sum(error**4 / (n - 1) for error, n in parts)
    )


def test_smallest_difference_is_shown_with_a_probability_of_80_percent():
    a, b = noisy(7, num_classes=1)
    entry = judge(a, b)["overall"]
    found = difference(a[..., 0], b[..., 0], [f"case_{n:03d}" for n in range(12)])
    quantiles = stats.t.ppf(0.975, found.freedom) + stats.t.ppf(0.8, found.freedom)
    assert entry["smallest_difference"] == pytest.approx(quantiles * found.total)
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
    adjusted, levels = holm(p_values, 0.05)
    assert adjusted == pytest.approx(expected)
    assert ((np.array(p_values) < levels) == (adjusted < 0.05)).all()


def test_holm_does_not_count_what_is_not_tested():
    adjusted, _ = holm([0.03, NAN, 0.02], 0.05)
    assert adjusted[[0, 2]] == pytest.approx([0.04, 0.04])
    assert np.isnan(adjusted[1])


@pytest.mark.parametrize("seed", range(5))
def test_interval_of_a_class_excludes_0_just_where_the_verdict_says_so(seed):
    a, b = noisy(seed, num_classes=5, num_cases=30, gap=0.012)
    found = judge(a, b)["classes"].values()
    for entry in found:
        low, high = entry["interval"]
        assert (low > 0 or high < 0) == (entry["verdict"] in CONFIDENT)
        assert (entry["adjusted_p"] < 0.05) == (entry["verdict"] in CONFIDENT)
    assert {entry["interval_confidence"] for entry in found} != {0.95}


def test_mean_over_classes_is_taken_in_each_case():
    a, b = noisy(8, num_classes=3)
    for scores in (a, b):
        scores[:, 2, 1] = NAN  # absent everywhere
    found = judge(arm(a), arm(b))["overall"]
    per_case = [
        [np.mean([x for x in case if x == x]) for run in scores for case in run]
        for scores in (a, b)
    ]
    assert found["scale"] == "difference"
    assert found["difference"] == pytest.approx(np.mean(per_case[0]) - np.mean(per_case[1]))


# ---- error rate and power


def rates(seed, num_cases, num_classes, shared, gap, undefined=0.0, pairs=200):
    """Of so many pairs: overall verdicts, any class's verdicts, and right verdicts of classes."""
    rng = np.random.default_rng(seed)
    persons = [f"{n:03d}" for n in range(num_cases)]
    overall = any_class = classes = 0
    for _ in range(pairs):
        case = 0.03 * rng.normal(size=(1, num_cases, num_classes))
        arms = []
        for add in (gap, 0.0):
            of_seed = 0.004 * rng.normal(size=(3, 1, 1 if shared else num_classes))
            noise = 0.015 * rng.normal(size=(3, num_cases, num_classes))
            arms.append(0.8 + case + of_seed + noise + add)
        worst = np.quantile(arms, undefined) if undefined else -np.inf
        a, b = (np.where(scores < worst, NAN, scores) for scores in arms)
        found = judge(a, b, persons)
        verdicts = [entry["verdict"] for entry in found["classes"].values()]
        overall += found["overall"]["verdict"] in CONFIDENT
        any_class += bool(CONFIDENT.intersection(verdicts))
        classes += verdicts.count(BETTER) / num_classes
    return overall, any_class, classes


SETTINGS = [  # cases, classes, whether seeds act on all classes alike
    (num_cases, *classes)
    for num_cases in (20, 40, 60)
    for classes in ((1, False), (2, True), (5, False), (5, True))
]


STUDY = [  # one by default
    setting if setting == (20, 2, True) else pytest.param(setting, marks=pytest.mark.chaos)
    for setting in SETTINGS
]


@pytest.mark.parametrize("setting", STUDY, ids=str)
def test_verdict_is_wrong_in_at_most_16_of_200_pairs_without_a_difference(setting):
    overall, any_class, _ = rates(11, *setting, gap=0.0)
    assert overall <= 16
    assert any_class <= 16
    assert overall > 0  # else the interval is so wide that it shows nothing


@pytest.mark.parametrize("setting", STUDY, ids=str)
def test_verdict_is_found_in_160_of_200_pairs_with_a_difference(setting):
    overall, _, classes = rates(12, *setting, gap=0.02)
    assert overall >= 160
    assert classes >= 140  # corrected for up to five classes


@pytest.mark.parametrize("setting", STUDY[1:3], ids=str)
def test_verdict_by_ranks_holds_the_error_rate_and_finds_differences(setting):
    overall, any_class, _ = rates(13, *setting, gap=0.0, undefined=0.05)
    assert overall <= 16
    assert any_class <= 16
    assert rates(14, *setting, gap=0.02, undefined=0.05)[0] >= 160


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
        ((3, 3), 1, "1 of at least 5 persons"),
    ],
)
def test_verdict_is_too_few_without_an_interval(seeds, cases, lacking):
    a, b = noisy(21, num_cases=cases, gap=0.1)
    entry = judge(a[: seeds[0]], b[: seeds[1]])["overall"]
    assert (entry["verdict"], entry["reason"]) == (TOO_FEW, lacking)
    assert (entry["interval"], entry["p_value"]) == ([None, None], None)
    assert entry["smallest_difference"] is None
    assert entry["difference"] == pytest.approx(a[: seeds[0]].mean() - b[: seeds[1]].mean())
    known = {name for name, error in entry["standard_errors"].items() if error is not None}
    assert known == {"seeds_a", "seeds_b", "persons"} - (
        {"seeds_a"} if seeds[0] == 1 else {"seeds_b"} if seeds[1] == 1 else set()
    ) - ({"persons"} if cases == 1 else set())


def test_verdict_counts_persons_not_cases():
    a, b = noisy(22, num_cases=12, gap=0.1)
    persons = [f"person_{n // 3}" for n in range(12)]
    assert judge(a, b)["overall"]["verdict"] == BETTER
    assert judge(a, b, persons)["overall"]["verdict"] == TOO_FEW


def test_margin_asks_whether_it_would_have_been_seen():
    a, b = noisy(23)
    smallest = judge(a, b)["overall"]["smallest_difference"]
    assert judge(a, b, margin=1.01 * smallest)["overall"]["verdict"] == NO_DIFFERENCE
    entry = judge(a, b, margin=0.99 * smallest)["overall"]
    assert entry["verdict"] == TOO_FEW
    assert entry["interval"][0] is not None
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
    assert judge(a, b, margin=0.2)["overall"]["verdict"] == NO_DIFFERENCE


@pytest.mark.parametrize("constant", [0.1, 0.7, 1 / 3, 123.4])
def test_rounding_is_no_difference(constant):
    a, b = np.full((3, 7), constant), np.full((10, 7), constant)
    persons = [f"person_{n % 6}" for n in range(7)]
    entry = judge(a, b, persons)["overall"]
    assert (entry["verdict"], entry["interval"], entry["p_value"]) == (NO_DIFFERENCE, [0, 0], 1)


def test_verdict_of_constant_scores():
    same = np.full((3, 7), 0.7)
    entry = judge(same, same)["overall"]
    assert (entry["verdict"], entry["interval"], entry["p_value"]) == (NO_DIFFERENCE, [0, 0], 1)
    assert entry["smallest_difference"] == 0
    entry = judge(same + 0.1, same)["overall"]
    assert (entry["verdict"], entry["p_value"]) == (BETTER, 0)
    assert entry["interval"] == pytest.approx([0.1, 0.1])


def test_swapping_the_arms_mirrors_everything():
    for undefined in (False, True):
        a, b = noisy(25, num_seeds=4, gap=0.012)
        b = b[:3]
        if undefined:
            a[1, 2, 0] = b[0, 3, 0] = b[2, 5, 0] = NAN
        there, back = judge(a, b, margin=0.01), judge(b, a, margin=0.01)
        pairs = [(there["overall"], back["overall"])]
        pairs += zip(there["classes"].values(), back["classes"].values(), strict=True)
        for one, other in pairs:
            assert one["verdict"] == MIRRORED[other["verdict"]]
            assert one["interval"] == [-end for end in reversed(other["interval"])]
            assert (one["mean_a"], one["estimate"]) == (other["mean_b"], -other["estimate"])
            for name in ("p_value", "adjusted_p", "smallest_difference", "scale"):
                assert one[name] == other[name]


# ---- undefined scores


def test_ranks_are_those_of_scipy_over_all_runs_and_cases():
    placed = np.array([[[1.0], [2], [np.inf]], [[2.0], [-np.inf], [np.inf]]])
    counted = np.array([[True], [True], [False]])
    expected = stats.rankdata([1, 2, 2, -np.inf]) / 4
    assert relative_ranks(placed, counted)[:, :2, 0].ravel() == pytest.approx(expected)


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


def test_undefined_scores_decide_against_what_the_defined_ones_say():
    a, b = (scores[..., 0] for scores in noisy(31, num_cases=20))
    a += 0.02
    a[:, :15] = NAN  # hardly ever found, and good where it is
    entry = judge(a, b)["overall"]
    assert entry["difference"] > 0
    assert entry["verdict"] == WORSE


def test_undefined_for_the_best_reason_ranks_best():
    a, b = (scores[..., :1] for scores in noisy(32, num_cases=10))
    a[:, :8] = NAN
    b[:, :8] = 0
    best = np.isnan(a)
    assert judge(arm(a, best), arm(b))["overall"]["verdict"] == BETTER
    assert judge(arm(a), arm(b))["overall"]["verdict"] == WORSE


def test_cases_undefined_everywhere_are_counted_apart():
    a, b = noisy(33, num_cases=20, gap=0.03)
    without = judge(a[:, 3:], b[:, 3:])
    a[:, :3, :] = b[:, :3, :] = NAN
    found = judge(a, b)
    entry = found["classes"]["class_0"]
    assert (entry["num_apart"], entry["num_cases"], entry["scale"]) == (3, 17, "difference")
    for name in ("interval", "difference", "verdict", "p_value"):
        assert found["overall"][name] == without["overall"][name]


def test_cases_undefined_everywhere_tell_something_if_not_alike():
    a, b = (scores[..., :1] for scores in noisy(34, num_cases=20))
    a[:, :10] = b[:, :10] = NAN
    entry = judge(arm(a, np.isnan(a)), arm(b))["overall"]  # absent in A, spurious in B
    assert (entry["num_apart"], entry["scale"], entry["verdict"]) == (0, "rank", BETTER)


def test_class_without_any_score_is_too_few():
    a, b = noisy(35)
    a[..., 0] = b[..., 0] = NAN
    found = judge(a, b)
    entry = found["classes"]["class_0"]
    assert (entry["verdict"], entry["mean_a"], entry["num_apart"]) == (TOO_FEW, None, 12)
    assert found["classes"]["class_1"]["adjusted_p"] == found["classes"]["class_1"]["p_value"]
    assert found["overall"]["difference"] == found["classes"]["class_1"]["difference"]


# ---- files


def write(path, header, rows, delimiter=","):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(header)
        writer.writerows(rows)
    return str(path)


@pytest.fixture
def ours(tmp_path):
    """Files of three runs per arm, 12 cases and two classes; A has better Dice by 0.05."""
    files = {}
    for name, scores in zip("ab", noisy(40, gap=0.05), strict=True):
        files[name] = [
            write(
                tmp_path / f"{name}{run}.csv",
                OURS,
                [
                    [f"case_{n:03d}", f"p{n // 2}", organ, "scored", dice, dice, 10 * (1 - dice), 0]
                    for n, case in enumerate(table.tolist())
                    for organ, dice in zip(("liver", "spleen"), case, strict=True)
                ],
            )
            for run, table in enumerate(scores)
        ]
    return files


def rows_of(file):
    with open(file, newline="") as opened:
        return list(csv.reader(opened))


def edit(file, change):
    header, *rows = rows_of(file)
    rows = change(rows) or rows
    write(file, header, rows)


def put(file, case, organ, **cells):
    def change(rows):
        for row in rows:
            if (row[0], row[2]) == (case, organ):
                for name, value in cells.items():
                    row[OURS.index(name)] = value

    edit(file, change)


def command(files, *options):
    return main(["--a", *files["a"], "--b", *files["b"], *options])


def compared(files, tmp_path, *options):
    assert command(files, *options, "--output", str(tmp_path / "found.json")) == 0
    return json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)


def refused(files, capsys, *options):
    """Lines of a refusal."""
    assert command(files, *options) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.strip().split("\n")


def test_command_compares_our_files(ours, tmp_path, capsys):
    found = compared(ours, tmp_path)
    said = capsys.readouterr().out
    assert "A is better than B" in said
    assert said.count("\n") > 5
    assert (found["metric"], found["direction"]) == ("dice", "higher is better")
    assert (found["num_cases"], found["num_persons"]) == (12, 6)
    assert found["num_seeds"] == {"a": 3, "b": 3}
    assert list(found["classes"]) == ["liver", "spleen"]
    a, b = noisy(40, gap=0.05)
    persons = [f"p{n // 2}" for n in range(12)]
    expected = judge(a, b, persons)
    assert found["overall"]["verdict"] == BETTER
    for name in ("interval", "p_value", "difference", "smallest_difference"):
        assert found["overall"][name] == pytest.approx(expected["overall"][name])
        assert found["classes"]["spleen"][name] == pytest.approx(
            expected["classes"]["class_1"][name]
        )


def test_command_says_that_b_is_better(ours, capsys):
    assert command({"a": ours["b"], "b": ours["a"]}) == 0
    assert capsys.readouterr().out.strip().split("\n")[-1].startswith("B is better than A")


def test_command_shows_a_difference_of_single_runs(ours, capsys):
    assert command({"a": ours["a"][:1], "b": ours["b"][:1]}) == 0
    last = capsys.readouterr().out.strip().split("\n")[-1]
    assert last.startswith(
        "Too few to tell: 1 of at least 2 seeds of A, 1 of at least 2 seeds of B."
    )
    assert "from persons" in last


def test_what_holds_for_all_classes_is_said_once(ours, capsys):
    files = {arm: paths[:1] for arm, paths in ours.items()}
    assert command(files) == 0
    told = capsys.readouterr().out
    assert (
        told.count("1 of at least 2 seeds of A, 1 of at least 2 seeds of B") == 2
    )  # and the verdict
    assert "\nAll: 1 of at least 2 seeds" in told


def test_result_does_not_depend_on_the_order_of_rows_and_files(ours, tmp_path):
    before = compared(ours, tmp_path)
    for n, file in enumerate([*ours["a"], *ours["b"]]):
        edit(file, random.Random(n).shuffle)
    ours["a"].reverse()
    ours["b"].reverse()
    after = compared(ours, tmp_path)
    for found in (before, after):
        found.pop("files")
    assert before == after


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("dice", (True, False)),
        ("DSC", (True, False)),
        ("nsd_2mm", (True, False)),
        ("Normalized Surface Distance", (True, False)),
        ("hd95_mm", (False, False)),
        ("HD95", (False, False)),
        ("Hausdorff_distance", (False, False)),
        ("ASSD", (False, False)),
        ("mean_error", (False, False)),
        ("volume_difference_ml", (False, True)),
        ("sensitivity", (True, False)),
        ("false_positives", (False, False)),
    ],
)
def test_direction_goes_by_the_name(metric, expected):
    assert direction(metric) == expected


def test_volume_difference_counts_by_its_size(ours, tmp_path):
    rng = np.random.default_rng(41)
    for name, size in (("a", 1.0), ("b", 5.0)):
        for file in ours[name]:
            signs = rng.choice([-1, 1], size=24)

            def change(rows, signs=signs, size=size):
                for row, sign in zip(rows, signs, strict=True):
                    row[-1] = sign * (size + 0.1 * rng.random())

            edit(file, change)
    found = compared(ours, tmp_path, "--metric", "volume_difference_ml")
    assert found["absolute"]
    assert found["overall"]["verdict"] == BETTER
    assert found["overall"]["difference"] == pytest.approx(-4, abs=0.1)


def test_direction_can_be_told(ours, tmp_path):
    assert compared(ours, tmp_path, "--higher_is_better", "false")["overall"]["verdict"] == WORSE
    assert compared(ours, tmp_path, "--metric", "HD95_mm")["overall"]["verdict"] == BETTER


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "inf", "-inf", "None", "N/A"])
def test_undefined_distance_is_the_worst_however_written(ours, tmp_path, cell):
    for file in ours["a"]:
        for n in range(10):
            put(file, f"case_{n:03d}", "liver", hd95_mm=cell, status="missed", dice="0")
    found = compared(ours, tmp_path, "--metric", "hd95_mm")
    entry = found["classes"]["liver"]
    assert (entry["scale"], entry["verdict"], entry["num_undefined"]["a"]) == ("rank", WORSE, 30)
    assert found["classes"]["spleen"]["scale"] == "difference"


def test_absent_is_best_and_spurious_worst(ours, tmp_path):
    for name, status in (("a", "absent"), ("b", "spurious")):
        for file in ours[name]:
            for n in range(6):
                dice = "" if status == "absent" else "0"
                put(file, f"case_{n:03d}", "liver", hd95_mm="", status=status, dice=dice)
    for metric in ("dice", "hd95_mm"):
        entry = compared(ours, tmp_path, "--metric", metric)["classes"]["liver"]
        assert (entry["scale"], entry["verdict"], entry["num_apart"]) == ("rank", BETTER, 0)
    # in a tool's own file, which has no status
    for file in (*ours["a"], *ours["b"]):
        rows = rows_of(file)
        write(file, [*rows[0][:3], *rows[0][4:]], [[*row[:3], *row[4:]] for row in rows[1:]])
    assert compared(ours, tmp_path)["classes"]["liver"]["verdict"] == BETTER
    entry = compared(ours, tmp_path, "--metric", "hd95_mm")["classes"]["liver"]
    assert (entry["num_apart"], entry["num_cases"]) == (6, 6)


@pytest.mark.parametrize(
    ("header", "delimiter", "options"),
    [
        (("Case", "Label", "Dice"), ",", ()),
        (("subject", "Structure", "DICE"), ";", ()),
        (("Name", "Organ", "dice"), "\t", ()),
        (("who", "what", "Score (%)"), ",", ("--case_column", "WHO", "--class_column", "what")),
    ],
)
def test_command_reads_files_of_other_tools(ours, tmp_path, header, delimiter, options):
    expected = compared(ours, tmp_path, "--group_pattern", r"\d+")
    for file in (*ours["a"], *ours["b"]):
        rows = [[row[4], row[0], row[2]] for row in rows_of(file)[1:]]
        write(file, (header[2], *header[:2]), rows, delimiter)
        with open(file, "rb+") as opened:  # as spreadsheets write it
            content = opened.read()
            opened.seek(0)
            opened.write(b"\xef\xbb\xbf" + content)
    metric = ("--metric", header[2]) if options else ()
    found = compared(ours, tmp_path, *options, *metric)
    assert found["metric"] == header[2]
    assert found["overall"] == expected["overall"]


def test_command_reads_files_without_classes(ours, tmp_path):
    for file in (*ours["a"], *ours["b"]):
        rows = [row for row in rows_of(file)[1:] if row[2] == "liver"]
        write(file, ("id", "dice"), [[row[0], row[4]] for row in rows])
    found = compared(ours, tmp_path)
    assert list(found["classes"]) == ["all"]
    assert found["classes"]["all"]["interval"] == found["overall"]["interval"]


def test_persons_come_from_column_or_pattern(ours, tmp_path):
    assert compared(ours, tmp_path)["num_persons"] == 6
    assert compared(ours, tmp_path, "--person_column", "case_id")["num_persons"] == 12
    assert compared(ours, tmp_path, "--group_pattern", "pairs")["num_persons"] == 7
    assert compared(ours, tmp_path, "--group_pattern", r"(\d\d)\d$")["num_persons"] == 2


def test_common_cases_leave_out_the_rest(ours, tmp_path, capsys):
    edit(ours["a"][1], lambda rows: rows[2:])
    edit(ours["b"][0], lambda rows: rows[:-1])
    lines = refused(ours, capsys)
    assert lines[0].startswith(
        f"{ours['a'][1]}: expected the cases of the other files, got no case_000."
    )
    assert "got no case_011 (spleen)" in lines[1]
    assert "--common_cases true" in lines[0]
    found = compared(ours, tmp_path, "--common_cases", "true")
    assert found["notes"] == ["Left out, not in every file: case_000, case_011 (spleen) (2)."]
    assert (found["num_cases"], found["classes"]["spleen"]["num_cases"]) == (11, 10)
    assert "Left out" in capsys.readouterr().out


def test_a_file_in_both_arms_or_copied_is_noted(ours, tmp_path):
    again = f"{tmp_path}/../{tmp_path.name}/a0.csv"
    found = compared({"a": ours["a"], "b": [*ours["b"], again]}, tmp_path)
    assert found["notes"] == [f"{again} is in both arms."]
    copy = write(tmp_path / "copy.csv", OURS, rows_of(ours["b"][0])[1:])
    found = compared({"a": ours["a"], "b": [*ours["b"], copy]}, tmp_path)
    assert [copy in note for note in found["notes"]] == [True]


# ---- mistakes


def drop(rows):
    return [row for row in rows if row[2] != "liver"]


def tear(rows):
    rows[2].pop()


def blank(rows):
    rows[3][0] = ""


def conflict(rows):
    rows[0][1] = "someone else"


MISTAKES = [
    (
        lambda rows: [*rows, rows[0]],
        "each case and class once, got case_000 (liver) again in line 26",
    ),
    (lambda rows: rows[1].__setitem__(4, "good"), "numbers, got 'good' in line 3. Correct it."),
    (lambda rows: rows[1].__setitem__(4, "0,8"), "numbers, got '0,8' in line 3. Correct it."),
    (drop, "expected the classes of the other files, got no liver."),
    (blank, "case and class named, got a blank in line 5."),
    (tear, "8 cells in every line, got 7 in line 4."),
]


@pytest.mark.parametrize(("change", "expected"), MISTAKES)
def test_command_refuses_a_file_in_one_line(ours, capsys, change, expected):
    edit(ours["b"][1], change)
    lines = refused(ours, capsys)
    assert len(lines) == 1
    assert lines[0].startswith(f"{ours['b'][1]}: expected ")
    assert expected in lines[0]


def test_command_refuses_persons_that_differ(ours, capsys):
    edit(ours["b"][1], conflict)
    assert refused(ours, capsys) == [
        "case_000: expected one person, got p0, someone else. Correct it."
    ]


def test_command_names_a_few_of_many(ours, capsys):
    edit(ours["a"][0], lambda rows: rows[:4])
    (line,) = refused(ours, capsys)
    assert "got no case_002, case_003, case_004, case_005, case_006 and 5 more." in line


def test_command_tells_every_fault(ours, tmp_path, capsys):
    edit(ours["a"][0], lambda rows: rows[1].__setitem__(4, "good"))
    ours["b"][2] = str(tmp_path / "none.csv")
    lines = refused(ours, capsys)
    assert len(lines) == 2
    assert "No such file" in lines[1]
    assert str(tmp_path / "none.csv") in lines[1]


def test_command_refuses_what_is_no_table(ours, tmp_path, capsys):
    for content in (b"", b"case,dice\n", b"\xff\xfe\x00", b'a,b\n"x\x00'):
        path = tmp_path / "odd.csv"
        path.write_bytes(content)
        lines = refused({"a": [str(path)], "b": ours["b"]}, capsys)
        assert len(lines) == 1
        assert lines[0].startswith(f"{path}: expected ")
    assert "expected a CSV file" in refused({"a": [str(tmp_path)], "b": ours["b"]}, capsys)[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ("--metric", "dicee"),
            "one column 'dicee' (--metric), got none. Did you mean 'dice'? Columns: case_id",
        ),
        (("--case_column", "kase_id"), "(--case_column), got none. Did you mean 'case_id'?"),
        (
            ("--class_column", "zzz"),
            "(--class_column), got none. Valid are: case_id, person, class",
        ),
        (("--person_column", "zzz"), "(--person_column), got none."),
    ],
)
def test_command_names_the_nearest_column(ours, capsys, options, expected):
    lines = refused(ours, capsys, *options)
    assert len(lines) == 6
    assert expected in lines[0]


def test_table_needs_a_case_column_and_one_of_the_metric(tmp_path):
    file = write(tmp_path / "x.csv", ("foo", "dice"), [["a", 1]])
    with pytest.raises(InputError, match=r"expected a column of case ids.*got foo, dice"):
        read_table(file, Columns())
    file = write(tmp_path / "x.csv", ("case", "Dice", "DICE"), [["a", 1, 2]])
    with pytest.raises(InputError, match=r"expected one column 'dice' \(--metric\), got 2"):
        read_table(file, Columns())
    assert read_table(file, Columns(metric="DICE")).values == {("a", "all"): 2}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--confidence", "95"), "--confidence: expected a number above 0 and below 1, got 95."),
        (("--confidence", "high"), "--confidence: expected a number above 0"),
        (("--margin", "-1"), "--margin: expected a number above 0"),
        (("--margin", "true"), "--margin: expected a number above 0"),
        (("--higher_is_better", "maybe"), "--higher_is_better: expected true or false"),
        (("--common_cases", "1"), "--common_cases: expected true or false"),
        (("--metrik", "dice"), "expected a known option, got --metrik. Did you mean 'metric'?"),
        (("--group_pattern", "("), "group_pattern: expected a regular expression"),
        (("--group_pattern", "a", "--person_column", "person"), "Give one of the two."),
        (("--output", "/no/such/folder/x.json"), "--output: expected a file in a folder"),
        (("--output", "/"), "--output: expected a file to write"),
        (("--metric",), "--metric: expected a value after it"),
    ],
)
def test_command_refuses_options_in_one_line(ours, capsys, options, expected):
    lines = refused(ours, capsys, *options)
    assert len(lines) == 1
    assert expected in lines[0]


@pytest.mark.parametrize("pattern", ["case_00", r"case_00(\d)|case"])
def test_command_refuses_cases_that_the_pattern_names_no_person_of(ours, capsys, pattern):
    lines = refused(ours, capsys, "--group_pattern", pattern)
    assert [line.split(":")[0] for line in lines] == ["case_010", "case_011"]


def test_command_refuses_arms_without_files(ours, capsys):
    assert main(["--a", *ours["a"]]) == 2
    assert capsys.readouterr().err.startswith("--b: expected files, got none.")
    assert main([]) == 2
    assert len(capsys.readouterr().err.strip().split("\n")) == 2


def test_command_refuses_a_file_twice_in_an_arm(ours, capsys):
    (line,) = refused({"a": [*ours["a"], ours["a"][0]], "b": ours["b"]}, capsys)
    assert line == (
        f"--a: expected each file once, got {ours['a'][0]} 2 times. "
        "Give one file per training seed."
    )


def test_command_takes_options_between_files(ours, capsys):
    first, *rest = ours["a"]
    words = ["--margin=.5", f"--a={first}", *rest, "--metric", "iou", "--b", *ours["b"]]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("iou, higher is better; runs: 3 of A, 3 of B")
    assert main(["--help"]) == 0
    assert "--common_cases" in capsys.readouterr().out
