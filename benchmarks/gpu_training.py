"""Mixed precision on a CUDA card: step time beside stock MONAI's.

    python -m benchmarks.gpu_training [--output FILE.json]

The trainer's whole step (forward, loss, backward, unscale, clip, AdamW, one host wait) on fixed
batches of two, 32 base channels, of 14 classes and 128^3 and of 70 classes and 128x96x256: float16
with and without a CUDA graph, bfloat16, float32 (TF32 off and on), and stock MONAI's
SupervisedTrainer with `amp=True` around the same network.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.inferers import SimpleInferer
from monai.losses import DiceCELoss
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import machine
from benchmarks.stock import torchs_own_layers
from networks.dense_unet import DenseUNet
from pipeline.precision import Precision
from pipeline.training.loss import SegmentationLoss
from pipeline.training.schedule import warmup_cosine
from pipeline.training.trainer import MixedPrecisionTrainer

WARM_UP, MEASURED = 8, 24
REAL = [
    "--group_pattern", "pairs", "--spacing", "[1, 1, 1]", "--roi_size", "[48, 64, 48]",
    "--base_channels", "32", "--strides", "[2, 2, 2]", "--network_def#norm", "batch",
    "--flip_axes", "auto", "--num_workers", "12", "--log_every", "1",
]  # fmt: skip


class FixedBatches:
    """The same few batches again and again, already on the card; only the seed stays behind."""

    def __init__(self, num_classes: int, size: tuple[int, ...], device: torch.device) -> None:
        rng = torch.Generator().manual_seed(0)
        self.batches = [
            {
                "image": torch.randn(2, 1, *size, generator=rng).to(device),
                "label": torch.randint(0, num_classes, (2, 1, *size), generator=rng).to(device),
                "seed": torch.tensor([n, n]),
            }
            for n in range(2)
        ]
        self.sampler, self.start = self, 0

    def __iter__(self):
        return iter([self.batches[n % 2] for n in range(len(self))])

    def __len__(self) -> int:
        return WARM_UP + MEASURED


def step_time(kind: str, num_classes: int = 14, size: tuple[int, ...] = (128, 128, 128)) -> dict:
    """Median, spread and peak memory of one kind of training step."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    dtype, _, graphs = kind.partition("_")
    amp = dtype in ("float16", "bfloat16")
    precision = Precision("cuda", amp=amp, amp_dtype=dtype if amp else "auto", tf32=kind == "tf32")
    network = DenseUNet(1, num_classes, seed=0)
    stock = kind.startswith("stock")
    network = network.cuda() if stock else precision.place(network)
    if kind.endswith("compiled"):
        network = torch.compile(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=not stock)
    loader, times = FixedBatches(num_classes, size, precision.device), []
    common = {
        "max_epochs": 1,
        "train_data_loader": loader,
        "network": network,
        "optimizer": optimizer,
        "inferer": SimpleInferer(),
        "train_handlers": [],
    }
    if stock:
        trainer = SupervisedTrainer(
            device=precision.device,
            loss_function=DiceCELoss(softmax=True, to_onehot_y=True),
            amp=True,
            **common,
        )
    else:
        scheduler = warmup_cosine(
            optimizer, warmup_steps=0, max_epochs=1, steps_per_epoch=len(loader)
        )
        trainer = MixedPrecisionTrainer(
            precision=precision,
            loss_function=SegmentationLoss(),
            lr_scheduler=scheduler,
            steps_per_epoch=len(loader),
            cuda_graph="none" if graphs else "auto",
            **common,
        )

    def stamp(_engine) -> None:
        torch.cuda.synchronize()
        times.append(time.perf_counter())

    trainer.add_event_handler(Events.ITERATION_COMPLETED, stamp)
    with torchs_own_layers() if stock else contextlib.nullcontext():
        trainer.run()
    steps = sorted(
        1000 * (b - a) for a, b in zip(times[WARM_UP - 1 :], times[WARM_UP:], strict=False)
    )
    return {
        "ms_median": round(statistics.median(steps), 2),
        "ms_quartiles": [round(steps[len(steps) // 4], 2), round(steps[3 * len(steps) // 4], 2)],
        "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "reserved_GB": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "skipped_steps": getattr(getattr(trainer, "progress", None), "skipped_steps", None),
    }


LIMIT_S = 600  # for one run; a hang is a failure, not a wait


def command(dataset: str, out: Path, *words: str) -> list[str]:
    return [
        sys.executable, "-m", "pipeline.run", "configs/amp.json", "--dataset_dir", dataset,
        "--output_dir", str(out), *REAL, *words,
    ]  # fmt: skip


def scalars(out: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [round(point.value, 5) for point in events.Scalars(tag)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/gpu_training.json")
    arguments = parser.parse_args()
    result: dict = {**machine.facts()}

    def keep(name: str, value: dict) -> None:
        result[name] = value
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(value)[:1500], flush=True)

    for num_classes, size in ((14, (128, 128, 128)), (70, (128, 96, 256))):
        kinds = ["stock_monai_float16", "float16", "float16_without_graph", "bfloat16"]
        kinds += ["tf32", "float32", "stock_monai_float16_compiled"] if num_classes == 14 else []
        kinds += kinds[:2]  # again: how far two readings of one thing are apart
        name = f"step_{num_classes}_classes_{'x'.join(map(str, size))}"
        keep(
            name,
            {f"{n}_{kind}": step_time(kind, num_classes, size) for n, kind in enumerate(kinds)},
        )


if __name__ == "__main__":
    main()
