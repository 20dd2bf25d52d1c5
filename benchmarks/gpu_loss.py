"""Dice + cross-entropy on a CUDA card: the fused kernels beside MONAI's DiceCELoss and torch.

    python -m benchmarks.gpu_loss [--output FILE.json] [--cases WORDS] [--sweep]

Forward and backward to the logits, float16 under autocast: time, peak memory above the logits, and
how far value and gradient are from float64. Beside each the floor: what has to be moved (logits
twice, gradient once, labels twice) at the bandwidth that a copy has on the same card. `--sweep`
times the kernels alone for a few ways of dividing the work; `--cases` takes those whose name has
the words ("70 classes, channels_last").
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from monai.losses import DiceCELoss

from benchmarks import machine
from networks.kernels import fused_loss
from pipeline.training.loss import SegmentationLoss

CASES = {
    "3 classes": (3, (2, 128, 128, 128)),
    "14 classes": (14, (2, 128, 128, 128)),
    "70 classes": (70, (2, 128, 96, 256)),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}
WARM_UP, MEASURED, SCALE = 10, 40, 65536.0
LOSSES = {
    "fused": lambda: SegmentationLoss(backend="triton"),
    "torch": lambda: SegmentationLoss(backend="torch"),
    "monai": lambda: DiceCELoss(to_onehot_y=True, softmax=True, include_background=True),
}


def data(num_classes: int, shape: tuple[int, ...], layout: str) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    batch, *size = shape
    logits = torch.randn(batch, num_classes, *size, device="cuda", dtype=torch.float16)
    label = torch.randint(num_classes, (batch, 1, *size), device="cuda")
    return logits.to(memory_format=LAYOUTS[layout]), label


def times_ms(work: Callable[[], object], count: int = MEASURED) -> dict[str, object]:
    """Median and quartiles; the host runs ahead, as it does in training."""
    for _ in range(WARM_UP):
        work()
    torch.cuda.synchronize()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    torch.cuda._sleep(40_000_000)  # the host gets ahead of the card
    for before, after in marks:
        before.record()
        work()
        after.record()
    torch.cuda.synchronize()
    found = sorted(before.elapsed_time(after) for before, after in marks)
    quartiles = [round(found[count // 4], 4), round(found[3 * count // 4], 4)]
    return {"ms_median": round(statistics.median(found), 4), "ms_quartiles": quartiles}


def passes(name: str, logits: torch.Tensor, label: torch.Tensor) -> Callable[[], None]:
    loss, leaf = LOSSES[name](), logits.detach().requires_grad_()

    def work() -> None:
        leaf.grad = None
        with torch.autocast("cuda", dtype=torch.float16):
            value = loss(leaf, label)
        value.backward()

    return work


def measured(name: str, num_classes: int, shape: tuple[int, ...], layout: str) -> dict:
    logits, label = data(num_classes, shape, layout)
    try:
        work = passes(name, logits, label)
        found = times_ms(work)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - logits.nbytes  # the gradient of the last pass
        work()
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    found["peak_MB_above_logits"] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
    found["logits_MB"] = round(logits.nbytes / 1e6, 1)
    return found


def error(name: str, num_classes: int, layout: str, size: int = 48) -> dict[str, float]:
    """Largest distance to MONAI's loss in float64, relative to value and largest gradient."""
    logits, label = data(num_classes, (2, size, size, size), layout)
    results = []
    for loss, dtype, scale in (
        (LOSSES["monai"](), torch.float64, 1.0),
        (LOSSES[name](), torch.float16, SCALE),
    ):
        leaf = logits.detach().to(dtype).requires_grad_()
        with torch.autocast("cuda", dtype=torch.float16, enabled=dtype == torch.float16):
            value = loss(leaf, label)
        (scale * value).backward()
        results.append((value.item(), leaf.grad.double() / scale))
    (expected, exact), (value, gradient) = results
    far = (gradient - exact).abs().max() / exact.abs().max()
    return {"value": abs(value / expected - 1), "gradient": far.item()}


def bandwidth() -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / float(times_ms(lambda: target.copy_(source))["ms_median"]) * 1e3


def sweep(num_classes: int, shape: tuple[int, ...], layout: str) -> list[list]:
    """Each way of dividing the work, fastest first: its kernel, `Tiling` and time."""
    logits, label = data(num_classes, shape, layout)
    is_last = layout == "channels_last"
    kept, found = dict(fused_loss.TILINGS), []
    leaf = logits.detach().requires_grad_()
    for kernel in ("sums", "gradient"):
        for row in itertools.product((9, 18, 36), (2, 4, 8), (4, 8, 16, 32)):
            fused_loss.TILINGS[kernel, is_last] = fused_loss.Tiling(*row)
            try:
                if kernel == "sums":
                    work = lambda: fused_loss.sums(logits, label)  # noqa: E731
                else:
                    value = fused_loss.sums(leaf, label)
                    rates = torch.ones_like(value)
                    work = lambda v=value, r=rates: torch.autograd.grad(  # noqa: E731
                        v, leaf, r, retain_graph=True
                    )
                found.append([kernel, *row, times_ms(work, 12)["ms_median"]])
            except Exception as fault:  # a way that does not compile is none
                print(kernel, row, type(fault).__name__)
            fused_loss.TILINGS.update(kept)
    return sorted(found, key=lambda one: (one[0], one[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/gpu_loss.json")
    parser.add_argument("--cases", default="")
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    speed = bandwidth()
    result: dict = {**machine.facts(), "copy_GB_per_s": round(speed / 1e9)}
    for (case, (num_classes, shape)), layout in itertools.product(CASES.items(), LAYOUTS):
        if arguments.cases not in f"{case}, {layout}":
            continue
        if arguments.sweep:
            for row in sweep(num_classes, shape, layout):
                print(f"{case}, {layout}:", *row, flush=True)
            continue
        voxels = shape[0] * shape[1] * shape[2] * shape[3]
        moved = voxels * (3 * num_classes * 2 + 2 * 8)
        entry: dict = {"floor_ms": round(moved / speed * 1e3, 4)}
        for name in LOSSES:
            entry[name] = measured(name, num_classes, shape, layout)
            entry[name]["error"] = error(name, num_classes, layout)
            torch.cuda.empty_cache()
        result[f"{case}, {layout}"] = entry
        print(f"{case}, {layout}:", json.dumps(entry), flush=True)
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
