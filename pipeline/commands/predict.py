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
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="RUN_DIR INPUT OUTPUT_DIR",
        help="run or bundle; NIfTI file, DICOM series, or folder; folder of labels",
    )
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="--key value ...",
                        help="keys of configs/inference.json")  # fmt: skip

    def predict(given: argparse.Namespace) -> int:
        if len(given.paths) != 3:
            parser.error(
                "expected a run, what to predict, and a folder for the labels, got "
                f"{len(given.paths)} words"
            )
        keys = ("run_dir", "input", "output_dir")
        words = [f"--{key}={path}" for key, path in zip(keys, given.paths, strict=True)]
        config = run.LOGGING.with_name("inference.json")
        return run.main([str(config), *words, *given.options])

    return run_parsed(parser, words, predict)
