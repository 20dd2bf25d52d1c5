"""Peak reserved memory of training, validation and prediction on a CUDA card, and its prediction.

    python -m benchmarks.gpu_memory [--output FILE.json] [--workers 8] [--limit_s 600]
    python -m benchmarks.gpu_memory --predict [--output FILE.json]

Each configuration of a fixed draw takes six steps of the real trainer (three without a graph, then
its capture and replays) on noise, then, with the trainer still there, one validation by sliding
windows, then, alone, one prediction. The first `NUM_FITTED` of them were looked at when the terms
of `pipeline.data.memory` were written; the others are held out. `--predict` needs no card: it puts
what is predicted now beside what was read.
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
from monai.data import MetaTensor, list_data_collate
from monai.inferers import SimpleInferer

from benchmarks import machine
from networks.dense_unet import DenseUNet
from pipeline.data.memory import Process, run_bytes
from pipeline.data.step_memory import Net
from pipeline.data.window_memory import Windows
from pipeline.precision import Precision
from pipeline.prediction.segmenter import Segmenter, SlidingWindowLabels
from pipeline.prediction.sliding_window import SlidingWindow
from pipeline.training.loss import SegmentationLoss
from pipeline.training.schedule import warmup_cosine
from pipeline.training.trainer import MixedPrecisionTrainer

Config = dict[str, Any]
NUM_FITTED, NUM_HELD_OUT = 45, 20
PHASES = ("train", "validate", "predict")
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


def volume_of(shape: list[int], device: str) -> MetaTensor:
    meta = {"original_affine": np.eye(4), "spatial_shape": np.array(shape)}
    voxels = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0)).to(device)
    return MetaTensor(voxels, affine=torch.eye(4, dtype=torch.float64), meta=meta)


def measured(config: Config) -> Config:
    """Readings of one configuration, in bytes; `error` in their place if it did not fit.

    Of `train`, `validate` and `predict` the peaks; of `rest` what is there between the first two.
    """
    logging.getLogger("pipeline").setLevel(logging.ERROR)
    amp = config["mode"] != "float32"
    found: Config = {}
    started = time.monotonic()
    try:
        clean()
        precision = Precision("cuda", amp=amp, amp_dtype=config["mode"] if amp else "auto")
        trainer = trainer_of(config, precision)
        trainer.run()
        found["train"] = peak()
        found["cuda_graph"] = trainer.describe()["effective"]["cuda_graph"]
        clean()
        found["rest"] = peak()
        arguments = config["roi_size"], config["num_classes"]
        inferer = SlidingWindowLabels(precision, *arguments)
        trainer.network.eval()
        batch = list_data_collate([{"image": volume_of(config["volume"], "cuda")}])
        inferer(batch["image"], trainer.network)
        del batch
        found["validate"] = peak()
        del trainer, inferer
        clean()
        found["left"] = torch.cuda.memory_reserved()
        network = network_of(config, precision)
        Segmenter([network], precision, SlidingWindow(*arguments))(
            volume_of(config["volume"], "cpu")
        )
        found["predict"] = peak()
    except RuntimeError as error:
        found["error"] = str(error).splitlines()[0]
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


def predicted(config: Config) -> dict[str, int]:
    """What is expected of a configuration, for each of `PHASES`, in bytes."""
    names = "strides", "base_channels", "num_classes"
    net = Net(*(config[n] for n in names), 1, config["recompute_levels"], config["mode"])
    windows = Windows(config["roi_size"], config["num_classes"])
    run = run_bytes(net, config["batch_size"], windows, config["volume"])
    alone = Process(net)
    alone.predict(windows, config["volume"])
    return dict(zip(PHASES, (*run.values(), alone.peak), strict=True))


def compared(result: Config) -> Config:
    """Readings with predictions, and the relative errors of both parts of the draw."""
    readings = [{**one, "predicted": predicted(one)} for one in result["readings"]]
    errors = {}
    for part in ("fitted", "held_out"):
        here = [one for one in readings if (one["number"] < NUM_FITTED) == (part == "fitted")]
        errors[part] = {
            phase: _summary([one["predicted"][phase] / one[phase]["reserved"] - 1 for one in here])
            for phase in PHASES
        }
    return {**result, "readings": readings, "relative_errors": errors}


def _summary(errors: list[float]) -> dict[str, float]:
    sizes = np.abs(errors)
    return {"median": round(float(np.median(sizes)), 4), "max": round(float(sizes.max()), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/gpu_memory.json")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--limit_s", type=float, default=600)
    parser.add_argument("--predict", action="store_true")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    if not arguments.predict:
        sweep(output, arguments.workers, arguments.limit_s, configurations())
    result = compared(json.loads(output.read_text()))
    rows = result.pop("readings")
    text = json.dumps(result, indent=1)[:-2] + ',\n "readings": [\n  '
    output.write_text(text + ",\n  ".join(map(json.dumps, rows)) + "\n ]\n}\n")
    print(json.dumps(result["relative_errors"], indent=1))


if __name__ == "__main__":
    main()
