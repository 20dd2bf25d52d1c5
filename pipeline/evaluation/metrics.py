"""Overlap metrics of label maps, per case and class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from monai.utils import convert_to_tensor

from pipeline import distributed


def dice_per_class(
    pred: torch.Tensor, label: torch.Tensor, num_classes: int, ignore_value: int | None = None
) -> np.ndarray:
    """Dice of every foreground class.

    Args:
        pred: `(H, W, D)` integer label map.
        label: `(H, W, D)` integer reference on the same grid.
        num_classes: Classes, background (0) included.
        ignore_value: Label of voxels that do not count.

    Returns:
        `(num_classes - 1,)` float64; `nan` where a class is absent from both.

    Raises:
        ValueError: If the shapes differ, or a value is not a class.

    Source: Dice, Ecology 26 (1945); 2 |P ∩ L| / (|P| + |L|).
    """
    if pred.shape != label.shape:
        raise ValueError(f"pred: expected the label's shape {label.shape}, got {pred.shape}.")
    pred, label = pred.long().flatten(), label.long().flatten()
    if ignore_value is not None:
        counted = label != ignore_value
        pred, label = pred[counted], label[counted]
    for name, values in (("pred", pred), ("label", label)):
        if len(values) and (values.min() < 0 or values.max() >= num_classes):
            raise ValueError(
                f"{name}: expected values 0 to {num_classes - 1}, "
                f"got {values.min()} to {values.max()}."
            )
    # rows are classes of the label, columns of the prediction
    counts = torch.bincount(label * num_classes + pred, minlength=num_classes**2)
    confusion = counts.reshape(num_classes, num_classes).cpu().numpy().astype(np.float64)
    intersection = np.diag(confusion)
    total = confusion.sum(axis=0) + confusion.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return (2 * intersection / total)[1:]


class MeanDice(Metric):
    """Mean Dice over foreground classes, per case, then over cases.

    A class that is absent from both prediction and label of a case is left out of that case and
    counted in the details. Works on decollated output: one dictionary per case, with `pred` and
    `label` `(1, H, W, D)` on the same grid.

    After an epoch `engine.state.metric_details[name]` holds `classes` (name to mean Dice),
    `absent` (name to number of cases left out) and `cases` (case id to Dice per class). Where each
    rank has a share of the cases, all ranks have what one would have for all.

    Args:
        class_names: Names of all classes, background first.
        ignore_value: Label of voxels that do not count; `None`: all do.
    """

    def __init__(self, class_names: Sequence[str], ignore_value: int | None = None) -> None:
        self.class_names = list(class_names)
        self.ignore_value = ignore_value
        super().__init__()

    def reset(self) -> None:
        """Forget all cases."""
        self.cases: dict[str, np.ndarray] = {}

    def iteration_completed(self, engine: Engine, *_: Any) -> None:
        """Score the cases of one batch."""
        state: Any = engine.state
        self.update((state.batch, state.output))

    def update(self, output: tuple[list[dict], list[dict]]) -> None:
        """Score cases.

        Args:
            output: The decollated batch, for the case ids, and the decollated output.
        """
        for case, result in zip(*output, strict=True):
            self.cases[case["case_id"]] = dice_per_class(
                convert_to_tensor(result["pred"][0]),
                convert_to_tensor(result["label"][0]),
                len(self.class_names),
                self.ignore_value,
            )

    def try_on(self, pred: torch.Tensor, label: torch.Tensor) -> None:
        """Compare label maps `(H, W, D)`, and forget them.

        Raises:
            ValueError: If a value is no class.
        """
        dice_per_class(pred, label, len(self.class_names), self.ignore_value)

    def compute(self) -> float:
        """Mean over cases of the mean over the classes present; `nan` if there is none."""
        scored = [np.nanmean(dice) for dice in self.cases.values() if not np.isnan(dice).all()]
        return float(np.mean(scored)) if scored else float("nan")

    def completed(self, engine: Engine, name: str) -> None:
        """Publish the metric and its details. All ranks have to call it."""
        # once, and here, so that `compute` may be asked by one alone
        self.cases = dict(
            distributed.interleave(distributed.all_gather_object(list(self.cases.items())))
        )
        super().completed(engine, name)
        table = np.array(list(self.cases.values())).reshape(-1, len(self.class_names) - 1)
        absent = np.isnan(table)
        state: Any = engine.state
        state.metric_details[name] = {
            "classes": {
                label: float(np.mean(column[~np.isnan(column)])) if present else float("nan")
                for label, column, present in zip(
                    self.class_names[1:], table.T, (~absent).any(axis=0), strict=True
                )
            },
            "absent": dict(zip(self.class_names[1:], absent.sum(axis=0).tolist(), strict=True)),
            "cases": {case: dice.tolist() for case, dice in self.cases.items()},
        }
