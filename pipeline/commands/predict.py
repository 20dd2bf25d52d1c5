"""Predict with a run or a bundle.

The same as `python -m pipeline.run configs/inference.json --run_dir RUN_DIR --input INPUT
--output_dir OUTPUT_DIR`, followed by the options. A case that cannot be predicted is named and left
out, the others are predicted, and the exit status is 1; with `--strict` the first one ends the
command.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipeline import run
from pipeline.commands.command import CommandParser, run_parsed


def main(words: Sequence[str] | None = None) -> int:
    """Predict, given the words after the command or this process's; return the exit status."""
    parser = CommandParser("predict", __doc__)
    add, keys = parser.add_argument, "keys of configs/inference.json"
    add("run_dir", metavar="RUN_DIR", help="run or bundle")
    add("input", metavar="INPUT", help="NIfTI file, DICOM series, or folder of these")
    add("output_dir", metavar="OUTPUT_DIR", help="folder for the label maps")
    rest = add("options", nargs=argparse.REMAINDER, metavar="--key value ...", help=keys)
    rest.required = False

    def predict(given: argparse.Namespace) -> int:
        paths = [f"--{name}={getattr(given, name)}" for name in ("run_dir", "input", "output_dir")]
        return run.main([str(run.LOGGING.with_name("inference.json")), *paths, *given.options])

    return run_parsed(parser, words, predict)
