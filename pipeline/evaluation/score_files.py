"""Scores of two arms of several runs each, read from a CSV per run, on the same cases."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import InputError
from pipeline.evaluation.comparison import Arm
from pipeline.evaluation.score_tables import Columns, Key, Table, few, name_of, read_table


@dataclass(frozen=True)
class Scores:
    """Two arms on the same cases.

    Attributes:
        metric: Name of the column, as the first file writes it.
        case_ids: `N`, sorted.
        persons: `N`, of the person of each case.
        class_names: `K`, sorted.
        arms: Scores of A and B.
        notes: What the reader of the result should know.
    """

    metric: str
    case_ids: list[str]
    persons: list[str]
    class_names: list[str]
    arms: tuple[Arm, Arm]
    notes: list[str]


def read_arms(
    files: Mapping[str, Sequence[str]],
    columns: Columns,
    *,
    person_of: Callable[[str], str] | None = None,
    common_cases: bool = False,
) -> Scores:
    """Read the files of both arms, and bring them onto the same cases.

    Args:
        files: Names of the files of `a` and of `b`, one per run.
        columns: Where to find what.
        person_of: Person of a case id; `None`: the person column, else each case is one.
        common_cases: Leave out what is not in every file.

    Raises:
        InputError: One line per fault: a file that cannot be read or names a thing twice, and
            files that do not agree.
    """
    _require_once(files)
    faults: list[str] = []
    read: dict[str, list[Table]] = {arm: [] for arm in files}
    for arm, names in files.items():
        for name in names:
            try:
                read[arm].append(read_table(name, columns))
            except InputError as error:
                faults += error.faults
    if faults:
        raise InputError(*dict.fromkeys(faults))
    tables = [*read["a"], *read["b"]]
    keys, notes = _common(tables, common_cases)
    case_ids, class_names = (sorted(set(part)) for part in zip(*keys, strict=True))
    return Scores(
        tables[0].metric,
        case_ids,
        _persons(tables, case_ids, person_of),
        class_names,
        (
            _arm(read["a"], keys, case_ids, class_names),
            _arm(read["b"], keys, case_ids, class_names),
        ),
        _copies(tables) + notes,
    )


def _require_once(files: Mapping[str, Sequence[str]]) -> None:
    """No arm has a file twice: that would be no further run."""
    paths = {arm: [Path(name).resolve() for name in names] for arm, names in files.items()}
    faults = [
        f"--{arm}: expected each file once, got {path} {of_arm.count(path)} times. "
        "Give one file per training seed."
        for arm, of_arm in paths.items()
        for path in dict.fromkeys(of_arm)
        if of_arm.count(path) > 1
    ]
    if faults:
        raise InputError(*faults)


def _copies(tables: Sequence[Table]) -> list[str]:
    """Notes on files in both arms, and on those that are unlikely to be of different seeds."""
    notes = []
    seen: dict[str, Table] = {}
    for table in tables:
        first = seen.setdefault(repr(sorted(table.values.items())), table)
        if Path(first.file).resolve() != Path(table.file).resolve():
            notes.append(f"{table.file} has the very scores of {first.file}: a copy is no new run.")
        elif first is not table:
            notes.append(f"{table.file} is in both arms.")
    return notes


def _arm(
    tables: Sequence[Table], keys: Collection[Key], case_ids: list[str], class_names: list[str]
) -> Arm:
    """Scores as arrays; undefined where a case and class is none of `keys`."""
    values = np.full((len(tables), len(case_ids), len(class_names)), np.nan)
    best = np.zeros(values.shape, dtype=bool)
    row_of, place_of = ({name: n for n, name in enumerate(x)} for x in (case_ids, class_names))
    for case, name in keys:
        at = row_of[case], place_of[name]
        values[:, *at] = [table.values[case, name] for table in tables]
        best[:, *at] = [(case, name) in table.best for table in tables]
    return Arm(values, best)


def _common(tables: Sequence[Table], leave_out: bool) -> tuple[list[Key], list[str]]:
    """Cases and classes that every file has, and a note on what was left out."""
    classes = {name for table in tables for _, name in table.values}
    lacking = [(t, classes - {name for _, name in t.values}) for t in tables]
    if any(names for _, names in lacking):
        raise InputError(
            *(
                f"{table.file}: expected the classes of the other files, got no "
                f"{few(sorted(names))}. Score all with the same classes."
                for table, names in lacking
                if names
            )
        )
    every = {key for table in tables for key in table.values}
    common = {key for key in every if all(key in table.values for table in tables)}
    if every == common:
        return sorted(common), []
    if leave_out and not common:
        raise InputError("files: expected cases that all have, got none. Score the same cases.")
    if leave_out:
        names = _names(every - common, every)
        return sorted(common), [f"Left out, not in every file: {few(names)} ({len(names)})."]
    raise InputError(
        *(
            f"{table.file}: expected the cases of the other files, got no "
            f"{few(_names(every - set(table.values), every))}. Score them, or compare what is "
            "common: --common_cases true"
            for table in tables
            if every - set(table.values)
        )
    )


def _names(keys: Collection[Key], every: Collection[Key]) -> list[str]:
    """A case by its id if all of its classes are meant."""
    rest = {case for case, name in every if (case, name) not in keys}
    return sorted({name_of(key) if key[0] in rest else key[0] for key in keys})


def _named(case: str, person: str | None) -> str:
    if not person:  # a pattern's first group need not be what matched
        raise InputError(f"{case}: expected group_pattern to name a person, got none. Change it.")
    return person


def _persons(
    tables: Sequence[Table], case_ids: Sequence[str], person_of: Callable[[str], str] | None
) -> list[str]:
    """Person of each case; without any, the case itself."""
    persons: list[str] = []
    faults: list[str] = []
    for case in case_ids:
        told = {person for table in tables for person in table.persons.get(case, ())}
        if person_of is not None:
            try:
                told = {_named(case, person_of(case))}
            except InputError as error:
                faults += error.faults
        elif len(told) > 1:
            faults.append(f"{case}: expected one person, got {few(sorted(told))}. Correct it.")
        persons.append(next(iter(told), case))
    if faults:
        raise InputError(*dict.fromkeys(faults))
    return persons
