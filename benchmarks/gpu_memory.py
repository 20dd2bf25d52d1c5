"""Peak reserved memory of training on a CUDA card, and the formula of the plan beside it.

    python -m benchmarks.gpu_memory [--output FILE.json] [--workers 8] [--limit_s 600]
    python -m benchmarks.gpu_memory --fit [--output FILE.json]

Each configuration of a fixed draw takes six steps of the real trainer on noise: three without a
graph, then its capture and replays. The first `NUM_FITTED` of them fit the numbers of
`pipeline.data.memory`; the others are held out. `--fit` needs no card: it fits the numbers, and
compares those that are in force with the readings.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import multiprocessing
import random
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import SimpleInferer
from scipy.optimize import nnls

from benchmarks import machine
from networks.dense_unet import DenseUNet
from pipeline.data.memory import FLOAT32, RESERVE, TrainingStep
from pipeline.precision import Precision
from pipeline.training.loss import SegmentationLoss
from pipeline.training.schedule import warmup_cosine
from pipeline.training.trainer import MixedPrecisionTrainer

Config = dict[str, Any]
NUM_FITTED, NUM_HELD_OUT = 45, 20
NUM_STEPS = 6  # the fourth is captured
STRIDES = [
    [[2, 2, 2]] * 2, [[2, 2, 2]] * 3, [[2, 2, 2]] * 4, [[2, 2, 1], [2, 2, 2]],
    [[2, 2, 1], [2, 2, 2], [2, 2, 2]], [[2, 2, 1], [2, 2, 1], [2, 2, 2], [2, 2, 2]],
    [[1, 2, 2], [2, 2, 2], [2, 2, 2]],
]  # fmt: skip
TICKETS_BYTES = 66e9  # that configurations at the same time may take together


def configurations() -> list[Config]:
    """All that are measured: first those that were looked at, then those held out."""
    return drawn(0, NUM_FITTED) + drawn(1, NUM_HELD_OUT)


def drawn(seed: int, number: int) -> list[Config]:
    """Some of a draw that knows nothing of what it is to test."""
    rng = random.Random(seed)
    found: list[Config] = []
    while len(found) < number:
        config: Config = {
            "mode": "float32" if rng.random() < 0.25 else "float16",
            "roi_size": [8 * rng.randint(4, 20) for _ in range(3)],
            "batch_size": rng.randint(1, 6),
            "base_channels": rng.choice([16, 24, 32, 48]),
            "num_classes": round(math.exp(rng.uniform(math.log(2), math.log(100)))),
            "strides": rng.choice(STRIDES),
            "norm": rng.choice(["batch", "instance"]),
            "recompute_levels": rng.choice([0, 0, 1, 2]),
        }
        scale = [rng.uniform(1, 2) for _ in range(3)]
        config["volume"] = [round(n * s) for n, s in zip(config["roi_size"], scale, strict=True)]
        most = 8e9 if config["mode"] == "float32" else 30e9
        reduction = np.prod(config["strides"], axis=0)
        whole = all(
            n % r == 0 and n >= 2 * r for n, r in zip(config["roi_size"], reduction, strict=True)
        )
        if whole and 0.5e9 < rough_bytes(config) < most:
            found.append(config)
    return found


def rough_bytes(config: Config) -> float:
    """Nearly what a step takes, of an earlier fit with nothing recomputed."""
    voxels = config["batch_size"] * math.prod(config["roi_size"])
    per_channel, per_class = (60, 18) if config["mode"] == "float32" else (37, 14)
    return voxels * (
        1.4 * per_channel * config["base_channels"] + per_class * config["num_classes"]
    )


class Noise:
    """A loader of the same batch again and again."""

    def __init__(self, config: Config) -> None:
        rng = torch.Generator().manual_seed(0)
        shape = config["batch_size"], 1, *config["roi_size"]
        label = torch.randint(0, config["num_classes"], shape, generator=rng, dtype=torch.uint8)
        image, seed = torch.randn(shape, generator=rng), torch.zeros(shape[0], dtype=torch.int64)
        self.batch = {"image": image, "label": label, "seed": seed}
        self.start, self.sampler = 0, self

    def __iter__(self):
        return iter([dict(self.batch) for _ in range(NUM_STEPS)])

    def __len__(self) -> int:
        return NUM_STEPS


def network_of(config: Config, precision: Precision) -> torch.nn.Module:
    names = "base_channels", "strides", "norm", "recompute_levels"
    arguments = {name: config[name] for name in names}
    return precision.place(DenseUNet(1, config["num_classes"], **arguments, seed=0))


def trainer_of(config: Config, precision: Precision) -> MixedPrecisionTrainer:
    network = network_of(config, precision)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    schedule = warmup_cosine(optimizer, warmup_steps=1, max_epochs=1, steps_per_epoch=NUM_STEPS)
    return MixedPrecisionTrainer(
        precision=precision,
        max_epochs=1,
        train_data_loader=Noise(config),
        network=network,
        optimizer=optimizer,
        loss_function=SegmentationLoss(include_background=False, batch_dice=True),
        lr_scheduler=schedule,
        steps_per_epoch=NUM_STEPS,
        inferer=SimpleInferer(),
    )


def clean() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak() -> dict[str, int]:
    torch.cuda.synchronize()
    return {
        "reserved": torch.cuda.max_memory_reserved(),
        "allocated": torch.cuda.max_memory_allocated(),
    }


def measured(config: Config) -> Config:
    """Readings of one configuration, in bytes; `error` in their place if it did not fit."""
    logging.getLogger("pipeline").setLevel(logging.ERROR)
    amp = config["mode"] != FLOAT32
    found: Config = {}
    started = time.monotonic()
    try:
        clean()
        precision = Precision("cuda", amp=amp, amp_dtype=config["mode"] if amp else "auto")
        trainer = trainer_of(config, precision)
        trainer.run()
        found["train"] = peak()
        found["cuda_graph"] = trainer.describe()["effective"]["cuda_graph"]
        del trainer
    except RuntimeError as error:
        found["error"] = str(error).splitlines()[0]
    clean()
    found["seconds"] = round(time.monotonic() - started, 1)
    return found


def sweep(output: Path, workers: int, limit_s: float, configs: list[Config]) -> None:
    """Measure all, some at a time in processes of their own, as far as the card's memory goes."""
    result: Config = {**machine.facts(), "readings": []}
    started, waiting = time.monotonic(), list(enumerate(configs))
    running: dict[Future, tuple[int, float]] = {}
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    while (waiting or running) and time.monotonic() - started < limit_s:
        taken = sum(size for _, size in running.values())
        for entry in sorted(waiting, key=lambda entry: -rough_bytes(entry[1])):
            size = 1e9 + 1.5 * rough_bytes(entry[1])
            if len(running) < workers and (taken + size < TICKETS_BYTES or not running):
                waiting.remove(entry)
                running[pool.submit(measured, entry[1])] = entry[0], size
                taken += size
        for future in wait(running, 1, FIRST_COMPLETED).done:
            number, _ = running.pop(future)
            result["readings"].append({"number": number, **configs[number], **future.result()})
            print(round(time.monotonic() - started), json.dumps(result["readings"][-1]), flush=True)
            result["readings"].sort(key=lambda one: one["number"])
            output.write_text(json.dumps(result) + "\n")
    for process in multiprocessing.active_children():
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


def step_of(config: Config) -> TrainingStep:
    names = "roi_size", "batch_size", "strides", "base_channels", "num_classes"
    levels = min(config["recompute_levels"], len(config["strides"]))
    return TrainingStep(*(config[n] for n in names), 1, levels, config["mode"])


def compared(result: Config) -> Config:
    """Readings with estimates, and how far these are off in both parts of the draw."""
    readings = [{**one, "estimate": round(step_of(one).estimate_bytes())}
                for one in result["readings"]]  # fmt: skip
    parts = {"fitted": readings[:NUM_FITTED], "held_out": readings[NUM_FITTED:]}
    return {
        **result,
        "readings": readings,
        "fitted_numbers": fitted(parts["fitted"]),
        "relative_errors": {name: _summary(part) for name, part in parts.items()},
    }


def fitted(readings: list[Config]) -> list[float]:
    """The numbers of `pipeline.data.memory`, in their order, by least relative squares."""
    rows = []
    for one in readings:
        known, activations, logits = step_of(one).terms()
        is_full = one["mode"] == FLOAT32
        reserved = one["train"]["reserved"]
        terms = [activations * is_full, activations * (not is_full), logits, 1e7, reserved - known]
        rows.append(np.array(terms) / reserved)
    table = np.array(rows)
    numbers, _ = nnls(table[:, :4], table[:, 4])
    return [round(float(number), 2) for number in numbers * [1, 1, 1, 1e7]]


def _summary(readings: list[Config]) -> dict[str, float]:
    errors = np.array([one["estimate"] / one["train"]["reserved"] - 1 for one in readings])
    return {
        "median": round(float(np.median(np.abs(errors))), 3),
        "lowest": round(float(errors.min()), 3),
        "highest": round(float(errors.max()), 3),
        "share_above_reserve": float(np.mean((1 + RESERVE) * (1 + errors) < 1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/gpu_memory.json")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--limit_s", type=float, default=600)
    parser.add_argument("--fit", action="store_true")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    if not arguments.fit:
        sweep(output, arguments.workers, arguments.limit_s, configurations())
    result = compared(json.loads(output.read_text()))
    rows = result.pop("readings")
    text = json.dumps(result, indent=1)[:-2] + ',\n "readings": [\n  '
    output.write_text(text + ",\n  ".join(map(json.dumps, rows)) + "\n ]\n}\n")
    print(json.dumps({key: result[key] for key in ("fitted_numbers", "relative_errors")}, indent=1))


if __name__ == "__main__":
    main()
