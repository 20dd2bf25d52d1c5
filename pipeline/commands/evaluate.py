"""Score predictions against labels, per case and class.

Files are matched by name, `<case>.nii.gz` or `.nii`. The output folder gets `metrics.csv`, a row
per case and class, and `summary.json`. Classes and the value to ignore are those given, else those
of --dataset_dir, else of a dataset.json in LABEL_DIR or its parent, else every value found is a
class. Persons, over whom intervals are drawn, are told by --group_pattern, else by --dataset_dir.

Exit status: 0 if every case was scored, 1 if one was refused (the others are scored), 2 a mistake
on the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.commands.command import CommandParser, number_in, run_parsed
from pipeline.data.cases import DatasetLayout, match
from pipeline.data.layouts import read_dataset_json, read_layout
from pipeline.data.nifti import MAX_VALUE
from pipeline.data.splits import persons_of
from pipeline.errors import InputError
from pipeline.evaluation.scores import Row, format_number, format_table, score_files, write_scores
from pipeline.precision import resolve_device


def main(words: Sequence[str] | None = None) -> int:
    """Score predictions; returns the exit status.

    Args:
        words: The command line after the command, by default this process's.
    """
    parser = CommandParser("evaluate", __doc__)
    add = parser.add_argument
    add("pred_dir", metavar="PRED_DIR", type=Path, help="folder of predictions")
    add("label_dir", metavar="LABEL_DIR", type=Path, help="folder of labels")
    add("--output_dir", type=Path, help="(PRED_DIR_scores)")
    add("--dataset_dir", help="dataset that says what classes there are")
    add("--class_names", type=_parse_names, help='JSON, such as \'["background", "liver"]\'')
    add("--tolerance_mm", type=number_in(0), default=1.0, help="of the surface Dice (1.0)")
    add("--group_pattern", help="tells persons by the case id, as in training")
    add("--ignore_value", type=number_in(1, MAX_VALUE, int), help="label of voxels not to count")
    add("--num_threads", type=number_in(1, kind=int), default=len(os.sched_getaffinity(0)),
        help="cases scored at the same time (one for each core)")  # fmt: skip
    add("--device", default="cpu", help="for surface distances (cpu)")
    return run_parsed(parser, words, _main)


def _parse_names(word: str) -> list[str]:
    try:
        names = json.loads(word)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(type(name) is str for name in names):
        raise argparse.ArgumentTypeError(
            f"expected a JSON list of names, background first, got {word}; quote it for the shell"
        )
    return names


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


def _evaluate(given: argparse.Namespace, output_dir: Path) -> Row:
    """Score all cases and write the scores; returns the summary, as `write_scores` does."""
    pairs, refused = match(given.pred_dir, given.label_dir)
    known = _read_dataset(given)
    names, ignore_value = _choose_classes(known, given)
    groups = {case["case_id"]: case["group"] for case in known.cases if "group" in case}
    persons = persons_of(
        [{"case_id": name, "group": groups.get(name, name)} for name, *_ in pairs],
        given.group_pattern,
    )
    how: dict[str, Any] = {
        "class_names": names or [str(value) for value in range(MAX_VALUE + 1)],
        "tolerance_mm": given.tolerance_mm,
    }
    device = resolve_device(given.device)
    if (output_dir / "summary.json").exists() and not (output_dir / "metrics.csv").exists():
        raise InputError(  # such as a run's
            f"--output_dir: expected no summary.json but of scores, got another in {output_dir}. "
            "Choose another folder."
        )
    output_dir.mkdir(parents=True, exist_ok=True)  # before the work
    rows, faults = score_files(
        pairs, given.num_threads, ignore_value=ignore_value, device=device, **how
    )
    if names is None:
        found = {row["class"] for row in rows if row["status"] != "absent"}
        how["class_names"] = [name for name in how["class_names"] if name in found | {"0"}]
    rows = [row for row in rows if row["class"] in how["class_names"]]
    for row in rows:
        row["person"] = persons[row["case_id"]]
    return write_scores(output_dir, rows, refused=dict(sorted((refused | faults).items())), **how)


def _read_dataset(given: argparse.Namespace) -> DatasetLayout:
    """Return what is known of the dataset; nothing, if no one says so."""
    if given.dataset_dir is not None:
        return read_layout(given.dataset_dir)
    for folder in (given.label_dir, given.label_dir.resolve().parent):
        if given.class_names is None and (folder / "dataset.json").is_file():
            return read_dataset_json(folder)  # of which no image need be there
    return DatasetLayout(Path(), "", "")


def _choose_classes(
    known: DatasetLayout, given: argparse.Namespace
) -> tuple[list[str] | None, int | None]:
    """Return names of the classes, `None` if not known, and the value to ignore."""
    names = given.class_names or known.class_names
    ignored = given.ignore_value or known.ignore_value
    if names is not None and not 2 <= len(set(names)) == len(names) <= MAX_VALUE + 1:
        raise InputError(
            f"class_names: expected 2 to {MAX_VALUE + 1} different names, background first, got "
            f"{names}. Change them."
        )
    if names is not None and ignored is not None and ignored < len(names):
        raise InputError(
            f"ignore_value: expected a value that is no class, got {ignored} ('{names[ignored]}'). "
            "Change it."
        )
    return names, ignored


def format_summary(summary: Row) -> list[str]:
    """Return the summary for people, a line per class."""
    rows = [["", "mean Dice [95 %]", "median hd95 mm", "mean nsd", "missed", "spurious", "absent"]]
    for name, of in [*summary["classes"].items(), ("all classes", summary["over_classes"])]:
        ends = ", ".join(format_number(end, ".3f") for end in of["dice"]["interval"] or [None] * 2)
        cells = [
            f"{format_number(of['dice']['mean'], '.3f')} [{ends}]",
            format_number(of["hd95_mm"]["median"], ".2f"),
            format_number(of["nsd"]["mean"], ".3f"),
        ]
        counts = of.get("status", dict.fromkeys(rows[0][4:], ""))
        rows.append([name, *cells, *(str(counts[word]) for word in rows[0][4:])])
    worst = [
        f"{n['case_id']} {format_number(n['mean_dice'], '.3f')}" for n in summary["worst_cases"]
    ]
    return [
        f"{summary['num_cases']} cases of {summary['num_persons']} persons; surfaces agree within "
        f"{summary['tolerance_mm']:g} mm",
        *format_table(rows),
        f"Lowest mean Dice: {', '.join(worst) or 'none'}",
    ]
