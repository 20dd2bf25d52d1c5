"""Splits of a dataset's persons into training, validation and test, by hash or by a file."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from pipeline.data.cases import Case
from pipeline.data.layouts import load_json
from pipeline.errors import DatasetIssue, InputError, nearest, refuse, require

GroupPattern = str | Callable[[str], str] | None
Sides = Sequence[Collection[str]]  # ids of training, validation and test cases, in this order


def split_by_hash(
    cases: Sequence[Case],
    *,
    fold: int | str = 0,
    num_folds: int = 5,
    split_seed: int = 0,
    group_pattern: GroupPattern = None,
    test_fraction: float = 0.0,
) -> Sides:
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
    names = set(persons.values())
    num_test = math.ceil(test_fraction * len(names) - 1e-9)  # 0.55 * 20 is above 11 in binary
    test = set(_sort_by_hash(names, f"test/{split_seed}/")[:num_test])
    rest = _sort_by_hash(names - test, f"{split_seed}/")
    got = f"{test_fraction} of {len(names)}"
    require(rest, "test_fraction", "persons left to train on", got, "Lower it.")
    validation: set[str] = set()
    if fold != "all":
        expected = f"2 to {len(rest)} (the number of persons)"
        require(2 <= num_folds <= len(rest), "num_folds", expected, num_folds, "Change it.")
        validation = set(rest[_check_fold(fold, num_folds) :: num_folds])
    sides = (set(rest) - validation, validation, test)
    return [{case_id for case_id, name in persons.items() if name in side} for side in sides]


def split_by_file(
    cases: Sequence[Case],
    split_file: str | Path,
    *,
    fold: int | str = 0,
    group_pattern: GroupPattern = None,
    left_out: Collection[str] = (),
) -> tuple[Sides, list[DatasetIssue]]:
    """Split as a file says: nnU-Net's `splits_final.json`, or one split of one's own.

    The file holds a list of objects with `train`, `val` or `validation`, and optionally `test`
    (lists of case ids), of which `fold` chooses one; or one such object, which is fold 0. With fold
    `all`, everything that any of them trains or validates on is trained on. A case that is not
    listed is left out, with a warning. The file may name cases that are `left_out` already.

    Raises:
        InputError: One line per fault: a file of another form, no such fold, an unknown case, a
            case listed twice, a person on two sides, nobody to train on.
    """
    sides = _read_sides(Path(split_file), fold)
    persons = persons_of(cases, group_pattern)
    known = {*persons, *left_out}
    listed = Counter(case_id for side in sides for case_id in side)
    faults = []
    for case_id, count in listed.items():
        if case_id not in known:
            faults.append(f"cases of the dataset, got '{case_id}'. {nearest(case_id, known)}")
        elif count > 1:
            faults.append(f"each case once in a fold, got {case_id} {count} times. Remove one.")
    faults += _find_divided_persons(sides, persons)
    if not faults and not {*sides[0]} & persons.keys():
        faults = ["cases to train on, got none. List some under train."]
    refuse(f"{split_file}: expected {fault}" for fault in faults)
    message = f"expected the case in {split_file}, fold {fold}, found it in no part of it. "
    message += "It is left out; list it to use it."
    unlisted = [case_id for case_id in persons if case_id not in listed]
    return sides, [DatasetIssue(case_id, "not_in_split", message, True) for case_id in unlisted]


def person_of(case_id: str, group_pattern: GroupPattern) -> str:
    """Name the person a case belongs to; all cases of a person stay on one side of a split.

    Without a pattern each case is a person of its own. With `pairs` the cases numbered 2k−1 and 2k
    are one person. Else the pattern is a function of the case id, or a regular expression whose
    first group, or whole match, names the person.

    Raises:
        InputError: If the pattern is not a regular expression or does not match.
    """
    if group_pattern is None or callable(group_pattern):
        return str(group_pattern(case_id)) if group_pattern else case_id
    try:
        match = re.search(r"(\d+)$" if group_pattern == "pairs" else group_pattern, case_id)
    except re.error as error:
        expected = "group_pattern: expected a regular expression or 'pairs'"
        raise InputError(f"{expected}, got {group_pattern!r} ({error}). Correct it.") from None
    expected = f"the case id to match group_pattern {group_pattern!r}"
    if match is None:
        raise InputError(f"{case_id}: expected {expected}, it does not. Change the pattern.")
    name = match.group(1) if match.groups() else match.group()
    return str((int(name) + 1) // 2) if group_pattern == "pairs" else name


def persons_of(cases: Sequence[Case], group_pattern: GroupPattern) -> dict[str, str]:
    """Name the person of each case id; without a pattern, a case's `group` is its person.

    Raises:
        InputError: One line per case that the pattern does not match.
    """
    persons: dict[str, str] = {}
    faults: dict[str, None] = {}  # an invalid pattern is one fault, not one a case
    for case in cases:
        case_id = case["case_id"]
        try:
            stated = case.get("group") if group_pattern is None else None
            persons[case_id] = stated or person_of(case_id, group_pattern)
        except InputError as error:
            faults |= dict.fromkeys(error.faults)
    refuse(faults)
    return persons


def _sort_by_hash(names: Collection[str], prefix: str) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(f"{prefix}{name}".encode()).hexdigest())


def _check_fold(fold: int | str, num_folds: int, source: str = "") -> int:
    is_fold = isinstance(fold, int) and not isinstance(fold, bool) and 0 <= fold < num_folds
    expected = f"0 to {num_folds - 1} or 'all'{source}"
    require(is_fold, "fold", expected, repr(fold), "Change it.")
    return int(fold)


def _read_sides(path: Path, fold: int | str) -> list[list[str]]:
    """Ids of the training, validation and test cases of one fold of a file, or of all."""
    source = load_json(path)
    folds = []
    for number, entry in enumerate(source if isinstance(source, list) else [source]):
        stated = entry if isinstance(entry, Mapping) else {}
        sides = [stated.get("train"), stated.get("val", stated.get("validation"))]
        sides.append(stated.get("test", []))
        is_valid = all(isinstance(s, list) and all(isinstance(c, str) for c in s) for s in sides)
        expected = "an object with train and val (lists of case ids)"
        got = str(entry)[:60]
        require(is_valid, f"{path}, fold {number}", expected, got, "Correct the file.")
        folds.append(sides)
    if fold != "all":
        return folds[_check_fold(fold, len(folds), f" with {path}")]
    test = dict.fromkeys(case_id for sides in folds for case_id in sides[2])
    rest = dict.fromkeys(case_id for sides in folds for side in sides[:2] for case_id in side)
    return [[case_id for case_id in rest if case_id not in test], [], [*test]]


def _find_divided_persons(sides: Sides, persons: Mapping[str, str]) -> list[str]:
    """A fault per person with cases on two sides."""
    first: dict[str, tuple[int, str]] = {}  # by person: a side, and the first case there
    faults: dict[str, str] = {}
    for number, side in enumerate(sides):
        for case_id in filter(persons.__contains__, side):
            person = persons[case_id]
            other, known = first.setdefault(person, (number, case_id))
            if other != number and known != case_id:
                got = f"got {known} and {case_id} of person {person} on two. Move one."
                faults.setdefault(person, f"a person's cases on one side, {got}")
    return list(faults.values())
