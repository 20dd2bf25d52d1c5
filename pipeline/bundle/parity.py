"""Whether a network in another format scores as the run does: mean Dice of validation cases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.bundle.formats import reason
from pipeline.bundle.writers import Network
from pipeline.config.keys import Config
from pipeline.config.parser import Parser
from pipeline.data.dataset import Cases
from pipeline.evaluation.metrics import dice_per_class
from pipeline.lifecycle.clients import given_data
from pipeline.lifecycle.stored_configs import stored_plan
from pipeline.prediction.segmenter import Segmenter
from pipeline.progress_bar import ProgressBar
from transforms.preprocess import ValidationPreprocessing

TOLERANCE = 1e-4  # of the mean Dice
ON_CPU: Config = {"device": "cpu", "amp": False}  # where every format runs, in float32


class NotComparedError(Exception):
    """There is nothing to compare on; says why, and names neither cases nor places."""


class _Called(torch.nn.Module):
    """A network of any kind as a module; what it is must not be looked into."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self._network = [network]

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return self._network[0](windows)


def cases_of(run_dir: Path, train: Config) -> Cases:
    """The cases of a run, if its dataset is still there.

    Args:
        run_dir: Of the run.
        train: Its `configs/train.json`.

    Raises:
        NotComparedError: If it is not, or is another one.
    """
    parser = Parser({**train, **ON_CPU, "bundle_root": str(run_dir)})
    try:
        data_module = parser.get_parsed_content("data_module")
        if not data_module.dataset_dir.exists():
            raise NotComparedError("the dataset is not there")
        cases = data_module.load(given_data(train))
        known = json.loads((run_dir / "run.json").read_text())["fingerprint"]
    except (RuntimeError, ValueError, OSError, LookupError):
        raise NotComparedError("the dataset cannot be read as the run read it") from None
    if cases.fingerprint != known:
        raise NotComparedError("the dataset is not the one that the run was trained on")
    return cases


def mean_dices(
    run_dir: Path, inference: Config, cases: Cases, networks: Mapping[str, Network]
) -> dict[str, float | str]:
    """Mean Dice over validation cases, predicted by sliding windows as the run predicts.

    Args:
        run_dir: Of the run.
        inference: Its `configs/inference.json`.
        cases: Its cases.
        networks: By name; on the CPU.

    Returns:
        For each name the mean, or in one line why it could not predict.

    Raises:
        NotComparedError: If there are no cases to compare on.
    """
    if not cases.validation:
        raise NotComparedError("the run has no validation cases")
    parser = Parser({**inference, **ON_CPU, "bundle_root": str(run_dir)})
    segmenters = _segmenters(parser.get_parsed_content("segmenter"), networks)
    preprocess = ValidationPreprocessing(parser.get_parsed_content("preprocessing"))
    ignored, num_classes = stored_plan(run_dir).ignore_value, len(inference["class_names"])
    scores: dict[str, list[float]] = {name: [] for name in networks}
    failed: dict[str, str] = {}
    for case in ProgressBar(cases.validation, desc="Comparing", total=len(cases.validation)):
        try:
            data = preprocess(case)
        except Exception:
            raise NotComparedError("a validation case cannot be read") from None
        for name in networks.keys() - failed.keys():
            try:
                labels = torch.as_tensor(segmenters[name](data["image"]).labels)
                label = torch.as_tensor(data["label"][0])
                scores[name].append(_mean(dice_per_class(labels, label, num_classes, ignored)))
            except Exception as error:  # runtimes raise many kinds
                failed[name] = reason(error)
    return {name: failed.get(name, _mean(scores[name])) for name in networks}


def _segmenters(own: Segmenter, networks: Mapping[str, Network]) -> dict[str, Segmenter]:
    """The run's own way to predict, with other networks."""
    return {
        name: Segmenter([_Called(network)], own.precision, own.inferer, own.cleanup)
        for name, network in networks.items()
    }


def _mean(values: Any) -> float:
    """Mean of what is a number; `nan` where nothing is."""
    found = np.asarray(values, dtype=np.float64)
    found = found[~np.isnan(found)]
    return float(found.mean()) if len(found) else float("nan")
