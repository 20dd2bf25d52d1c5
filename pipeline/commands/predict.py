"""Predict with a run or a bundle.

    python -m pipeline predict RUN_DIR INPUT OUTPUT_DIR [--key value ...]

The same as `python -m pipeline.run configs/inference.json --run_dir RUN_DIR --input INPUT
--output_dir OUTPUT_DIR`. A case that cannot be predicted is named and left out, the others are
predicted, and the exit status is 1; with `--strict` the first one ends the command.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline import run
from pipeline.commands.command import run_command
from pipeline.errors import InputError

USAGE = "usage: python -m pipeline predict RUN_DIR INPUT OUTPUT_DIR"


def main(words: Sequence[str] | None = None) -> int:
    """Predict; returns the exit status.

    Args:
        words: The command line after the command, by default this process's.
    """
    return run_command(__doc__, words, _predict)


def _predict(words: list[str]) -> int:
    paths, rest = run.split_words(words)
    if len(paths) != 3:
        raise InputError(
            "command line: expected a run, what to predict, and a folder for the labels, got "
            f"{len(paths)} words. {USAGE}"
        )
    named = zip(("run_dir", "input", "output_dir"), paths, strict=True)
    config = run.LOGGING.with_name("inference.json")
    return run.main([str(config), *(f"--{key}={path}" for key, path in named), *rest])
