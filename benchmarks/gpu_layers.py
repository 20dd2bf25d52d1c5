"""The network's fused layers beside torch's own, each alone, forward and backward.

    python -m benchmarks.gpu_layers [--output FILE.json]

Batches of two in float16, channels last (torch's in its default layout too), at the sizes that a
patch of 128^3 gives them; medians and quartiles by the device's clock, in one run. `error` is the
largest difference from float64 on a smaller volume, in units of the largest value. `floor_ms` is
the time of a device copy of the bytes that must be read and written once.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import machine
from benchmarks.stock import torchs_own_layers
from networks import fused_layers

LAST = torch.channels_last_3d
READINGS, WARM_UP = 40, 8


def timed(work: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of a call on the device."""
    times = []
    for n in range(WARM_UP + READINGS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if n >= WARM_UP:
            times.append(start.elapsed_time(end))
    low, middle, high = statistics.quantiles(times, n=4)
    return {"ms_median": round(middle, 3), "ms_quartiles": [round(low, 3), round(high, 3)]}


def tensor(*shape: int, dtype: torch.dtype = torch.float16, layout: Any = LAST) -> torch.Tensor:
    values = torch.randn(shape, device="cuda")
    return values.to(dtype).contiguous(memory_format=layout).requires_grad_()


def upsample(x: torch.Tensor, skip: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (fused_layers.upsample_concat(x, skip),)


def torchs_upsample(x: torch.Tensor, skip: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As the network has it under autocast: interpolation and concatenation in float32."""
    with torch.autocast("cuda", torch.float16, enabled=x.dtype == torch.float16):
        x = F.interpolate(x, size=skip.shape[2:], mode="trilinear", align_corners=False)
        return (torch.cat([x, skip], 1).to(skip.dtype),)


def pooled(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return fused_layers.pool_and_skip(x, nn.MaxPool3d((2, 2, 2), (2, 2, 2)))


def torchs_pooled(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return F.max_pool3d(x, 2), x * 1


def norm_relu(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weights = torch.promote_types(x.dtype, torch.float32)
    return (fused_layers.norm_relu(norm_of(x.shape[1], weights), x),)


@functools.cache
def norm_of(channels: int, dtype: torch.dtype) -> nn.Module:
    return nn.BatchNorm3d(channels).to("cuda", dtype)


Shapes = Callable[[int], list[tuple[int, ...]]]
CASES: dict[str, tuple[Callable, Callable | None, Shapes, int]] = {
    # ours, torch's (None: the same function, with torch's operations), shapes by edge, edge
    "upsample_concat_64_channels_64_to_128": (
        upsample, torchs_upsample, lambda n: [(2, 64, n, n, n), (2, 32, *(2 * n,) * 3)], 64,
    ),
    "upsample_concat_128_channels_32_to_64": (
        upsample, torchs_upsample, lambda n: [(2, 128, n, n, n), (2, 64, *(2 * n,) * 3)], 32,
    ),
    "norm_relu_32_channels_128": (norm_relu, None, lambda n: [(2, 32, n, n, n)], 128),
    "pool_32_channels_128": (pooled, torchs_pooled, lambda n: [(2, 32, n, n, n)], 128),
}  # fmt: skip


def step(function: Any, inputs: list[torch.Tensor], gradients: list[torch.Tensor]) -> list:
    return list(torch.autograd.grad(function(*inputs), inputs, gradients))


def error(function: Any, shapes: Shapes, oracle: Any) -> float:
    """Of outputs and gradients, on a small volume."""
    inputs = [tensor(*shape) for shape in shapes(8)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    gradients = [torch.randn_like(out) for out in outputs]
    mine = [*outputs, *torch.autograd.grad(outputs, inputs, gradients)]
    with torchs_own_layers():
        true = oracle(*exact)
        true = [*true, *torch.autograd.grad(true, exact, [g.double() for g in gradients])]
    pairs = zip(mine, true, strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def case(ours: Any, torchs: Any, shapes: Any, edge: int) -> dict[str, Any]:
    inputs = [tensor(*shape) for shape in shapes(edge)]
    gradients = [torch.randn_like(out) for out in ours(*inputs)]
    moved = 2 * 2 * sum(t.numel() for t in (*inputs, *gradients))  # both ways, two bytes each
    copied = torch.empty(moved // 4, dtype=torch.float16, device="cuda")
    found = {
        "floor_ms": timed(copied.clone)["ms_median"],
        "ours": timed(lambda: step(ours, inputs, gradients)),
    }
    oracle = torchs or ours
    plain = [tensor(*shape, layout=torch.contiguous_format) for shape in shapes(edge)]
    with torchs_own_layers():
        found["torch_channels_last"] = timed(lambda: step(oracle, inputs, gradients))
        gradients = [g.contiguous() for g in gradients]
        found["torch_default_layout"] = timed(lambda: step(oracle, plain, gradients))
    found["error"] = error(ours, shapes, oracle)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/gpu_layers.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {**machine.facts()}
    for name, (ours, torchs, shapes, edge) in CASES.items():
        result[name] = case(ours, torchs, shapes, edge)
        print(name, json.dumps(result[name]), flush=True)
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
