"""The scores of a run: its validation and test cases, predicted with its best and last weights."""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.cache import CachedDataset
from pipeline.data.listing import Case, paths_of
from pipeline.data.progress_bar import ProgressBar
from pipeline.data.splits import persons_of
from pipeline.data.volume import files_of
from pipeline.errors import InputError, TrainingStopped, as_bool
from pipeline.lifecycle import Lifecycle
from pipeline.precision import Precision
from pipeline.predict import FAULTS, reason
from pipeline.prediction.files import save_like
from pipeline.prediction.scores import score_case, write_scores
from pipeline.prediction.segmenter import Segmenter
from pipeline.prediction.sliding_window import SlidingWindow
from pipeline.predictor import load_weights
from pipeline.training.durable import make_directory, write_json

log = logging.getLogger(__name__)

WEIGHTS = {"best": "model.pt", "last": "last.pt"}
MOST_THREADS = 4
Rows = list[dict[str, Any]]


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

        Raises:
            TrainingStopped: If the scores cannot be written.
        """
        if not self.lifecycle.is_held:
            return
        folder = self.lifecycle.run_dir / "scores"
        trained = {name: value.clone() for name, value in self.network.state_dict().items()}
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of weights that there were before
            if self.enabled:
                self._score_weights(folder)
        except OSError as error:
            log.error("%s", error)
            raise TrainingStopped(str(error)) from error
        finally:
            self.network.load_state_dict(trained)

    def _score_weights(self, folder: Path) -> None:
        cases = self.lifecycle.cases
        splits: dict[str, tuple[list[Case], Callable[[int], dict[str, Any]]]] = {
            "validation": (cases.validation, self.validation.__getitem__),
            "test": (cases.test, lambda number: self.preprocessing(cases.test[number])),
        }
        best, last = (self.lifecycle.run_dir / "models" / name for name in WEIGHTS.values())
        for split, (its, load) in splits.items():
            # there is no best one where no score was a number
            if its and best.is_file():
                load_weights(self.network, best)
                self._score(its, load, folder / f"{split}_best")
            if its and best.is_file() and best.read_bytes() == last.read_bytes():
                shutil.copytree(folder / f"{split}_best", folder / f"{split}_last")
            elif its:
                load_weights(self.network, last)
                self._score(its, load, folder / f"{split}_last")

    def _score(
        self, cases: list[Case], load: Callable[[int], dict[str, Any]], folder: Path
    ) -> None:
        make_directory(folder)
        persons = persons_of(cases, self.lifecycle.intake.split["group_pattern"])
        refused: dict[str, str] = {}
        threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
        waiting: dict[str, Future[Rows]] = {}
        slots = threading.BoundedSemaphore(2 * threads)  # volumes that wait to be scored
        pool = ThreadPoolExecutor(threads)
        try:
            bar = ProgressBar(range(len(cases)), desc=f"Scoring {folder.name}", total=len(cases))
            for case, number in zip(cases, bar, strict=True):
                try:
                    data = load(number)
                    found = self.segmenter(data["image"])
                except FAULTS as error:
                    refused[case["case_id"]] = reason(error)
                    continue
                slots.acquire()
                work = (case, found.labels, data["label"][0].numpy(), found.affine, folder)
                future = waiting[case["case_id"]] = pool.submit(self._score_case, *work)
                future.add_done_callback(lambda _: slots.release())
            rows = self._gathered(waiting, persons, refused)
        finally:
            pool.shutdown(cancel_futures=True)
        for case_id, why in refused.items():
            log.warning("%s: %s", case_id, why)
        write_json(folder / "cases.json", {case["case_id"]: self._files(case) for case in cases})
        summary = write_scores(
            folder,
            rows,
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

    @staticmethod
    def _gathered(
        waiting: dict[str, Future[Rows]], persons: dict[str, str], refused: dict[str, str]
    ) -> Rows:
        """Rows of all cases that could be scored; the others are added to `refused`."""
        rows: Rows = []
        for case_id, future in waiting.items():
            try:
                scored = future.result()
            except InputError as error:
                refused[case_id] = reason(error)
                continue
            rows += [{"case_id": case_id, "person": persons[case_id], **row} for row in scored]
        return rows

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
