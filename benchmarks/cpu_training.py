"""Training on a CPU beside stock MONAI: the step, in turns, and the default run.

    python -m benchmarks.cpu_training [--output FILE.json] [--rounds N] [--runs N]

The step is that of `gpu_training`: the trainer's whole step on fixed batches. Each reading is of a
process of its own, because what the trainer tells the C library's allocator stays so; ours and
stock's take turns, and the ratio is of neighbours. Stock is SupervisedTrainer with DiceCELoss, in
the default layout, with the same weights; its network has torch's own InstanceNorm3d and
interpolation. The run is `pipeline.run configs/amp.json` without final scores and report, beside
`cpu_stock_run`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.inferers import SimpleInferer
from monai.losses import DiceCELoss
from torch import nn

from benchmarks import machine
from networks import dense_unet, fused_layers
from pipeline.precision import Precision
from pipeline.training.loss import SegmentationLoss
from pipeline.training.schedule import warmup_cosine
from pipeline.training.trainer import MixedPrecisionTrainer

WARM_UP = 3
CASES: dict[str, dict[str, Any]] = {
    "default_run": {
        "size": (56, 48, 28), "classes": 6, "steps": 16,
        "network": {
            "base_channels": 8, "strides": [[2, 2, 1], [2, 2, 2], [2, 2, 2]], "norm": "instance",
        },
    },
    "32_channels_48": {
        "size": (48, 48, 48), "classes": 14, "steps": 5,
        "network": {"base_channels": 32, "norm": "batch"},
    },
}  # fmt: skip


class FixedBatches:
    """The same two batches again and again."""

    def __init__(self, classes: int, size: tuple[int, ...], steps: int) -> None:
        rng = torch.Generator().manual_seed(0)
        self.batches = [
            {
                "image": torch.randn(2, 1, *size, generator=rng),
                "label": torch.randint(0, classes, (2, 1, *size), generator=rng),
                "seed": torch.tensor([n, n]),
            }
            for n in range(2)
        ]
        self.steps, self.sampler, self.start = steps, self, 0

    def __iter__(self):
        return iter([self.batches[n % 2] for n in range(self.steps)])

    def __len__(self) -> int:
        return self.steps


def with_torch_alone() -> None:
    """Let the network be made of torch's own layers, as it was in the default layout."""
    dense_unet.NORMS["instance"] = nn.InstanceNorm3d
    fused_layers.upsample = lambda x, size: F.interpolate(
        x, size=size, mode="trilinear", align_corners=False
    )


def step_times(case: str, kind: str) -> dict[str, Any]:
    """Seconds of each step of one process, its processor time and peak memory."""
    about = CASES[case]
    if kind == "stock":
        with_torch_alone()
    precision = Precision("cpu", amp=kind == "bfloat16", amp_dtype="bfloat16")
    network: Any = dense_unet.DenseUNet(1, about["classes"], seed=0, **about["network"])
    if kind != "stock":
        network = precision.place(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    loader = FixedBatches(about["classes"], about["size"], WARM_UP + about["steps"])
    common: dict[str, Any] = {
        "max_epochs": 1, "train_data_loader": loader, "network": network, "optimizer": optimizer,
        "inferer": SimpleInferer(), "train_handlers": [],
    }  # fmt: skip
    trainer: Any
    if kind == "stock":
        loss = DiceCELoss(softmax=True, to_onehot_y=True)
        trainer = SupervisedTrainer(device=precision.device, loss_function=loss, **common)
    else:
        scheduler = warmup_cosine(
            optimizer, warmup_steps=0, max_epochs=1, steps_per_epoch=len(loader)
        )
        trainer = MixedPrecisionTrainer(
            precision=precision, loss_function=SegmentationLoss(), lr_scheduler=scheduler,
            steps_per_epoch=len(loader), **common,
        )  # fmt: skip
    wall, processor = [], []

    def stamp(_engine: Any) -> None:
        wall.append(time.perf_counter())
        processor.append(time.process_time())

    trainer.add_event_handler(Events.ITERATION_COMPLETED, stamp)
    trainer.run()

    def between(times: list[float]) -> list[float]:
        return [b - a for a, b in zip(times[WARM_UP - 1 :], times[WARM_UP:], strict=False)]

    return {
        "wall_s": statistics.median(between(wall)),
        "processor_s": statistics.median(between(processor)),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(median, 3), "quartiles": [round(low, 3), round(high, 3)]}  # type: ignore[dict-item]


def in_turns(case: str, rounds: int) -> dict[str, Any]:
    kinds = ("stock", "ours", "bfloat16")
    found: dict[str, list[dict]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            words = [sys.executable, "-m", "benchmarks.cpu_training", "--one", case, kind]
            found[kind].append(json.loads(subprocess.check_output(words).splitlines()[-1]))
    result: dict[str, Any] = {
        kind: {key: spread([one[key] for one in readings]) for key in readings[0]}
        for kind, readings in found.items()
    }
    for kind in kinds[1:]:
        for key in ("wall_s", "processor_s"):
            pairs = zip(found["stock"], found[kind], strict=True)
            result[f"stock_over_{kind}_{key}"] = spread([a[key] / b[key] for a, b in pairs])
    return result


def run_times(num_runs: int) -> dict[str, Any]:
    """Whole commands in turns: start of Python, preprocessing, training, validation."""
    found: dict[str, list[float]] = {"ours": [], "stock_0_workers": [], "stock_2_workers": []}
    with tempfile.TemporaryDirectory() as folder:
        for n in range(num_runs):
            ours = [
                "-m", "pipeline.run", "configs/amp.json", "--output_dir", f"{folder}/{n}",
                "--cache_dir", f"{folder}/cache{n}", "--final_scores", "false", "--report", "false",
            ]  # fmt: skip
            stock = ["-m", "benchmarks.cpu_stock_run"]
            for name, words in (
                ("ours", ours),
                ("stock_0_workers", [*stock, "0"]),
                ("stock_2_workers", [*stock, "2"]),
            ):
                start = time.perf_counter()
                subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
                found[name].append(time.perf_counter() - start)
                print(name, round(found[name][-1], 1), flush=True)
    result: dict[str, Any] = {name: spread(times) for name, times in found.items()}
    for name in ("stock_0_workers", "stock_2_workers"):
        pairs = zip(found[name], found["ours"], strict=True)
        result[f"{name}_over_ours"] = spread([a / b for a, b in pairs])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/cpu_training.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "KIND"))
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(step_times(*arguments.one)))
        return
    result: dict[str, Any] = {
        **machine.facts(), "device": machine.processor(), "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(), "rounds": arguments.rounds,
    }  # fmt: skip

    def keep(name: str, value: dict) -> None:
        result[name] = value
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(value), flush=True)

    for case in CASES:
        keep(case, in_turns(case, arguments.rounds))
    if arguments.runs > 1:
        keep("run", run_times(arguments.runs))


if __name__ == "__main__":
    main()
