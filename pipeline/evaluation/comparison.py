"""Scores of two arms of several runs each, read from a file per run, on the same cases.

A file is our `metrics.csv`, nnU-Net's `summary.json`, or a CSV with the columns `case`, `class` and
the metric, in any case. Without `class`, all rows are of one class.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.cases import case_name
from pipeline.data.layouts import parse_csv
from pipeline.data.splits import GroupPattern, persons_of
from pipeline.errors import InputError, nearest, refuse, require, some
from pipeline.evaluation.scores import format_table
from pipeline.evaluation.statistics import BETTER, WORSE, compare_arms

Key = tuple[str, str]  # case id, class
Cells = dict[str, str]  # `case`, `class`, `person`, `status` and the metric
Score = tuple[float, str]  # see `compare_arms`; person or ""
ScoreFile = tuple[str, dict[Key, Score]]  # path and scores of one run

UNDEFINED = {"", "none", "n/a", "na", "<na>", "null"}  # and numbers that are not finite
ONE_CLASS = "all"  # in a file without a column of classes
OVERLAP = re.compile(r"dice|dsc|iou|jaccard|nsd|f1|normali[sz]ed.?surface.?distance")
ERROR = re.compile(r"[mr]mse|mae\b|hd|hausdorff|distance|m?as+d\b|msd|mm\b|false|\bf[pn]r?\b")
SAID = {BETTER: "A is better than B", WORSE: "B is better than A"}
COLUMNS = (
    "class, mean A:.4f, mean B:.4f, A - B:+.4f, from:+.4f, to:+.4f, p:.2g, adjusted p:.2g, "
    "smallest:.4f, cases, undefined A, undefined B, scale, verdict"
)
SHOWN = ("p_value", "adjusted_p", "smallest_difference", "num_cases")
EXPLANATION = """\
The interval (from, to) and the smallest difference are of A - B, at the level that Holm's method
gives the class. The smallest would have been shown with a probability of 80 %. On the scale "rank",
undefined scores rank as the worst, or as the best where there was nothing to find; both are then of
the chance that a score of A is the better one, less one half, and means are of the defined scores.
Cases that are undefined in every run are not counted."""


@dataclass(frozen=True)
class PairedScores:
    """Two arms on the same N cases, sorted, of N persons; and notes for the reader."""

    persons: list[str]
    class_names: list[str]
    arms: tuple[np.ndarray, np.ndarray]  # see `compare_arms`
    notes: list[str]


def find_direction(metric: str) -> tuple[bool, bool]:
    """Tell by a metric's name whether more is better, and whether its sign is to be ignored."""
    name = re.sub("[^a-z0-9]+", " ", metric.lower())
    is_signed = bool(re.search(r"differ|diff\b|rvd", name))
    is_error = re.search("loss|err", name) or (ERROR.search(name) and not OVERLAP.search(name))
    return not (is_signed or is_error), is_signed


def read_arms(
    files: Mapping[str, Sequence[str]],
    metric: str,
    *,
    group_pattern: GroupPattern = None,
    common_cases: bool = False,
) -> PairedScores:
    """Read the files of both arms, and bring them onto the same cases.

    Args:
        files: Paths of `a` and of `b`, one per run.
        group_pattern: Tells persons by the case id; without it, the column `person` does, or each
            case is a person.
        common_cases: Whether to leave out what is not in every file.

    Raises:
        InputError: If files cannot be read, name a case twice, or do not agree.
    """
    read: list[ScoreFile] = []
    faults: list[str] = []
    for path in (*files["a"], *files["b"]):
        try:
            read.append(_read_file(path, metric.lower()))
        except InputError as error:
            faults += error.faults
    refuse(dict.fromkeys(faults))
    notes, seen = [], dict[str, str]()
    for path, of_file in read:
        if (text := repr(sorted(of_file.items()))) in seen:
            notes.append(f"{path} has the very scores of {seen[text]}: it is no new run.")
        seen.setdefault(text, path)
    keys, left_out = _find_common(read, common_cases)
    case_ids, class_names = (sorted(set(part)) for part in zip(*keys, strict=True))
    places, num_a = [*product(case_ids, class_names)], len(files["a"])
    values = [of[key][0] if key in keys else math.nan for _, of in read for key in places]
    table = np.reshape(values, (len(read), len(case_ids), len(class_names)))
    arms = table[:num_a], table[num_a:]
    told: dict[str, str] = {}
    for (case, _), (_, person) in chain(*(scores.items() for _, scores in read)):
        told[case] = told.get(case) or person
    cases = [{"case_id": case, "group": told[case]} for case in case_ids]
    persons = [*persons_of(cases, group_pattern).values()]
    return PairedScores(persons, class_names, arms, notes + left_out)


def _read_file(path: str, metric: str) -> ScoreFile:
    lines: list[tuple[str, Cells]] | None = None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("{"):
            lines = [*_read_nnunet(text)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: expected a CSV file or nnU-Net's summary.json, got: {error}. Check the path."
        ) from None
    if lines is None:
        lines = [
            (f"in line {number}", {name.lower(): cell for name, cell in cells.items()})
            for number, cells in parse_csv(text, path)
        ]
    require(lines, path, "a header and a row per case and class", "none", "Score some cases.")
    header = [*lines[0][1]]
    case = "case" if "case" in header else "case_id"
    for name in (case, metric):
        shown = name.removesuffix("_id")
        require(name in header, path, f"a column '{shown}'", "none", nearest(shown, header))
    scores: dict[Key, Score] = {}
    wrong = []
    for place, cells in lines:
        key = cells[case], cells.get("class", ONE_CLASS)
        value, status = _parse_score(cells[metric]), cells.get("status")
        if "" in key or key in scores or value is None:
            wrong.append(f"{' '.join(key)}: '{cells[metric]}' {place}")
        else:
            # overlap is undefined only where neither label nor prediction has the class
            is_best = status == "absent" if status else OVERLAP.search(metric)
            value = math.inf if math.isnan(value) and is_best else value
            scores[key] = value, cells.get("person", "")
    expected = "one number for each case and class"
    require(not wrong, path, expected, some(wrong), "Correct or remove it.")
    return path, scores


def _read_nnunet(text: str) -> Iterator[tuple[str, Cells]]:
    for entry in json.loads(text)["metric_per_case"]:
        case_id = case_name(Path(entry["prediction_file"]))
        for label, metrics in entry["metrics"].items():
            scores = {name.lower(): str(value) for name, value in metrics.items()}
            yield f"of {case_id}", {"case": case_id, "class": label, **scores}


def _parse_score(cell: str) -> float | None:
    """Return the number, `nan` where it is undefined, `None` if it is no number."""
    try:
        value = math.nan if cell.lower() in UNDEFINED else float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else math.nan


def _find_common(files: Sequence[ScoreFile], leave_out: bool) -> tuple[set[Key], list[str]]:
    """Return cases and classes that every file has, and a note on what was left out."""
    every = set().union(*(scores for _, scores in files))
    common = every.intersection(*(scores for _, scores in files))
    if leave_out and common and common != every:
        return common, [f"Left out, not in every file: {_name(every - common)}."]
    refuse(
        f"{path}: expected the cases and classes of the other files, got no {_name(missing)}. "
        "Score them, or compare what is common: --common_cases true"
        for path, scores in files
        if (missing := every - scores.keys())
    )
    return common, []


def _name(keys: set[Key]) -> str:
    return some(sorted(case if name == ONE_CLASS else f"{case} ({name})" for case, name in keys))


def compare_files(
    files: Mapping[str, Sequence[str]],
    metric: str,
    *,
    margin: float | None = None,
    confidence: float = 0.95,
    higher_is_better: bool | None = None,
    group_pattern: GroupPattern = None,
    common_cases: bool = False,
) -> dict[str, Any]:
    """Compare the files of two arms by `compare_arms`; returns plain values for JSON.

    The files are those of `read_arms`. Whether higher is better is told by the metric's name, if it
    is not given.
    """
    scores = read_arms(files, metric, group_pattern=group_pattern, common_cases=common_cases)
    higher, absolute = find_direction(metric)
    if higher_is_better is not None:
        higher = higher_is_better
    a, b = map(np.abs, scores.arms) if absolute else scores.arms
    return {
        "metric": metric,
        "direction": f"{'higher' if higher else 'lower'} is better",
        "absolute": absolute,
        "confidence": confidence,
        "margin": margin,
        "files": files,
        "num_seeds": {arm: len(names) for arm, names in files.items()},
        "num_cases": len(scores.persons),
        "num_persons": len(set(scores.persons)),
        "notes": scores.notes,
        **compare_arms(
            a, b, scores.persons, scores.class_names,
            higher_is_better=higher, confidence=confidence, margin=margin,
        ),
    }  # fmt: skip


def format_result(result: Mapping[str, Any]) -> list[str]:
    """Return lines for people: one per class, one for their mean, and the verdict in words."""
    overall, seeds = result["overall"], result["num_seeds"]
    absolute = "size of " if result["absolute"] else ""
    rows = [
        [
            name, of["mean_a"], of["mean_b"], of["difference"], *of["interval"],
            *map(of.get, SHOWN), *of["num_undefined"].values(), of["scale"], _name_verdict(of),
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
