"""Resident memory of training runs by number of cases, and what the cache costs in time.

    python -m benchmarks.cache_memory DATASET_DIR [--before COMMIT]

Trains through `pipeline.run` on a CPU: 20 and 200 cases of DATASET_DIR (Task04_Hippocampus), 20 and
80 synthetic cases of 96^3 voxels. Each is run twice: the first fills the cache, the second finds it
filled. With COMMIT, one without the cache, the same is measured there.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH = 100, 2  # every training case is read
RUN: dict[str, Any] = {
    "spacing": [1, 1, 1], "roi_size": [32, 32, 32], "base_channels": 4, "num_folds": 5,
    "network_def#strides": [[2, 2, 2], [2, 2, 2], [2, 2, 2]], "batch_size": BATCH,
    "steps_per_epoch": STEPS, "max_epochs": 1, "val_interval": 1, "device": "cpu",
}  # fmt: skip
SAMPLES = 1000


def status() -> dict[str, int]:
    """Memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    names = ("VmRSS", "RssAnon", "RssFile", "VmHWM")
    return {name: round(int(values[name].split()[0]) / 1024) for name in names}


def child_run(words: list[str]) -> dict[str, Any]:
    """Memory after the last training step, with every case read, and at the end."""
    from ignite.engine import Events

    from pipeline.run import main
    from pipeline.training.trainer import MixedPrecisionTrainer

    found: dict[str, Any] = {}
    begun, run = time.perf_counter(), MixedPrecisionTrainer.run

    def note(name: str) -> None:
        found[name] = status()

    def measured(self: MixedPrecisionTrainer) -> None:
        found["seconds_to_first_step"] = round(time.perf_counter() - begun, 1)
        note("before_training")
        once = Events.ITERATION_COMPLETED(once=STEPS)
        self.add_event_handler(once, lambda: note(f"after_{STEPS}_steps"))
        run(self)
        note("after_validation")

    MixedPrecisionTrainer.run = measured  # type: ignore[method-assign]
    assert main(["configs/amp.json", *words]) == 0
    return found


def child_time(words: list[str]) -> dict[str, Any]:
    """Seconds to build the training dataset, to build it again, and milliseconds per sample."""
    from pipeline.data.dataset import load_cases
    from pipeline.data.sampling import PatchDataset
    from transforms.preprocess import preprocessing

    arguments: dict[str, Any] = {
        "data": load_cases(words[0]).train, "transform": preprocessing([1, 1, 1]),
        "roi_size": (32, 32, 32), "patch_size": (48, 48, 48), "num_classes": 3, "seed": 0,
        "samples_per_epoch": SAMPLES,
    }  # fmt: skip

    def build() -> Any:
        try:
            from pipeline.data.cache import VolumeCache
        except ImportError:
            return PatchDataset(**arguments)
        cache = VolumeCache(Path(words[1]), 10**12, {})
        return PatchDataset(cache=cache, **arguments)  # type: ignore[misc]

    found: dict[str, Any] = {"cases": len(arguments["data"])}
    for name in ("first_s", "second_s"):
        begun = time.perf_counter()
        patches = build()
        found[name] = round(time.perf_counter() - begun, 2)
    times = []
    for number in range(SAMPLES):
        begun = time.perf_counter()
        patches[number]
        times.append(time.perf_counter() - begun)
    found["ms_per_sample_median"] = round(statistics.median(times) * 1e3, 3)
    found["ms_per_sample_p99"] = round(sorted(times)[int(0.99 * SAMPLES)] * 1e3, 3)
    return found


def in_child(tree: Path, kind: str, *words: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    with tempfile.NamedTemporaryFile("r") as result:
        command = [sys.executable, __file__, "--child", kind, result.name, *words]
        subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(result.name).read_text())


def subset(source: Path, target: Path, number: int) -> Path:
    """A dataset folder with the first cases of another."""
    description = json.loads((source / "dataset.json").read_text())
    description["training"] = description["training"][:number]
    for entry in description["training"]:
        for key in ("image", "label"):
            (target / entry[key]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / entry[key], target / entry[key])
    (target / "dataset.json").write_text(json.dumps(description))
    return target


def synthetic(target: Path, number: int, size: int = 96) -> Path:
    """Cases of size^3 voxels: a bright ball in noise."""
    import nibabel as nib
    import numpy as np

    grid = np.indices((size,) * 3)
    entries = []
    for n in range(number):
        rng = np.random.default_rng(n)
        centre = rng.integers(size // 4, 3 * size // 4, 3).reshape(3, 1, 1, 1)
        label = (((grid - centre) ** 2).sum(0) < (size // 5) ** 2).astype(np.uint8)
        image = (label + rng.normal(0, 0.5, label.shape)).astype(np.float32)
        entry = {"image": f"image/case_{n:03d}.nii", "label": f"label/case_{n:03d}.nii"}
        for key, voxels in (("image", image), ("label", label)):
            (target / key).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), target / entry[key])
        entries.append(entry)
    labels = {"0": "background", "1": "ball", "2": "none"}
    description = {"modality": {"0": "MR"}, "labels": labels, "training": entries}
    (target / "dataset.json").write_text(json.dumps(description))
    return target


def measure(tree: Path, datasets: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Every dataset through the code of a tree."""
    has_cache = (tree / "pipeline/data/cache.py").exists()
    found: dict[str, Any] = {}
    for name, dataset in datasets.items():
        print(tree.name, name, file=sys.stderr)
        found[name] = {}
        for turn in ("cache empty", "cache filled") if has_cache else ("no cache",):
            values = {**RUN, "dataset_dir": str(dataset), "output_dir": str(folder / name / turn)}
            if has_cache:
                values["cache_dir"] = str(folder / name / "cache")
            values["group_pattern"] = "pairs"
            words = [
                word
                for key, value in values.items()
                for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
            ]
            found[name][turn] = in_child(tree, "run", *words)
        found[name]["time"] = in_child(tree, "time", str(dataset), str(folder / name / "timed"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset_dir", type=Path)
    parser.add_argument("--before", help="a commit without the cache, to compare with")
    arguments = parser.parse_args()
    from benchmarks.machine import processor  # not in a child, which has another tree's modules

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datasets = {f"hippocampus_{n}": subset(arguments.dataset_dir, folder / f"h{n}", n)
                    for n in (20, 200)}  # fmt: skip
        datasets |= {f"synthetic_96_{n}": synthetic(folder / f"s{n}", n) for n in (20, 80)}
        result = {
            "machine": {"cpu": processor(), "cores": os.cpu_count(),
                        "python": platform.python_version()},
            "unit": "MB, as /proc/self/status has it",
            "with_cache": measure(ROOT, datasets, folder / "after"),
        }  # fmt: skip
        if arguments.before:
            archive = subprocess.check_output(["git", "archive", arguments.before], cwd=ROOT)
            with tarfile.open(fileobj=io.BytesIO(archive)) as files:
                files.extractall(folder / "tree", filter="data")
            result["before"] = measure(folder / "tree", datasets, folder / "before")
    text = json.dumps(result, indent=2) + "\n"
    (ROOT / "benchmarks" / "cache_memory.json").write_text(text)
    print(text)


if __name__ == "__main__":
    if "--child" in sys.argv:
        kind, result, *words = sys.argv[sys.argv.index("--child") + 1 :]
        # the tree's own packages come first, this file's folder has nothing to import
        sys.path[0] = str(Path.cwd())
        child = {"run": child_run, "time": child_time}[kind]
        Path(result).write_text(json.dumps(child(words)))
    else:
        main()
