"""Score predictions against labels, per case and class.

Files are matched by name, `<case>.nii.gz` or `.nii`. The output folder gets `metrics.csv` and
`summary.json`. Classes and the value to ignore are those given, else those of --dataset_dir, else
of a dataset.json in LABEL_DIR or its parent, else every value found is a class. Persons, over whom
intervals are drawn, are told by --group_pattern, else by --dataset_dir.

Exit status: 0 all cases scored, 1 one was refused, 2 a mistake on the command line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.commands.command import CommandParser, number_in, run_parsed
from pipeline.config.keys import read_word
from pipeline.data.cases import DatasetLayout, match
from pipeline.data.layouts import read_dataset_json, read_layout
from pipeline.data.nifti import MAX_VALUE
from pipeline.data.splits import persons_of
from pipeline.distributed import own_cores
from pipeline.errors import InputError, require
from pipeline.evaluation import scores
from pipeline.precision import resolve_device


def main(words: Sequence[str] | None = None) -> int:
    """Score predictions; returns the exit status. By default `words` are this process's."""
    parser = CommandParser("evaluate", __doc__)
    add = parser.add_argument
    add("pred_dir", metavar="PRED_DIR", type=Path, help="folder of predictions")
    add("label_dir", metavar="LABEL_DIR", type=Path, help="folder of labels")
    add("--output_dir", type=Path, help="(PRED_DIR_scores)")
    add("--dataset_dir", help="dataset that says what classes there are")
    names = partial(read_word, "class_names")
    add("--class_names", type=names, help='JSON, such as \'["background", "liver"]\'')
    add("--tolerance_mm", type=number_in(0), default=1.0, help="of the surface Dice (1.0)")
    add("--group_pattern", help="tells persons by the case id, as in training")
    add("--ignore_value", type=number_in(1, MAX_VALUE, int), help="label of voxels not to count")
    threads = "cases scored at the same time (one for each core)"
    add("--num_threads", type=number_in(1, kind=int), default=own_cores(), help=threads)
    add("--device", default="cpu", help="for surface distances (cpu)")
    return run_parsed(parser, words, _main)


def _main(given: argparse.Namespace) -> int:
    output_dir = given.output_dir or Path(f"{given.pred_dir.resolve()}_scores")
    try:
        summary = _evaluate(given, output_dir)
    except OSError as error:
        raise InputError(
            f"--output_dir: expected a folder that can be written, got: {error}. Choose another."
        ) from None
    print("\n".join(format_summary(summary)))
    print(f"Written: {output_dir / 'metrics.csv'}, {output_dir / 'summary.json'}", flush=True)
    for case_id, reason in summary["refused"].items():
        print(f"{case_id}: {reason}", file=sys.stderr)
    return 1 if summary["refused"] else 0


def _evaluate(given: argparse.Namespace, output_dir: Path) -> scores.Row:
    """Score all cases and write the scores; returns the summary, as `write_scores` does."""
    pairs, refused = match(given.pred_dir, given.label_dir)
    known = _read_dataset(given)
    groups = {case["case_id"]: case.get("group") for case in known.cases}
    cases = [{"case_id": case_id, "group": groups.get(case_id)} for case_id, *_ in pairs]
    persons = persons_of(cases, given.group_pattern)
    device = resolve_device(given.device)
    is_foreign = (output_dir / "summary.json").exists() > (output_dir / "metrics.csv").exists()
    expected = "a folder without the summary.json of a run"
    require(not is_foreign, "--output_dir", expected, output_dir, "Choose another folder.")
    output_dir.mkdir(parents=True, exist_ok=True)  # before the work
    how: dict[str, Any] = {"tolerance_mm": given.tolerance_mm}
    how["class_names"] = known.class_names or [str(value) for value in range(MAX_VALUE + 1)]
    rows, faults = scores.score_files(
        pairs, given.num_threads, ignore_value=known.ignore_value, device=device, **how
    )
    if known.class_names is None:
        found = {"0"} | {row["class"] for row in rows if row["status"] != "absent"}
        how["class_names"] = [name for name in how["class_names"] if name in found]
    kept = [
        {**row, "person": persons[row["case_id"]]}
        for row in rows
        if row["class"] in how["class_names"]
    ]
    return scores.write_scores(output_dir, kept, refused=refused | faults, **how)


def _read_dataset(given: argparse.Namespace) -> DatasetLayout:
    """Return what is known of the dataset, classes and ignored value as they are given."""
    known, folders = DatasetLayout(), [given.label_dir, given.label_dir.resolve().parent]
    described = [folder for folder in folders if (folder / "dataset.json").is_file()]
    if given.dataset_dir is not None:
        known = read_layout(given.dataset_dir)
    elif given.class_names is None and described:
        known = read_dataset_json(described[0])  # of which no image need be there
    names = given.class_names or known.class_names
    ignored = given.ignore_value or known.ignore_value
    if names is not None:
        are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
        are_sound = are_names and 2 <= len(set(names)) == len(names) <= MAX_VALUE + 1
        expected = f"a JSON list of 2 to {MAX_VALUE + 1} different names, background first,"
        require(are_sound, "class_names", expected, names, "Quote it for the shell.")
        is_free = ignored is None or ignored >= len(names)
        require(is_free, "ignore_value", "a value that is no class", ignored, "Change it.")
    return replace(known, class_names=names, ignore_value=ignored)


def format_summary(summary: scores.Row) -> list[str]:
    """Return the summary for people, a line per class."""
    columns = "class, mean Dice:.3f, 95 % from:.3f, to:.3f, median hd95 mm:.2f, mean nsd:.3f, "
    columns += ", ".join(scores.STATUS[1:])
    rows = []
    for name, of in [*summary["classes"].items(), ("all classes", summary["over_classes"])]:
        dice, counts = of["dice"], of.get("status", {})
        numbers = [dice["mean"], *(dice["interval"] or (None, None)), of["hd95_mm"]["median"]]
        rows.append([name, *numbers, of["nsd"]["mean"], *map(counts.get, scores.STATUS[1:])])
    return [
        f"{summary['num_cases']} cases of {summary['num_persons']} persons; surfaces agree within "
        f"{summary['tolerance_mm']:g} mm",
        *scores.format_table(columns, rows),
    ]
