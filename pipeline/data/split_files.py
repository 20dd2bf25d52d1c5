"""Splits that a file states, such as nnU-Net's `splits_final.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.described import read_json
from pipeline.data.issues import DatasetIssue
from pipeline.data.listing import Case
from pipeline.data.splits import GroupPattern, Split, parted, persons_of
from pipeline.errors import InputError, nearest


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
    may be there as well. With fold `all`, what any of them trains or validates on is trained on.
    A case that the chosen split does not list is left out, with a warning: a file is often written
    for a part of the cases on purpose.

    Args:
        cases: Of the dataset.
        split_file: Its path.
        fold: Which entry, counted from 0, or `all`.
        group_pattern: Tells persons apart; see `person_of`.
        left_out: Ids of cases that were excluded or have a fault; the file may name them.

    Raises:
        InputError: One line per fault: a file of another form, no such fold, an unknown case, a
            case listed twice, a person on two sides, nobody to train on.
    """
    where = str(split_file)
    train, validation, test = sides = _chosen(_entries(Path(split_file)), fold, where)
    persons = persons_of(cases, group_pattern)
    listed = {case_id for side in sides for case_id in side}
    faults = [*_name_faults(sides, {*persons, *left_out}, where), *_torn(sides, persons, where)]
    if not faults and not set(train) & set(persons):
        faults = [f"{where}: expected cases to train on, got none. List some under train."]
    if faults:
        raise InputError(*faults)
    unlisted = [
        DatasetIssue(
            case_id,
            "not_in_split",
            f"expected the case in {where}, fold {fold}, found it in no part of it. "
            "It is left out; list it to use it.",
            warning=True,
        )
        for case_id in persons
        if case_id not in listed
    ]
    return parted(cases, set(train), set(validation), set(test), unlisted)


def _entries(path: Path) -> list[dict[str, list[str]]]:
    """The splits of a file, each with `train`, `validation` and `test`."""
    source = read_json(path)
    entries = source if isinstance(source, list) else [source]
    return [_entry(entry, f"{path}, fold {n}") for n, entry in enumerate(entries)]


def _entry(entry: Any, where: str) -> dict[str, list[str]]:
    if isinstance(entry, Mapping):
        validation = entry.get("val", entry.get("validation"))
        sides = {
            "train": entry.get("train"),
            "validation": validation,
            "test": entry.get("test", []),
        }
        if all(
            isinstance(side, list) and all(isinstance(case_id, str) for case_id in side)
            for side in sides.values()
        ):
            return sides
    raise InputError(
        f"{where}: expected an object with train and val (lists of case ids), got "
        f"{str(entry)[:60]}. Correct the file."
    )


def _chosen(
    entries: list[dict[str, list[str]]], fold: int | str, where: str
) -> tuple[list[str], list[str], list[str]]:
    if fold == "all":
        test = list(dict.fromkeys(case_id for entry in entries for case_id in entry["test"]))
        rest = (case_id for one in entries for case_id in [*one["train"], *one["validation"]])
        return [case_id for case_id in dict.fromkeys(rest) if case_id not in test], [], test
    if isinstance(fold, (str, bool)) or not 0 <= fold < len(entries):
        raise InputError(
            f"fold: expected 0 to {len(entries) - 1} or 'all' with {where}, got {fold!r}. "
            "Change it."
        )
    return entries[fold]["train"], entries[fold]["validation"], entries[fold]["test"]


def _name_faults(
    sides: Sequence[Sequence[str]], known: Collection[str], where: str
) -> Iterator[str]:
    """A line per case that is unknown, and per case that is listed twice."""
    for case_id, count in Counter(case_id for side in sides for case_id in side).items():
        if case_id not in known:
            yield (
                f"{where}: expected cases of the dataset, got '{case_id}'. "
                f"{nearest(case_id, known)}"
            )
        elif count > 1:
            yield (
                f"{where}: expected each case once in a fold, got {case_id} {count} times. "
                "Remove one."
            )


def _torn(sides: Sequence[Sequence[str]], persons: Mapping[str, str], where: str) -> Iterator[str]:
    """A line per person with cases on two sides."""
    first: dict[str, tuple[int, str]] = {}
    told = set()
    for number, side in enumerate(sides):
        for case_id in side:
            person = persons.get(case_id)
            if person is None:
                continue
            other, other_case = first.setdefault(person, (number, case_id))
            if other != number and other_case != case_id and person not in told:
                told.add(person)
                yield (
                    f"{where}: expected a person's cases on one side, got {other_case} and "
                    f"{case_id} of person {person} on two. Move one."
                )
