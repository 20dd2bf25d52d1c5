"""The scores of a run: its validation and test cases, predicted with its best and last weights.

Each rank predicts and scores a share of the cases; rank 0 writes what is of all of them.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import distributed
from pipeline.data.cache import CachedDataset
from pipeline.data.cases import Case, files_of, paths_of
from pipeline.data.splits import persons_of
from pipeline.errors import InputError, TrainingStopped, as_bool
from pipeline.evaluation.scores import score_case, write_scores
from pipeline.files import make_directory, write_json
from pipeline.lifecycle.lifecycle import Lifecycle
from pipeline.precision import Precision
from pipeline.prediction.nifti_output import save_like
from pipeline.prediction.predict_files import FAULTS, reason
from pipeline.prediction.predictor import load_weights
from pipeline.prediction.segmenter import Segmenter
from pipeline.prediction.sliding_window import SlidingWindow
from pipeline.progress_bar import ProgressBar

log = logging.getLogger(__name__)

WEIGHTS = {"best": "model.pt", "last": "last.pt"}
MOST_THREADS = 4
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """Of one case: the rows of its scores, or why it could not be predicted or not be scored."""

    rows: Rows = field(default_factory=list)
    unpredicted: str | None = None
    unscored: str | None = None


class Scoring:
    """Scores a run that is trained, into its `scores/<split>_<weights>/`.

    Each folder gets the prediction of every case (`<case_id>.nii.gz`), `metrics.csv`,
    `summary.json`, and `cases.json`: where images and labels are, as paths from the run directory.

    Args:
        lifecycle: Of the run.
        network: On its device; has the same weights afterwards.
        precision: That it predicts in.
        inferer: Cuts windows and blends them.
        validation: The preprocessed validation cases, labels on the grids of their files.
        preprocessing: Makes the same of a test case.
        tolerance_mm: Of the normalised surface Dice.
        enabled: Whether anything is scored.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        network: torch.nn.Module,
        precision: Precision,
        inferer: SlidingWindow,
        validation: CachedDataset,
        preprocessing: Callable[[Case], dict[str, Any]],
        tolerance_mm: float = 1.0,
        enabled: bool | str = True,
    ) -> None:
        self.lifecycle, self.network, self.tolerance_mm = lifecycle, network, tolerance_mm
        self.segmenter = Segmenter([network], precision, inferer)
        self.validation, self.preprocessing = validation, preprocessing
        self.enabled = as_bool(enabled, "final_scores")

    def run(self) -> None:
        """Predict and score; what cannot be predicted is named and left out.

        All ranks have to call it.

        Raises:
            TrainingStopped: If the scores cannot be written.
        """
        if not self.lifecycle.is_held:
            return
        folder = self.lifecycle.run_dir / "scores"
        trained = {name: value.clone() for name, value in self.network.state_dict().items()}
        try:
            with distributed.sync_errors():
                self._score_into(folder)
        finally:
            self.network.load_state_dict(trained)

    def _score_into(self, folder: Path) -> None:
        try:
            if distributed.is_main():
                shutil.rmtree(folder, ignore_errors=True)  # of weights that there were before
            if self.enabled:
                self._score_weights(folder)
        except OSError as error:
            log.error("%s", error)
            raise TrainingStopped(str(error)) from error

    def _score_weights(self, folder: Path) -> None:
        cases = self.lifecycle.cases
        splits: dict[str, tuple[list[Case], Callable[[int], dict[str, Any]]]] = {
            "validation": (cases.validation, self.validation.__getitem__),
            "test": (cases.test, lambda number: self.preprocessing(cases.test[number])),
        }
        best, last = (self.lifecycle.run_dir / "models" / name for name in WEIGHTS.values())
        # there is no best one where no score was a number; not all ranks may see it at once
        has_best = distributed.broadcast_object(best.is_file())
        is_last = distributed.broadcast_object(
            has_best and distributed.is_main() and best.read_bytes() == last.read_bytes()
        )
        for split, (its, load) in splits.items():
            if its and has_best:
                load_weights(self.network, best)
                self._score(its, load, folder / f"{split}_best")
            if its and not is_last:
                load_weights(self.network, last)
                self._score(its, load, folder / f"{split}_last")
            elif its and distributed.is_main():
                shutil.copytree(folder / f"{split}_best", folder / f"{split}_last")

    def _score(
        self, cases: list[Case], load: Callable[[int], dict[str, Any]], folder: Path
    ) -> None:
        if distributed.is_main():
            make_directory(folder)
        distributed.all_gather_object(None)  # the others write into it as well
        outcomes = distributed.interleave(
            distributed.all_gather_object(self._outcomes(cases, load, folder))
        )
        if distributed.is_main():
            self._write(cases, outcomes, folder)

    def _outcomes(
        self, cases: list[Case], load: Callable[[int], dict[str, Any]], folder: Path
    ) -> list[Outcome]:
        """Of this rank's share of the cases, whose predictions are written."""
        mine = distributed.shard(range(len(cases)))
        threads = min(MOST_THREADS, distributed.own_cores())
        waiting: list[Future[Rows] | Outcome] = []
        slots = threading.BoundedSemaphore(2 * threads)  # volumes that wait to be scored
        pool = ThreadPoolExecutor(threads)
        try:
            for number in ProgressBar(mine, desc=f"Scoring {folder.name}", total=len(mine)):
                try:
                    data = load(number)
                    found = self.segmenter(data["image"])
                except FAULTS as error:
                    waiting.append(Outcome(unpredicted=reason(error)))
                    continue
                slots.acquire()
                work = (cases[number], found.labels, data["label"][0].numpy(), found.affine, folder)
                future = pool.submit(self._score_case, *work)
                future.add_done_callback(lambda _: slots.release())
                waiting.append(future)
            return [_outcome(one) for one in waiting]
        finally:
            pool.shutdown(cancel_futures=True)

    def _write(self, cases: list[Case], outcomes: list[Outcome], folder: Path) -> None:
        """What is of all cases."""
        persons = persons_of(cases, self.lifecycle.data_module.split["group_pattern"])
        case_ids = [case["case_id"] for case in cases]
        of_case = list(zip(case_ids, outcomes, strict=True))
        refused = {case_id: one.unpredicted for case_id, one in of_case if one.unpredicted}
        refused |= {case_id: one.unscored for case_id, one in of_case if one.unscored}
        for case_id, why in refused.items():
            log.warning("%s: %s", case_id, why)
        write_json(folder / "cases.json", {case["case_id"]: self._files(case) for case in cases})
        summary = write_scores(
            folder,
            [
                {"case_id": case_id, "person": persons[case_id], **row}
                for case_id, one in of_case
                for row in one.rows
            ],
            class_names=self.lifecycle.plan.class_names,
            tolerance_mm=self.tolerance_mm,
            refused=refused,
        )
        low, high = summary["mean_dice_interval"] or (math.nan, math.nan)
        log.info(
            "%s: mean Dice %.4f (95 %% interval over persons %.4f to %.4f)",
            folder.name.replace("_", " cases, "),
            math.nan if summary["mean_dice"] is None else summary["mean_dice"],
            low,
            high,
        )

    def _score_case(
        self, case: Case, pred: np.ndarray, label: np.ndarray, affine: np.ndarray, folder: Path
    ) -> Rows:
        save_like(pred, paths_of(case)[0], folder / f"{case['case_id']}.nii.gz")
        return score_case(
            pred,
            label,
            spacing_mm=np.linalg.norm(affine[:3, :3], axis=0).tolist(),
            class_names=self.lifecycle.plan.class_names,
            tolerance_mm=self.tolerance_mm,
            ignore_value=self.lifecycle.plan.ignore_value,
        )

    def _files(self, case: Case) -> dict[str, list[str]]:
        run_dir = self.lifecycle.run_dir
        return {
            key: [os.path.relpath(path, run_dir) for path in paths]
            for key, paths in files_of(case).items()
        }


def _outcome(waiting: Future[Rows] | Outcome) -> Outcome:
    """Of a case that was predicted, its scores when they are there."""
    if isinstance(waiting, Outcome):
        return waiting
    try:
        return Outcome(rows=waiting.result())
    except InputError as error:
        return Outcome(unscored=reason(error))
