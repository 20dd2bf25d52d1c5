"""Write the report of a run, `report/index.html` in its directory: one file that opens offline.

Exit status: 0 written, 1 it could not be written, 2 a mistake on the command line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.command_line import CommandParser, loading, run_parsed
from pipeline.errors import require_path


def main(words: Sequence[str] | None = None) -> int:
    """Run the command with `words` or this process's own, and return its exit status."""
    parser = CommandParser("report", __doc__, "RUN [--output_dir DIR]")
    parser.add_argument("run_dir", metavar="RUN", help="run directory")
    parser.add_argument("--output_dir", metavar="DIR", help="folder of index.html (RUN/report)")
    return run_parsed(parser, words, _run)


def _run(options: argparse.Namespace) -> int:
    require_path("RUN", Path(options.run_dir, "configs/train.json"), "the directory of a run")
    with loading():
        from pipeline.reporting.report import write_report

    try:
        path = write_report(options.run_dir, options.output_dir)
    except OSError as error:
        got = str(error).rstrip(".")
        print(f"{options.run_dir}: expected a writable directory, got: {got}.", file=sys.stderr)
        return 1
    print(f"The report is {path}. Open it in a browser:\n  {path.resolve().as_uri()}")
    return 0
