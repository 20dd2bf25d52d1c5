"""Scores of two arms of several runs each, read from a file per run, on the same cases.

A file is our `metrics.csv`, nnU-Net's `summary.json`, or a CSV with the columns `case`, `class` and
the metric, in any case. Without `class`, all rows are of one class.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.data.cases import case_name
from pipeline.errors import InputError, nearest, some
from pipeline.evaluation.statistics import Arm

Key = tuple[str, str]  # case id, class
Cells = dict[str, str]  # `case`, `class`, `person`, `status` and the metric

UNDEFINED = {"", "none", "n/a", "na", "<na>", "null"}  # and numbers that are not finite
ONE_CLASS = "all"  # in a file without a column of classes
OVERLAP = re.compile(r"dice|dsc|iou|jaccard|nsd|f1|normali[sz]ed.?surface.?distance")
SIGNED = re.compile(r"differ|diff\b|rvd")
ERROR = re.compile(
    r"loss|err|[mr]mse|mae\b|hd|hausdorff|distance|m?as+d\b|msd|mm\b|false|\bf[pn]r?\b"
)


@dataclass
class ScoreFile:
    """Scores of one run, `nan` if undefined; those that stand for the best; and persons."""

    path: str
    values: dict[Key, float] = field(default_factory=dict)
    best: set[Key] = field(default_factory=set)
    persons: set[tuple[str, str]] = field(default_factory=set)  # case and person


@dataclass(frozen=True)
class PairedScores:
    """Two arms on the same N cases, sorted, of N persons; and notes for the reader."""

    case_ids: list[str]
    persons: list[str]
    class_names: list[str]
    arms: tuple[Arm, Arm]
    notes: list[str]


def find_direction(metric: str) -> tuple[bool, bool]:
    """Tell by a metric's name whether more is better, and whether its sign is to be ignored."""
    name = re.sub("[^a-z0-9]+", " ", metric.lower())
    if SIGNED.search(name):
        return False, True
    is_error = re.search("loss|err", name) or (ERROR.search(name) and not OVERLAP.search(name))
    return not is_error, False


def read_arms(
    files: Mapping[str, Sequence[str]],
    metric: str,
    *,
    person_of: Callable[[str], str] | None = None,
    common_cases: bool = False,
) -> PairedScores:
    """Read the files of both arms, and bring them onto the same cases.

    Args:
        files: Names of the files of `a` and of `b`, one per run.
        metric: Name of the column, in any case.
        person_of: Person of a case id; `None`: the column `person`, else each case is one.
        common_cases: Leave out what is not in every file.

    Raises:
        InputError: One line per fault: a file that cannot be read or names a case twice, and files
            that do not agree.
    """
    faults: list[str] = []
    read: dict[str, list[ScoreFile]] = {arm: [] for arm in files}
    for arm, paths in files.items():
        if twice := [path for path in paths if paths.count(path) > 1]:
            faults.append(
                f"--{arm}: expected each file once, got {twice[0]} again. Give one file per seed."
            )
        for path in paths:
            try:
                read[arm].append(_read_file(path, metric.lower()))
            except InputError as error:
                faults += error.faults
    if faults:
        raise InputError(*dict.fromkeys(faults))
    every = [*read["a"], *read["b"]]
    notes, seen = [], dict[str, str]()
    for file in every:
        if (scores := repr(sorted(file.values.items()))) in seen:
            notes.append(f"{file.path} has the very scores of {seen[scores]}: it is no new run.")
        seen.setdefault(scores, file.path)
    keys, left_out = _find_common(every, common_cases)
    case_ids, class_names = (sorted(set(part)) for part in zip(*keys, strict=True))
    a, b = (_make_arm(of_arm, keys, case_ids, class_names) for of_arm in (read["a"], read["b"]))
    persons = _find_persons(every, case_ids, person_of)
    return PairedScores(case_ids, persons, class_names, (a, b), notes + left_out)


def _read_file(path: str, metric: str) -> ScoreFile:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        read = _read_nnunet if text.lstrip().startswith("{") else _read_csv
        lines = list(read(text))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
        raise InputError(
            f"{path}: expected a CSV file or nnU-Net's summary.json, got: {error}. Check the path."
        ) from None
    if not lines:
        raise InputError(f"{path}: expected a header and a row per case and class, got none.")
    for name in ("case", metric):
        if name not in (header := lines[0][1]):
            raise InputError(
                f"{path}: expected a column '{name}', got none. {nearest(name, header)}"
            )
    found, wrong = ScoreFile(path), []
    for place, cells in lines:
        key = cells["case"], cells.get("class", ONE_CLASS)
        score, status = _parse_score(cells[metric]), cells.get("status")
        if "" in key:
            wrong.append(f"a blank {place}")
        elif key in found.values:
            wrong.append(f"{_name(key)} again {place}")
        elif score is None:
            wrong.append(f"'{cells[metric]}' {place}")
        else:
            found.values[key] = score
            # overlap is undefined only where neither label nor prediction has the class
            is_best = status == "absent" if status else OVERLAP.search(metric)
            if math.isnan(score) and is_best:
                found.best.add(key)
            found.persons.add((cells["case"], cells.get("person", "")))
    if wrong:
        raise InputError(
            f"{path}: expected one number for each case and class, got {some(wrong)}. Correct it."
        )
    return found


def _read_csv(text: str) -> Iterator[tuple[str, Cells]]:
    """Yield place and cells of each line, by names of columns in lower case."""
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=first.count))
    names = [name.strip().lower() for name in next(reader, [])]
    if "case" not in names:
        names = ["case" if name == "case_id" else name for name in names]
    for row in reader:
        if len(row) not in (0, len(names)):
            raise ValueError(f"{len(row)} instead of {len(names)} cells in line {reader.line_num}")
        if row:
            cells = dict(zip(names, map(str.strip, row), strict=True))
            yield f"in line {reader.line_num}", cells


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
    every = set().union(*(file.values for file in files))
    common = every.intersection(*(file.values for file in files))
    if common == every:
        return common, []
    if leave_out and common:
        left_out = sorted(map(_name, every - common))
        return common, [f"Left out, not in every file: {some(left_out)}."]
    raise InputError(
        *(
            f"{file.path}: expected the cases and classes of the other files, got no "
            f"{some(sorted(map(_name, missing)))}. Score them, or compare what is common: "
            "--common_cases true"
            for file in files
            if (missing := every - {*file.values})
        )
    )


def _find_persons(
    files: Sequence[ScoreFile], case_ids: Sequence[str], person_of: Callable[[str], str] | None
) -> list[str]:
    """Return the person of each case; without any, the case itself."""
    told: dict[str, set[str]] = {case: set() for case in case_ids}
    faults: list[str] = []
    for case, person in set().union(*(file.persons for file in files)):
        if person and case in told and person_of is None:
            told[case].add(person)
    for case, persons in told.items():
        if len(persons) > 1:
            faults.append(f"{case}: expected one person, got {some(sorted(persons))}. Correct it.")
        try:
            persons |= {person_of(case)} if person_of else set()
        except InputError as error:
            faults += error.faults
    if faults:
        raise InputError(*dict.fromkeys(faults))
    return [min(persons, default=case) for case, persons in told.items()]


def _make_arm(
    files: Sequence[ScoreFile], keys: set[Key], case_ids: list[str], class_names: list[str]
) -> Arm:
    """Return scores as arrays; undefined where a case and class is none of `keys`."""
    shape = len(files), len(case_ids), len(class_names)
    places = list(itertools.product(case_ids, class_names))
    values = [file.values[key] if key in keys else math.nan for file in files for key in places]
    best = [key in keys and key in file.best for file in files for key in places]
    return Arm(np.reshape(values, shape), np.reshape(best, shape))


def _name(key: Key) -> str:
    return key[0] if key[1] == ONE_CLASS else f"{key[0]} ({key[1]})"
