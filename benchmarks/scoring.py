"""Time of scoring predictions: 40 cases of a dataset, and one large volume of 14 classes.

    python -m benchmarks.scoring DATASET_DIR [--output FILE.json]

`DATASET_DIR` is Task04_Hippocampus; its first 40 labels are scored against themselves moved by one
voxel, as files, with as many threads as there are cores and with one. The large volume is
512 x 512 x 200 with 14 balls of different size, scored in memory in one thread against itself moved
by two voxels; once more with a stray voxel of each class in both corners, so that the box around
each class is the whole volume.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import scipy
import torch

from benchmarks import machine
from pipeline.commands.evaluate import main as evaluate
from pipeline.evaluation.scores import score_case

SHAPE = (512, 512, 200)
SPACING_MM = (0.8, 0.8, 1.5)
NUM_CLASSES = 14
NUM_CASES = 40
REPEATS = 3


def write_cases(dataset_dir: Path, root: Path) -> None:
    for folder in ("pred", "labels"):
        (root / folder).mkdir()
    for path in sorted((dataset_dir / "labelsTr").glob("[!.]*.nii.gz"))[:NUM_CASES]:
        image = nib.load(path)
        voxels = np.asarray(image.dataobj)
        nib.save(image, root / "labels" / path.name)
        moved = nib.Nifti1Image(np.roll(voxels, 1, axis=0), image.affine)
        nib.save(moved, root / "pred" / path.name)


def large_label() -> np.ndarray:
    """Balls of 10 to 62 voxels' radius, on a grid of five by three."""
    label = np.zeros(SHAPE, np.uint8)
    for value in range(1, NUM_CLASSES + 1):
        radius = 6 + 4 * value
        middle = (60 + 97 * ((value - 1) % 5), 90 + 165 * ((value - 1) // 5), 100)
        inside = tuple(slice(max(m - radius, 0), m + radius + 1) for m in middle)
        grids = np.ogrid[inside]
        squares = sum((grid - m) ** 2 for grid, m in zip(grids, middle, strict=True))
        label[inside][squares <= radius**2] = value
    return label


def seconds(work: Callable[[], object]) -> list[float]:
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        found.append(round(time.perf_counter() - start, 2))
    return found


def readings(dataset_dir: Path) -> dict[str, list[float]]:
    cores, found = len(os.sched_getaffinity(0)), {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_cases(dataset_dir, root)
        for threads in sorted({1, cores}):
            words = [root / "pred", root / "labels", "--num_threads", threads]
            words += ["--dataset_dir", dataset_dir, "--group_pattern", "pairs"]
            found[f"{NUM_CASES} cases, threads: {threads}"] = seconds(
                lambda words=words: evaluate([*map(str, words)])
            )
    torch.set_num_threads(1)
    label = large_label()
    pred = np.roll(label, 2, axis=1)
    how = {
        "spacing_mm": SPACING_MM,
        "class_names": [str(value) for value in range(NUM_CLASSES + 1)],
        "tolerance_mm": 1.0,
    }
    name = f"{'x'.join(map(str, SHAPE))}, {NUM_CLASSES} classes"
    found[name] = seconds(lambda: score_case(pred, label, **how))
    label[0, 0, :NUM_CLASSES] = label[-1, -1, -NUM_CLASSES:] = np.arange(1, NUM_CLASSES + 1)
    found[f"{name}, stray voxels"] = seconds(lambda: score_case(pred, label, **how))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset_dir", type=Path)
    parser.add_argument("--output", default="benchmarks/scoring.json")
    arguments = parser.parse_args()
    found = readings(arguments.dataset_dir)
    result = {
        **machine.facts(),
        "scipy": scipy.__version__,
        "numpy": np.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "median_s": {name: statistics.median(times) for name, times in found.items()},
        "readings_s": found,
    }
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
