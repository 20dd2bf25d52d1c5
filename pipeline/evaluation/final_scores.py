"""The scores of a run: its validation and test cases, predicted with its best and last weights."""

from __future__ import annotations

import logging
import os
import shutil
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.data.cache import CachedDataset
from pipeline.data.cases import Case, Pair, files_of, paths_of
from pipeline.data.dataset import Cases
from pipeline.data.splits import GroupPattern, persons_of
from pipeline.errors import TrainingStopped, as_bool
from pipeline.evaluation.scores import score_files, write_scores
from pipeline.files import make_directory, write_durably, write_json
from pipeline.precision import Precision
from pipeline.prediction.nifti_output import save_like
from pipeline.prediction.predict_files import FAULTS, describe_fault
from pipeline.prediction.predictor import load_weights
from pipeline.prediction.segmenter import Segmenter
from pipeline.prediction.sliding_window import SlidingWindow
from pipeline.progress_bar import ProgressBar, details
from transforms.preprocess import Preprocessing

log = logging.getLogger(__name__)


class Scoring:
    """Scores a trained run, into its `scores/<split>_<weights>/`.

    Each folder gets the prediction of every case (`<case_id>.nii.gz`), `metrics.csv`,
    `summary.json`, and `cases.json`, which has the paths of images and labels from the run
    directory. Each rank predicts and scores a share of the cases; rank 0 writes the results.

    Args:
        is_held: Whether this process is in the run; else nothing is done.
        network: Network on its device; it has the same weights afterwards.
        validation: The validation cases of `cases`, preprocessed.
        preprocessing: Preprocesses a test case.
        group_pattern: Tells persons by the case id, as in the split.
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
        self.run_dir, self.is_held, self.network = run_dir, is_held, network
        self.segmenter = Segmenter([network], precision, inferer)
        self.splits: dict[str, tuple[list[Case], Callable[[int], Any]]] = {
            "validation": (cases.validation, lambda n: validation[n]["image"]),
            "test": (cases.test, lambda n: preprocessing(cases.test[n])["image"]),
        }
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
        trained = {name: value.clone() for name, value in self.network.state_dict().items()}
        try:
            with distributed.sync_errors():
                if distributed.is_main():  # scores of earlier weights
                    shutil.rmtree(self.run_dir / "scores", ignore_errors=True)
                if self.enabled:
                    self._score_weights()
        except OSError as error:
            log.error("%s", error)
            raise TrainingStopped(str(error)) from error
        finally:
            self.network.load_state_dict(trained)

    def _score_weights(self) -> None:
        best, last = (self.run_dir / "models" / name for name in ("model.pt", "last.pt"))
        # there is no best one where no score was a number; not all ranks may see it at once
        has_best, is_last = distributed.run_on_main(
            lambda: (best.is_file(), best.is_file() and best.read_bytes() == last.read_bytes())
        )
        for split in (name for name, (cases, _) in self.splits.items() if cases):
            of_best, of_last = (self.run_dir / f"scores/{split}_{n}" for n in ("best", "last"))
            if has_best:
                self._score(split, best, of_best)
            if not is_last:
                self._score(split, last, of_last)
            elif distributed.is_main():
                make_directory(of_last)
                for path in of_best.iterdir():
                    write_durably(of_last / path.name, path.read_bytes())

    def _score(self, split: str, weights: Path, folder: Path) -> None:
        load_weights(self.network, weights)
        distributed.run_on_main(lambda: make_directory(folder))
        pairs, refused = self._predict(split, folder)
        rows, unscored = score_files(pairs, ignore_value=self.ignore_value, **self.how)
        shares = distributed.all_gather_object((rows, refused | unscored))
        if not distributed.is_main():
            return
        cases = self.splits[split][0]
        persons = persons_of(cases, self.group_pattern)
        order = {case_id: number for number, case_id in enumerate(persons)}
        found, faults = zip(*shares, strict=True)
        rows = [{**row, "person": persons[row["case_id"]]} for row in chain(*found)]
        rows.sort(key=lambda row: order[row["case_id"]])
        refused = dict(ChainMap(*faults))
        for case_id, why in refused.items():
            log.warning("%s: %s", case_id, why)
        files = {
            case["case_id"]: {
                key: [os.path.relpath(path, self.run_dir) for path in paths]
                for key, paths in files_of(case).items()
            }
            for case in cases
        }
        write_json(folder / "cases.json", files)
        summary = write_scores(folder, rows, refused=refused, **self.how)
        details.info("%s: %s", folder.name, describe_score(summary))

    def _predict(self, split: str, folder: Path) -> tuple[list[Pair], dict[str, str]]:
        """Predict this rank's cases; return files to score, and why others have none."""
        cases, load = self.splits[split]
        mine, is_main = distributed.shard(range(len(cases))), distributed.is_main()
        pairs, refused = [], {}
        for number in ProgressBar(mine, desc=f"Predicting {folder.name}", enabled=is_main):
            case_id = cases[number]["case_id"]
            path = folder / f"{case_id}.nii.gz"
            try:
                labels = self.segmenter(load(number)).labels
            except FAULTS as error:
                refused[case_id] = describe_fault(error)
            else:  # a full disk is no fault of the case
                names = self.how["class_names"]
                save_like(labels, paths_of(cases[number])[0], path, names)
                pairs.append((case_id, path, Path(cases[number]["label"])))
        return pairs, refused


def describe_score(summary: Mapping[str, Any]) -> str:
    """Return the mean Dice of a summary with its interval over persons, where it has one."""
    if summary["mean_dice"] is None:
        return "mean Dice undefined"
    interval = summary["mean_dice_interval"]
    within = " (95 % interval {:.4f} to {:.4f})".format(*interval) if interval else ""
    return f"mean Dice {summary['mean_dice']:.4f}{within}"
