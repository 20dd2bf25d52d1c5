"""Dice's and cross-entropy's sums as one operation of autograd, computed by Triton's kernels."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, NamedTuple, cast

import torch
import triton
from torch import nn
from torch.autograd.function import once_differentiable

from networks.kernels import self_check
from networks.kernels.loss_kernels import gradient_kernel, sums_kernel, value_kernel

log = logging.getLogger(__name__)

MAX_CLASSES = 256
INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: on a CPU, for tests
FAST = torch.version.cuda is not None and not INTERPRETED  # there are NVIDIA's instructions
PARTIAL_BYTES = 3 * 2**19  # of the sums of all programs, at most


class Tiling(NamedTuple):
    """The division of a kernel's work into tiles."""

    held: int  # logits that a thread holds, about; decides how many threads share a voxel
    num_warps: int  # per program
    programs: int  # per multiprocessor, in all


# by kernel, and whether channels are last
TILINGS = {(name, False): Tiling(36, 4, 8) for name in ("sums", "gradient")}
TILINGS |= {(name, True): Tiling(18, 4, 8) for name in ("sums", "gradient")}


@functools.cache
def failure(device: torch.device) -> str | None:
    """Say why the kernels are not used on this card, and log it; see `self_check`."""
    if fault := self_check.find_fault(compare_loss, device):
        log.warning("The loss is not fused on %s: %s", device, fault)
    return fault


def compare_loss(device: torch.device) -> None:
    """Compare value and gradient with the formula; raise an exception if a kernel is wrong."""
    num_classes, size = 5, (5, 7, 9) if device.type == "cuda" else (3, 3, 3)
    label = self_check.noise(2, 1, *size).abs().mul(2).long().clamp_max(num_classes - 1)
    options = {"dice_weight": 1.0, "ce_weight": 1.0, "smooth": 1.0, "FIRST": 0, "BATCH_DICE": True}

    def fused(_: Any, logits: torch.Tensor) -> tuple[torch.Tensor]:
        totals = sums(logits, label.to(device)).sum(0, keepdim=True)
        return (FusedValue.apply(totals, None, num_classes, options),)

    def formula(_: Any, logits: torch.Tensor) -> tuple[torch.Tensor]:
        true, log_p = torch.zeros_like(logits).scatter_(1, label, 1), logits.log_softmax(1)
        parts = log_p.exp() * true, log_p.exp(), true
        overlap, mass, count = (part.sum((0, 2, 3, 4)) for part in parts)
        dice = 1 - (2 * overlap + 1) / (mass + count + 1)
        return (dice.mean() - (log_p * true).sum() / count.sum(),)

    for dtype in self_check.TOLERANCES:
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            logits = self_check.noise(2, num_classes, *size, seed=1)
            logits = logits.to(device, dtype, memory_format=layout)
            self_check.compare_operations("the loss", fused, formula, [logits], nn.Identity())


class FusedSums(torch.autograd.Function):
    """`sums` of logits that are contiguous or have channels last, and a contiguous label."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        """Sums of each volume; the arguments are those of `sums`."""
        logits, label, class_weights, ctx.ignore_value, dice, entropy = given
        ctx.save_for_backward(logits, label, class_weights)
        grid, arguments = _launch("sums", logits, label, class_weights, ctx.ignore_value)
        partials = logits.new_empty(*grid[::-1], 3 * logits.shape[1] + 2, dtype=torch.float32)
        with torch.cuda.device_of(logits):
            sums_kernel[grid](partials=partials, DICE=dice, ENTROPY=entropy, **arguments)
        return partials.sum(1, dtype=torch.float64)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rates: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradient by the logits."""
        logits, label, class_weights = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        rates = rates.to(torch.float32, memory_format=torch.contiguous_format)
        grid, arguments = _launch("gradient", logits, label, class_weights, ctx.ignore_value)
        with torch.cuda.device_of(logits):
            gradient_kernel[grid](rates=rates, gradient=gradient, **arguments)
        return gradient, None, None, None, None, None


class FusedValue(torch.autograd.Function):
    """Loss of all levels and volumes, float32 scalar, of their sums, `(L, K)` float64.

    One kernel in the place of tens, each of which takes longer to start than to run. The rates of
    change are made with the value, and backward multiplies them.
    """

    @staticmethod
    def forward(ctx: Any, totals: torch.Tensor, *given: Any) -> torch.Tensor:
        """The value; `given` are class weights, the number of classes, `value_kernel`'s options."""
        class_weights, num_classes, options = given
        value, rates = totals.new_empty((), dtype=torch.float32), torch.empty_like(totals)
        weights = totals if class_weights is None else class_weights
        with torch.cuda.device_of(totals):
            value_kernel[(1,)](
                totals, weights, value, rates, len(totals), C=num_classes,
                HAS_WEIGHTS=class_weights is not None, BLOCK=triton.next_power_of_2(num_classes),
                **options,
            )  # fmt: skip
        ctx.save_for_backward(rates)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Rates by the sums."""
        (rates,) = ctx.saved_tensors
        return rates * scale, None, None, None


def sums(
    logits: torch.Tensor,
    label: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    ignore_value: int | None = None,
    *,
    dice: bool = True,
    entropy: bool = True,
) -> torch.Tensor:
    """Sums of each volume over its voxels, `(B, 3 C + 2)` float64, of tensors in any layout.

    These are overlap, mass and size, C numbers each; the weighted sum of -ln(p) at the labels; and
    the sum of the weights. Numbers of voxels are exact. What `dice` and `entropy` exclude is 0.

    Args:
        logits: `(B, C, …)` of a floating dtype, which the gradient has; C up to `MAX_CLASSES`.
        label: `(B, 1, …)` integers of any dtype. A voxel whose label is neither a class nor
            `ignore_value` counts in the masses alone.
        class_weights: `(C,)` float32 on the same device.
    """
    if not (logits.is_contiguous() or _is_last(logits)):
        logits = logits.contiguous()
    label = label.contiguous()
    label = label.view(torch.uint8) if label.dtype == torch.bool else label
    result = FusedSums.apply(logits, label, class_weights, ignore_value, dice, entropy)
    return cast(torch.Tensor, result)


def _is_last(logits: torch.Tensor) -> bool:
    """Return whether the classes of a voxel are neighbours in memory."""
    return not logits.is_contiguous() and logits.movedim(1, -1).is_contiguous()


def _launch(
    name: str, logits: torch.Tensor, label: torch.Tensor, class_weights: Any, ignore_value: Any
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid of a kernel, programs by volumes, and the arguments that both kernels have."""
    num_volumes, num_classes = logits.shape[:2]
    num_voxels = math.prod(logits.shape[2:])
    is_last = _is_last(logits)
    tiling = TILINGS[name, is_last]
    rows, chunk, run = shape_of_tile(num_classes, is_last, logits.element_size(), tiling)
    most = 2 * num_volumes
    if logits.is_cuda:
        found = torch.cuda.get_device_properties(logits.device).multi_processor_count
        most = tiling.programs * found
    if name == "sums":
        most = min(most, PARTIAL_BYTES // (4 * (3 * num_classes + 2)))
    # counts of a program are float32, exact up to 2**24
    programs = max(most // num_volumes, math.ceil(num_voxels / 2**23), 1)
    arguments = {
        "logits": logits,
        "label": label,
        "weights": logits if class_weights is None else class_weights,
        "num_voxels": num_voxels,
        "ignored": 0 if ignore_value is None else ignore_value,
        "C": num_classes,
        "IS_LAST": is_last,
        "HAS_WEIGHTS": class_weights is not None,
        "HAS_IGNORED": ignore_value is not None,
        "FAST": FAST,
        "ROWS": rows,
        "CHUNK": chunk,
        "RUN": run,
        "num_warps": tiling.num_warps,
        "num_stages": 1,
    }
    return (min(programs, math.ceil(num_voxels / (rows * run))), num_volumes), arguments


def shape_of_tile(
    num_classes: int, is_last: bool, element_size: int, tiling: Tiling
) -> tuple[int, int, int]:
    """`(ROWS, CHUNK, RUN)` with which a thread holds about `tiling.held` logits.

    `is_last` is whether channels are last in memory; `element_size` is that of a logit in bytes.
    """
    if is_last:
        vector = min(math.gcd(num_classes, 16), max(16 // element_size, 1))
    else:
        vector = max(4 // element_size, 1)
    lanes = 1  # that share a voxel
    least = vector if is_last else 1  # classes of one of them in a chunk
    while lanes < 32 and math.ceil(num_classes / (lanes * least)) * vector > tiling.held:
        lanes *= 4 if lanes < vector and not is_last else 2  # with 2 the labels would be moved
    chunk = lanes * least
    voxels = 32 // lanes * (1 if is_last else vector)  # of a warp
    if is_last:
        return voxels * tiling.num_warps, chunk, 1
    return tiling.num_warps, chunk, voxels
