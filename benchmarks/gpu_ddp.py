"""What several ranks cost and give on CUDA cards.

    torchrun --standalone --nproc_per_node=N -m benchmarks.gpu_ddp [--output FILE.json]

Whole optimizer steps of the trainer (forward, loss, backward, unscale, clip, AdamW) on fixed
patches of 128^3, 14 classes, 32 base channels, batch norm, float16, two patches for each rank.

With one rank: the trainer with a replica (DistributedDataParallel, SyncBatchNorm) beside the same
trainer without one, in turns in one process: the overhead of the machinery, which has nothing to
send. With several: the step with a replica beside what each card does for itself without one, with
the bytes that pass through the all-reduce, so that a reader can judge a link of their own. With
SyncBatchNorm (`replica`) and, to tell it apart, with batch norms that are each rank's own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from monai.inferers import SimpleInferer

from benchmarks import machine
from benchmarks.gpu_training import FixedBatches
from networks.dense_unet import DenseUNet
from pipeline import distributed
from pipeline.distributed import DistributedSettings
from pipeline.precision import Precision
from pipeline.training.loss import SegmentationLoss
from pipeline.training.schedule import warmup_cosine
from pipeline.training.trainer import MixedPrecisionTrainer

ROUNDS, STEPS = 10, 12  # rounds of STEPS steps of each kind in turn
KINDS = ("without", "replica", "replica_own_statistics")


def make_trainer(group: DistributedSettings | None) -> MixedPrecisionTrainer:
    precision = Precision("cuda", cudnn_benchmark=True)
    network = precision.place(DenseUNet(1, 14, norm="batch", seed=0))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    return MixedPrecisionTrainer(
        precision=precision,
        max_epochs=1,
        train_data_loader=[],
        network=network,
        optimizer=optimizer,
        loss_function=SegmentationLoss(batch_dice=True),
        lr_scheduler=warmup_cosine(optimizer, warmup_steps=0, max_epochs=1, steps_per_epoch=999),
        steps_per_epoch=999,
        replica=group and group.replica(network),
        inferer=SimpleInferer(),
    )


def taken(trainer: MixedPrecisionTrainer, batches: list[Any]) -> list[float]:
    """Milliseconds of `STEPS` steps, each begun by all ranks at once."""
    times = []
    for n in range(STEPS):
        torch.cuda.synchronize()
        dist.barrier()
        started = time.perf_counter()
        machine.take_step(trainer, batches[n % 2])
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return times


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, the trainer's own collectives are those of a single process."""
    before = distributed.size, distributed.rank
    distributed.size, distributed.rank = (lambda: 1), (lambda: 0)
    try:
        yield
    finally:
        distributed.size, distributed.rank = before


def all_reduced(trainer: MixedPrecisionTrainer, batches: list[Any]) -> dict[str, int]:
    """Calls and bytes of one step's all-reduces, counted where they are made.

    Those of SyncBatchNorm are gatherings of another kind and are not among them.
    """
    counted, original = {"calls": 0, "bytes": 0}, dist.all_reduce

    def count(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counted["calls"] += 1
        counted["bytes"] += tensor.numel() * tensor.element_size()
        return original(tensor, *args, **kwargs)

    dist.all_reduce = count
    try:
        machine.take_step(trainer, batches[0])
    finally:
        dist.all_reduce = original
    return counted


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    distributed.join()
    group = DistributedSettings("cuda")
    group.enter()
    groups = None, group, DistributedSettings("cuda", sync_batch_norm=False)
    trainers = {kind: make_trainer(each) for kind, each in zip(KINDS, groups, strict=True)}
    batches = FixedBatches(14, (128, 128, 128), trainers["replica"].precision.device).batches
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def measure(kind: str) -> list[float]:
        with alone() if kind == "without" else contextlib.nullcontext():
            return taken(trainers[kind], batches)

    for kind in KINDS:
        measure(kind)
    for round_number in range(ROUNDS):
        for kind in KINDS[:: -1 if round_number % 2 else 1]:
            times[kind].append(statistics.median(measure(kind)))
    ratios = {
        kind: sorted(b / a for a, b in zip(times["without"], times[kind], strict=True))
        for kind in KINDS[1:]
    }
    result = {
        "machine": machine.facts(),
        "what": __doc__,
        "process_group": group.describe(),
        "patches_per_rank": 2,
        "step_ms": {kind: round(statistics.median(times[kind]), 3) for kind in KINDS},
        "ratio_median": {k: round(statistics.median(v), 4) for k, v in ratios.items()},
        "ratio_min_max": {k: [round(v[0], 4), round(v[-1], 4)] for k, v in ratios.items()},
        "all_reduced_per_step": all_reduced(trainers["replica"], batches),
        "skipped_steps": trainers["replica"].progress.skipped_steps,
    }
    if distributed.is_main():
        print(json.dumps(result, indent=2))
        if output:
            output.write_text(json.dumps(result, indent=2) + "\n")
    distributed.destroy()


if __name__ == "__main__":
    main()
