"""What is found wrong with a dataset: one line for a person, fields for a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class DatasetIssue:
    """One fault or warning about one case.

    Args:
        case_id: Of the case.
        check: Which check found it, a word for programs: `missing`, `outside`, `affine`, …
        message: `expected {X}, got {Y}. {what to do}`, without the case id.
        warning: Whether training may go on all the same.
    """

    case_id: str
    check: str
    message: str
    warning: bool = False

    @property
    def line(self) -> str:
        """The message after its case."""
        return f"{self.case_id}: {self.message}"


class Problem(NamedTuple):
    """What a finding says, in the words that all have, before it is said of a case."""

    check: str
    expected: str
    got: str
    remedy: str
    warning: bool = False


def make_finding(case: Mapping[str, Any], problem: Problem) -> DatasetIssue:
    """The finding that `case` has this problem."""
    message = f"expected {problem.expected}, got {problem.got}. {problem.remedy}."
    return DatasetIssue(case["case_id"], problem.check, message, problem.warning)


def some(words: Sequence[str]) -> str:
    """The first five, and how many more there are."""
    return ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")
