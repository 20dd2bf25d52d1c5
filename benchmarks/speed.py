"""Two states of this repository side by side: a step, a window and the loop around them.

    python -m benchmarks.speed OLD_DIR NEW_DIR --output FILE.json [--rounds 10] [--device cuda]

In each round either tree is measured once, in a process of its own, and the one that went first
goes second in the next. Per tree and round: milliseconds of a training step on fixed batches (its
median), of a sliding window's volume, and of a step of `pipeline.run` with its loader, augmentation
and handlers. What counts is the median over rounds of the ratio new / old, with its range.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = {
    "cuda": {"patch": 128, "channels": 32, "volume": 256, "steps": (10, 30)},
    "cpu": {"patch": 32, "channels": 8, "volume": 48, "steps": (3, 9)},
}  # steps: that do not count, and that do
MOVED = {  # name in the new tree -> in the old one
    "pipeline.training.loss": "pipeline.training.losses",
    "pipeline.training.schedule": "pipeline.training.optimization",
}


class Stamp:
    """A handler that notes when each optimizer step ended, and writes the times at the end."""

    def __init__(self, file: str) -> None:
        self.file, self.times = Path(file), []

    def attach(self, engine: Any) -> None:
        from ignite.engine import Events

        engine.add_event_handler(Events.ITERATION_COMPLETED, self.note)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def note(self, engine: Any) -> None:
        self.times.append(time.perf_counter())

    def write(self, engine: Any) -> None:
        self.file.write_text(json.dumps(self.times))


def find(module: str, name: str) -> Any:
    """An object of the tree that is measured, under either of its names."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(MOVED[module]), name)


def intervals(times: list[float], left_out: int) -> float:
    """Median milliseconds between times, without the first ones."""
    pairs = list(itertools.pairwise(times))[left_out:]
    return statistics.median(1000 * (b - a) for a, b in pairs)


def step_ms(device: str) -> float:
    """A training step on fixed batches of two."""
    import torch
    from ignite.engine import Events
    from monai.inferers import SimpleInferer

    size = SIZES[device]
    skipped, counted = size["steps"]
    precision = find("pipeline.precision", "Precision")(
        device, amp=device == "cuda", amp_dtype="float16"
    )
    network = precision.place(
        find("networks.dense_unet", "DenseUNet")(1, 14, size["channels"], norm="batch", seed=0)
    )
    shape = (2, 1, *[size["patch"]] * 3)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.randn(shape, generator=generator).to(device),
        "label": torch.randint(0, 14, shape, generator=generator).to(device),
        "seed": torch.tensor([0, 1]),
    }

    class Batches(list):
        """Batches whose sampler is themselves, as a loader's of the old tree."""

        start = 0
        sampler = property(lambda self: self)

    loader = Batches([batch] * (skipped + counted))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    schedule = find("pipeline.training.schedule", "warmup_cosine")
    trainer_class = find("pipeline.training.trainer", "MixedPrecisionTrainer")
    names = set(inspect.signature(trainer_class).parameters)
    values = {
        "precision": precision, "max_epochs": 1, "train_data_loader": loader, "network": network,
        "optimizer": optimizer, "steps_per_epoch": len(loader),
        "loss_function": find("pipeline.training.loss", "SegmentationLoss")(),
        "lr_scheduler": schedule(
            optimizer, warmup_steps=0, max_epochs=1, steps_per_epoch=len(loader)
        ),
    }  # fmt: skip
    trainer = trainer_class(
        **{key: value for key, value in values.items() if key in names}, inferer=SimpleInferer()
    )
    times: list[float] = []

    def stamp(_engine: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    trainer.add_event_handler(Events.ITERATION_COMPLETED, stamp)
    trainer.run()
    return intervals(times, skipped)


def window_ms(device: str) -> float:
    """All windows of a volume, 14 classes, at half overlap."""
    import numpy as np
    import torch
    from monai.data import MetaTensor, list_data_collate

    size = SIZES[device]
    precision = find("pipeline.precision", "Precision")(
        device, amp=device == "cuda", amp_dtype="float16"
    )
    network = precision.place(
        find("networks.dense_unet", "DenseUNet")(1, 14, size["channels"], norm="batch", seed=0)
    ).eval()
    segmenter = find("pipeline.prediction.segmenter", "SlidingWindowLabels")(
        precision, [size["patch"]] * 3, 14, sw_batch_size=4, overlap=0.5
    )
    shape = 1, *[size["volume"]] * 3
    meta = {"original_affine": np.eye(4), "spatial_shape": np.array(shape[1:])}
    voxels = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    image = MetaTensor(voxels, affine=torch.eye(4, dtype=torch.float64), meta=meta)
    volume = list_data_collate([image])
    times = []
    for _ in range(14 if device == "cuda" else 3):
        begin = time.perf_counter()
        with torch.inference_mode(), precision.autocast():
            labels = segmenter(volume, network)
        if device == "cuda":
            torch.cuda.synchronize()
        del labels
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[3 if device == "cuda" else 1 :])


def loop_ms(device: str, work: Path) -> float:
    """A step of `pipeline.run` on the phantom."""
    size = SIZES[device]
    stamps, overlay = work / "stamps.json", work / "stamp.json"
    handler = {"_target_": "speed.Stamp", "file": str(stamps)}
    overlay.write_text(json.dumps({"+train#handlers": [handler]}))
    patch = [64, 64, 32] if device == "cuda" else [32, 32, 16]
    words: dict[str, Any] = {
        "bundle_root": work, "output_dir": work / "run", "cache_dir": work / "cache",
        "device": device, "roi_size": patch, "batch_size": 4, "base_channels": size["channels"],
        "spacing": [1.584, 1.584, 3.019], "strides": [2, 2], "max_epochs": 1, "val_interval": 1,
        "steps_per_epoch": (200 if device == "cuda" else 25), "final_scores": "false",
        "report": "false",
        "amp_dtype": "float16" if device == "cuda" else "auto",
    }  # fmt: skip
    line = [f"--{key}={value}" for key, value in words.items()]
    subprocess.run(
        [sys.executable, "-m", "pipeline.run", "configs/amp.json", overlay, *line,
         "--allow", "speed.Stamp"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return intervals(json.loads(stamps.read_text()), size["steps"][0])


def measure(device: str) -> dict[str, float]:
    """All three, of the tree in the working directory."""
    import torch

    if device == "cpu":
        torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        return {
            "step": step_ms(device),
            "window": window_ms(device),
            "loop": loop_ms(device, Path(folder)),
        }


def main() -> int:
    """Measure both trees in turns; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trees", type=Path, nargs="*")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=SIZES, default="cuda")
    given = parser.parse_args()
    if not given.trees:
        print(json.dumps(measure(given.device)))
        return 0
    old, new = (tree.resolve() for tree in given.trees)
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(given.rounds):
        found = {}
        for name, tree in [("old", old), ("new", new)][:: 1 if number % 2 == 0 else -1]:
            done = subprocess.run(
                [sys.executable, __file__, "--device", given.device],
                cwd=tree, check=True, capture_output=True, text=True,
                env={**os.environ, "PYTHONPATH": path_of(tree)},
            )  # fmt: skip
            found[name] = json.loads(done.stdout.splitlines()[-1])
        rounds.append(found)
        print(json.dumps(found), flush=True)
    ratios = {
        what: sorted(found["new"][what] / found["old"][what] for found in rounds)
        for what in ("step", "window", "loop")
    }
    result = {
        "device": device_name(given.device),
        "ratio_new_to_old": {
            what: {"median": statistics.median(each), "range": [each[0], each[-1]]}
            for what, each in ratios.items()
        },
        "rounds": rounds,
    }
    print(json.dumps(result["ratio_new_to_old"], indent=1))
    if given.output is not None:
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def path_of(tree: Path) -> str:
    """PYTHONPATH of a measurement: the tree, this file's folder, and what was there."""
    here = str(Path(__file__).resolve().parent)
    return os.pathsep.join([str(tree), here, *filter(None, [os.environ.get("PYTHONPATH")])])


def device_name(device: str) -> str:
    """The card's name, or the processor's."""
    import platform

    import torch

    return torch.cuda.get_device_name() if device == "cuda" else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
