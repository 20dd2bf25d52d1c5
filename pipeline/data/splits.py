"""Splits of a dataset's persons into training, validation and test, by hash or by a file."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.cases import Case
from pipeline.data.layouts import load_json
from pipeline.errors import DatasetIssue, InputError, nearest, refuse, require

GroupPattern = str | Callable[[str], str] | None


@dataclass(frozen=True)
class Split:
    """Cases by what they are for, each list in the order of the dataset."""

    train: list[Case]
    validation: list[Case]  # empty with fold `all`
    test: list[Case]  # that no fold trains or validates on
    issues: list[DatasetIssue] = field(default_factory=list)  # cases that a file does not list


def split_by_hash(
    cases: Sequence[Case],
    *,
    fold: int | str = 0,
    num_folds: int = 5,
    split_seed: int = 0,
    group_pattern: GroupPattern = None,
    test_fraction: float = 0.0,
) -> Split:
    """Order the persons by a hash and deal them out to the folds in turn.

    The test persons are chosen first, by an order that depends on `split_seed` alone: they are the
    same for every `fold` and `num_folds`. With fold `all`, the others are trained on. A share
    `test_fraction` above 0 is one person at least.

    Raises:
        InputError: One line per fault: a pattern that does not match, too few persons, a fold or
            share out of range.
    """
    persons = persons_of(cases, group_pattern)
    is_share = not isinstance(test_fraction, bool) and 0 <= test_fraction < 1
    require(is_share, "test_fraction", "0 to below 1", repr(test_fraction), "Change it.")
    names = sorted(set(persons.values()))
    num_test = math.ceil(test_fraction * len(names) - 1e-9)  # 0.55 * 20 is above 11 in binary
    test = set(sorted(names, key=lambda name: _rank(f"test/{split_seed}/{name}"))[:num_test])
    rest = sorted(set(names) - test, key=lambda name: _rank(f"{split_seed}/{name}"))
    got = f"{test_fraction} of {len(names)}"
    require(rest, "test_fraction", "persons left to train on", got, "Lower it.")
    validation: set[str] = set()
    if fold != "all":
        expected = f"2 to {len(rest)} (the number of persons)"
        require(2 <= num_folds <= len(rest), "num_folds", expected, num_folds, "Change it.")
        validation = set(rest[_check_fold(fold, num_folds, "") :: num_folds])
    sides = (set(rest) - validation, validation, test)
    return _make_split(cases, [{c for c, name in persons.items() if name in s} for s in sides])


def split_by_file(
    cases: Sequence[Case],
    split_file: str | Path,
    *,
    fold: int | str = 0,
    group_pattern: GroupPattern = None,
    left_out: Collection[str] = (),
) -> Split:
    """Split as a file says: nnU-Net's `splits_final.json`, or one split of one's own.

    The file holds a list of objects with `train` and `val` (lists of case ids), of which `fold`
    chooses one, or a single such object, which is fold 0. `val` may be called `validation`; `test`
    is optional. With fold `all`, everything that any of them trains or validates on is trained on.
    A case that the chosen split does not list is left out, with a warning `not_in_split`. The file
    may name the cases `left_out`, which were excluded or have a fault.

    Raises:
        InputError: One line per fault: a file of another form, no such fold, an unknown case, a
            case listed twice, a person on two sides, nobody to train on.
    """
    where = str(split_file)
    sides = _choose_entry(_read_entries(Path(split_file)), fold, where)
    persons = persons_of(cases, group_pattern)
    listed = Counter(case_id for side in sides for case_id in side)
    known = {*persons, *left_out}
    faults = [
        f"{where}: expected cases of the dataset, got '{case_id}'. {nearest(case_id, known)}"
        if case_id not in known
        else f"{where}: expected each case once in a fold, got {case_id} {n} times. Remove one."
        for case_id, n in listed.items()
        if case_id not in known or n > 1
    ]
    refuse(faults + _find_divided_persons(sides, persons, where))
    expected, remedy = "cases to train on", "List some under train."
    require({*sides[0]} & persons.keys(), where, expected, "none", remedy)
    message = f"expected the case in {where}, fold {fold}, found it in no part of it. "
    message += "It is left out; list it to use it."
    unlisted = [case_id for case_id in persons if case_id not in listed]
    issues = [DatasetIssue(case_id, "not_in_split", message, warning=True) for case_id in unlisted]
    return _make_split(cases, sides, issues)


def person_of(case_id: str, group_pattern: GroupPattern) -> str:
    """Name the person a case belongs to; all cases of a person stay on one side of a split.

    Args:
        case_id: Such as `hippocampus_017`.
        group_pattern: `None` (each case is a person of its own); `pairs` (the cases numbered
            2k−1 and 2k are one person); a function of the case id; or a regular expression whose
            first group, or whole match, names the person.

    Raises:
        InputError: If the pattern is not a regular expression or does not match.
    """
    if group_pattern is None:
        return case_id
    if callable(group_pattern):
        return str(group_pattern(case_id))
    try:
        match = re.search(r"(\d+)$" if group_pattern == "pairs" else group_pattern, case_id)
    except re.error as error:
        raise InputError(
            f"group_pattern: expected a regular expression or 'pairs', got {group_pattern!r} "
            f"({error})."
        ) from None
    if match is None:
        raise InputError(
            f"{case_id}: expected the case id to match group_pattern {group_pattern!r}, "
            "it does not. Change the pattern."
        )
    name = match.group(1) if match.groups() else match.group()
    return str((int(name) + 1) // 2) if group_pattern == "pairs" else name


def persons_of(cases: Sequence[Case], group_pattern: GroupPattern) -> dict[str, str]:
    """Name the person of each case id; without a pattern, a case's `group` is its person.

    Raises:
        InputError: One line per case that the pattern does not match.
    """
    if group_pattern is None:
        return {case["case_id"]: case.get("group") or case["case_id"] for case in cases}
    persons: dict[str, str] = {}
    faults: list[str] = []
    for case_id in (case["case_id"] for case in cases):
        try:
            persons[case_id] = person_of(case_id, group_pattern)
        except InputError as error:
            faults += error.faults
    refuse(dict.fromkeys(faults))  # an invalid pattern is one fault, not one a case
    return persons


def _rank(word: str) -> str:
    return hashlib.sha256(word.encode()).hexdigest()


def _check_fold(fold: int | str, num_folds: int, source: str) -> int:
    is_fold = isinstance(fold, int) and not isinstance(fold, bool) and 0 <= fold < num_folds
    expected = f"0 to {num_folds - 1} or 'all'{source}"
    require(is_fold, "fold", expected, repr(fold), "Change it.")
    return int(fold)


def _make_split(
    cases: Sequence[Case], sides: Sequence[Collection[str]], issues: Sequence[DatasetIssue] = ()
) -> Split:
    train, validation, test = ([c for c in cases if c["case_id"] in side] for side in sides)
    return Split(train, validation, test, list(issues))


def _read_entries(path: Path) -> list[list[list[str]]]:
    """For each fold of a file, the ids of the training, validation and test cases."""
    source = load_json(path)
    folds = []
    for number, entry in enumerate(source if isinstance(source, list) else [source]):
        stated = entry if isinstance(entry, Mapping) else {}
        validation = stated.get("val", stated.get("validation"))
        sides: list[Any] = [stated.get("train"), validation, stated.get("test", [])]
        is_valid = all(isinstance(s, list) and all(isinstance(c, str) for c in s) for s in sides)
        expected = "an object with train and val (lists of case ids)"
        where = f"{path}, fold {number}"
        require(is_valid, where, expected, str(entry)[:60], "Correct the file.")
        folds.append(sides)
    return folds


def _choose_entry(folds: Sequence[list[list[str]]], fold: int | str, where: str) -> list[list[str]]:
    if fold != "all":
        return folds[_check_fold(fold, len(folds), f" with {where}")]
    test = {case_id: None for _, _, side in folds for case_id in side}
    rest = {case_id: None for one in folds for side in one[:2] for case_id in side}
    return [[case_id for case_id in rest if case_id not in test], [], [*test]]


def _find_divided_persons(
    sides: Sequence[Sequence[str]], persons: Mapping[str, str], where: str
) -> list[str]:
    """A line per person with cases on two sides."""
    found: dict[str, dict[int, str]] = {}  # by person and side, the first case there
    for number, side in enumerate(sides):
        for case_id in filter(persons.__contains__, side):
            found.setdefault(persons[case_id], {}).setdefault(number, case_id)
    several = {person: list(dict.fromkeys(cases.values())) for person, cases in found.items()}
    return [
        f"{where}: expected a person's cases on one side, got {cases[0]} and {cases[1]} of person "
        f"{person} on two. Move one."
        for person, cases in several.items()
        if len(cases) > 1
    ]
