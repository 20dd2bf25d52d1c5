"""Reads a run directory for the report and the notebooks.

Nothing here writes, and a missing or damaged file is no error: the value is empty then, so that a
run that stopped early or was copied in part can still be shown.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.errors import InputError
from pipeline.evaluation.scores import Row, read_scores

SPLITS, WEIGHTS = ("validation", "test"), ("best", "last")


@dataclass(frozen=True)
class SplitScores:
    """Scores of the cases of one split, predicted with one set of weights.

    Attributes:
        directory: Folder of `metrics.csv`, `cases.json` and the predictions.
        split: `validation` or `test`.
        weights: `best` or `last`.
        rows: Case id to class name to the row of `metrics.csv`.
        class_names: Foreground classes, in the order of their label values.
    """

    directory: Path
    split: str
    weights: str
    rows: Mapping[str, Mapping[str, Row]]
    class_names: list[str]

    def by_class(self, measure: str) -> dict[str, np.ndarray]:
        """Class name to the values of a measure in all cases, `nan` where it is undefined."""
        return {
            name: np.array(
                [case.get(name, {}).get(measure, np.nan) for case in self.rows.values()], float
            )
            for name in self.class_names
        }

    def means(self, measure: str) -> dict[str, float]:
        """Case id to the mean over the classes that the measure is defined for, else `nan`."""
        table = np.array(list(self.by_class(measure).values()))
        return {case: mean_of(column) for case, column in zip(self.rows, table.T, strict=True)}

    def class_means(self) -> dict[str, dict[str, float]]:
        """Class name to the mean of each measure over the cases that it is defined for."""
        return {
            name: {key: mean_of(self.by_class(key)[name]) for key in ("dice", "hd95_mm", "nsd")}
            for name in self.class_names
        }

    def ranked(self) -> list[str]:
        """Ids of the cases that have a Dice, the worst case first."""
        means = self.means("dice")
        return sorted((c for c in means if not np.isnan(means[c])), key=lambda c: (means[c], c))

    def sorted_cases(self) -> list[str]:
        """Ids of all cases: `ranked`, then those without a Dice."""
        ranked = self.ranked()
        return [*ranked, *(case for case in self.rows if case not in ranked)]

    @cached_property
    def tolerance_mm(self) -> float | None:
        """Tolerance of the normalised surface Dice, if it is known."""
        return _read_json(self.directory / "summary.json").get("tolerance_mm")

    @cached_property
    def paths(self) -> dict[str, dict[str, Any]]:
        """Case id to the paths of `image` (one, or one per channel), `label` and `pred`."""
        root = self.directory.parents[1]
        return {
            case: {
                "image": _join(root, files.get("image")),
                "label": _join(root, files.get("label")),
                "pred": self.directory / f"{case}.nii.gz",
            }
            for case, files in _read_json(self.directory / "cases.json").items()
        }


@dataclass(frozen=True)
class Run:
    """The contents of a run directory.

    Attributes:
        directory: Path as it was given.
        summary: `summary.json`; empty if the run has not ended.
        plan: `plan.json`.
        config: `configs/train.json`.
        curves: TensorBoard tag to `(N, 2)` steps and values.
        skipped: `overflow.jsonl`, the latest record of each step.
        scores: Scores by split and weights.
    """

    directory: Path
    summary: dict[str, Any]
    plan: dict[str, Any]
    config: dict[str, Any]
    curves: dict[str, np.ndarray]
    skipped: list[dict[str, Any]]
    scores: dict[tuple[str, str], SplitScores]

    def best_scores(self, split: str) -> SplitScores | None:
        """Scores of the best weights, or of the last weights if there are no others."""
        return self.scores.get((split, "best")) or self.scores.get((split, "last"))

    def require_scores(self, split: str) -> SplitScores:
        """Return `best_scores`.

        Raises:
            InputError: If the split was not scored.
        """
        if (scores := self.best_scores(split)) is None:
            raise InputError(
                f"{self.directory}: expected scores/{split}_best/metrics.csv, got none. "
                "Let the run end."
            )
        return scores

    @property
    def skipped_steps(self) -> list[int]:
        """Numbers of the steps that were skipped."""
        return [record["step"] for record in self.skipped]

    @property
    def has_loss_scale(self) -> bool:
        """Whether the loss was scaled, by the curve of the scale."""
        return bool((self.curves.get("AMP/loss_scale", np.ones((1, 2)))[:, 1] != 1).any())

    @property
    def class_names(self) -> list[str]:
        """Foreground classes; the place in this list decides the colour of a class."""
        return list(self.plan.get("class_names", []))[1:]


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
    plan = _read_json(directory / "plan.json")
    return Run(
        directory,
        _read_json(directory / "summary.json"),
        plan,
        _read_json(directory / "configs" / "train.json"),
        read_curves(directory / "tensorboard"),
        _read_skipped(directory / "overflow.jsonl"),
        _read_all_scores(directory, list(plan.get("class_names", []))[1:]),
    )


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


def mean_of(values: np.ndarray) -> float:
    """Mean of the values that are not `nan`; `nan` if there are none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _read_all_scores(directory: Path, class_names: list[str]) -> dict[tuple[str, str], SplitScores]:
    found = {}
    for split, weights in itertools.product(SPLITS, WEIGHTS):
        folder = directory / "scores" / f"{split}_{weights}"
        rows: dict[str, dict[str, Row]] = {}
        with contextlib.suppress(InputError):  # the file is missing or damaged
            for row in read_scores(folder / "metrics.csv"):
                rows.setdefault(row["case_id"], {})[row["class"]] = row
        if rows:
            names = class_names or list(next(iter(rows.values())))
            found[split, weights] = SplitScores(folder, split, weights, rows, names)
    return found


def _read_skipped(path: Path) -> list[dict[str, Any]]:
    """Read the records; a step that was repeated after a resume has two lines and counts once."""
    records = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a crash cut the line off
            record = json.loads(line)
            records[int(record["step"])] = record
    return [records[step] for step in sorted(records)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _join(root: Path, path: Any) -> Any:
    """Join `root` with a path or with each path of a list."""
    if isinstance(path, list):
        return [root / one for one in path]
    return path and root / path
