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
    parser.usage = "python -m pipeline predict RUN_DIR INPUT OUTPUT_DIR [--key value ...]"
    add, paths = parser.add_argument, "RUN_DIR INPUT OUTPUT_DIR"
    what = "run or bundle; NIfTI file, DICOM series, or folder; folder of labels"
    add("paths", nargs="*", metavar=paths, help=what)
    keys = "keys of configs/inference.json"
    add("options", nargs=argparse.REMAINDER, metavar="--key value ...", help=keys)

    def predict(given: argparse.Namespace) -> int:
        if len(given.paths) != 3:
            expected = "expected a run, what to predict, and a folder for the labels"
            parser.error(f"{expected}, got {len(given.paths)} words")
        names = ("run_dir", "input", "output_dir")
        words = [f"--{name}={path}" for name, path in zip(names, given.paths, strict=True)]
        return run.main([str(run.LOGGING.with_name("inference.json")), *words, *given.options])

    return run_parsed(parser, words, predict)
