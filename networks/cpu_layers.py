"""Operations of the network that torch does slowly on a CPU in channels_last_3d.

Each gives the result of torch's operation up to float32 rounding. Torch's operation is used where
these would not be faster or are not allowed: on other devices, in other memory formats and dtypes,
for subclasses of Tensor, and in a network that is scripted, traced, exported or compiled.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LARGEST_MEAN = 10.0  # in standard deviations; above it E[x²] − E[x]² loses more than a digit


class InstanceNorm(nn.InstanceNorm3d):
    """Instance norm that works in channels_last_3d; torch's converts it to contiguous and back.

    The statistics are sums in the given memory format, and the rest is batch norm of each volume
    alone. Sums are torch's pairwise ones: its batch norm adds the voxels of a channel one after the
    other, and is off by 1e-3 standard deviations at 96³. The gradient of torch's instance norm is
    wrong for a single volume if the next layer's gradient is channels last (torch 2.13); this one
    is right.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise each channel of each volume of `x` `(B, C, H, W, D)`, scale and shift it."""
        if not torch.jit.is_scripting():
            if _applies(x):
                return _instance_norm(x, self.weight, self.bias, self.eps)
            if x.device.type == "cpu" and not torch.jit.is_tracing():
                return _plain(x, self.weight, self.bias, self.eps)
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)


def upsample(x: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Interpolate `x` `(B, C, H, W, D)` trilinearly to `size`, corners not aligned.

    The gradient is computed axis by axis, as products with small matrices of linear interpolation;
    torch visits all eight neighbours of every voxel.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript)
        if x.requires_grad and torch.is_grad_enabled() and _applies(x):
            return _Upsample.apply(x, tuple(size))
    return F.interpolate(x, size=size, mode="trilinear", align_corners=False)


def _applies(x: torch.Tensor) -> bool:
    return (
        type(x) is torch.Tensor
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.dim() == 5
        and x.is_contiguous(memory_format=torch.channels_last_3d)
        and not x.is_contiguous()  # of one channel both are true
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )


def _instance_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    with torch.no_grad():
        axes, voxels = (2, 3, 4), x[0, 0].numel()
        mean = x.sum(axes) / voxels  # (B, C)
        var = (x * x).sum(axes) / voxels - mean * mean
        usual = voxels > 1 and bool((mean.square() <= LARGEST_MEAN**2 * var).all())
    if not usual:  # a constant channel too, and what is not finite
        return _plain(x, weight, bias, eps)
    return _InstanceNorm.apply(x, weight, bias, mean, var, eps)


def _plain(x: torch.Tensor, weight: Any, bias: Any, eps: float) -> torch.Tensor:
    y = F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    if not y.requires_grad or type(y) is not torch.Tensor or torch.compiler.is_compiling():
        return y
    return _ContiguousGradient.apply(y)


class _ContiguousGradient(torch.autograd.Function):
    """Make the gradient contiguous: torch's instance norm misreads one of a single volume."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(y)  # the same tensor, which ReLU may then overwrite
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.contiguous()


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
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor):
        x, weight, mean, inverse = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
        grad_x, parts = torch.empty_like(x), []
        for i in range(len(x)):
            one = slice(i, i + 1)
            grad_x[one], *rest = torch.ops.aten.native_batch_norm_backward(
                grad[one],
                x[one],
                weight,
                None,
                None,
                mean[i],
                inverse[i],
                True,
                ctx.eps,
                [True] * 3,
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
    @torch.autograd.function.once_differentiable
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
