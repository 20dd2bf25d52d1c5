"""Scores a folder of predictions against a folder of labels, as `ampseg evaluate` does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.data.cases import DatasetLayout, Pair, match
from pipeline.data.layouts import name_segments, read_dataset_json, read_layout
from pipeline.data.nifti import MAX_VALUE
from pipeline.data.splits import persons_of
from pipeline.distributed import own_cores
from pipeline.errors import printable, require, some
from pipeline.evaluation.scores import STATUS, Row, format_table, score_files, write_scores
from pipeline.precision import resolve_device


def evaluate_folders(given: argparse.Namespace, output_dir: Path) -> Row:
    """Score all cases by the options of `ampseg evaluate`; returns what `write_scores` does."""
    highest = given.ignore_value or MAX_VALUE
    expected = f"1 to {MAX_VALUE}"
    require(highest <= MAX_VALUE, "--ignore_value", expected, highest, "Correct it.")
    pairs, refused, left = match(given.pred_dir, given.label_dir)
    _tell_left(left, given.label_dir)
    known = _read_dataset(given)
    named = _name_segments(known, pairs)
    refused |= {issue.case_id: issue.message for issue in named.issues}
    pairs = [pair for pair in pairs if pair[0] not in refused]
    groups = {case["case_id"]: case.get("group") for case in known.cases}
    cases = [{"case_id": case_id, "group": groups.get(case_id)} for case_id, *_ in pairs]
    persons = persons_of(cases, given.group_pattern)
    device = resolve_device(given.device)
    is_foreign = (output_dir / "summary.json").exists() > (output_dir / "metrics.csv").exists()
    expected = "a folder without the summary.json of a run"
    require(not is_foreign, "--output_dir", expected, output_dir, "Choose another folder.")
    output_dir.mkdir(parents=True, exist_ok=True)  # before the work
    names = named.class_names or [str(value) for value in range(MAX_VALUE + 1)]
    how: dict[str, Any] = {"class_names": names, "tolerance_mm": given.tolerance_mm}
    also: dict[str, Any] = {"ignore_value": known.ignore_value, "device": device}
    rows, faults = score_files(pairs, given.num_threads or own_cores(), **how, **also)
    if named.class_names is None:
        found = {"0"} | {row["class"] for row in rows if row["status"] != "absent"}
        how["class_names"] = names = [name for name in names if name in found]
    kept = [{**row, "person": persons[row["case_id"]]} for row in rows if row["class"] in names]
    return write_scores(output_dir, kept, refused=refused | faults, **how)


def _tell_left(left: Sequence[str], folder: Path) -> None:
    if left:
        label, have, are = ("label", "has", "is") if len(left) == 1 else ("labels", "have", "are")
        told = f"{len(left)} {label} of {folder} {have} no prediction and {are} not scored"
        print(f"{told}: {some(left)}")


def _name_segments(known: DatasetLayout, pairs: Sequence[Pair]) -> DatasetLayout:
    labels = [{"case_id": case_id, "label": str(label)} for case_id, _, label in pairs]
    return name_segments(replace(known, cases=labels, issues=[]))


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
        are_names = are_names and names == [printable(name, keep="") for name in names]
        are_sound = are_names and 2 <= len(set(names)) == len(names) <= MAX_VALUE + 1
        expected = f"a JSON list of 2 to {MAX_VALUE + 1} different names, background first,"
        require(are_sound, "class_names", expected, names, "Quote it for the shell.")
        is_free = ignored is None or ignored >= len(names)
        require(is_free, "ignore_value", "a value that is no class", ignored, "Change it.")
    return replace(known, class_names=names, ignore_value=ignored)


def format_summary(summary: Row) -> list[str]:
    """Return the summary for people, a line per class."""
    columns = "class, mean Dice:.3f, 95 % from:.3f, to:.3f, median hd95 mm:.2f, mean nsd:.3f, "
    columns += ", ".join(STATUS[1:])
    rows = []
    for name, of in [*summary["classes"].items(), ("all classes", summary["over_classes"])]:
        dice, counts = of["dice"], of.get("status", {})
        numbers = [dice["mean"], *(dice["interval"] or (None, None)), of["hd95_mm"]["median"]]
        rows.append([name, *numbers, of["nsd"]["mean"], *map(counts.get, STATUS[1:])])
    return [
        f"{summary['num_cases']} cases of {summary['num_persons']} persons; surfaces agree within "
        f"{summary['tolerance_mm']:g} mm",
        *format_table(columns, rows),
    ]
