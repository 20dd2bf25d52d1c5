"""Datasets that a table lists: a CSV file, or a JSON list of objects, one case each."""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.described import read_json
from pipeline.data.issues import DatasetIssue
from pipeline.data.listing import Case, DatasetLayout, case_name, channel_of
from pipeline.errors import InputError

TABLES = ("cases.csv", "cases.json")

Row = dict[str, Any]


def read_table(path: Path) -> DatasetLayout:
    """The layout that a table lists, paths as they are stated.

    Columns are `image` (or `image_0`, `image_1`, … for channels), `label`, and `case_id` and
    `group` (the person) if wanted; in JSON `image` may be a list. Other columns are passed over.

    Raises:
        InputError: One line per fault: a table that cannot be read, a column that is not there.
    """
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    if not rows:
        raise InputError(f"{path}: expected cases, got none. List one or more.")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    image_columns = _image_columns(columns, path)
    wanted = [*image_columns, "label"] + [name for name in ("case_id", "group") if name in columns]
    cases, findings = [], []
    for number, row in enumerate(rows, start=1):
        case, absent = _case(row, image_columns, wanted)
        if absent:
            message = f"expected {' and '.join(absent)} in row {number} of {path}, got an empty "
            name = case.get("case_id") or f"row {number}"
            findings.append(DatasetIssue(name, "missing", message + "cell. Fill it in."))
        else:
            cases.append(case)
    root = path.parent.resolve()
    name = root.name if path.name in TABLES else path.stem
    return DatasetLayout(root=root, kind="table", name=name, cases=cases, findings=findings)


def _csv_rows(path: Path) -> list[Row]:
    """Rows of a CSV file: UTF-8, separated by the commonest of `,`, `;` and tab in its header."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        header = text.partition("\n")[0]
        delimiter = max(",;\t", key=header.count)
        cells = list(csv.reader(text.splitlines(), delimiter=delimiter, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: expected CSV in UTF-8, got: {error}. Mend the file.") from None
    lines = [(n, line) for n, line in enumerate(cells, start=1) if any(c.strip() for c in line)]
    if not lines:
        return []
    columns = [name.strip() for name in lines[0][1]]
    faults = [
        f"{path}: expected {len(columns)} cells in line {n}, got {len(line)}. Quote a cell that "
        "has the separator in it."
        for n, line in lines[1:]
        if len(line) != len(columns)
    ]
    if len(set(columns)) < len(columns):
        faults.append(f"{path}: expected columns of different names, got {columns}. Rename one.")
    if faults:
        raise InputError(*faults)
    return [
        dict(zip(columns, (cell.strip() for cell in line), strict=True)) for _, line in lines[1:]
    ]


def _json_rows(path: Path) -> list[Row]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a JSON list of cases, got {type(rows).__name__}.")
    faults = [
        f"{path}: expected an object with file names in entry {number}, got {row!r}. Correct it."
        for number, row in enumerate(rows, start=1)
        if not isinstance(row, Mapping) or not all(_fits(key, row[key]) for key in row)
    ]
    if faults:
        raise InputError(*faults)
    # a person may be a number in JSON, as it looks like one in CSV
    return [
        {k: v if isinstance(v, list) else str(v) for k, v in r.items() if v is not None}
        for r in rows
    ]


def _fits(key: str, value: Any) -> bool:
    """Whether a column that means something holds what it may hold, or nothing."""
    if re.fullmatch(r"image|image_\d+|label|case_id|group", key) is None or value is None:
        return True
    if key in ("case_id", "group"):
        return isinstance(value, (str, int))
    many = key == "image" and isinstance(value, list)
    return all(isinstance(one, str) and one for one in value) if many else isinstance(value, str)


def _image_columns(columns: list[str], path: Path) -> list[str]:
    """`image`, or `image_0`, `image_1`, …, after the columns have been found complete."""
    numbered = [name for name in columns if re.fullmatch(r"image_\d+", name)]
    expected = [f"image_{n}" for n in range(len(numbered))]
    if "image" in columns and numbered:
        raise InputError(
            f"{path}: expected either a column image or image_0, image_1, …, got both. Remove one."
        )
    missing = [name for name in ["label", *(expected or ["image"])] if name not in columns]
    if missing:
        raise InputError(*(_missing_column(name, columns, path) for name in missing))
    return expected or ["image"]


def _missing_column(name: str, columns: list[str], path: Path) -> str:
    close = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    mend = f"Is it '{close[0]}'? Rename it." if close else "Add it."
    return f"{path}: expected a column {name}, got {', '.join(columns)}. {mend}"


def _case(row: Row, image_columns: list[str], wanted: list[str]) -> tuple[Case, list[str]]:
    """The case of a row, and the columns in which it has nothing."""
    absent = [name for name in wanted if not row.get(name)]
    images = [row.get(name) or "" for name in image_columns]
    image = images[0] if len(images) == 1 else images
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    case = {key: row[key] for key in ("case_id", "label", "group") if row.get(key)}
    if "case_id" not in case and image:
        first = case_name(image[0] if isinstance(image, list) else image)
        split = channel_of(first) if isinstance(image, list) else None
        case["case_id"] = split[0] if split else first
    return {**case, "image": image}, absent
