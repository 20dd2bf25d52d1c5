"""Overlap of label maps, per case and class."""

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
    """Return the Dice of every foreground class, `(num_classes - 1,)` float64.

    It is `nan` where a class is absent from both label maps, `(H, W, D)` integers on one grid.
    Voxels with the label `ignore_value` do not count.

    Raises:
        ValueError: If the shapes differ, or a value is not a class.
    """
    if pred.shape != label.shape:
        raise ValueError(f"pred: expected the label's shape {label.shape}, got {pred.shape}.")
    pred, label = pred.long().flatten(), label.long().flatten()
    if ignore_value is not None:
        counted = label != ignore_value
        pred, label = pred[counted], label[counted]
    for name, values in (("pred", pred), ("label", label)):
        if len(values) and (values.min() < 0 or values.max() >= num_classes):
            got = f"{values.min()} to {values.max()}"
            raise ValueError(f"{name}: expected values 0 to {num_classes - 1}, got {got}.")
    # rows are classes of the label, columns of the prediction
    counts = torch.bincount(label * num_classes + pred, minlength=num_classes**2)
    confusion = counts.reshape(num_classes, num_classes).cpu().numpy()
    return compute_dice(np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1))[1:]


def compute_dice(both: np.ndarray, of_pred: np.ndarray, of_label: np.ndarray) -> np.ndarray:
    """Compute the Dice from numbers of voxels, `nan` if 0. Source: Dice, Ecology 26 (1945)."""
    return divide(2 * both, of_pred + of_label)


def divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide element by element; `nan` where the whole is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole, part / whole, np.nan)


def mean_of_defined(values: np.ndarray, axis: int | None = None) -> Any:
    """Return the mean of values that are not `nan`, over all axes or one; `nan` without any."""
    defined = ~np.isnan(values)
    if axis is None:
        return np.mean(values[defined]) if defined.any() else np.nan
    return divide(np.where(defined, values, 0).sum(axis=axis), defined.sum(axis=axis))


class MeanDice(Metric):
    """Mean Dice over foreground classes, per case, then over cases.

    A class that is absent from both prediction and label of a case is left out of that case. Output
    is decollated: a dictionary per case, with `pred` and `label` `(1, H, W, D)` on one grid. After
    an epoch `engine.state.metric_details[name]` holds `classes` (name to mean Dice), `absent` (name
    to number of cases left out) and `cases` (case id to Dice per class), of all ranks.

    Args:
        class_names: Names of all classes, background first.
        ignore_value: Label of voxels that do not count; `None`: all do.
    """

    def __init__(self, class_names: Sequence[str], ignore_value: int | None = None) -> None:
        self.class_names, self.ignore_value = list(class_names), ignore_value
        super().__init__()

    def reset(self) -> None:
        """Forget all cases."""
        self.cases: dict[str, np.ndarray] = {}

    def iteration_completed(self, engine: Engine, *_: Any) -> None:
        """Score the cases of one batch."""
        state: Any = engine.state
        self.update((state.batch, state.output))

    def update(self, output: tuple[list[dict], list[dict]]) -> None:
        """Score cases, given the decollated batch, for the case ids, and the decollated output."""
        for case, result in zip(*output, strict=True):
            pred, label = (convert_to_tensor(result[key][0]) for key in ("pred", "label"))
            self.cases[case["case_id"]] = self.try_on(pred, label)

    def try_on(self, pred: torch.Tensor, label: torch.Tensor) -> np.ndarray:
        """Compare label maps `(H, W, D)`, and forget them; raises as `dice_per_class`."""
        return dice_per_class(pred, label, len(self.class_names), self.ignore_value)

    def compute(self) -> float:
        """Return the mean over cases of the mean over the classes present; `nan` without any."""
        means = np.array([mean_of_defined(dice) for dice in self.cases.values()])
        return float(mean_of_defined(means))

    def completed(self, engine: Engine, name: str) -> None:
        """Publish the metric and its details. All ranks have to call it."""
        # once, and here, so that one rank alone may call `compute`
        shares = distributed.all_gather_object(list(self.cases.items()))
        self.cases = dict(distributed.interleave(shares))
        super().completed(engine, name)
        names = self.class_names[1:]
        table = np.array(list(self.cases.values())).reshape(-1, len(names))
        means = [float(mean_of_defined(column)) for column in table.T]
        state: Any = engine.state
        state.metric_details[name] = {
            "classes": dict(zip(names, means, strict=True)),
            "absent": dict(zip(names, np.isnan(table).sum(axis=0).tolist(), strict=True)),
            "cases": {case: dice.tolist() for case, dice in self.cases.items()},
        }
