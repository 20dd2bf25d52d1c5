"""What is wrong with a dataset: one line for people, fields for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.errors import InputError


@dataclass(frozen=True)
class DatasetIssue:
    """One fault or warning about one case."""

    case_id: str
    check: str  # that found it, one word for programs: `missing`, `outside`, `affine`, …
    message: str  # `expected {X}, got {Y}. {what to do}`, without the case id
    warning: bool = False  # whether training may start all the same

    @property
    def line(self) -> str:
        """The message after the case id."""
        return f"{self.case_id}: {self.message}"


def make_issue(
    case_id: str, check: str, expected: str, got: object, remedy: str, *, warning: bool = False
) -> DatasetIssue:
    """An issue with a message of the usual form; the remedy is a sentence without its period."""
    return DatasetIssue(case_id, check, f"expected {expected}, got {got}. {remedy}.", warning)


def require(condition: object, where: object, expected: str, got: object, remedy: str) -> None:
    """Raise an InputError of one line unless a condition holds."""
    if not condition:
        raise InputError(f"{where}: expected {expected}, got {got}. {remedy}")


def refuse(faults: Iterable[str]) -> None:
    """Raise an InputError of these lines if there are any."""
    if lines := tuple(faults):
        raise InputError(*lines)


def some(words: Sequence[str]) -> str:
    """Name the first five words, and count the others."""
    return ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")
