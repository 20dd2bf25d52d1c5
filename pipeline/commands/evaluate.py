"""Scores of predictions against labels, per case and class.

    python -m pipeline evaluate PRED_DIR LABEL_DIR [--output_dir DIR] [--dataset_dir DIR]
        [--class_names JSON] [--tolerance_mm 1.0] [--group_pattern P] [--ignore_value N]
        [--num_threads N] [--device cpu]

Files are matched by name, `<case>.nii.gz` or `.nii`. `output_dir` (`<PRED_DIR>_scores`) gets
`metrics.csv`, a row per case and class, and `summary.json`. Classes (`["background", "liver"]`) and
the value to ignore are those given, else those of `dataset_dir`, else of a dataset.json in
LABEL_DIR or its parent, else every value found is a class. Persons, by whom intervals are drawn,
are told by `group_pattern`, else by `dataset_dir`.

Exit status: 0 if every case was scored, 1 if one was refused (the others are scored), 2 a mistake
on the command line.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.commands.command import run_command
from pipeline.config.compose import parse_overrides
from pipeline.data.cases import DatasetLayout
from pipeline.data.layouts import read_dataset_json, read_layout
from pipeline.data.pairs import MAX_VALUE, Pair, match, read_pair
from pipeline.data.splits import persons_of
from pipeline.errors import InputError, nearest
from pipeline.evaluation.scores import Row, score_case, write_scores
from pipeline.precision import resolve_device
from pipeline.progress_bar import ProgressBar
from pipeline.run import split_words

USAGE = "usage: python -m pipeline evaluate PRED_DIR LABEL_DIR [--key value ...]"
NO_DEFAULT = (
    "output_dir", "dataset_dir", "class_names", "group_pattern", "ignore_value", "num_threads",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {**dict.fromkeys(NO_DEFAULT), "tolerance_mm": 1.0, "device": "cpu"}


def main(words: Sequence[str] | None = None) -> int:
    """Score predictions; returns the exit status.

    Args:
        words: The command line after the command, by default this process's.
    """
    return run_command(__doc__, words, _main)


def _main(words: list[str]) -> int:
    pred_dir, label_dir, options = read_command(words)
    try:
        output_dir, summary = evaluate(pred_dir, label_dir, options)
    except OSError as error:
        print(
            f"--output_dir: expected a folder that can be written, got: {error}. Choose another.",
            file=sys.stderr,
        )
        return 2
    print("\n".join(table(summary)))
    print(f"Written: {output_dir / 'metrics.csv'}, {output_dir / 'summary.json'}", flush=True)
    for case_id, reason in summary["refused"].items():
        print(f"{case_id}: {reason}", file=sys.stderr)
    return 1 if summary["refused"] else 0


def read_command(words: list[str]) -> tuple[Path, Path, dict[str, Any]]:
    """The two folders, and the options with their defaults.

    Raises:
        InputError: One line per mistake.
    """
    folders, rest = split_words(words)
    given = parse_overrides(rest)
    options = DEFAULTS | {key: value for key, value in given.items() if value is not None}
    if options["num_threads"] is None:
        options["num_threads"] = len(os.sched_getaffinity(0))
    names, tolerance = options["class_names"], options["tolerance_mm"]
    ignored, threads = options["ignore_value"], options["num_threads"]
    faults = [
        f"--{key}: expected a known option, got '{key}'. {nearest(key, DEFAULTS)}"
        for key in given
        if key not in DEFAULTS
    ]
    if len(folders) != 2:
        faults.append(f"command line: expected two folders first, got {len(folders)}. {USAGE}")
    if names is not None and not (isinstance(names, list) and all(type(n) is str for n in names)):
        faults.append(
            f"--class_names: expected a JSON list of names, background first, got {names!r}. "
            "Quote it for the shell."
        )
    if type(tolerance) not in (int, float) or not 0 <= tolerance < math.inf:
        faults.append(f"--tolerance_mm: expected 0 mm or more, got {tolerance!r}. Change it.")
    if ignored is not None and (type(ignored) is not int or not 0 < ignored <= MAX_VALUE):
        faults.append(f"--ignore_value: expected 1 to {MAX_VALUE}, got {ignored!r}. Change it.")
    if type(threads) is not int or threads < 1:
        faults.append(f"--num_threads: expected 1 or more, got {threads!r}. Change it.")
    if faults:
        raise InputError(*faults)
    return Path(folders[0]), Path(folders[1]), options


def evaluate(pred_dir: Path, label_dir: Path, options: Mapping[str, Any]) -> tuple[Path, Row]:
    """Score all cases, and write what was found.

    Args:
        pred_dir: Of the predictions.
        label_dir: Of the labels.
        options: `DEFAULTS`, some of them changed, and `num_threads`.

    Returns:
        The folder that was written to, and the summary; see `write_scores`.

    Raises:
        InputError: If nothing can be scored as asked, or the folder not be written.
    """
    pairs, refused = match(pred_dir, label_dir)
    known = _description(label_dir, options)
    names, ignore_value = _classes(known, options)
    persons = _persons(known, [pair[0] for pair in pairs], options["group_pattern"])
    how: dict[str, Any] = {
        "class_names": names or [str(value) for value in range(MAX_VALUE + 1)],
        "tolerance_mm": float(options["tolerance_mm"]),
        "ignore_value": ignore_value,
        "device": resolve_device(str(options["device"])),
    }
    default = f"{pred_dir.resolve()}_scores"
    output_dir = Path(str(options["output_dir"] or default))
    if (output_dir / "summary.json").exists() and not (output_dir / "metrics.csv").exists():
        raise InputError(  # such as a run's
            f"--output_dir: expected no summary.json but of scores, got another in {output_dir}. "
            "Choose another folder."
        )
    output_dir.mkdir(parents=True, exist_ok=True)  # before the work
    rows, faults = _score(pairs, options["num_threads"], how)
    if names is None:
        found = {row["class"] for row in rows if row["status"] != "absent"}
        names = [name for name in how["class_names"] if name in found | {"0"}]
    summary = write_scores(
        output_dir,
        [{**row, "person": persons[row["case_id"]]} for row in rows if row["class"] in names],
        class_names=names,
        tolerance_mm=how["tolerance_mm"],
        refused=dict(sorted({**refused, **faults}.items())),
    )
    return output_dir, summary


def _description(label_dir: Path, options: Mapping[str, Any]) -> DatasetLayout:
    """What is known of the dataset; nothing, if no one says so."""
    if options["dataset_dir"] is not None:
        return read_layout(str(options["dataset_dir"]))
    if options["class_names"] is None:
        for folder in (label_dir, label_dir.resolve().parent):
            if (folder / "dataset.json").is_file():
                return read_dataset_json(folder)  # of which no image need be there
    return DatasetLayout(Path(), "", "")


def _classes(
    known: DatasetLayout, options: Mapping[str, Any]
) -> tuple[list[str] | None, int | None]:
    """Names of the classes, `None` if not known, and the value to ignore."""
    names = known.class_names if options["class_names"] is None else options["class_names"]
    ignored = options["ignore_value"] or known.ignore_value
    if names is not None and not 2 <= len(set(names)) == len(names) <= MAX_VALUE + 1:
        raise InputError(
            f"class_names: expected 2 to {MAX_VALUE + 1} different names, background first, got "
            f"{names}. Change them."
        )
    if ignored is not None and names is not None and ignored < len(names):
        raise InputError(
            f"ignore_value: expected a value that is no class, got {ignored} ('{names[ignored]}'). "
            "Change it."
        )
    return names, ignored


def _persons(known: DatasetLayout, case_ids: Sequence[str], pattern: Any) -> dict[str, str]:
    groups = {case["case_id"]: case["group"] for case in known.cases if "group" in case}
    cases = [
        {"case_id": case_id} | ({"group": groups[case_id]} if case_id in groups else {})
        for case_id in case_ids
    ]
    return persons_of(cases, None if pattern is None else str(pattern))


def _score(
    pairs: Sequence[Pair], num_threads: int, how: Mapping[str, Any]
) -> tuple[list[Row], dict[str, str]]:
    """Rows of the cases, in their order, and the reason for each that is refused."""

    def score(pair: Pair) -> list[Row] | InputError:
        case_id, pred_path, label_path = pair
        try:
            pred, label, spacing_mm = read_pair(pred_path, label_path)
            rows = score_case(pred, label, spacing_mm=spacing_mm, **how)
        except InputError as error:
            return error
        return [{"case_id": case_id, **row} for row in rows]

    rows: list[Row] = []
    refused = {}
    with ThreadPoolExecutor(num_threads) as pool:
        bar = ProgressBar(pool.map(score, pairs), desc="Scoring", total=len(pairs))
        for (case_id, *_), result in zip(pairs, bar, strict=True):
            if isinstance(result, InputError):
                refused[case_id] = str(result)
            else:
                rows += result
    return rows, refused


def table(summary: Row) -> list[str]:
    """The summary for people.

    Args:
        summary: As `write_scores` returns it.
    """
    classes = summary["classes"]
    width = max(map(len, ["all classes", *classes]))
    columns = (("missed", 8), ("spurious", 10), ("absent", 8))
    lines = [
        f"{summary['num_cases']} cases of {summary['num_persons']} persons; surfaces agree within "
        f"{summary['tolerance_mm']:g} mm",
        f"{'':<{width}}  {'mean Dice [95 %]':^20}  median hd95  mean nsd  missed  spurious  absent",
    ]
    for name, of in [*classes.items(), ("all classes", summary["over_classes"])]:
        ends = ", ".join(map(_shown, of["dice"]["interval"] or [None, None]))
        lines.append(
            f"{name:<{width}}  {_shown(of['dice']['mean'])} {f'[{ends}]':<14}  "
            f"{_shown(of['hd95_mm']['median'], 2):>8} mm  {_shown(of['nsd']['mean']):>8}"
            + "".join(f"{of['status'][kind]:>{n}}" for kind, n in columns if "status" in of)
        )
    worst = [f"{case['case_id']} {_shown(case['mean_dice'])}" for case in summary["worst_cases"]]
    return [*lines, f"Lowest mean Dice: {', '.join(worst) or 'none'}"]


def _shown(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
