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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.commands.command import CommandParser, number_in, run_parsed
from pipeline.data.splits import person_of
from pipeline.errors import InputError, as_bool
from pipeline.evaluation.comparison import find_direction, read_arms
from pipeline.evaluation.scores import format_number, format_table
from pipeline.evaluation.statistics import BETTER, TOO_FEW, WORSE, Arm, compare_arms

SAID = {BETTER: "A is better than B", WORSE: "B is better than A"}


def main(words: Sequence[str] | None = None) -> int:
    """Compare two arms; returns the exit status.

    Args:
        words: The command line after the command, by default this process's.
    """
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
    add("--output", help="file that gets the result as JSON")
    return run_parsed(parser, words, _main)


def _main(given: argparse.Namespace) -> int:
    result = _compare_files(given)
    if given.output is not None:
        try:
            text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            Path(given.output).write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"--output: expected a file to write, got: {error}.") from None
    print("\n".join(format_result(result)))
    return 0


def _compare_files(given: argparse.Namespace) -> dict[str, Any]:
    files = {"a": given.a, "b": given.b}
    scores = read_arms(
        files,
        given.metric,
        person_of=given.group_pattern and partial(person_of, group_pattern=given.group_pattern),
        common_cases=as_bool(given.common_cases, "--common_cases"),
    )
    higher, absolute = find_direction(given.metric)
    if given.higher_is_better is not None:
        higher = as_bool(given.higher_is_better, "--higher_is_better")
    a, b = (Arm(np.abs(arm.values) if absolute else arm.values, arm.best) for arm in scores.arms)
    return {
        "metric": given.metric,
        "direction": f"{'higher' if higher else 'lower'} is better",
        "absolute": absolute,
        "confidence": given.confidence,
        "margin": given.margin,
        "files": files,
        "num_seeds": {arm: len(names) for arm, names in files.items()},
        "num_cases": len(scores.case_ids),
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
    entries = {**result["classes"], "mean over classes": overall}
    head = ["", "mean A", "mean B", "A - B", "interval", "p", "adjusted p", "smallest", "scale"]
    absolute = "size of " if result["absolute"] else ""
    lines = [
        f"{absolute}{result['metric']}, {result['direction']}; runs: {seeds['a']} of A, "
        f"{seeds['b']} of B; {result['num_cases']} cases of {result['num_persons']} persons",
        "",
        *format_table([[*head, "verdict"], *([n, *_cells(entry)] for n, entry in entries.items())]),
        "",
        "interval, smallest: of A - B, at the level the class was tested at (Holm); a difference "
        "as large as the smallest would have been shown with a probability of 80 %.",
    ]
    if any(entry["scale"] == "rank" for entry in entries.values()):
        lines.append(
            "rank: scores that are undefined rank as the worst, or as the best where there was "
            "nothing to find; interval and smallest are of the chance that a score of A is the "
            "better one, less one half, and means are of the defined scores alone."
        )
    lines += [f"{name}: {remark}" for name, of in entries.items() if (remark := _remark(of))]
    lines += [f"Note: {note}" for note in result["notes"]]
    return [*lines, "", _conclude(overall)]


def _cells(entry: Mapping[str, Any]) -> list[str]:
    forms = {"mean_a": ".4f", "mean_b": ".4f", "difference": "+.4f", "p_value": ".2g"}
    forms |= {"adjusted_p": ".2g", "smallest_difference": ".4f"}
    cells = [format_number(entry[key], form) for key, form in forms.items()]
    low, high = (format_number(end, "+.4f") for end in entry["interval"])
    cells.insert(3, "-" if low == "-" else f"{low} to {high}")
    return [*cells, entry["scale"], SAID.get(entry["verdict"], entry["verdict"])]


def _remark(entry: Mapping[str, Any]) -> str:
    undefined = entry["num_undefined"]
    told = [entry["reason"]] if entry["reason"] else []
    if any(undefined.values()):
        told.append(f"{undefined['a']} scores of A and {undefined['b']} of B are undefined")
    if entry["num_apart"]:
        told.append(f"{entry['num_apart']} cases undefined in every run are counted apart")
    return "; ".join(told)


def _conclude(overall: Mapping[str, Any]) -> str:
    said = SAID.get(overall["verdict"], overall["verdict"].capitalize())
    if overall["smallest_difference"] is None:
        names = {"seeds_a": "seeds of A", "seeds_b": "seeds of B", "persons": "persons"}
        errors = overall["standard_errors"].items()
        known = [f"{error:.4f} from {names[n]}" for n, error in errors if error is not None]
        return f"{said}: {overall['reason']}. Standard errors: {', '.join(known) or 'unknown'}."
    low, high = overall["interval"]
    kind = "of ranks " if overall["scale"] == "rank" else ""
    more = f" {overall['reason']};" if overall["verdict"] == TOO_FEW else ""
    return (
        f"{said}:{more} A - B {kind}is {overall['estimate']:+.4f}, "
        f"{100 * overall['interval_confidence']:g} % interval {low:+.4f} to {high:+.4f}; "
        f"the smallest difference these data would have shown, at 80 %, is "
        f"{overall['smallest_difference']:.4f}."
    )
