"""Two variants of training: `python -m pipeline compare --a A1.csv [A2.csv ...] --b B1.csv [...]`.

One file per training seed: the metrics.csv of our evaluation, or any CSV with a row for each case
and class. Says of each class, and of their mean, whether A is better than B, and what difference
these data could have shown.

    --metric NAME              column that is compared (dice)
    --higher_is_better BOOL    by default, by the metric's name
    --margin NUMBER            smallest difference that matters, in units of the metric
    --confidence NUMBER        of the intervals, and one less the chance of a false verdict (0.95)
    --case_column NAME, --class_column NAME, --person_column NAME
                               where they are not found by their usual names
    --group_pattern PATTERN    tells persons by the case id, as in training
    --common_cases true        leave out cases that not every file has
    --output FILE              gets the result as JSON

Exit status: 0 compared, whatever the verdict, 2 a mistake in a file or on the command line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.commands.command import run_command
from pipeline.config.compose import parse_overrides
from pipeline.data.splits import person_of
from pipeline.errors import InputError, as_bool, nearest
from pipeline.evaluation.comparison import BETTER, TOO_FEW, WORSE, Arm, compare
from pipeline.evaluation.score_files import read_arms
from pipeline.evaluation.score_tables import Columns, direction

USAGE = "usage: python -m pipeline compare --a A1.csv [A2.csv ...] --b B1.csv [B2.csv ...]"
COLUMNS = ("metric", "case_column", "class_column", "person_column")
OPTIONS = (
    *COLUMNS,
    *("higher_is_better", "margin", "confidence", "group_pattern", "common_cases", "output"),
)
SAID = {BETTER: "A is better than B", WORSE: "B is better than A"}


def main(words: Sequence[str] | None = None) -> int:
    """Compare two arms; returns the exit status.

    Args:
        words: The command line after the command, by default this process's.
    """
    return run_command(__doc__, words, _main)


def _main(words: list[str]) -> int:
    files, rest = split_arms(words)
    result = run(files, checked(parse_overrides(rest)))
    print("\n".join(table(result)))
    return 0


def split_arms(words: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The files after `--a` and `--b`, and the other words.

    Raises:
        InputError: If an arm has no file.
    """
    files: dict[str, list[str]] = {"a": [], "b": []}
    rest: list[str] = []
    taking = rest
    for word in words:
        option, given, value = word.partition("=")
        arm = files.get(option[2:]) if option.startswith("--") else None
        if arm is not None:
            taking = arm
            arm += [value] if given else []
            continue
        if word.startswith("--"):
            taking = rest
        taking.append(word)
    faults = [f"--{arm}: expected files, got none. {USAGE}" for arm in files if not files[arm]]
    if faults:
        raise InputError(*faults)
    return files, rest


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options, each of its type.

    Raises:
        InputError: One line per fault.
    """
    faults = [
        f"command line: expected a known option, got --{name}. {nearest(name, OPTIONS)}"
        for name in options
        if name not in OPTIONS
    ]
    for name, most in (("confidence", 1), ("margin", math.inf)):
        given = options.get(name)
        try:
            options[name] = None if given is None else float(str(given))  # .5 is no JSON
        except ValueError:
            options[name] = math.nan
        if given is not None and not 0 < options[name] < most:
            faults.append(f"--{name}: expected a number above 0 and below {most}, got {given!r}.")
    for name in ("higher_is_better", "common_cases"):
        try:
            options[name] = as_bool(options[name], f"--{name}") if name in options else None
        except InputError as error:
            faults += error.faults
    if {"person_column", "group_pattern"} <= options.keys():
        faults.append("--group_pattern: expected no --person_column besides. Give one of the two.")
    output = options.get("output")
    if output is not None and not Path(str(output)).parent.is_dir():
        faults.append(f"--output: expected a file in a folder that is there, got {output}.")
    if faults:
        raise InputError(*faults)
    return options


def run(files: Mapping[str, Sequence[str]], options: Mapping[str, Any]) -> dict[str, Any]:
    """Read, compare, and write the result if a file is named for it.

    Args:
        files: Of the arms `a` and `b`.
        options: As `checked` returns them.

    Raises:
        InputError: If the files cannot be compared, or the result not be written.
    """
    pattern = options.get("group_pattern")
    scores = read_arms(
        files,
        Columns(**{name: str(options[name]) for name in COLUMNS if name in options}),
        person_of=None if pattern is None else partial(person_of, group_pattern=str(pattern)),
        common_cases=bool(options.get("common_cases")),
    )
    higher, absolute = direction(scores.metric)
    if options.get("higher_is_better") is not None:
        higher = options["higher_is_better"]
    confidence, margin = options.get("confidence") or 0.95, options.get("margin")
    a, b = (Arm(np.abs(arm.values) if absolute else arm.values, arm.best) for arm in scores.arms)
    result = {
        "metric": scores.metric,
        "direction": f"{'higher' if higher else 'lower'} is better",
        "absolute": absolute,
        "confidence": confidence,
        "margin": margin,
        "files": {arm: list(names) for arm, names in files.items()},
        "num_seeds": {arm: len(names) for arm, names in files.items()},
        "num_cases": len(scores.case_ids),
        "num_persons": len(set(scores.persons)),
        "notes": scores.notes,
    } | compare(
        a,
        b,
        scores.persons,
        scores.class_names,
        higher_is_better=higher,
        confidence=confidence,
        margin=margin,
    )
    if options.get("output") is not None:
        try:
            text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            Path(str(options["output"])).write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"--output: expected a file to write, got: {error}.") from None
    return result


def table(result: Mapping[str, Any]) -> list[str]:
    """The result for people: a line per class, one for their mean, and the verdict in words."""
    overall, seeds = result["overall"], result["num_seeds"]
    entries = {**result["classes"], "mean over classes": overall}
    head = ["", "mean A", "mean B", "A - B", "interval", "p", "adjusted p", "smallest", "scale"]
    grid = [[*head, "verdict"], *([name, *_row(entry)] for name, entry in entries.items())]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    absolute = "size of " if result["absolute"] else ""
    lines = [
        f"{absolute}{result['metric']}, {result['direction']}; runs: {seeds['a']} of A, "
        f"{seeds['b']} of B; {result['num_cases']} cases of {result['num_persons']} persons",
        "",
        *("  ".join(map(str.ljust, row, widths)).rstrip() for row in grid),
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
    alike: dict[str, list[str]] = {}  # what holds for many classes is said once
    for name, entry in entries.items():
        alike.setdefault(_apart(entry), []).append(name)
    lines += [
        f"{'All' if len(names) == len(entries) else ', '.join(names)}: {told}"
        for told, names in alike.items()
        if told
    ]
    lines += [f"Note: {note}" for note in result["notes"]]
    return [*lines, "", _conclusion(overall)]


def _row(entry: Mapping[str, Any]) -> list[str]:
    """Cells of one line, after the name."""
    low, high = entry["interval"]
    forms = {"mean_a": ".4f", "mean_b": ".4f", "difference": "+.4f", "p_value": ".2g"}
    forms |= {"adjusted_p": ".2g", "smallest_difference": ".4f"}
    cells = ["-" if entry[key] is None else format(entry[key], form) for key, form in forms.items()]
    cells.insert(3, "-" if low is None else f"{low:+.4f} to {high:+.4f}")
    return [*cells, entry["scale"], SAID.get(entry["verdict"], entry["verdict"])]


def _apart(entry: Mapping[str, Any]) -> str:
    """What to know of a line beside its numbers."""
    undefined = entry["num_undefined"]
    told = [entry["reason"]] if entry["reason"] else []
    if any(undefined.values()):
        told.append(f"{undefined['a']} scores of A and {undefined['b']} of B are undefined")
    if entry["num_apart"]:
        told.append(f"{entry['num_apart']} cases undefined in every run are counted apart")
    return "; ".join(told)


def _conclusion(overall: Mapping[str, Any]) -> str:
    said = SAID.get(overall["verdict"], overall["verdict"].capitalize())
    if overall["smallest_difference"] is None:
        errors = overall["standard_errors"]
        names = {"seeds_a": "seeds of A", "seeds_b": "seeds of B", "persons": "persons"}
        known = [
            f"{errors[n]:.4f} from {name}" for n, name in names.items() if errors[n] is not None
        ]
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
