"""What a run directory tells about its run, read to be shown.

Nothing in here writes, and nothing fails because a run stopped early, was copied in part, or has
lost its data: each part is empty then.
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
class Scores:
    """Scores of the cases of one split, predicted with one set of weights.

    Attributes:
        directory: Where they are: `metrics.csv`, `cases.json` and the predictions.
        split: `validation` or `test`.
        weights: `best` or `last`.
        rows: Case id to class name to the row of `metrics.csv`.
        class_names: Foreground classes, in their order.
    """

    directory: Path
    split: str
    weights: str
    rows: Mapping[str, Mapping[str, Row]]
    class_names: list[str]

    def values(self, class_name: str, measure: str) -> np.ndarray:
        """A measure of one class in every case, `nan` where it is undefined."""
        cases = self.rows.values()
        return np.array([case.get(class_name, {}).get(measure, np.nan) for case in cases], float)

    def by_class(self, measure: str) -> dict[str, np.ndarray]:
        """Class name to `values`."""
        return {name: self.values(name, measure) for name in self.class_names}

    def means(self, measure: str) -> dict[str, float]:
        """Case id to the mean over the classes that the measure is defined for, else `nan`."""
        table = np.array(list(self.by_class(measure).values()))
        return {case: mean_of(column) for case, column in zip(self.rows, table.T, strict=True)}

    def ranked(self) -> list[str]:
        """Ids of cases with a Dice, the worst first."""
        means = self.means("dice")
        return sorted((c for c in means if not np.isnan(means[c])), key=lambda c: (means[c], c))

    @cached_property
    def tolerance_mm(self) -> float | None:
        """Of the normalised surface Dice, if that is known."""
        return _json(self.directory / "summary.json").get("tolerance_mm")

    @cached_property
    def paths(self) -> dict[str, dict[str, Any]]:
        """Case id to paths of `image` (one, or one per channel), `label` and `pred`."""
        return {
            case: {
                "image": _absolute(self.directory.parents[1], files.get("image")),
                "label": _absolute(self.directory.parents[1], files.get("label")),
                "pred": self.directory / f"{case}.nii.gz",
            }
            for case, files in _json(self.directory / "cases.json").items()
        }


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        directory: As it was named.
        summary: `summary.json`; empty where the run has not ended.
        plan: `plan.json`.
        config: `configs/train.json`.
        curves: TensorBoard's tag to `(N, 2)` steps and values.
        skipped: `overflow.jsonl`, the latest line of each step.
        scores: What there is, by split and weights.
    """

    directory: Path
    summary: dict[str, Any]
    plan: dict[str, Any]
    config: dict[str, Any]
    curves: dict[str, np.ndarray]
    skipped: list[dict[str, Any]]
    scores: dict[tuple[str, str], Scores]

    def best_scores(self, split: str) -> Scores | None:
        """Of the best weights, or of the last where there are no others."""
        return self.scores.get((split, "best")) or self.scores.get((split, "last"))

    def require_scores(self, split: str) -> Scores:
        """`best_scores`, which must be there.

        Raises:
            InputError: If they are not.
        """
        if (scores := self.best_scores(split)) is None:
            raise InputError(
                f"{self.directory}: expected scores/{split}_best/metrics.csv, got none. "
                "Let the run end."
            )
        return scores

    @property
    def skipped_steps(self) -> list[int]:
        """Their numbers."""
        return [record["step"] for record in self.skipped]

    @property
    def class_names(self) -> list[str]:
        """Foreground classes; each has its colour by its place here."""
        return list(self.plan.get("class_names", []))[1:]


def read_run(run_dir: str | Path) -> Run:
    """Read a run directory.

    Raises:
        InputError: If it is none.
    """
    directory = Path(run_dir)
    if not (directory / "configs" / "train.json").is_file():
        raise InputError(
            f"{run_dir}: expected a run directory, got one without configs/train.json. "
            "Name the output_dir of a run."
        )
    plan = _json(directory / "plan.json")
    return Run(
        directory,
        _json(directory / "summary.json"),
        plan,
        _json(directory / "configs" / "train.json"),
        read_curves(directory / "tensorboard"),
        _skipped(directory / "overflow.jsonl"),
        _scores(directory, list(plan.get("class_names", []))[1:]),
    )


def read_curves(directory: Path) -> dict[str, np.ndarray]:
    """Scalars of TensorBoard's event files: tag to `(N, 2)` float64 steps and values."""
    if not directory.is_dir():
        return {}
    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it tells of every file
    events = EventAccumulator(str(directory), {"scalars": 0, "images": 1, "tensors": 1})
    events.Reload()
    return {
        tag: np.array([(point.step, point.value) for point in events.Scalars(tag)], float)
        for tag in events.Tags()["scalars"]
    }


def mean_of(values: np.ndarray) -> float:
    """Mean of what is defined; `nan` if nothing is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _scores(directory: Path, class_names: list[str]) -> dict[tuple[str, str], Scores]:
    found = {}
    for split, weights in itertools.product(SPLITS, WEIGHTS):
        folder = directory / "scores" / f"{split}_{weights}"
        rows: dict[str, dict[str, Row]] = {}
        with contextlib.suppress(InputError):  # is not there, or not such a file
            for row in read_scores(folder / "metrics.csv"):
                rows.setdefault(row["case_id"], {})[row["class"]] = row
        if rows:
            names = class_names or list(next(iter(rows.values())))
            found[split, weights] = Scores(folder, split, weights, rows, names)
    return found


def _skipped(path: Path) -> list[dict[str, Any]]:
    """A step that was taken again after a resume stands there twice, and counts once."""
    records = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
            records[int(record["step"])] = record
        except (ValueError, TypeError, KeyError):
            continue  # torn by a crash
    return [records[step] for step in sorted(records)]


def _json(path: Path) -> dict[str, Any]:
    """An object from a file; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _absolute(root: Path, path: Any) -> Any:
    """`path`, or each of a list, from `root`."""
    if isinstance(path, list):
        return [root / one for one in path]
    return path and root / path
