"""Time and memory of `pipeline.commands.check`, cold and with its cache filled.

    python -m benchmarks.check_cost DATASET_DIR [--output FILE.json]

`DATASET_DIR` is Task04_Hippocampus. Beside it a dataset of two synthetic CT volumes of
512 x 512 x 400 voxels (int16, noise in a cylinder, three classes), since a dataset is two persons
or more. Each reading is a process of its own; `import` is one that imports what the check does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks import machine

SHAPE = (512, 512, 400)
REPEATS = 3


def make_large(root: Path) -> Path:
    """Two large cases in the layout of folders."""
    for number in range(2):
        rng = np.random.default_rng(number)
        i, j = np.indices(SHAPE[:2]) - 256
        body = i**2 + j**2 < 200**2
        image, label = np.full(SHAPE, -1024, np.int16), np.zeros(SHAPE, np.uint8)
        for k in range(SHAPE[2]):
            image[..., k][body] = rng.normal(40, 60, int(body.sum()))
        label[200:300, 200:300, 100:200], label[300:350, 200:300, 100:200] = 1, 2
        affine = np.diag([0.8, 0.8, 1.25, 1.0])
        for folder, voxels in (("images", image), ("labels", label)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            volume = nib.Nifti1Image(voxels, affine)
            volume.set_sform(affine, code=1)
            nib.save(volume, root / folder / f"large_{number}.nii.gz")
    return root


# its own highest resident memory: what the system counts for a child begins with the parent's
CHECK = """
import sys
from pipeline.commands.check import main
import pipeline.data.data_module, monai.bundle
status = main(sys.argv[1:]) if sys.argv[1:] else 0
lines = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(status)
"""


def measure(words: list[str]) -> dict[str, float]:
    """Wall time and peak resident memory of a check; of its imports where there are no words."""
    start = time.perf_counter()
    process = subprocess.run([sys.executable, "-c", CHECK, *words], capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{words}: {process.stdout}{process.stderr}")
    peak_kb = int(process.stderr.split()[-1])
    seconds = round(time.perf_counter() - start, 2)
    return {"seconds": seconds, "peak_MB": round(peak_kb * 1024 / 1e6, 1)}


def command(dataset: Path, cache: Path, *more: str) -> list[str]:
    return [str(dataset), "--cache_dir", str(cache), "--num_folds", "2", *more]


def readings(dataset: Path, folder: Path, *more: str) -> dict[str, list]:
    """Cold, cached and headers alone, `REPEATS` times each in turn; the files are in memory."""
    cache, found = folder / "cache", {"cold": [], "cached": [], "fast": []}
    for _ in range(REPEATS):
        shutil.rmtree(cache, ignore_errors=True)
        found["cold"].append(measure(command(dataset, cache, *more)))
        found["cached"].append(measure(command(dataset, cache, *more)))
        found["fast"].append(
            measure(command(dataset, folder / "none", "--preflight", "fast", *more))
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset_dir", type=Path)
    parser.add_argument("--output", default="benchmarks/check_cost.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        large = make_large(Path(folder) / "large")
        names = ["--class_names", '["background", "a", "b"]']
        result = {
            **machine.facts(),
            "cores": len(os.sched_getaffinity(0)),
            "import": [measure([]) for _ in range(REPEATS)],
            "hippocampus": readings(
                arguments.dataset_dir, Path(folder), "--group_pattern", "pairs"
            ),
            "two volumes of 512x512x400": readings(large, Path(folder), *names),
        }
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
