"""Score predictions against labels, per case and class.

Files are matched by name, such as `<case>.nii.gz`; the predictions decide the cases. The output
folder gets `metrics.csv` and `summary.json`. Classes and the value to ignore are those given, else
those of --dataset_dir, else of a dataset.json in LABEL_DIR or its parent, else every value found is
a class. Persons, over whom intervals are drawn, are told by --group_pattern, else by --dataset_dir.

Exit status: 0 all cases scored, 1 one was refused, 2 a mistake on the command line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pipeline.config.command_line import CommandParser, loading, number_in, run_parsed
from pipeline.config.keys import read_word
from pipeline.errors import InputError, printable, require_path


def main(words: Sequence[str] | None = None) -> int:
    """Score predictions; returns the exit status. By default `words` are this process's."""
    parser = CommandParser("evaluate", __doc__, "PRED_DIR LABEL_DIR [options]")
    add = parser.add_argument
    add("pred_dir", metavar="PRED_DIR", type=Path, help="folder of predictions")
    add("label_dir", metavar="LABEL_DIR", type=Path, help="folder of labels")
    add("--output_dir", type=Path, help="(PRED_DIR_scores)")
    add("--dataset_dir", help="dataset that says what classes there are")
    names = partial(read_word, "class_names")
    add("--class_names", type=names, help='JSON, such as \'["background", "liver"]\'')
    add("--tolerance_mm", type=number_in(0), default=1.0, help="of the surface Dice (1.0)")
    add("--group_pattern", help="tells persons by the case id, as in training")
    add("--ignore_value", type=number_in(1, kind=int), help="label of voxels not to count")
    threads = "cases scored at the same time (one for each core)"
    add("--num_threads", type=number_in(1, kind=int), help=threads)
    add("--device", default="cpu", help="for surface distances (cpu)")
    return run_parsed(parser, words, _main)


def _main(given: argparse.Namespace) -> int:
    for name in ("pred_dir", "label_dir"):
        require_path(name.upper(), getattr(given, name), "a folder of label maps")
    if given.dataset_dir is not None:
        require_path("--dataset_dir", given.dataset_dir, "a dataset")
    with loading():
        from pipeline.evaluation.folders import evaluate_folders, format_summary
        from pipeline.files import WriteError
    output_dir = given.output_dir or Path(f"{given.pred_dir.resolve()}_scores")
    try:
        summary = evaluate_folders(given, output_dir)
    except WriteError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        raise InputError(
            f"--output_dir: expected a folder that can be written, got: {error}. Choose another."
        ) from None
    print("\n".join(format_summary(summary)))
    print(f"Written: {output_dir / 'metrics.csv'}, {output_dir / 'summary.json'}", flush=True)
    for case_id, reason in summary["refused"].items():
        print(f"{printable(case_id, keep='')}: {reason}", file=sys.stderr)
    return 1 if summary["refused"] else 0
