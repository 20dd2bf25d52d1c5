"""Layers limited by memory bandwidth, each in one pass where torch needs several.

On CUDA, for channels-last tensors, they run the kernels of `networks.kernels`, which compute in
float32 and round once, to the dtype that they store. Everywhere else, and in a network that is
traced or exported, they run torch's operations.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from networks.kernels import self_check

try:
    import triton

    from networks.kernels import norm_activation
except ImportError:  # no Triton for this platform
    triton = None

log = logging.getLogger(__name__)

Grid = tuple[int, int, int]

LAST = torch.channels_last_3d
TILE = 4096  # values that a program holds at a time
PROGRAMS = 1024  # that share the sums over an image: some for each multiprocessor of a card
LARGEST_MEAN = 10.0  # in standard deviations; above it E[x²] − E[x]² loses more than a digit


class InstanceNorm(nn.InstanceNorm3d):
    """Instance norm that works in channels_last_3d; torch's converts it to contiguous and back.

    The statistics are torch's pairwise sums, and the rest is batch norm of each volume alone:
    statistics of torch's batch norm are off by 1e-3 standard deviations at 96³. The gradient is
    right where torch's is not (2.13: a single volume whose output's gradient is channels last).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise each channel of each volume of `x` `(B, C, H, W, D)`, scale and shift it."""
        if _applies(x) and (moments := _usual_moments(x)):
            return _InstanceNorm.apply(x, self.weight, self.bias, *moments, self.eps)
        y = F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
        if x.device.type == "cpu" and _is_eager() and type(y) is torch.Tensor and y.requires_grad:
            y.register_hook(torch.Tensor.contiguous)  # for torch, with a single volume
        return y


def upsample(x: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Interpolate `x` `(B, C, H, W, D)` trilinearly to `size`, corners not aligned.

    The gradient is computed axis by axis, as products with small matrices of linear interpolation;
    torch visits all eight neighbours of every voxel.
    """
    if x.requires_grad and torch.is_grad_enabled() and _applies(x):
        return _Upsample.apply(x, tuple(size))
    return F.interpolate(x, size=size, mode="trilinear", align_corners=False)


def _applies(x: torch.Tensor) -> bool:
    return (
        type(x) is torch.Tensor
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.dim() == 5
        and x.is_contiguous(memory_format=LAST)
        and not x.is_contiguous()  # of one channel both are true
        and _is_eager()
    )


@torch.no_grad()
def _usual_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return mean and variance, `(B, C)`; `None` for a constant channel, or one not finite."""
    axes, voxels = (2, 3, 4), x[0, 0].numel()
    mean = x.sum(axes) / voxels
    var = (x * x).sum(axes) / voxels - mean * mean
    usual = voxels > 1 and bool((mean.square() <= LARGEST_MEAN**2 * var).all())
    return (mean, var) if usual else None


class _InstanceNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, mean, var, eps) -> torch.Tensor:
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.eps = eps
        out = torch.empty_like(x)
        for i in range(len(x)):
            out[i : i + 1] = F.batch_norm(x[i : i + 1], mean[i], var[i], weight, bias, eps=eps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor):
        x, weight, mean, inverse = ctx.saved_tensors
        grad = grad.contiguous(memory_format=LAST)
        grad_x, parts = torch.empty_like(x), []
        for i in range(len(x)):
            one = slice(i, i + 1)
            statistics = None, None, mean[i], inverse[i], True, ctx.eps
            grad_x[one], *rest = torch.ops.aten.native_batch_norm_backward(
                grad[one], x[one], weight, *statistics, [True] * 3
            )
            parts.append(rest)
        grad_weight, grad_bias = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
        return grad_x, grad_weight, grad_bias, None, None, None


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        ctx.size = x.shape[2:]
        return F.interpolate(x, size=size, mode="trilinear", align_corners=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor):
        y = grad.permute(0, 2, 3, 4, 1)  # (B, H, W, D, C), as it lies in memory
        for axis in (1, 2, 3):
            shape, coarse, fine = y.shape, ctx.size[axis - 1], y.shape[axis]
            if coarse != fine:
                rows = y.reshape(shape[:axis].numel(), fine, -1)
                transposed = _interpolation(coarse, fine).mT.expand(len(rows), -1, -1)
                y = torch.bmm(transposed, rows).view(*shape[:axis], coarse, *shape[axis + 1 :])
        return y.permute(0, 4, 1, 2, 3), None


@cache
def _interpolation(coarse: int, fine: int) -> torch.Tensor:
    """Return the `(fine, coarse)` matrix of linear interpolation along an axis."""
    unit = torch.eye(coarse)[None]  # (1, coarse, coarse)
    return F.interpolate(unit, size=fine, mode="linear", align_corners=False)[0].T.contiguous()


def serves(*tensors: torch.Tensor) -> bool:
    """Return whether the kernels can process these tensors, `(B, C, H, W, D)`, here and now."""
    return _is_eager() and all(
        type(x) is torch.Tensor
        and works_on(x.device)
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and x.dtype == tensors[0].dtype
        and x.numel() > 0
        and x.is_contiguous(memory_format=LAST)
        for x in tensors
    )


@cache
def works_on(device: torch.device) -> bool:
    """Return whether the kernels process channels-last tensors there; see `self_check`."""
    if triton is None or not (device.type == "cuda" or triton.knobs.runtime.interpret):
        return False
    if device.type == "cuda" and device.index is None:  # so that it is told once
        return works_on(torch.device("cuda", torch.cuda.current_device()))
    if fault := self_check.find_fault(compare_layers, device):
        log.warning("Layers are not fused on %s: %s", device, fault)
    return not fault


def compare_layers(device: torch.device) -> None:
    """Compare each kernel with torch; raise an exception if one fails or is wrong."""
    compare, noise, channels = self_check.compare_operations, self_check.noise, 20
    sizes = [(5, 7, 9), (2, 7, 4)]  # fine and coarse: several tiles each, which are not full
    if device.type == "cpu":  # interpreted, a program takes some milliseconds
        sizes = [(2, 2, 3), (1, 1, 2)]
    for dtype in self_check.TOLERANCES:
        fine, coarse = (noise(2, channels, *n).to(device, dtype, memory_format=LAST) for n in sizes)
        for norm in (nn.BatchNorm3d(channels), nn.InstanceNorm3d(channels, affine=True)):
            for seed, parameter in enumerate(norm.parameters()):
                parameter.data = noise(channels, seed=seed)
            compare(
                f"{type(norm).__name__} with ReLU",
                lambda norm, x: (_NormReLU.apply(x, norm.weight, norm.bias, norm),),
                lambda norm, x: (F.relu(norm(x)),), [fine], norm,
            )  # fmt: skip
        compare(
            "pooling", lambda pool, x: _PoolAndSkip.apply(x, pool.kernel_size),
            lambda pool, x: (pool(x), x * 1), [fine], nn.MaxPool3d((1, 2, 2), (1, 2, 2)),
        )  # fmt: skip
        compare(
            "upsampling", lambda _, x, skip: (_UpsampleConcat.apply(x, skip),),
            lambda _, x, skip: (torch.cat([upsample(x, list(skip.shape[2:])), skip], 1),),
            [coarse, fine], nn.Identity(),
        )  # fmt: skip


def _is_eager() -> bool:
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def channels_last(image: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Give a one-channel `image` `(B, 1, H, W, D)` on CUDA channels-last strides, if `weight` has.

    A convolution takes its memory format from its input. It took such an image for contiguous, and
    converted the gradient of its output: 10 % of a step. `weight` is that of a convolution of the
    same network that has several channels; other images are returned as they are.
    """
    last = weight.is_contiguous(memory_format=LAST) and not weight.is_contiguous()
    last = last and image.is_cuda and _is_eager()
    if not last or image.shape[1] != 1 or not image.is_contiguous():
        return image
    _, _, height, width, depth = image.shape
    return image.as_strided(image.shape, (height * width * depth, 1, width * depth, depth, 1))


def norm_relu(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compute `relu(norm(x))`; `x` `(B, C, H, W, D)` may be overwritten.

    The kernels serve BatchNorm3d and InstanceNorm3d with weights and without hooks.
    """
    if _is_usual(norm) and serves(x):
        return _NormReLU.apply(x, norm.weight, norm.bias, norm)
    return F.relu(norm(x), inplace=True)


def _is_usual(norm: nn.Module) -> bool:
    return (
        isinstance(norm, nn.BatchNorm3d | nn.InstanceNorm3d)
        and norm.affine
        and norm.momentum is not None
        and isinstance(norm, nn.BatchNorm3d) == norm.track_running_stats
        and not (norm._forward_hooks or norm._forward_pre_hooks)
    )


def pool_and_skip(x: torch.Tensor, pool: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x` `(B, C, H, W, D)` pooled, and `x` for the skip; their gradients are added at once.

    `pool` is a MaxPool3d whose stride is its kernel's size, a triple.
    """
    if not pool._forward_hooks and not pool._forward_pre_hooks and serves(x):
        return _PoolAndSkip.apply(x, pool.kernel_size)
    return pool(x), x


def upsample_concat(x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """Concatenate `x` `(B, C, h, w, d)`, interpolated to the size of `skip`, and `skip`.

    `skip` `(B, C', H, W, D)` is no smaller along any axis; interpolation is trilinear.
    """
    if serves(x, skip):
        return _UpsampleConcat.apply(x, skip)
    return torch.cat([upsample(x, list(skip.shape[2:])), skip], dim=1)


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, norm: Any):
        images, channels, rows = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        per_image = isinstance(norm, nn.InstanceNorm3d)
        fixed = not per_image and not norm.training
        if fixed:
            mean, rstd = norm.running_mean, (norm.running_var + norm.eps).rsqrt()
        else:
            mean, rstd = _moments(x, norm, per_image)
        out = torch.empty_like(x)
        tile, grid = _tiles(rows, channels, images)
        norm_activation.norm_relu_kernel[grid](
            x, out, mean, rstd, weight, bias, rows, channels, PER_IMAGE=per_image, **tile
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.per_image, ctx.fixed = per_image, fixed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        images, channels, rows = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        grad = _rows(grad)
        groups = images if ctx.per_image else 1
        parts, part_rows, tile, grid = _parts(x)
        norm_activation.norm_relu_sums_of_parts[grid](
            grad, x, parts, mean, rstd, weight, bias, rows, part_rows, channels, grad.stride(4),
            PER_IMAGE=ctx.per_image, **tile,
        )  # fmt: skip
        sums = parts.new_empty((groups, 2, channels))
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
        norm_activation.norm_relu_sums[(triton.cdiv(channels, 16),)](
            parts, sums, grad_weight, grad_bias, channels, NUM_PARTS=grid[0],
            IMAGES=images // groups, GROUPS=groups, PARTS=64, CHANNELS=16,
        )  # fmt: skip
        out = torch.empty_like(x)
        tile, grid = _tiles(rows, channels, images)
        norm_activation.norm_relu_backward[grid](
            grad, x, out, mean, rstd, weight, bias, sums, rows, channels, grad.stride(4),
            float(rows * images // groups), PER_IMAGE=ctx.per_image, FIXED=ctx.fixed, **tile,
        )  # fmt: skip
        return out, grad_weight, grad_bias, None


def _moments(x: torch.Tensor, norm: Any, per_image: bool) -> tuple[torch.Tensor, torch.Tensor]:
    images, channels, rows = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    groups = images if per_image else 1
    parts, part_rows, tile, grid = _parts(x)
    norm_activation.moments_of_parts[grid](x, parts, rows, part_rows, channels, **tile)
    mean, rstd = parts.new_empty((2, groups, channels))
    running = not per_image and norm.track_running_stats
    if running:
        norm.num_batches_tracked.add_(1)
    norm_activation.moments[(triton.cdiv(channels, 16), groups)](
        parts, mean, rstd, norm.running_mean, norm.running_var, rows, part_rows, channels,
        norm.eps, norm.momentum, NUM_PARTS=grid[0], IMAGES=images // groups, RUNNING=running,
        PARTS=64, CHANNELS=16,
    )  # fmt: skip
    return mean, rstd


class _PoolAndSkip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stride: tuple[int, int, int]):
        (images, channels, *size), (sz, sy, sx) = x.shape, stride
        cells = [n // s for n, s in zip(size, stride, strict=True)]
        out = _empty(x, images, channels, cells)
        tile, grid = _line_tiles(images * cells[0] * cells[1], cells[2], channels)
        norm_activation.max_pool[grid](x, out, *size, channels, Z=sz, Y=sy, X=sx, **tile)
        ctx.save_for_backward(x)
        ctx.stride = stride
        return out, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_pooled: torch.Tensor, grad_skip: torch.Tensor):
        (x,) = ctx.saved_tensors
        (images, channels, *size), (sz, sy, sx) = x.shape, ctx.stride
        grad_skip, grad_pooled = _rows(grad_skip), grad_pooled.contiguous(memory_format=LAST)
        out = torch.empty_like(x)
        lines = [triton.cdiv(n, s) for n, s in zip(size, ctx.stride, strict=True)]
        tile, grid = _line_tiles(images * lines[0] * lines[1], lines[2], channels)
        norm_activation.max_pool_backward[grid](
            x, grad_pooled, grad_skip, out, *size, channels, grad_skip.stride(4),
            Z=sz, Y=sy, X=sx, **tile,
        )  # fmt: skip
        return out, None


class _UpsampleConcat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        images, channels, *size = skip.shape
        new = x.shape[1]
        out = _empty(skip, images, new + channels, size)
        d_in, h_in, w_in = x.shape[2:]
        tile, grid = _line_tiles(images * (d_in + 1) * (h_in + 1), size[2], new)
        # of ratios that divide evenly no output lies on an input, where rounding would decide
        exact = all(o == i or o % (2 * i) == 0 for o, i in ((size[0], d_in), (size[1], h_in)))
        counts = [-(-o // i) + (0 if exact else 2) for o, i in ((size[0], d_in), (size[1], h_in))]
        norm_activation.upsample_kernel[grid](
            x, out, d_in, h_in, w_in, *size, new, new + channels, NUM_Z=counts[0],
            NUM_Y=counts[1], FIRST=0 if exact else -1, **tile,
        )  # fmt: skip
        rows = images * math.prod(size)
        tile, of_skip = _tiles(rows, channels, 1)
        norm_activation.copy_rows[of_skip](
            skip, out[:, new:], rows, channels, channels, new + channels, **tile
        )
        ctx.shape = x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images, new, *size_in = ctx.shape
        grad, size_out = _rows(grad), grad.shape[2:]
        out = _empty(grad, images, new, size_in)
        taps = [_taps(n, o) for n, o in zip(size_in, size_out, strict=True)]
        tile, grid = _line_tiles(images * math.prod(size_in[:2]), size_in[2], new)
        norm_activation.upsample_backward[grid](
            grad, out, *size_in, *size_out, new, grad.stride(4),
            TAPS_Z=taps[0], TAPS_Y=taps[1], TAPS_X=taps[2], **tile,
        )  # fmt: skip
        return out, grad[:, new:]  # a view: pooling's backward reads rows of any stride


def _taps(size_in: int, size_out: int) -> int:
    """Return how many outputs of an axis one input may contribute to."""
    whole, rest = divmod(2 * size_out, size_in)
    return 1 if size_in == size_out else whole + 2 * (rest > 0)


def _parts(x: torch.Tensor) -> tuple[torch.Tensor, int, dict[str, int], Grid]:
    """Return room for two sums of each part of the images' rows, `(B, P, 2, C)`, and rows of one.

    The programs that sum up the parts have the tile and the grid that follow.
    """
    images, channels, rows = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    tile, (_, blocks, _) = _tiles(rows, channels, images)
    wanted = max(1, PROGRAMS // (images * blocks))
    part_rows = triton.cdiv(triton.cdiv(rows, wanted), tile["ROWS"]) * tile["ROWS"]
    count = triton.cdiv(rows, part_rows)
    parts = x.new_empty((images, count, 2, channels), dtype=torch.float32)
    return parts, part_rows, tile, (count, blocks, images)


def _tiles(rows: int, channels: int, images: int) -> tuple[dict[str, int], Grid]:
    """Return the rows and channels of a program's tile, and the grid of programs."""
    block = _channel_block(channels)
    tile = {"ROWS": TILE // block, "CHANNELS": block}
    return tile, (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(channels, block), images)


def _line_tiles(lines: int, length: int, channels: int) -> tuple[dict[str, int], Grid]:
    """Return the tile of a program that works along a line of voxels, and the grid of programs.

    Lines are the first axis of the grid: CUDA allows fewer programs on the other axes.
    """
    block = _channel_block(channels)
    positions = min(triton.next_power_of_2(length), TILE // 2 // block)
    grid = lines, triton.cdiv(length, positions), triton.cdiv(channels, block)
    return {"POSITIONS": positions, "CHANNELS": block}, grid


def _channel_block(channels: int) -> int:
    """Return the largest power of two up to 64 that divides the channels, if it is at least 16."""
    divisor = math.gcd(channels, 64)
    return divisor if divisor >= 16 else min(triton.next_power_of_2(channels), 64)


def _empty(like: torch.Tensor, images: int, channels: int, size: Any) -> torch.Tensor:
    shape = (images, channels, *size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=LAST)


def _rows(grad: torch.Tensor) -> torch.Tensor:
    """Make `grad` channels last; rows may have any stride, as in a slice of the channels."""
    _, channels, height, width, depth = grad.shape

    def strides(step: int) -> tuple[int, ...]:
        return height * width * depth * step, 1, width * depth * step, depth * step, step

    if grad.stride(4) >= channels and grad.stride() == strides(grad.stride(4)):
        return grad
    grad = grad.contiguous(memory_format=LAST)  # of an axis of length 1 the stride may be any
    return grad.as_strided(grad.shape, strides(channels))
