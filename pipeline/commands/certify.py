"""Certify that mixed precision costs no accuracy, for a dataset and a config of your own.

The config is trained with the same seeds, hence on the same batches, in each precision, and in
float32 with as many other seeds, as a control. The scores of the validation cases are compared as
`compare` does. `output_dir` (`runs/<name of dataset_dir>_certificate`) gets the runs,
`certificate.json` and `certificate.md`. The same command goes on; further dtypes cost what is new.

Exit status: 0 if no class is worse, 1 if one is (a precision in which training stops is worse) or a
run failed, 2 a mistake in input or config, 130 interrupted.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial

from pipeline import run
from pipeline.config.command_line import CommandParser, loading, number_in, run_parsed
from pipeline.config.keys import KEYS, PRECISIONS


def main(words: Sequence[str] | None = None) -> int:
    """Certify; returns the exit status. By default `words` are this process's command line."""
    words = list(sys.argv[1:] if words is None else words)
    shown = "[CONFIG.json ...] [--dataset_dir DATASET_DIR] [--key value ...]"
    common = ("dataset_dir", "output_dir", "group_pattern", "device")
    parser = CommandParser("certify", __doc__, shown, KEYS, common, "amp.json")
    add = parser.add_argument
    add("configs", metavar="CONFIG.json", nargs="*", help=f"none: {run.AMP}")
    add("--dtypes", nargs="+", choices=PRECISIONS, default=[*PRECISIONS], help="tf32: CUDA only")
    add("--seeds", type=number_in(2, kind=int), default=3, help="in each precision (3)")
    add("--margin", type=number_in(1e-6, 1), default=0.005, help="of Dice, that does not matter")
    add("--jobs", type=number_in(1, kind=int), default=1, help="runs at the same time (1)")
    return run_parsed(parser, words, partial(_certify, words))


def _certify(words: list[str], given: argparse.Namespace) -> int:
    composed = run.compose_run(given.configs, given.overrides)
    with loading():
        from pipeline.evaluation.certificate import certify, plan_sweep
    sweep = plan_sweep(
        composed, given.configs, given.overrides, given.allow,
        given.dtypes, given.seeds, given.margin, given.jobs,
    )  # fmt: skip
    return certify(sweep, shlex.join(["ampseg", "certify", *words]))
