"""The whole training loop on a card, beside the bare step and stock MONAI.

    python -m benchmarks.gpu_loop --data DATASET_DIR [--batch_size 8] [--output FILE.json]

Task04_Hippocampus, crops of 48x64x48, 32 base channels, BatchNorm, mixed precision, full
augmentation. In turns, in one process:

  ours   the trainer of configs/amp.json with its loader, augmentation and all its handlers
  bare   network, loss, backward pass, clipping and AdamW with one wait, on batches on the card,
         replayed as a graph as ours is
  stock  MONAI's CacheDataset, CPU transforms, DataLoader and SupervisedTrainer with amp=True

A round of each has its first steps left out; times are from one step's wait for the device to the
next one's. `--profile FILE` adds a round of ours of which 30 steps are profiled.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai import transforms as mt
from monai.data import CacheDataset, DataLoader
from monai.engines import SupervisedTrainer
from monai.inferers import SimpleInferer
from monai.losses import DiceCELoss
from torch.utils.data import RandomSampler

from benchmarks import machine
from benchmarks.gpu_training import REAL
from benchmarks.stock import torchs_own_layers
from pipeline.config.command_line import CommandParser
from pipeline.config.compose import compose_located
from pipeline.config.keys import KEYS
from pipeline.lifecycle.workflow import build, make_parser
from pipeline.precision import Precision
from pipeline.training.graph import StepGraph
from pipeline.training.loss import SegmentationLoss
from pipeline.training.trainer import MixedPrecisionTrainer, StepEvents

FIXED, PROFILED = 4, 30  # batches of the bare step; steps
TINY = {"roi_size": [16, 16, 16], "base_channels": 4, "preflight": "off", "num_workers": 0}


def overrides_of(words: list[str]) -> dict[str, Any]:
    """The values of a command line."""
    return dict(CommandParser("", None, keys=KEYS).parse(words).overrides)


class Ours:
    """Rounds of the real trainer; each is an epoch, after which it is given another."""

    def __init__(self, overrides: dict[str, Any]) -> None:
        parser = make_parser(compose_located(["configs/amp.json"], overrides))
        parser.evaluate("initialize")
        self.lifecycle = build(parser, "lifecycle")
        self.trainer: MixedPrecisionTrainer = build(parser, "train::trainer")
        self.trainer.add_event_handler(StepEvents.STEP_COMPLETED, lambda _: self.after_step())
        self.times: list[float] = []
        self.profiler: Any = None
        self.profiled = range(0)

    def after_step(self) -> None:
        self.times.append(time.perf_counter())
        if self.profiler and len(self.times) == self.profiled.start:
            self.profiler.start()
        if self.profiler and len(self.times) == self.profiled.stop:
            self.profiler.stop()

    def __call__(self) -> list[float]:
        self.times = []
        self.trainer.run()
        self.trainer.state.max_epochs += 1
        return self.times

    def profile(self, warm_up: int, steps: int, file: str) -> None:
        cuda = [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        activities = [torch.profiler.ProfilerActivity.CPU, *cuda]
        self.profiler = torch.profiler.profile(activities=activities)
        self.profiled = range(warm_up, min(warm_up + PROFILED, steps))
        self()
        averages, self.profiler = self.profiler.key_averages(), None
        tables = [averages.table(sort_by="self_cpu_time_total", row_limit=40)]
        if cuda:
            tables.append(averages.table(sort_by="self_cuda_time_total", row_limit=40))
        Path(file).write_text(f"{len(self.profiled)} steps\n" + "\n".join(tables))


class Bare:
    """The same step on batches that are on the device already, and nothing else."""

    def __init__(self, trainer: MixedPrecisionTrainer, steps: int) -> None:
        now = trainer.precision
        self.precision = Precision(**now.requested)
        self.network = self.precision.place(copy.deepcopy(trainer.network)).train()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, fused=True)
        self.loss_function, self.steps = SegmentationLoss(), steps
        cuda = self.precision.device.type == "cuda"
        self.work = StepGraph(self._work, self.network) if cuda else self._work
        loader: Any = trainer.data_loader
        loader.sampler.start = 0
        batches = itertools.islice(loader, FIXED)
        self.batches = [trainer.prepare_batch(b, now.device, True) for b in batches]

    def _work(self, image: torch.Tensor, label: torch.Tensor) -> tuple[None, torch.Tensor]:
        with self.precision.autocast():
            loss = self.loss_function(self.network(image), label)
        self.precision.backward(loss)
        return None, loss.detach()

    def __call__(self) -> list[float]:
        times, zero = [], torch.zeros((), device=self.precision.device)
        for _, (image, label) in zip(
            range(self.steps), itertools.cycle(self.batches), strict=False
        ):
            self.optimizer.zero_grad(set_to_none=True)
            _, loss = self.work(image, label)
            self.precision.step(self.optimizer, loss, zero, zero, grad_clip=12.0)
            times.append(time.perf_counter())
        return times


def stock_transforms(roi: Sequence[int]) -> tuple[list, list]:
    """What MONAI's tutorials do once and each time, with our probabilities and ranges."""
    both, modes = ["image", "label"], ["bilinear", "nearest"]
    once = [
        mt.LoadImaged(both, ensure_channel_first=True),
        mt.Orientationd(both, axcodes="RAS"),
        mt.Spacingd(both, pixdim=(1, 1, 1), mode=modes),
        mt.NormalizeIntensityd("image", channel_wise=True),
        mt.SpatialPadd(both, roi),
    ]
    turn, scale = 0.5236, (0.43, 0.4)  # MONAI's scale is of coordinates: 1/0.7 and 1/1.4
    each = [
        mt.RandCropByPosNegLabeld(both, "label", roi, pos=2, neg=1, num_samples=1),
        mt.RandAffined(
            both, prob=0.36, rotate_range=(turn,) * 3, scale_range=(scale,) * 3, mode=modes,
            padding_mode="zeros", spatial_size=roi,
        ),
        *(mt.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)),
        mt.RandGaussianNoised("image", prob=0.1, std=0.1),
        mt.RandGaussianSmoothd("image", (0.5, 1), (0.5, 1), (0.5, 1), prob=0.2),
        mt.RandScaleIntensityd("image", 0.25, prob=0.15),
        mt.RandScaleIntensityFixedMeand("image", factors=0.25, preserve_range=True, prob=0.15),
        mt.RandAdjustContrastd("image", prob=0.1, gamma=(0.7, 1.5), invert_image=True),
        mt.RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
    ]  # fmt: skip
    return once, each


class Stock:
    """Rounds of MONAI's trainer over its own data path; workers stay alive between rounds."""

    def __init__(
        self, ours: Ours, steps: int, batch_size: int, roi: Sequence[int], workers: int, cases: int
    ) -> None:
        device, network = ours.trainer.precision.device, copy.deepcopy(ours.trainer.network)
        network = network.to(memory_format=torch.contiguous_format)
        once, each = stock_transforms(roi)
        keys = ("image", "label")
        data = [{k: case[k] for k in keys} for case in ours.lifecycle.cases.train[:cases]]
        data = CacheDataset(data, mt.Compose([*once, *each]), num_workers=workers, progress=False)
        drawn = RandomSampler(data, replacement=True, num_samples=batch_size * steps)
        loader = DataLoader(
            data, batch_size=batch_size, sampler=drawn, num_workers=workers,
            persistent_workers=workers > 0, pin_memory=device.type == "cuda",
        )  # fmt: skip
        self.trainer = SupervisedTrainer(
            device=device,
            max_epochs=1,
            train_data_loader=loader,
            network=network,
            optimizer=torch.optim.AdamW(network.parameters(), lr=1e-4),
            loss_function=DiceCELoss(softmax=True, to_onehot_y=True),
            inferer=SimpleInferer(),
            amp=device.type == "cuda",
            non_blocking=True,
        )
        self.times: list[float] = []
        self.trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda _: self.times.append(time.perf_counter())
        )

    def __call__(self) -> list[float]:
        self.times = []
        with torchs_own_layers():
            self.trainer.run()
        self.trainer.state.max_epochs += 1
        return self.times

    def end(self) -> None:
        """A process on a CUDA machine may hang at its end with workers alive."""
        iterator: Any = self.trainer.data_loader._iterator
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


def summary(rounds: list[list[float]], warm_up: int, batch_size: int) -> dict[str, Any]:
    """Medians and quartiles over steps, and volumes per second by round."""
    kept = [times[warm_up - 1 :] for times in rounds]
    steps = [1000 * (b - a) for times in kept for a, b in itertools.pairwise(times)]
    low, middle, high = statistics.quantiles(steps, n=4)
    rates = [batch_size * (len(times) - 1) / (times[-1] - times[0]) for times in kept]
    return {
        "volumes_per_s": round(statistics.median(rates), 1),
        "volumes_per_s_by_round": [round(rate, 1) for rate in rates],
        "ms_median": round(middle, 3),
        "ms_quartiles": [round(low, 3), round(high, 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("SEG_TEST_DATA"), help="DATASET_DIR")
    parser.add_argument("--output", default="benchmarks/gpu_loop.json")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=12, help="of stock MONAI")
    parser.add_argument("--tiny", action="store_true", help="to try it on a CPU")
    parser.add_argument("--profile", metavar="FILE", help="table of 30 steps of ours")
    parser.add_argument(
        "--option", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"),
        help="of the config, for ours: --option resident false",
    )  # fmt: skip
    given = parser.parse_args()
    if given.tiny:
        given.batch_size, given.steps, given.rounds, given.workers = 2, 6, 2, 0
    warm_up, roi = given.steps // 5 + 1, (16, 16, 16) if given.tiny else (48, 64, 48)
    result: dict[str, Any] = {**machine.facts(), "batch_size": given.batch_size, "roi_size": roi}
    with tempfile.TemporaryDirectory() as folder:
        options = [word for key, value in given.option for word in (f"--{key}", value)]
        ours = Ours(
            {
                **overrides_of(REAL),
                "dataset_dir": given.data,
                "output_dir": f"{folder}/run",
                "cache_dir": f"{folder}/cache",
                "log_every": 10,
                "batch_size": given.batch_size,
                "steps_per_epoch": given.steps,
                "max_epochs": 1,
                "val_interval": 10**6,
                **(TINY if given.tiny else {}),
                **overrides_of(options),
            }
        )
        try:
            cases = 8 if given.tiny else 10**6
            arguments = given.steps, given.batch_size, roi, given.workers, cases
            kinds: dict[str, Any] = {
                "ours": ours,
                "bare": Bare(ours.trainer, given.steps),
                "stock": Stock(ours, *arguments),
            }
            rounds: dict[str, list[list[float]]] = {name: [] for name in kinds}
            for number in range(given.rounds):
                for name in sorted(kinds, reverse=bool(number % 2)):
                    rounds[name].append(kinds[name]())
            for name, times in rounds.items():
                result[name] = summary(times, warm_up, given.batch_size)
            result["ours_to_bare"] = round(
                result["ours"]["volumes_per_s"] / result["bare"]["volumes_per_s"], 4
            )
            result["training_data"] = ours.trainer.data_loader.describe()
            result["precision"] = ours.trainer.precision.describe()["effective"]
            result["skipped_steps"] = ours.trainer.progress.skipped_steps
            if given.profile:
                ours.profile(warm_up, given.steps, given.profile)
            kinds["stock"].end()
        finally:
            ours.lifecycle.release()
    Path(given.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(main())
