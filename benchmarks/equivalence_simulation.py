"""How often `pipeline.evaluation.statistics` says "equivalent", wrongly and rightly.

    python -m benchmarks.equivalence_simulation [--draws 20000] [--output FILE.json]

Scores of two arms are drawn again and again: 3 seeds each, 27 persons, one case per person. A score
is the sum of the effects of the arm, of its seed, of the person in this arm, and of noise. The
variances give the difference of means a true standard error, which seeds, persons and noise have
shares in, in three mixes. With the true difference at the margin, "equivalent" is wrong; the share
of such draws is given with its exact 95 % interval (Clopper & Pearson, Biometrika 26, 1934). With a
true difference of 0 the share is the power. A second study, of the verdicts "better" and "worse",
has two classes and more cases.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from pipeline.evaluation.statistics import BETTER, WORSE, compare_arms, estimate_difference

NUM_SEEDS, NUM_PERSONS, MARGIN = 3, 27, 0.01
# shares of the variance of the difference of means, noise excluded: of seeds and of persons
MIXES = {"seeds dominate": (0.9, 0.1), "mixed": (0.5, 0.5), "persons dominate": (0.1, 0.9)}
NOISE_SHARE = 0.1
# of the margin: with the smaller one errors of the t-interval show, with the larger one power
STANDARD_ERRORS = (0.15, 0.3)


def draw_arms(
    rng: np.random.Generator, mix: tuple[float, float], standard_error: float, gap: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `(seeds, persons)` scores of two arms, of which the first is better by `gap`."""
    variance = standard_error**2
    of_seeds, of_persons = (share * (1 - NOISE_SHARE) * variance for share in mix)
    seed_std = np.sqrt(of_seeds * NUM_SEEDS / 2)
    person_std = np.sqrt(of_persons * NUM_PERSONS / 2)
    noise_std = np.sqrt(NOISE_SHARE * variance * NUM_SEEDS * NUM_PERSONS / 2)
    case = 0.8 + 0.05 * rng.normal(size=(1, NUM_PERSONS))
    arms = []
    for shift in (gap, 0.0):
        arms.append(
            case
            + shift
            + seed_std * rng.normal(size=(NUM_SEEDS, 1))
            + person_std * rng.normal(size=(1, NUM_PERSONS))
            + noise_std * rng.normal(size=(NUM_SEEDS, NUM_PERSONS))
        )
    return arms[0], arms[1]


def count_equivalent(mix: tuple[float, float], ratio: float, gap: float, draws: int) -> int:
    """Count draws that are called equivalent; the draws depend on the arguments alone."""
    rng = np.random.default_rng([int(100 * share) for share in (*mix, ratio)])
    persons = [f"{n:02d}" for n in range(NUM_PERSONS)]
    found = 0
    for _ in range(draws):
        a, b = draw_arms(rng, mix, ratio * MARGIN, gap)
        found += estimate_difference(a, b, persons).is_within(MARGIN, 0.95)
    return found


def study_equivalence(draws: int) -> dict[str, Any]:
    """Return error and power of "equivalent" in each mix."""
    study = {}
    for name, mix in MIXES.items():
        for ratio in STANDARD_ERRORS:
            wrong = count_equivalent(mix, ratio, MARGIN, draws)
            right = count_equivalent(mix, ratio, 0.0, draws)
            ends = binomtest(wrong, draws).proportion_ci(0.95)
            study[f"{name}, standard error {ratio:g} of the margin"] = {
                "wrong_percent": 100 * wrong / draws,
                "wrong_percent_interval": [100 * ends.low, 100 * ends.high],
                "power_percent": 100 * right / draws,
            }
    return study


def study_difference(pairs: int) -> dict[str, Any]:
    """Return how often pairs are called different, without and with a difference of 0.02.

    Cases have two classes, on which seeds act alike. By ranks: the lowest 5 % are undefined.
    """
    study = {}
    for num_cases in (20, 40, 60):
        for undefined in (0.0, 0.05):
            counts = {}
            for gap in (0.0, 0.02):
                rng = np.random.default_rng([num_cases, int(100 * undefined), int(100 * gap)])
                persons = [f"{n:02d}" for n in range(num_cases)]
                counts[gap] = 0
                for _ in range(pairs):
                    case = 0.8 + 0.03 * rng.normal(size=(1, num_cases, 2))
                    scores = np.stack([case + shift for shift in (gap, 0.0)])
                    scores = scores + 0.004 * rng.normal(size=(2, 3, 1, 1))
                    scores = scores + 0.015 * rng.normal(size=(2, 3, num_cases, 2))
                    if undefined:
                        scores[scores < np.quantile(scores, undefined)] = np.nan
                    verdict = compare_arms(*scores, persons, ["one", "two"])["overall"]["verdict"]
                    counts[gap] += verdict in (BETTER, WORSE)
            study[f"{num_cases} cases, {undefined:g} undefined"] = {
                "wrong_percent": 100 * counts[0.0] / pairs,
                "power_percent": 100 * counts[0.02] / pairs,
            }
    return study


def main() -> None:
    """Run both studies and write or print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=1_000, help="of the second study")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    result = {
        "draws": given.draws,
        "num_seeds": NUM_SEEDS,
        "num_persons": NUM_PERSONS,
        "margin": MARGIN,
        "noise_share": NOISE_SHARE,
        "equivalence": study_equivalence(given.draws),
        "pairs": given.pairs,
        "difference": study_difference(given.pairs),
    }
    text = json.dumps(result, indent=2) + "\n"
    given.output.write_text(text) if given.output else print(text)


if __name__ == "__main__":
    main()
