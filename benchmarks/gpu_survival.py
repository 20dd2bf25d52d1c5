"""What surviving costs on a CUDA card, and how near a resumed run comes to an undisturbed one.

    python -m benchmarks.gpu_survival DATASET_DIR [--output FILE.json]

`DATASET_DIR` is Task04_Hippocampus. Two parts:

1. A durable checkpoint of the network with 32 base channels and AdamW: check for finite values,
   copy from the device, write, fsync, rename.
2. The same short float16 run three times: twice uninterrupted, once killed with SIGKILL in the
   middle of an epoch and continued.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.gpu_precision import make_trainer
from benchmarks.gpu_training import LIMIT_S, FixedBatches, command
from pipeline.training.checkpoint import CheckpointHandler, checkpoints, load_checkpoint
from pipeline.training.trainer import MixedPrecisionTrainer


def checkpoint_cost(out: Path, tries: int = 7) -> dict[str, Any]:
    """Part 1."""
    trainer = make_trainer(MixedPrecisionTrainer, "float16")
    batches = FixedBatches(14, (64, 64, 64), torch.device("cuda")).batches
    trainer.take_step([batches[0]])  # AdamW has its moments then
    handler = CheckpointHandler(out, validator=None)
    times = []
    for number in range(tries):
        torch.cuda.synchronize()
        started = time.perf_counter()
        handler._save(trainer, f"step_{number}.pt")
        times.append(1000 * (time.perf_counter() - started))
    assert trainer.diagnosis is None, trainer.diagnosis
    size = checkpoints(out / "checkpoints")[-1].stat().st_size
    return {"bytes": size, "ms_median": round(statistics.median(times), 1),
            "ms_min_max": [round(min(times), 1), round(max(times), 1)]}  # fmt: skip


def resume(dataset: str, out: Path) -> dict:
    """Part 2: largest weight difference of a killed and of an untouched run to a first one."""
    words = ["--batch_size", "2", "--steps_per_epoch", "40", "--max_epochs", "2"]
    words += ["--val_interval", "2", "--checkpoint_every", "25"]
    for name in ("first", "second"):
        subprocess.run(command(dataset, out / name, *words), check=True, timeout=LIMIT_S)
    process = subprocess.Popen(command(dataset, out / "killed", *words))
    while not checkpoints(out / "killed/checkpoints"):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = load_checkpoint(checkpoints(out / "killed/checkpoints")[-1])["progress"]["step"]
    subprocess.run(command(dataset, out / "killed", *words), check=True, timeout=LIMIT_S)
    models = {
        name: torch.load(out / name / "models/last.pt", weights_only=True, map_location="cpu")
        for name in ("first", "second", "killed")
    }

    def difference(name: str) -> float:
        pairs = ((models["first"][key].float(), models[name][key].float()) for key in models[name])
        return max((a - b).abs().max().item() for a, b in pairs)

    return {
        "killed_after_step": killed_at,
        "max_abs_weight_difference_killed_and_continued": difference("killed"),
        "max_abs_weight_difference_second_uninterrupted": difference("second"),
        "last_mean_dice": {
            name: json.loads((out / name / "summary.json").read_text())["last_mean_dice"]
            for name in models
        },
        "final_scaler": {
            name: load_checkpoint(checkpoints(out / name / "checkpoints")[-1])["scaler"]
            for name in models
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset_dir")
    parser.add_argument("--output", default="benchmarks/gpu_survival.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {**machine.facts()}
    with tempfile.TemporaryDirectory() as folder:
        result["checkpoint"] = checkpoint_cost(Path(folder) / "cost")
        print(result, flush=True)
        torch.cuda.empty_cache()
        result["resume"] = resume(arguments.dataset_dir, Path(folder))
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["resume"]))


if __name__ == "__main__":
    main()
