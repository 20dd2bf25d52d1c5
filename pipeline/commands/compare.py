"""Compare two variants of training.

Give one file per training seed: the metrics.csv of our evaluation, nnU-Net's summary.json, or a CSV
with the columns case, class and the metric. The result says for each class, and for their mean,
whether A is better than B, and what difference these data could have shown.

Exit status: 0 compared, whatever the verdict, 2 a mistake in a file or on the command line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.commands.command import CommandParser, number_in, run_parsed
from pipeline.errors import InputError, as_bool
from pipeline.evaluation.comparison import find_direction, read_arms
from pipeline.evaluation.scores import format_table
from pipeline.evaluation.statistics import BETTER, WORSE, compare_arms

SAID = {BETTER: "A is better than B", WORSE: "B is better than A"}
COLUMNS = (
    "class, mean A:.4f, mean B:.4f, A - B:+.4f, from:+.4f, to:+.4f, p:.2g, adjusted p:.2g, "
    "smallest:.4f, cases, undefined A, undefined B, scale, verdict"
)
KEYS = ("p_value", "adjusted_p", "smallest_difference", "num_cases")
EXPLANATION = """\
The interval (from, to) and the smallest difference are of A - B, at the level that Holm's method
gives the class. The smallest would have been shown with a probability of 80 %. On the scale "rank",
undefined scores rank as the worst, or as the best where there was nothing to find; both are then of
the chance that a score of A is the better one, less one half, and means are of the defined scores.
Cases that are undefined in every run are not counted."""


def main(words: Sequence[str] | None = None) -> int:
    """Compare two arms; returns the exit status. By default `words` are this process's."""
    parser = CommandParser("compare", __doc__)
    add = parser.add_argument
    for arm in "ab":
        name = f"files of {arm.upper()}, one per seed"
        add(f"--{arm}", nargs="+", required=True, metavar="FILE", help=name)
    add("--metric", default="dice", help="column to compare (dice)")
    add("--higher_is_better", metavar="BOOL", help="by default, by the metric's name")
    margin = "smallest difference that matters; with it, arms may be called equivalent"
    add("--margin", type=number_in(1e-12), help=margin)
    level = number_in(1e-6, 1 - 1e-6)
    add("--confidence", type=level, default=0.95, help="of the intervals (0.95)")
    add("--group_pattern", help="tells persons by the case id, as in training")
    common = "leave out cases that not every file has"
    add("--common_cases", metavar="BOOL", nargs="?", const="true", default="false", help=common)
    add("--output", type=Path, help="file that gets the result as JSON")
    return run_parsed(parser, words, _main)


def _main(given: argparse.Namespace) -> int:
    result = _compare_files(given)
    if given.output is not None:
        try:
            given.output.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise InputError(f"--output: expected a file to write, got: {error}.") from None
    print("\n".join(format_result(result)))
    return 0


def _compare_files(given: argparse.Namespace) -> dict[str, Any]:
    files = {"a": given.a, "b": given.b}
    scores = read_arms(
        files,
        given.metric,
        group_pattern=given.group_pattern,
        common_cases=as_bool(given.common_cases, "--common_cases"),
    )
    higher, absolute = find_direction(given.metric)
    if given.higher_is_better is not None:
        higher = as_bool(given.higher_is_better, "--higher_is_better")
    a, b = map(np.abs, scores.arms) if absolute else scores.arms
    return {
        "metric": given.metric,
        "direction": f"{'higher' if higher else 'lower'} is better",
        "absolute": absolute,
        "confidence": given.confidence,
        "margin": given.margin,
        "files": files,
        "num_seeds": {arm: len(names) for arm, names in files.items()},
        "num_cases": len(scores.persons),
        "num_persons": len(set(scores.persons)),
        "notes": scores.notes,
        **compare_arms(
            a, b, scores.persons, scores.class_names,
            higher_is_better=higher, confidence=given.confidence, margin=given.margin,
        ),
    }  # fmt: skip


def format_result(result: Mapping[str, Any]) -> list[str]:
    """Return lines for people: one per class, one for their mean, and the verdict in words."""
    overall, seeds = result["overall"], result["num_seeds"]
    absolute = "size of " if result["absolute"] else ""
    rows = [
        [
            name, of["mean_a"], of["mean_b"], of["difference"], *of["interval"],
            *map(of.get, KEYS), *of["num_undefined"].values(), of["scale"], _name_verdict(of),
        ]
        for name, of in {**result["classes"], "mean over classes": overall}.items()
    ]  # fmt: skip
    return [
        f"{absolute}{result['metric']}, {result['direction']}; runs: {seeds['a']} of A, "
        f"{seeds['b']} of B; {result['num_cases']} cases of {result['num_persons']} persons",
        *("", *format_table(COLUMNS, rows), "", EXPLANATION),
        *(f"Note: {note}" for note in result["notes"]),
        *("", f"Overall: {_name_verdict(overall)}."),
    ]


def _name_verdict(entry: Mapping[str, Any]) -> str:
    said = SAID.get(entry["verdict"], entry["verdict"])
    return f"{said} ({entry['reason']})" if entry["reason"] else said
