"""Dice and cross-entropy, reduced in float32 whatever the dtype of the logits.

Sums over a volume do not fit float16: at 96³ MONAI's DiceCELoss on float16 logits returns a Dice
loss of exactly 1 with no gradient, and a cross-entropy of NaN (`tests/test_losses.py` shows it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import nn

from pipeline.errors import InputError, as_bool

WHERE = "SegmentationLoss"
NO_LABEL = -100  # torch's own default for ignore_index


class SegmentationLoss(nn.Module):
    """`dice_weight · Dice + ce_weight · cross-entropy` of softmax probabilities, in float32.

    The parts are the two halves of MONAI's DiceCELoss, and with the defaults the value is that of
    `DiceCELoss(to_onehot_y=True, softmax=True)` on float32 logits.

    Args:
        dice_weight: Factor of the Dice loss, at least 0.
        ce_weight: Factor of the cross-entropy, at least 0; not both may be 0.
        include_background: Whether class 0 takes part in Dice. True as in MONAI: a crop without
            foreground then still has a Dice term with a useful gradient.
        class_weights: One positive weight per class, or None for equal ones. In cross-entropy a
            weighted mean over the voxels; in Dice a factor of the class's term before the mean,
            as in MONAI.
        batch_dice: Sum over the batch before dividing, instead of a Dice loss per volume.
        smooth: Positive number added to Dice's numerator and denominator.
        ignore_value: Label of voxels that contribute neither to Dice nor to cross-entropy; where
            all are ignored the loss is 0 and so is its gradient.

    Raises:
        InputError: If an argument is not as described.

    Source: Milletari et al., V-Net, 3DV 2016 (Dice, here without squares); Isensee et al.,
        nnU-Net, Nature Methods 2021 (its sum with cross-entropy, deep supervision's weights).
    """

    class_weights: torch.Tensor | None

    def __init__(
        self,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
        include_background: bool | str = True,
        class_weights: Sequence[float] | None = None,
        batch_dice: bool | str = False,
        smooth: float = 1e-5,
        ignore_value: int | None = None,
    ) -> None:
        super().__init__()
        self.dice_weight = _number("dice_weight", dice_weight, zero=True)
        self.ce_weight = _number("ce_weight", ce_weight, zero=True)
        if self.dice_weight == self.ce_weight == 0:
            raise InputError(
                f"{WHERE}: expected a positive dice_weight or ce_weight, got 0 for both. Raise one."
            )
        if ignore_value is not None and type(ignore_value) is not int:
            raise InputError(
                f"{WHERE}: expected ignore_value to be an integer or null, "
                f"got {ignore_value!r}. Name one label."
            )
        smooth = _number("smooth", smooth)
        self.ignore_value = ignore_value
        # Not saved: the config is where they belong.
        self.register_buffer("class_weights", _weights(class_weights), persistent=False)
        self.include_background = as_bool(include_background, f"{WHERE}: include_background")
        self.dice = DiceLoss(
            include_background=self.include_background,
            to_onehot_y=True,
            softmax=True,
            batch=as_bool(batch_dice, f"{WHERE}: batch_dice"),
            smooth_nr=smooth,
            smooth_dr=smooth,
            reduction="none",  # DiceLoss checks its weights on the host, so they are applied here
            ignore_index=ignore_value,
        )

    def forward(
        self, logits: torch.Tensor | Sequence[torch.Tensor], label: torch.Tensor
    ) -> torch.Tensor:
        """Loss of a batch, with no synchronisation of the host.

        Args:
            logits: `(B, C, H, W, D)` of any floating dtype, C ≥ 2; or, for deep supervision, a
                sequence of them, full resolution first. Their losses are averaged with weights
                1, 1/2, 1/4, …, and the label is brought to their sizes by nearest neighbour.
            label: `(B, 1, H, W, D)` of any dtype, integers in [0, C) or `ignore_value`. That they
                are is for the preflight to check: looking here would wait for the device.

        Returns:
            float32 scalar; its gradient reaches the logits in their own dtype.

        Raises:
            ValueError: If the shapes do not fit each other or the class weights.
        """
        levels = [logits] if isinstance(logits, torch.Tensor) else list(logits)
        self._check(levels, label)
        weights = [0.5**i for i in range(len(levels))]
        label = label.as_subclass(torch.Tensor)  # a MetaTensor would track every operation
        with torch.autocast(label.device.type, enabled=False):
            losses = [
                weight * self._loss(level.as_subclass(torch.Tensor).float(), _resize(label, level))
                for weight, level in zip(weights, levels, strict=True)
            ]
            return torch.stack(losses).sum() / sum(weights)

    def _loss(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Loss at one resolution, of float32 logits."""
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(logits.device)  # waits for a copy only once
        total = logits.new_zeros(())
        if self.dice_weight > 0:
            total = total + self.dice_weight * self._dice(logits, label)
        if self.ce_weight > 0:
            total = total + self.ce_weight * self._cross_entropy(logits, label)
        return total

    def _dice(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        first = 0 if self.include_background else 1
        per_class = self.dice(logits, label).view(-1, logits.shape[1] - first)  # (B or 1, classes)
        if self.class_weights is not None:
            per_class = per_class * self.class_weights[first:]
        return per_class.mean()

    def _cross_entropy(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        target = label[:, 0].long()  # (B, H, W, D)
        ignored = NO_LABEL if self.ignore_value is None else self.ignore_value
        # Reduced here: torch's own mean is 0/0 without a valid voxel, and on CUDA it adds up in
        # an order that varies from run to run.
        entropy = F.cross_entropy(logits, target, ignore_index=ignored, reduction="none")
        if self.class_weights is None and self.ignore_value is None:
            return entropy.mean()
        valid = target != ignored
        weight = valid.float()
        if self.class_weights is not None:
            weight = weight * self.class_weights[target.where(valid, 0)]
        return (weight * entropy).sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)

    def _check(self, levels: list[torch.Tensor], label: torch.Tensor) -> None:
        shape = tuple(levels[0].shape)
        if shape[1] < 2:
            raise ValueError(
                f"{WHERE}: expected logits of at least 2 classes, got {shape[1]}. "
                "Count the background as one."
            )
        if tuple(label.shape) != (shape[0], 1, *shape[2:]):
            raise ValueError(
                f"{WHERE}: expected a label of shape {(shape[0], 1, *shape[2:])}, "
                f"got {tuple(label.shape)}. Give it as integers in one channel."
            )
        if self.class_weights is not None and len(self.class_weights) != shape[1]:
            raise InputError(
                f"{WHERE}: expected {shape[1]} class_weights, one per class, "
                f"got {len(self.class_weights)}. Background is the first."
            )


def _resize(label: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """`label` on the grid of `logits`, by the voxel nearest to each centre."""
    if label.shape[2:] == logits.shape[2:]:
        return label
    return F.interpolate(label.float(), size=logits.shape[2:], mode="nearest-exact")


def _weights(values: Any) -> torch.Tensor | None:
    if values is None:
        return None
    if not isinstance(values, list | tuple) or not values:
        raise InputError(
            f"{WHERE}: expected class_weights to be a list of numbers or null, "
            f"got {values!r}. Give one per class."
        )
    return torch.tensor([_number("class_weights", v) for v in values])


def _number(name: str, value: Any, *, zero: bool = False) -> float:
    """`value` if it is a finite number above 0, or 0 where `zero` allows it."""
    valid = type(value) in (int, float) and 0 <= value < math.inf and (zero or value > 0)
    if not valid:
        least = "0 or more" if zero else "more than 0"
        raise InputError(
            f"{WHERE}: expected {name} to be {least}, got {value!r}. Give a finite number."
        )
    return float(value)
