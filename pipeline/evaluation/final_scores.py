"""The scores of a run: its validation and test cases, predicted with its best and last weights.

Each rank predicts and scores a share of the cases; rank 0 writes the results of all.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.data.cache import CachedDataset
from pipeline.data.cases import Case, files_of, paths_of
from pipeline.data.dataset import Cases
from pipeline.data.splits import GroupPattern, persons_of
from pipeline.errors import TrainingStopped, as_bool
from pipeline.evaluation.scores import Row, score_files, write_scores
from pipeline.files import make_directory, write_json
from pipeline.precision import Precision
from pipeline.prediction.predict_files import FAULTS, describe_fault, save_like
from pipeline.prediction.predictor import load_weights
from pipeline.prediction.segmenter import Segmenter
from pipeline.prediction.sliding_window import SlidingWindow
from pipeline.progress_bar import ProgressBar
from transforms.preprocess import Preprocessing

log = logging.getLogger(__name__)

MAX_THREADS = 4
LoadImage = Callable[[int], Any]  # number of a case to preprocessed image


class Scoring:
    """Scores a trained run, into its `scores/<split>_<weights>/`.

    Each folder gets the prediction of every case (`<case_id>.nii.gz`), `metrics.csv`,
    `summary.json`, and `cases.json`: where images and labels are, as paths from the run directory.

    Args:
        run_dir: Of the run.
        is_held: Whether this process is in the run; else nothing is done.
        cases: Of the run; `validation` has those for validation preprocessed.
        network: On its device; has the same weights afterwards.
        precision: Used for prediction.
        inferer: Cuts windows and blends them.
        validation: See `cases`.
        preprocessing: Makes the same of a test case.
        class_names: In the order of the label values, background first.
        ignore_value: Label of voxels that do not count.
        group_pattern: Tells persons by the case id, as in the split.
        tolerance_mm: Of the normalised surface Dice.
        enabled: Whether anything is scored.
    """

    def __init__(
        self,
        *,
        run_dir: Path,
        is_held: bool,
        cases: Cases,
        network: torch.nn.Module,
        precision: Precision,
        inferer: SlidingWindow,
        validation: CachedDataset,
        preprocessing: Preprocessing,
        class_names: Sequence[str],
        ignore_value: int | None = None,
        group_pattern: GroupPattern = None,
        tolerance_mm: float = 1.0,
        enabled: bool | str = True,
    ) -> None:
        self.run_dir, self.is_held, self.cases, self.network = run_dir, is_held, cases, network
        self.segmenter = Segmenter([network], precision, inferer)
        self.validation, self.preprocessing = validation, preprocessing
        self.group_pattern = group_pattern
        self.enabled = as_bool(enabled, "final_scores")
        self.how: dict[str, Any] = {"class_names": class_names, "tolerance_mm": tolerance_mm}
        self.ignore_value = ignore_value

    def run(self) -> None:
        """Predict and score, on all ranks; cases that cannot be predicted are named and left out.

        Raises:
            TrainingStopped: If the scores cannot be written.
        """
        if not self.is_held:
            return
        folder = self.run_dir / "scores"
        trained = {name: value.clone() for name, value in self.network.state_dict().items()}
        try:
            with distributed.sync_errors():
                if distributed.is_main():
                    shutil.rmtree(folder, ignore_errors=True)  # scores of earlier weights
                if self.enabled:
                    self._score_weights(folder)
        except OSError as error:
            log.error("%s", error)
            raise TrainingStopped(str(error)) from error
        finally:
            self.network.load_state_dict(trained)

    def _score_weights(self, folder: Path) -> None:
        splits: dict[str, tuple[list[Case], LoadImage]] = {
            "validation": (self.cases.validation, lambda n: self.validation[n]["image"]),
            "test": (self.cases.test, lambda n: self.preprocessing(self.cases.test[n])["image"]),
        }
        best, last = (self.run_dir / "models" / name for name in ("model.pt", "last.pt"))
        # there is no best one where no score was a number; not all ranks may see it at once
        has_best = distributed.broadcast_object(best.is_file())
        is_last = distributed.broadcast_object(
            has_best and distributed.is_main() and best.read_bytes() == last.read_bytes()
        )
        for split, (cases, load) in splits.items():
            if cases and has_best:
                load_weights(self.network, best)
                self._score(cases, load, folder / f"{split}_best")
            if cases and not is_last:
                load_weights(self.network, last)
                self._score(cases, load, folder / f"{split}_last")
            elif cases and distributed.is_main():
                shutil.copytree(folder / f"{split}_best", folder / f"{split}_last")

    def _score(self, cases: list[Case], load: LoadImage, folder: Path) -> None:
        if distributed.is_main():
            make_directory(folder)
        distributed.all_gather_object(None)  # the others write into it as well
        mine = distributed.shard(range(len(cases)))
        refused: dict[str, str] = {}
        pairs, enabled = [], distributed.is_main()
        for number in ProgressBar(mine, desc=f"Predicting {folder.name}", enabled=enabled):
            case = cases[number]
            case_id, path = case["case_id"], folder / f"{case['case_id']}.nii.gz"
            try:
                labels = self.segmenter(load(number)).labels
            except FAULTS as error:
                refused[case_id] = describe_fault(error)
            else:  # a full disk is no fault of the case
                save_like(labels, paths_of(case)[0], path)
                pairs.append((case_id, path, Path(case["label"])))
        threads = min(MAX_THREADS, distributed.own_cores())
        rows, unscored = score_files(pairs, threads, ignore_value=self.ignore_value, **self.how)
        shares = distributed.all_gather_object((rows, refused | unscored))
        if distributed.is_main():
            rows = [row for of_rank, _ in shares for row in of_rank]
            refused = {case_id: why for _, of_rank in shares for case_id, why in of_rank.items()}
            self._write(cases, rows, refused, folder)

    def _write(
        self, cases: list[Case], rows: list[Row], refused: dict[str, str], folder: Path
    ) -> None:
        persons = persons_of(cases, self.group_pattern)
        order = list(persons)
        rows = [{**row, "person": persons[row["case_id"]]} for row in rows]
        rows.sort(key=lambda row: order.index(row["case_id"]))
        refused = {case_id: refused[case_id] for case_id in order if case_id in refused}
        for case_id, why in refused.items():
            log.warning("%s: %s", case_id, why)
        write_json(folder / "cases.json", {case["case_id"]: self._files(case) for case in cases})
        summary = write_scores(folder, rows, refused=refused, **self.how)
        low, high = summary["mean_dice_interval"] or (math.nan, math.nan)
        mean = math.nan if summary["mean_dice"] is None else summary["mean_dice"]
        what = folder.name.replace("_", " cases, ")
        said = "%s: mean Dice %.4f (95 %% interval over persons %.4f to %.4f)"
        log.info(said, what, mean, low, high)

    def _files(self, case: Case) -> dict[str, list[str]]:
        return {
            key: [os.path.relpath(path, self.run_dir) for path in paths]
            for key, paths in files_of(case).items()
        }
