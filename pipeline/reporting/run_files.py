"""Reads a run directory for the report and the notebooks.

Nothing here writes, and a missing or damaged file is no error: the value is empty then, so that a
run that stopped early or was copied in part can still be shown.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.errors import require
from pipeline.evaluation.metrics import mean_of_defined
from pipeline.evaluation.scores import Row, read_scores

# tags of earlier versions, as patterns; a run that was continued has old and new ones
OLD_TAGS = {"^AMP/": "weight_update/", "^LR$": "weight_update/lr", "^val/dice_": "val/mean_dice_"}


@dataclass(frozen=True)
class SplitScores:
    """It holds the scores of the cases of one split, predicted with one set of weights.

    `rows` has the rows of `metrics.csv` by case id and class name. The case with the lowest mean
    Dice comes first; cases without a Dice come last.
    """

    directory: Path  # of `metrics.csv`, `cases.json` and the predictions
    split: str  # validation or test
    weights: str  # best or last; both if they are one network
    rows: Mapping[str, Mapping[str, Row]]
    class_names: list[str]  # foreground, by label value
    summary: dict[str, Any]  # `summary.json` beside `metrics.csv`

    def by_class(self, measure: str) -> dict[str, np.ndarray]:
        """Return the values of a measure in all cases by class name, `nan` where undefined."""
        return {
            name: np.array([case.get(name, {}).get(measure, np.nan) for case in self.rows.values()])
            for name in self.class_names
        }

    def means(self, measure: str) -> dict[str, float]:
        """Return the mean over the classes with a defined value by case id, `nan` without any."""
        table = np.array([*self.by_class(measure).values()])
        return dict(zip(self.rows, mean_of_defined(table, axis=0).tolist(), strict=True))

    def ranked(self) -> list[str]:
        """Return ids of the cases that have a Dice, the worst case first."""
        return [case for case, mean in self.means("dice").items() if not math.isnan(mean)]

    def find_files(self, case: str) -> dict[str, Path]:
        """Return paths of `image` (first channel), `label`, `pred`; `KeyError` if unknown."""
        root, files = self.directory.parents[1], _read_json(self.directory / "cases.json")[case]
        image, label = (str(np.atleast_1d(files[key])[0]) for key in ("image", "label"))
        pred = self.directory / f"{case}.nii.gz"
        return {"image": root / image, "label": root / label, "pred": pred}


@dataclass(frozen=True)
class Run:
    """It holds the contents of a run directory."""

    directory: Path  # as it was given
    summary: dict[str, Any]  # `summary.json`; empty if the run has not ended
    plan: dict[str, Any]  # `plan.json`
    config: dict[str, Any]  # `configs/train.json`
    curves: dict[str, np.ndarray]  # TensorBoard tag to `(N, 2)` steps and values
    skipped: dict[int, dict[str, Any]]  # skipped step to its latest record, in order of steps
    scores: dict[tuple[str, str], SplitScores]  # by split and weights

    def best_scores(self, split: str) -> SplitScores | None:
        """Return scores of the best weights, or of the last weights if there are no others."""
        return self.scores.get((split, "best")) or self.scores.get((split, "last"))

    @property
    def main_scores(self) -> SplitScores | None:
        """Return the scores by which the run is judged: of test cases where there are any."""
        return self.best_scores("test") or self.best_scores("validation")

    @property
    def dataset(self) -> str:
        """Return the dataset's name, which runs of earlier versions have in their metadata."""
        metadata = _read_json(self.directory / "configs" / "metadata.json")
        return self.summary.get("dataset") or metadata.get("name", "").partition(", ")[2]

    @property
    def class_names(self) -> list[str]:
        """Return the foreground classes; their order decides their colours."""
        return self.plan.get("class_names", [])[1:]


def read_run(run_dir: str | Path) -> Run:
    """Read a run directory; raises `InputError` if it has no `configs/train.json`."""
    directory = Path(run_dir)
    is_run = (directory / "configs" / "train.json").is_file()
    got, remedy = "one without configs/train.json", "Name the output_dir of a run."
    require(is_run, run_dir, "a run directory", got, remedy)
    files = (directory / name for name in ("summary.json", "plan.json", "configs/train.json"))
    summary, plan, config = map(_read_json, files)
    curves = read_curves(directory / "tensorboard")
    skipped = _read_skipped(directory / "overflow.jsonl")
    run = Run(directory, summary, plan, config, curves, skipped, scores={})
    for split, weights in itertools.product(("validation", "test"), ("best", "last")):
        scores = _read_split(directory / "scores" / f"{split}_{weights}", run.class_names)
        best = run.scores.get((split, "best"))
        if scores and best and str(scores.rows) == str(best.rows):  # of one network
            run.scores[split, "best"] = replace(best, weights="best (also the last)")
        elif scores:
            run.scores[split, weights] = scores
    return run


def read_curves(directory: Path) -> dict[str, np.ndarray]:
    """Read the scalars of TensorBoard's event files: tag to `(N, 2)` float64 steps and values."""
    if not directory.is_dir():
        return {}
    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it logs a line for every file
    events = EventAccumulator(str(directory), {"scalars": 0, "images": 1, "tensors": 1})
    events.Reload()
    curves: dict[str, np.ndarray] = {}
    for tag in events.Tags()["scalars"]:
        points = np.array([(point.step, point.value) for point in events.Scalars(tag)], float)
        for pattern, replacement in OLD_TAGS.items():
            tag = re.sub(pattern, replacement, tag)
        curves[tag] = np.concatenate([curves.get(tag, points[:0]), points])
    return curves


def _read_split(directory: Path, class_names: list[str]) -> SplitScores | None:
    rows: dict[str, dict[str, Row]] = {}
    with contextlib.suppress(ValueError, KeyError):  # missing or damaged
        for row in read_scores(directory / "metrics.csv"):
            rows.setdefault(row["case_id"], {})[row["class"]] = row
    summary = _read_json(directory / "summary.json")
    if not rows or not summary:
        return None
    names = class_names or list(next(iter(rows.values())))
    split, weights = directory.name.split("_")
    scores = SplitScores(directory, split, weights, rows, names, summary)
    means = scores.means("dice")
    order = sorted(rows, key=lambda case: (math.isnan(means[case]), means[case], case))
    return replace(scores, rows={case: rows[case] for case in order})


def _read_skipped(path: Path) -> dict[int, dict[str, Any]]:
    records = {}  # a step that was repeated after a resume has two lines and counts once
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a crash cut the line off
            record = json.loads(line)
            records[int(record["step"])] = record
    return dict(sorted(records.items()))


def _read_json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        if isinstance(content := json.loads(path.read_text(encoding="utf-8")), dict):
            return content
    return {}
