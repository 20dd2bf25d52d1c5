"""What the commands have in common: their words, `--help`, and a mistake of the user's in lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from pipeline.errors import InputError


def run_command(
    usage: str | None, words: Sequence[str] | None, work: Callable[[list[str]], int]
) -> int:
    """Run a command; returns its exit status, 2 for a mistake of the user's.

    Args:
        usage: What `--help` prints.
        words: The command line after the command; `None`: this process's.
        work: Takes the words and returns the exit status; may raise `InputError`.
    """
    rest = list(sys.argv[1:] if words is None else words)
    if "--help" in rest or "-h" in rest:
        print(usage)
        return 0
    try:
        return work(rest)
    except InputError as error:
        error.tell()
        return 2
