"""Dice and cross-entropy, reduced in float32 whatever the dtype of the logits.

It is a function of sums over voxels, which are added up over ranks. They do not fit float16: at
96³ MONAI's DiceCELoss on float16 logits is a Dice loss of exactly 1 and a cross-entropy of NaN.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pipeline import distributed
from pipeline.errors import InputError, as_bool, require_choice

WHERE = "SegmentationLoss"
BACKENDS = ("auto", "triton", "torch")


class SegmentationLoss(nn.Module):
    """`dice_weight · Dice + ce_weight · cross-entropy` of softmax probabilities, in float32.

    With the defaults the value is that of MONAI's `DiceCELoss(to_onehot_y=True, softmax=True)` on
    float32 logits. Of several ranks each gets the loss of all their samples together, and its
    gradient for its own. Raises `InputError` if an argument is not as described.

    Args:
        dice_weight, ce_weight: At least 0, and not both 0.
        include_background: Whether class 0 takes part in Dice, so that a crop without foreground
            has a useful gradient.
        class_weights: One positive weight per class, or None. In cross-entropy a weighted mean
            over voxels; in Dice a factor of the class's term before the mean, as in MONAI.
        batch_dice: Sum over the batch before dividing, instead of a Dice loss per volume.
        smooth: Positive number added to Dice's numerator and denominator.
        ignore_value: Label of voxels that contribute neither to Dice nor to cross-entropy; where
            all are ignored the loss is 0 and so is its gradient.
        backend: What computes sums and gradient: `torch`, `triton` (fused kernels, which keep
            nothing of the logits' size), or `auto`: triton where it serves, on CUDA with up to 256
            classes. `in_force` tells which.

    Source: Milletari et al., V-Net, 3DV 2016 (Dice, here without squares); Isensee et al.,
        nnU-Net, Nature Methods 2021 (its sum with cross-entropy, deep supervision's weights).
    """

    is_over_ranks = True
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
        backend: str = "auto",
    ) -> None:
        super().__init__()
        above_0 = dice_weight + ce_weight, smooth, *(class_weights or ())
        if min(dice_weight, ce_weight) < 0 or not all(0 < x < math.inf for x in above_0):
            raise InputError(
                f"{WHERE}: expected dice_weight and ce_weight of 0 or more, not both 0, and smooth "
                f"and class_weights above 0, got {dice_weight}, {ce_weight}, {smooth} and "
                f"{class_weights}. Correct them."
            )
        require_choice(backend, BACKENDS, f"{WHERE}: backend")
        self.dice_weight, self.ce_weight = float(dice_weight), float(ce_weight)
        self.smooth = float(smooth)
        self.ignore_value, self.backend = ignore_value, backend
        self.include_background = as_bool(include_background, f"{WHERE}: include_background")
        self.batch_dice = as_bool(batch_dice, f"{WHERE}: batch_dice")
        weights = None if class_weights is None else torch.tensor([*map(float, class_weights)])
        # Not saved: the config is where they belong.
        self.register_buffer("class_weights", weights, persistent=False)

    def in_force(self, device: torch.device, num_classes: int = 2) -> str:
        """The backend for logits on `device`; `InputError` if triton is asked for in vain."""
        if self.backend == "torch":
            return "torch"
        obstacle = _obstacle(device, num_classes)
        if obstacle and self.backend == "triton":
            needed, found = obstacle
            expected = f"expected {needed} for backend 'triton', got {found}"
            raise InputError(f"{WHERE}: {expected}. Use auto.")
        return "torch" if obstacle else "triton"

    def forward(
        self, logits: torch.Tensor | Sequence[torch.Tensor], label: torch.Tensor
    ) -> torch.Tensor:
        """Loss of a batch, with no synchronisation of the host.

        Args:
            logits: `(B, C, H, W, D)` of any floating dtype, C ≥ 2; or, for deep supervision, a
                sequence of them, full resolution first. Their losses are averaged with weights
                1, 1/2, 1/4, …, and the label is brought to their sizes by nearest neighbour.
            label: `(B, 1, H, W, D)` of any dtype, integers in [0, C) or `ignore_value`, which the
                preflight checks: looking here would wait for the device.

        Returns:
            float32 scalar; its gradient reaches the logits in their own dtype. `ValueError` if the
            shapes do not fit each other or the class weights.
        """
        levels = [logits] if isinstance(logits, torch.Tensor) else list(logits)
        self._check(levels[0].shape, label.shape)
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(label.device)  # waits for a copy only once
        label = label.as_subclass(torch.Tensor)  # a MetaTensor would track every operation
        is_fused = self.in_force(levels[0].device, levels[0].shape[1]) == "triton"
        with torch.autocast(label.device.type, enabled=False):
            compute = self._fused_sums if is_fused else self._sums
            sums = [compute(x.as_subclass(torch.Tensor), _resize(label, x)) for x in levels]
            totals = distributed.all_reduce_sum(torch.stack(sums) if sums[1:] else sums[0][None])
            if is_fused:
                first, num_classes = int(not self.include_background), levels[0].shape[1]
                options = {n: getattr(self, n) for n in ("dice_weight", "ce_weight", "smooth")}
                options |= {"FIRST": first, "BATCH_DICE": self.batch_dice}
                return _fused().FusedValue.apply(totals, self.class_weights, num_classes, options)
            values = self._value(totals)
            weights = 0.5 ** torch.arange(len(levels), device=values.device)
            return (weights * values).sum() / weights.sum()

    def _sums(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Sums over volumes, `(K,)` float32: rows of one number per class for Dice, then sum and
        weight of the cross-entropy.
        """
        logits = logits.float()
        target = label[:, 0].long()  # (B, H, W, D)
        valid = None if self.ignore_value is None else (target != self.ignore_value)[:, None]
        one_hot = _one_hot(target, valid, logits.shape[1])
        size = one_hot.flatten(2).sum(2, dtype=logits.dtype)  # (B, C)
        weight = size if self.class_weights is None else size * self.class_weights
        overlap = mass = entropy = torch.zeros_like(size)
        if self.ce_weight > 0:
            log_p = logits.log_softmax(1)
            ignored = -100 if self.ignore_value is None else self.ignore_value  # -100: torch's own
            entropy = F.nll_loss(  # summed below: torch's own sum varies from run to run on CUDA
                log_p, target, self.class_weights, ignore_index=ignored, reduction="none"
            )
        if self.dice_weight > 0:
            p = log_p.exp() if self.ce_weight > 0 else logits.softmax(1)
            overlap = (p * one_hot).flatten(2).sum(2)
            mass = (p if valid is None else p * valid).flatten(2).sum(2)
        if self.batch_dice:
            rows = torch.stack([overlap, mass, size])
        else:  # quotients of single volumes, and how many volumes there are
            terms = self._dice(overlap, mass, size)
            rows = torch.stack([terms, torch.ones_like(terms)])
        return torch.cat([rows.sum(1).flatten(), torch.stack([entropy.sum(), weight.sum()])])

    def _fused_sums(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """The same by Triton, in float64, so that numbers of voxels stay exact."""
        parts = {"dice": self.dice_weight > 0, "entropy": self.ce_weight > 0}
        found = _fused().sums(logits, label, self.class_weights, self.ignore_value, **parts)
        if self.batch_dice:
            return found.sum(0)
        rows, rest = found.split([3 * logits.shape[1], 2], 1)
        terms = self._dice(*rows.chunk(3, 1))
        return torch.cat([terms.sum(0), torch.full_like(terms[0], len(terms)), rest.sum(0)])

    def _value(self, totals: torch.Tensor) -> torch.Tensor:
        """Loss at each resolution, `(L,)`, of sums over all volumes, `(L, K)`."""
        rows, entropy, weight = totals.split([totals.shape[1] - 2, 1, 1], 1)
        if self.batch_dice:
            terms = self._dice(*rows.chunk(3, 1))
        else:
            added, num_volumes = rows.chunk(2, 1)
            terms = added / num_volumes
        if self.class_weights is not None:
            terms = terms * self.class_weights
        first = 0 if self.include_background else 1
        dice = terms[:, first:].mean(1)
        # without a valid voxel torch's own mean is 0/0
        mean_entropy = entropy / weight.clamp_min(torch.finfo(weight.dtype).tiny)
        return self.dice_weight * dice + self.ce_weight * mean_entropy[:, 0]

    def _dice(self, overlap: torch.Tensor, mass: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        return 1 - (2 * overlap + self.smooth) / (mass + size + self.smooth)

    def _check(self, shape: torch.Size, label_shape: torch.Size) -> None:
        of_label, weights = (shape[0], 1, *shape[2:]), self.class_weights
        if shape[1] < 2:
            expected, found = "logits of at least 2 classes, background included", str(shape[1])
        elif label_shape != of_label:
            expected, found = f"an integer label of shape {of_label}", str(tuple(label_shape))
        elif weights is not None and len(weights) != shape[1]:
            expected, found = f"{shape[1]} class_weights, one per class", str(len(weights))
        else:
            return
        raise ValueError(f"{WHERE}: expected {expected}, got {found}.")


@functools.cache
def _fused() -> Any:
    """The module of the fused kernels; `None` without triton, whose import takes a second."""
    try:
        from networks.kernels import fused_loss
    except ImportError:
        return None
    return fused_loss


@functools.cache
def _obstacle(device: torch.device, num_classes: int) -> tuple[str, str] | None:
    """Say what triton needs and what there is instead; `None` if it can be used."""
    on_cpu = "logits on CUDA", device.type
    if device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        return on_cpu  # before triton is imported
    if (fused := _fused()) is None:
        return "triton", "no such package"
    if num_classes > fused.MAX_CLASSES:
        return f"at most {fused.MAX_CLASSES} classes", str(num_classes)
    if device.type != "cuda" and not fused.INTERPRETED:
        return on_cpu
    reason = fused.failure(device)
    return reason and ("kernels that agree with torch's operations", reason)


def _resize(label: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """`label` on the grid of `logits`, by the voxel nearest to each centre."""
    if label.shape[2:] == logits.shape[2:]:
        return label
    return F.interpolate(label.float(), size=logits.shape[2:], mode="nearest-exact")


def _one_hot(target: torch.Tensor, valid: torch.Tensor | None, num_classes: int) -> torch.Tensor:
    """`(B, C, H, W, D)` uint8, 0 at ignored voxels; refuses labels out of range."""
    target = target[:, None]
    shape = (len(target), num_classes, *target.shape[2:])
    found = torch.zeros(shape, dtype=torch.uint8, device=target.device)
    if valid is None:
        return found.scatter_(1, target, 1)
    return found.scatter_(1, target.where(valid, 0), 1).mul_(valid)
