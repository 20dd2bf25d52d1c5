"""What the commands share: options, `--help`, and one line for a mistake of the user."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from pipeline.errors import InputError


class CommandParser(argparse.ArgumentParser):
    """A parser of the options of `python -m pipeline COMMAND`; mistakes are `InputError`s."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(
            f"python -m pipeline {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Refuse the words that were typed."""
        usage = " ".join(self.format_usage().split())
        raise InputError(f"command line: {message}. {usage}")


def number_in(
    low: float, high: float = math.inf, kind: Callable[[str], float] = float
) -> Callable[[str], float]:
    """Return a type of options: a finite number from `low` to `high`, both included."""

    def parse(word: str) -> float:
        try:
            value = kind(word)
        except ValueError:
            value = math.nan
        if low <= value <= high and math.isfinite(value):
            return value
        limits = f"{low} to {high}" if high < math.inf else f"{low} or more"
        raise argparse.ArgumentTypeError(f"expected {limits}, got {word}")

    return parse


def run_parsed(
    parser: CommandParser, words: Sequence[str] | None, work: Callable[[argparse.Namespace], int]
) -> int:
    """Do the work of a command; returns its exit status, 2 for a user's mistake."""
    try:
        return work(parser.parse_args(words))
    except InputError as error:
        error.tell()
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
