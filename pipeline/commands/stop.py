"""End a run early and properly, with scores and report; its learning rates fall to zero until then.

The run ends with its present epoch, or with the next one if less than half of that is left. The
request is a file in the run directory, which the run looks for at every step; SIGUSR2 does the same
for the process. A run that is not at work takes notice when it is continued.

Exit status: 0 asked, or there is nothing to ask for; 2 a mistake on the command line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.command_line import CommandParser, loading, run_parsed
from pipeline.errors import require, require_path


def main(words: Sequence[str] | None = None) -> int:
    """Run the command with `words` or this process's own, and return its exit status."""
    parser = CommandParser("stop", __doc__, "RUN")
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    return run_parsed(parser, words, _run)


def _run(options: argparse.Namespace) -> int:
    run_dir: Path = options.run_dir
    require_path("RUN", run_dir, "the directory of a run")
    is_run = (run_dir / "run.json").is_file() and (run_dir / "configs/train.json").is_file()
    require(is_run, "RUN", "a run directory", run_dir, "Name that of a run.")
    with loading():
        from pipeline.files import write_json
        from pipeline.lifecycle.run_directory import holder_of
        from pipeline.training.early_end import STOP_FILE, read_early_end

    holder, end = holder_of(run_dir), read_early_end(run_dir)
    if holder is None and (summary := run_dir / "summary.json").is_file():
        epoch = json.loads(summary.read_text())["progress"]["epoch"]
        print(f"{run_dir}: the run is finished, with {epoch} epochs; there is nothing to stop.")
        return 0
    if end is None:
        write_json(run_dir / STOP_FILE, {})
    when = f"after epoch {end.epoch}" if end else "with this epoch or the next"
    who = f"{holder} ends the run {when}" if holder else f"the run ends {when} once it is continued"
    print(f"{run_dir}: {who}.")
    return 0
