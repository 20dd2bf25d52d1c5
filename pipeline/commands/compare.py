"""Compare two variants of training.

Give one file per training seed: the metrics.csv of our evaluation, nnU-Net's summary.json, or a CSV
with the columns case, class and the metric. The result says for each class, and for their mean,
whether A is better than B, and what difference these data could have shown.

Exit status: 0 compared, whatever the verdict, 2 a mistake in a file or on the command line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.command_line import (
    CommandParser,
    loading,
    number_in,
    run_parsed,
)
from pipeline.errors import InputError, as_bool, find_path_fault, refuse


def main(words: Sequence[str] | None = None) -> int:
    """Compare two arms; returns the exit status. By default `words` are this process's."""
    parser = CommandParser("compare", __doc__, "--a FILE ... --b FILE ... [options]")
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
    add("--json", "--output", type=Path, metavar="FILE", help="file that gets the result, too")
    return run_parsed(parser, words, _main)


def _main(given: argparse.Namespace) -> int:
    missing = (find_path_fault("command line", one, "scores") for one in (*given.a, *given.b))
    refuse(filter(None, missing))
    is_told = given.higher_is_better is not None
    higher = as_bool(given.higher_is_better, "--higher_is_better") if is_told else None
    with loading():
        from pipeline.evaluation.comparison import compare_files, format_result
    result = compare_files(
        {"a": given.a, "b": given.b},
        given.metric,
        margin=given.margin,
        confidence=given.confidence,
        higher_is_better=higher,
        group_pattern=given.group_pattern,
        common_cases=as_bool(given.common_cases, "--common_cases"),
    )
    if given.json is not None:
        try:
            given.json.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise InputError(f"--json: expected a file to write, got: {error}.") from None
    print("\n".join(format_result(result)))
    return 0
