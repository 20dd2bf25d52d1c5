"""Reads a run directory for the report and the notebooks.

Nothing here writes, and a missing or damaged file is no error: the value is empty then, so that a
run that stopped early or was copied in part can still be shown.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.errors import InputError
from pipeline.evaluation.metrics import mean_of_defined
from pipeline.evaluation.scores import Row, read_scores


@dataclass(frozen=True)
class SplitScores:
    """Scores of the cases of one split, predicted with one set of weights.

    Attributes:
        directory: Folder of `metrics.csv`, `cases.json` and the predictions.
        split: `validation` or `test`.
        weights: `best` or `last`.
        rows: Case id to class name to row of `metrics.csv`; the lowest mean Dice comes first, cases
            without a Dice come last.
        class_names: Foreground classes, by label value.
        tolerance_mm: Of the normalised surface Dice; `None` if it is not known.
    """

    directory: Path
    split: str
    weights: str
    rows: Mapping[str, Mapping[str, Row]]
    class_names: list[str]
    tolerance_mm: float | None

    def by_class(self, measure: str) -> dict[str, np.ndarray]:
        """Class name to the values of a measure in all cases, `nan` where it is undefined."""
        return {
            name: np.array([case.get(name, {}).get(measure, np.nan) for case in self.rows.values()])
            for name in self.class_names
        }

    def means(self, measure: str) -> dict[str, float]:
        """Case id to the mean over the classes that the measure is defined for, else `nan`."""
        table = np.array([*self.by_class(measure).values()])
        return dict(zip(self.rows, mean_of_defined(table, axis=0).tolist(), strict=True))

    def ranked(self) -> list[str]:
        """Ids of the cases that have a Dice, the worst case first."""
        return [case for case, mean in self.means("dice").items() if not math.isnan(mean)]

    def find_files(self, case: str) -> dict[str, Path]:
        """Paths of `image` (of the first channel), `label` and `pred` of a case.

        Raises:
            KeyError: If `cases.json` does not name them.
        """
        root, files = self.directory.parents[1], _read_json(self.directory / "cases.json")[case]
        image, label = (
            root / (paths if isinstance(paths, str) else paths[0])
            for paths in (files["image"], files["label"])
        )
        pred = self.directory / f"{case}.nii.gz"
        return {"image": image, "label": label, "pred": pred}


@dataclass(frozen=True)
class Run:
    """The contents of a run directory.

    Attributes:
        directory: Path as it was given.
        summary: `summary.json`; empty if the run has not ended.
        plan: `plan.json`.
        config: `configs/train.json`.
        curves: TensorBoard tag to `(N, 2)` steps and values.
        skipped: `overflow.jsonl`: skipped step to its latest record, in the order of steps.
        scores: Scores by split and weights.
    """

    directory: Path
    summary: dict[str, Any]
    plan: dict[str, Any]
    config: dict[str, Any]
    curves: dict[str, np.ndarray]
    skipped: dict[int, dict[str, Any]]
    scores: dict[tuple[str, str], SplitScores]

    def best_scores(self, split: str) -> SplitScores | None:
        """Scores of the best weights, or of the last weights if there are no others."""
        return self.scores.get((split, "best")) or self.scores.get((split, "last"))

    @property
    def has_loss_scale(self) -> bool:
        """Whether the loss was scaled, by the curve of the scale."""
        return bool((self.curves.get("AMP/loss_scale", np.ones((1, 2)))[:, 1] != 1).any())

    @property
    def class_names(self) -> list[str]:
        """Foreground classes; the place in this list decides the colour of a class."""
        return self.plan.get("class_names", [])[1:]


def read_run(run_dir: str | Path) -> Run:
    """Read a run directory.

    Raises:
        InputError: If it has no `configs/train.json`.
    """
    directory = Path(run_dir)
    if not (directory / "configs" / "train.json").is_file():
        raise InputError(
            f"{run_dir}: expected a run directory, got one without configs/train.json. "
            "Name the output_dir of a run."
        )
    files = (directory / name for name in ("summary.json", "plan.json", "configs/train.json"))
    summary, plan, config = map(_read_json, files)
    curves = read_curves(directory / "tensorboard")
    skipped = _read_skipped(directory / "overflow.jsonl")
    run = Run(directory, summary, plan, config, curves, skipped, scores={})
    for key in itertools.product(("validation", "test"), ("best", "last")):
        if scores := _read_split(directory / "scores" / "_".join(key), run.class_names):
            run.scores[key] = scores
    return run


def read_curves(directory: Path) -> dict[str, np.ndarray]:
    """Read the scalars of TensorBoard's event files: tag to `(N, 2)` float64 steps and values."""
    if not directory.is_dir():
        return {}
    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it logs a line for every file
    events = EventAccumulator(str(directory), {"scalars": 0, "images": 1, "tensors": 1})
    events.Reload()
    return {
        tag: np.array([(point.step, point.value) for point in events.Scalars(tag)], float)
        for tag in events.Tags()["scalars"]
    }


def _read_split(directory: Path, class_names: list[str]) -> SplitScores | None:
    rows: dict[str, dict[str, Row]] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, csv.Error):  # missing or damaged
        for row in read_scores(directory / "metrics.csv"):
            rows.setdefault(row["case_id"], {})[row["class"]] = row
    if not rows:
        return None
    names = class_names or list(next(iter(rows.values())))
    tolerance_mm = _read_json(directory / "summary.json").get("tolerance_mm")
    split, weights = directory.name.split("_")
    scores = SplitScores(directory, split, weights, rows, names, tolerance_mm)
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
