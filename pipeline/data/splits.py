"""Which persons are trained on, validated on and kept for a test."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from pipeline.data.issues import DatasetIssue
from pipeline.data.listing import Case
from pipeline.errors import InputError

GroupPattern = str | Callable[[str], str] | None


@dataclass(frozen=True)
class Split:
    """Cases by what they are for, each list in the order of the dataset.

    Attributes:
        train: To train on.
        validation: To validate on in training; empty with fold `all`.
        test: In no fold trained or validated on.
        findings: A warning `not_in_split` for each case that a split file does not list.
    """

    train: list[Case]
    validation: list[Case]
    test: list[Case]
    findings: list[DatasetIssue] = field(default_factory=list)


def split_by_hash(
    cases: Sequence[Case],
    *,
    fold: int | str = 0,
    num_folds: int = 5,
    split_seed: int = 0,
    group_pattern: GroupPattern = None,
    test_fraction: float = 0.0,
) -> Split:
    """Order the persons by a hash and deal them out in turn.

    The test persons come from an order of their own, by `split_seed` alone, and are taken out
    before the folds are dealt: they are the same for every `fold` and `num_folds`.

    Args:
        cases: Of the dataset.
        fold: Which part is validated on, 0 to `num_folds` - 1, or `all`: train on every person that
            is not kept for the test.
        num_folds: Parts that the persons are divided into.
        split_seed: Which division.
        group_pattern: Tells persons apart; see `person_of`.
        test_fraction: Of the persons, 0 to below 1; one person at least where it is not 0.

    Raises:
        InputError: One line per fault: a pattern that does not match, too few persons, a fold or
            share out of range.
    """
    persons = persons_of(cases, group_pattern)
    if isinstance(test_fraction, bool) or not 0 <= test_fraction < 1:
        raise InputError(f"test_fraction: expected 0 to below 1, got {test_fraction!r}. Change it.")
    names = sorted(set(persons.values()))
    kept = math.ceil(
        test_fraction * len(names) - 1e-9
    )  # 0.55 of 20 is 11, though 0.55 * 20 is more
    tested = set(sorted(names, key=lambda name: _rank(f"test/{split_seed}/{name}"))[:kept])
    ordered = sorted(set(names) - tested, key=lambda name: _rank(f"{split_seed}/{name}"))
    if not ordered:
        raise InputError(
            f"test_fraction: expected persons left to train on, got {test_fraction} of "
            f"{len(names)}. Lower it."
        )
    validated = set() if fold == "all" else set(_fold_of(ordered, fold, num_folds))
    test = {case_id for case_id, person in persons.items() if person in tested}
    validation = {case_id for case_id, person in persons.items() if person in validated}
    return parted(cases, set(persons) - test - validation, validation, test)


def person_of(case_id: str, group_pattern: GroupPattern) -> str:
    """The person a case belongs to, so that all of a person's cases stay on one side of a split.

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
    expression = r"(\d+)$" if group_pattern == "pairs" else group_pattern
    try:
        match = re.search(expression, case_id)
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
    """Person by case id; without a pattern a case's `group` is the person, where it has one.

    Raises:
        InputError: One line per case that the pattern does not match.
    """
    persons: dict[str, str] = {}
    faults: list[str] = []
    for case in cases:
        try:
            person = person_of(case["case_id"], group_pattern)
        except InputError as error:
            faults += error.faults
            continue
        persons[case["case_id"]] = case.get("group", person) if group_pattern is None else person
    if faults:
        raise InputError(*dict.fromkeys(faults))  # a broken pattern is one fault, not one a case
    return persons


def _rank(word: str) -> str:
    return hashlib.sha256(word.encode()).hexdigest()


def _fold_of(ordered: Sequence[str], fold: int | str, num_folds: int) -> Sequence[str]:
    if not 2 <= num_folds <= len(ordered):
        raise InputError(
            f"num_folds: expected 2 to {len(ordered)} (the number of persons), got {num_folds}. "
            "Change it."
        )
    if isinstance(fold, (str, bool)) or not 0 <= fold < num_folds:
        raise InputError(f"fold: expected 0 to {num_folds - 1} or 'all', got {fold!r}. Change it.")
    return ordered[fold::num_folds]


def parted(
    cases: Sequence[Case],
    train: Collection[str],
    validation: Collection[str],
    test: Collection[str],
    findings: Sequence[DatasetIssue] = (),
) -> Split:
    """The cases of each set of case ids."""
    train_cases, validation_cases, test_cases = (
        [case for case in cases if case["case_id"] in ids] for ids in (train, validation, test)
    )
    return Split(train_cases, validation_cases, test_cases, list(findings))
