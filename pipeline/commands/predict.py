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
    """Predict; returns the exit status.

    Args:
        words: The command line after the command, by default this process's.
    """
    parser = CommandParser("predict", __doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run directory or bundle")
    parser.add_argument(
        "input", metavar="INPUT", help="NIfTI file, DICOM series, or folder of them"
    )
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="folder for the label maps")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="--key value ...",
                        help="keys of configs/inference.json")  # fmt: skip
    return run_parsed(parser, words, _predict)


def _predict(given: argparse.Namespace) -> int:
    paths = [f"--{key}={getattr(given, key)}" for key in ("run_dir", "input", "output_dir")]
    return run.main([str(run.LOGGING.with_name("inference.json")), *paths, *given.options])
