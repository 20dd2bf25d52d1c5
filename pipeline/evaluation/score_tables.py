"""Scores of one run, read from a CSV: our metrics.csv, or the long table of any tool.

A long table has a row for each case and class, or for each case alone, which is then of one class.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import InputError, nearest

Key = tuple[str, str]  # case id, class

# names of columns, those that come first are taken first; lower case, _ for what is no letter
USUAL = {
    "case_column": (
        *("case_id", "case", "caseid", "case_name", "subject_id", "subject", "image_id", "image"),
        *("scan_id", "scan", "file_name", "filename", "file", "id", "name", "patient_id"),
        *("patient", "reference_file", "prediction_file"),
    ),
    "class_column": (
        *("class", "class_name", "label", "label_name", "structure", "organ", "region", "roi"),
        *("segment", "class_id", "label_id"),
    ),
    "person_column": ("person", "person_id", "patient_id", "patient", "subject_id", "subject"),
}
ONE_CLASS = "all"
UNDEFINED = {"", "none", "n/a", "na", "<na>", "null"}  # and what is no finite number
# what an undefined score says, where the file says what is there: see pipeline.evaluation.scores
STATUS_IS_BEST = {"absent": True, "missed": False, "spurious": False, "scored": False}


@dataclass(frozen=True)
class Columns:
    """Names of columns, in any case; `None`: the first of the usual names that is there."""

    metric: str = "dice"
    case_column: str | None = None
    class_column: str | None = None
    person_column: str | None = None


@dataclass
class Table:
    """One file: its scores, `nan` if undefined, which of those stand for the best, and persons."""

    file: str
    metric: str
    values: dict[Key, float] = field(default_factory=dict)
    best: set[Key] = field(default_factory=set)
    persons: dict[str, set[str]] = field(default_factory=dict)


def direction(metric: str) -> tuple[bool, bool]:
    """Whether more is better, and whether the sign does not matter, by the name of a metric."""
    name = metric.lower()
    words = set(re.findall("[a-z]+", name))
    signed = "differ" in name or bool(words & {"diff", "rvd"})
    if signed or "loss" in name or "error" in name or words & {"err", "rmse", "mae", "mse"}:
        return False, signed
    if is_overlap(metric):
        return True, False
    short = {"hd", "ahd", "mhd", "assd", "asd", "masd", "msd", "mm", "fp", "fn", "fpr", "fnr"}
    return not (words & short or re.search("hausdorff|distance|false", name)), False


def is_overlap(metric: str) -> bool:
    """Whether a metric is undefined only where neither label nor prediction has the class."""
    overlap = "dice|dsc|iou|jaccard|nsd|f1|normali[sz]ed.?surface.?distance"
    return re.search(overlap, metric.lower()) is not None


def read_table(file: str, columns: Columns) -> Table:
    """Read one file.

    Raises:
        InputError: One line per fault.
    """
    header, rows = _cells(file)
    metric = _column(file, header, columns.metric, "metric")
    case, class_, person = (_usual(file, header, columns, option) for option in USUAL)
    if case is None:
        raise InputError(
            f"{file}: expected a column of case ids, such as case_id, got {', '.join(header)}. "
            "Name it with --case_column."
        )
    status = next((n for n, name in enumerate(header) if name.lower() == "status"), None)
    table = Table(file, header[metric])
    overlap = is_overlap(table.metric)
    named, once, numbers = "case and class named", "each case and class once", "numbers"
    wrong: dict[str, list[str]] = {named: [], once: [], numbers: []}
    for line, row in rows:
        key = (row[case], ONE_CLASS if class_ is None else row[class_])
        if "" in key:
            wrong[named].append(f"a blank in line {line}")
        if key in table.values:
            wrong[once].append(f"{name_of(key)} again in line {line}")
        value = _number(row[metric])
        word = "" if status is None else row[status].lower()
        if value is None:
            wrong[numbers].append(f"'{row[metric]}' in line {line}")
            continue
        table.values[key] = value
        if math.isnan(value) and STATUS_IS_BEST.get(word, overlap):
            table.best.add(key)
        if person is not None and person != case and row[person]:
            table.persons.setdefault(row[case], set()).add(row[person])
    _refuse(file, wrong)
    return table


def _refuse(file: str, wrong: dict[str, list[str]]) -> None:
    faults = [
        f"{file}: expected {x}, got {few(got)}. Correct it." for x, got in wrong.items() if got
    ]
    if faults:
        raise InputError(*faults)


def _cells(file: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and rows without surrounding blanks, each row with its line."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=first.count))
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: expected a CSV file, got: {error}. Check the path.") from None
    if len(lines) < 2:
        raise InputError(f"{file}: expected a header and a row per case and class, got none.")
    header = lines[0][1]
    torn = [f"{len(row)} in line {line}" for line, row in lines if len(row) != len(header)]
    _refuse(file, {f"{len(header)} cells in every line": torn})
    return header, lines[1:]


def _column(file: str, header: Sequence[str], wanted: str, option: str) -> int:
    """Index of a column that has to be there; its exact name goes before one in another case."""
    for written in (str, _plain_name):
        found = [n for n, name in enumerate(header) if written(name) == written(wanted)]
        if len(found) == 1:
            return found[0]
    near = nearest(wanted.lower(), header)
    there = f" Columns: {', '.join(header)}." if near.startswith("Did") else ""
    raise InputError(
        f"{file}: expected one column '{wanted}' (--{option}), got {len(found) or 'none'}. "
        f"{near}{there}"
    )


def _usual(file: str, header: Sequence[str], columns: Columns, option: str) -> int | None:
    """Index of the column that an option names, else of the first usual one, if there is one."""
    wanted = getattr(columns, option)
    if wanted is not None:
        return _column(file, header, wanted, option)
    there = [_plain_name(name) for name in header]
    return next((there.index(name) for name in USUAL[option] if name in there), None)


def _plain_name(name: str) -> str:
    return re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")


def _number(cell: str) -> float | None:
    """The number, `nan` where there is none, `None` if it is no number."""
    if cell.lower() in UNDEFINED:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else math.nan


def name_of(key: Key) -> str:
    """A case and class, for people."""
    return key[0] if key[1] == ONE_CLASS else f"{key[0]} ({key[1]})"


def few(names: Sequence[str], number: int = 5) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(names[:number]) + more
