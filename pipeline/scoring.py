"""The scores of a run: its validation and test cases, predicted with its best and last weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.cache import CachedDataset, VolumeCache
from pipeline.data.listing import Case, paths_of
from pipeline.data.progress_bar import ProgressBar
from pipeline.data.splits import persons_of
from pipeline.data.volume import files_of
from pipeline.errors import as_bool
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
        preprocessing: Of a case, which leaves the label on the grid of the image's file.
        cache: Where preprocessed cases are.
        tolerance_mm: Of the normalised surface Dice.
        enabled: Whether anything is done.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        network: torch.nn.Module,
        precision: Precision,
        inferer: SlidingWindow,
        preprocessing: Callable[[Case], dict[str, Any]],
        cache: VolumeCache,
        tolerance_mm: float = 1.0,
        enabled: bool | str = True,
    ) -> None:
        self.lifecycle, self.network, self.tolerance_mm = lifecycle, network, tolerance_mm
        self.segmenter = Segmenter([network], precision, inferer)
        self.preprocessing, self.cache = preprocessing, cache
        self.enabled = as_bool(enabled, "final_scores")

    def run(self) -> None:
        """Predict and score; what cannot be predicted is named and left out."""
        if not self.enabled or not self.lifecycle.is_held:
            return
        run_dir, cases = self.lifecycle.run_dir, self.lifecycle.cases
        splits = {"validation": cases.validation, "test": cases.test}
        models = {w: run_dir / "models" / name for w, name in WEIGHTS.items()}
        trained = {name: value.clone() for name, value in self.network.state_dict().items()}
        try:
            for split in (split for split, its in splits.items() if its):
                dataset = CachedDataset(splits[split], self.preprocessing, self.cache)
                for weights, path in models.items():
                    if path.is_file():  # there is no best one where no score was a number
                        load_weights(self.network, path)
                        self._score(dataset, split, weights)
        finally:
            self.network.load_state_dict(trained)

    def _score(self, dataset: CachedDataset, split: str, weights: str) -> None:
        cases = dataset.data
        folder = self.lifecycle.run_dir / "scores" / f"{split}_{weights}"
        make_directory(folder)
        pattern = self.lifecycle.intake.split["group_pattern"]
        persons = persons_of(cases, pattern)
        waiting: dict[str, Future[Rows]] = {}
        rows: Rows = []
        refused: dict[str, str] = {}
        with ThreadPoolExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
            numbered = ProgressBar(range(len(cases)), desc=f"Scoring {split}", total=len(cases))
            for case, number in zip(cases, numbered, strict=True):
                data = dataset[number]
                try:
                    found = self.segmenter(data["image"])
                except FAULTS as error:
                    refused[case["case_id"]] = reason(error)
                    continue
                work = (case, found.labels, data["label"][0].numpy(), found.affine, folder)
                waiting[case["case_id"]] = pool.submit(self._score_case, *work)
            for case_id, future in waiting.items():
                try:
                    known = {"case_id": case_id, "person": persons[case_id]}
                    rows += [{**known, **row} for row in future.result()]
                except FAULTS as error:
                    refused[case_id] = reason(error)
        for case_id, why in refused.items():
            log.warning("%s: %s", case_id, why)
        names = self.lifecycle.plan.class_names
        write_json(folder / "cases.json", {case["case_id"]: self._files(case) for case in cases})
        summary = write_scores(
            folder, rows, class_names=names, tolerance_mm=self.tolerance_mm, refused=refused
        )
        if summary["mean_dice"] is not None:
            low, high = summary["mean_dice_interval"] or (np.nan, np.nan)
            log.info(
                "%s cases, %s weights: mean Dice %.4f (95 %% interval over persons %.4f to %.4f)",
                split.capitalize(), weights, summary["mean_dice"], low, high,
            )  # fmt: skip

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
