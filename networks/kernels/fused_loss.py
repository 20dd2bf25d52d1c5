"""Dice's and cross-entropy's sums as one operation of autograd, computed by Triton's kernels."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, cast

import torch
import triton
from torch.autograd.function import once_differentiable

from networks.kernels.loss_kernels import gradient_kernel, sums_kernel, value_kernel

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
    """Say why kernels do not run on this card; Triton needs a C compiler, for one."""
    logits, label = (torch.zeros(1, n, 1, 1, 1, device=device) for n in (2, 1))
    try:
        FusedSums.apply(logits, label, None, None, True, True)
    except Exception as error:
        return str(error).splitlines()[0]
    return None


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
