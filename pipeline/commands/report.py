"""The report of a run: `python -m pipeline report RUN`.

Writes `report/index.html` into the run directory: curves, scores of all cases, pictures of three of
them, precision, plan, skipped steps, and the command that makes the run again. One file, which a
browser opens without a network.

Exit status: 0 written, 1 it could not be written, 2 a mistake on the command line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline.commands.command import run_command
from pipeline.errors import InputError

USAGE = "usage: python -m pipeline report RUN"


def main(words: Sequence[str] | None = None) -> int:
    """Write the report of a run; returns the exit status.

    Args:
        words: The command line after the command, by default this process's.
    """
    return run_command(__doc__, words, _main)


def _main(words: list[str]) -> int:
    if len(words) != 1:
        raise InputError(f"command line: expected a run directory, got {len(words)}. {USAGE}")
    from pipeline.reporting.report import write_report  # its imports take seconds

    try:
        path = write_report(words[0])
    except OSError as error:
        print(
            f"{words[0]}: expected a directory that can be written, got: {error}.", file=sys.stderr
        )
        return 1
    print(f"The report is {path}. Open it in a browser:\n  {path.resolve().as_uri()}")
    return 0
