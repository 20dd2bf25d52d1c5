"""What trusted precision costs and shows on a CUDA card.

    python -m benchmarks.gpu_precision DATASET_DIR [--output FILE.json]

`DATASET_DIR` is Task04_Hippocampus. Two parts:

1. The transaction's cost: a whole step (forward, loss, backward, unscale, clip, AdamW) of the
   trainer beside the same trainer reduced to the plain AMP recipe (no copy of the BatchNorm
   statistics, no largest logit, `GradScaler.step`), in turns, on fixed batches of 2 x 128^3 and of
   2 x 40 x 56 x 40, 14 classes, 32 base channels.
2. A float16 run into which one infinity is put at a known step: its `overflow.jsonl`, its replay,
   the loss scale over its first steps, and what its checkpoint holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from monai.inferers import SimpleInferer

from benchmarks import machine
from benchmarks.gpu_training import LIMIT_S, FixedBatches, command, scalars
from networks.dense_unet import DenseUNet
from pipeline.precision import Precision, StepStats
from pipeline.training.checkpoint import checkpoints, load_checkpoint
from pipeline.training.loss import SegmentationLoss
from pipeline.training.schedule import warmup_cosine
from pipeline.training.trainer import MixedPrecisionTrainer
from transforms.augment import Augment

WARM_UP, ROUNDS, STEPS = 8, 8, 12  # rounds of STEPS steps of each kind in turn
POISONED_STEP, BATCH_SIZE, TRAINED_STEPS = 50, 4, 150


class InfAugment(Augment):
    """Augmentation that puts an infinity into one voxel of given samples of the run."""

    def __init__(self, *args: Any, numbers: list[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.numbers = numbers

    def __call__(self, batch, *args, **kwargs):
        image, label = super().__call__(batch, *args, **kwargs)
        for n, number in enumerate(batch["number"].tolist()):
            if number in self.numbers:
                image[n, 0, 0, 0, 0] = float("inf")
        return image, label


class PlainTrainer(MixedPrecisionTrainer):
    """The same step as the AMP recipe of torch's documentation takes it."""

    def _iteration(self, engine, batchdata):
        self.optimizer.zero_grad(set_to_none=True)
        self.group = [batchdata]
        output = self.state.output = {}
        loss = self.forward(batchdata, self.precision.autocast())
        scaler = self.precision.scaler
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.grad_clip)
        if scaler:
            scaler.step(self.optimizer)  # waits for the device once
            scaler.update()
        elif norm.isfinite():  # likewise
            self.optimizer.step()
        self.lr_scheduler.step()
        self.last_step = StepStats(True, 0.0, 0.0, 1.0, 0.0)
        return output


def make_trainer(kind: type[MixedPrecisionTrainer], mode: str) -> MixedPrecisionTrainer:
    precision = Precision("cuda", amp=mode != "float32", amp_dtype=mode)
    network = precision.place(DenseUNet(1, 14, seed=0))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    return kind(
        precision=precision,
        max_epochs=1,
        train_data_loader=[],
        network=network,
        optimizer=optimizer,
        loss_function=SegmentationLoss(),
        lr_scheduler=warmup_cosine(optimizer, warmup_steps=0, max_epochs=1, steps_per_epoch=999),
        steps_per_epoch=999,
        inferer=SimpleInferer(),
    )


def transaction_cost(mode: str, size: tuple[int, int, int]) -> dict[str, Any]:
    """Median step of both kinds, and the median over rounds of their ratio."""
    trainers = {
        "plain": make_trainer(PlainTrainer, mode),
        "ours": make_trainer(MixedPrecisionTrainer, mode),
    }
    batches = FixedBatches(14, size, torch.device("cuda")).batches
    times: dict[str, list[list[float]]] = {name: [] for name in trainers}
    for trainer in trainers.values():
        for n in range(WARM_UP):
            machine.take_step(trainer, batches[n % 2])
    for round_number in range(ROUNDS):
        for name in sorted(trainers, reverse=bool(round_number % 2)):
            taken = []
            for n in range(STEPS):
                torch.cuda.synchronize()
                started = time.perf_counter()
                machine.take_step(trainers[name], batches[n % 2])
                torch.cuda.synchronize()
                taken.append(1000 * (time.perf_counter() - started))
            times[name].append(taken)
    medians = {
        name: [statistics.median(taken) for taken in rounds] for name, rounds in times.items()
    }
    ratios = sorted(a / b for a, b in zip(medians["ours"], medians["plain"], strict=True))
    return {
        "plain_ms": round(statistics.median(medians["plain"]), 3),
        "ours_ms": round(statistics.median(medians["ours"]), 3),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_min_max": [round(ratios[0], 4), round(ratios[-1], 4)],
        "skipped_steps": trainers["ours"].progress.skipped_steps,
    }


def poisoned_run(dataset: str, out: Path) -> dict[str, Any]:
    """Part 2."""
    overlay = out / "poison.json"
    poisoned = BATCH_SIZE * (POISONED_STEP - 1) + 1  # the second sample of the step
    changes = {"_target_": "benchmarks.gpu_precision.InfAugment", "numbers": [poisoned]}
    overlay.write_text(json.dumps({f"train#augment#{k}": v for k, v in changes.items()}))
    words = command(
        dataset, out / "run", "--batch_size", str(BATCH_SIZE),
        "--steps_per_epoch", str(TRAINED_STEPS), "--max_epochs", "1", "--val_interval", "1",
        "--underflow_every", "25", "--allow", "benchmarks.gpu_precision.InfAugment",
    )  # fmt: skip
    words.insert(words.index("configs/amp.json") + 1, str(overlay))
    subprocess.run(words, check=True, timeout=LIMIT_S)
    replayed = subprocess.run(
        [*words, "--replay_step", str(POISONED_STEP)],
        check=True, timeout=LIMIT_S, capture_output=True, text=True,
    ).stdout  # fmt: skip
    content = load_checkpoint(checkpoints(out / "run/checkpoints")[-1])
    lines = (out / "run/overflow.jsonl").read_text().splitlines()
    return {
        "poisoned_step": POISONED_STEP,
        "poisoned_sample": poisoned,
        "overflow": [json.loads(line) for line in lines],
        "replay": json.loads(replayed[replayed.index("{") :]),
        "loss_scale_first_100_steps": scalars(out / "run", "weight_update/loss_scale")[:100],
        "max_abs_logit_every_25_steps": scalars(out / "run", "weight_update/max_abs_logit")[::25],
        "underflow_fraction_every_25_steps": scalars(
            out / "run", "weight_update/underflow_fraction"
        ),
        "summary": json.loads((out / "run/summary.json").read_text()),
        "checkpoint": {
            "keys": sorted(content),
            "scaler": content["scaler"],
            "progress": content["progress"],
            "lr_scheduler_last_epoch": content["lr_scheduler"]["last_epoch"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset_dir")
    parser.add_argument("--output", default="benchmarks/gpu_precision.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {**machine.facts()}

    def keep(name: str, value: dict[str, Any]) -> None:
        result[name] = value
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(value)[:2500], flush=True)

    modes = ("float16", "bfloat16")
    sizes = ((128, 128, 128), (40, 56, 40))
    costs = {f"{mode} {size}": transaction_cost(mode, size) for size in sizes for mode in modes}
    keep("transaction_cost", costs)
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        keep("poisoned_run", poisoned_run(arguments.dataset_dir, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
