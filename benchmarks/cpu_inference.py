"""Prediction on a CPU beside stock MONAI: the window alone and file to file, time and peak memory.

    python -m benchmarks.cpu_inference OUTPUT.json

Each reading is of a process of its own, since a process' peak memory never falls.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import monai
import nibabel as nib
import numpy as np
import torch
from monai.inferers import SlidingWindowInferer

from benchmarks.gpu_inference import network_of, volume_of
from benchmarks.machine import processor
from pipeline.data.cases import list_images
from pipeline.precision import Precision
from pipeline.prediction.predict_files import Prediction
from pipeline.prediction.segmenter import Segmenter
from pipeline.prediction.sliding_window import SlidingWindow
from transforms.preprocess import preprocessing

SHAPE, ROI = (192, 192, 96), (96, 96, 96)
ROUNDS = 3


def stock(num_classes: int, shape: tuple[int, ...]) -> Callable[[], Any]:
    network = network_of(num_classes, Precision("cpu"))
    volume = volume_of(shape).as_tensor()[None]
    inferer = SlidingWindowInferer(ROI, 2, 0.5, "gaussian")

    def work() -> torch.Tensor:
        with torch.inference_mode():
            return torch.softmax(inferer(volume, network), dim=1).argmax(dim=1)

    return work


def ours(num_classes: int, shape: tuple[int, ...]) -> Callable[[], Any]:
    precision = Precision("cpu")
    image = volume_of(shape)
    window = SlidingWindow(ROI, num_classes, 2)
    segmenter = Segmenter([network_of(num_classes, precision)], precision, window)
    return lambda: segmenter(image)


def files(num_classes: int, shape: tuple[int, ...]) -> Callable[[], Any]:
    folder = Path(tempfile.mkdtemp())
    (folder / "images").mkdir()
    voxels = (volume_of(shape)[0].numpy() * 200).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / "images/case.nii.gz")
    precision = Precision("cpu")
    window = SlidingWindow(ROI, num_classes, 2)
    segmenter = Segmenter([network_of(num_classes, precision)], precision, window)
    prepare = preprocessing((1.0, 1.0, 1.0), keys=("image",))
    cases = list_images(folder / "images", 1)
    return Prediction(cases, prepare, segmenter, str(folder), "out", 1).run


def _reading(make: Callable, num_classes: int, shape: tuple[int, ...], queue: Any) -> None:
    work = make(num_classes, shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queue.put((seconds, (peak - before) / 1e6))


def measured(make: Callable, num_classes: int, shape: tuple[int, ...], rounds: int) -> dict:
    context = get_context("spawn")
    found = []
    for _ in range(rounds):
        queue = context.Queue()
        process = context.Process(target=_reading, args=(make, num_classes, shape, queue))
        process.start()
        found.append(queue.get())
        process.join()
    seconds = [one[0] for one in found]
    return {
        "shape": list(shape), "classes": num_classes,
        "median_s": round(statistics.median(seconds), 1), "min_s": round(min(seconds), 1),
        "max_s": round(max(seconds), 1),
        "peak_gb_above": round(statistics.median(one[1] for one in found), 2),
    }  # fmt: skip


def main() -> None:
    result: dict[str, Any] = {
        "machine": {"cpu": processor(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"torch": torch.__version__, "monai": monai.__version__},
        "work": "roi 96^3, overlap 0.5, Gaussian, float32, 32 base channels, labels",
    }
    for name, make, classes, shape, rounds in (
        ("stock_monai", stock, 14, SHAPE, ROUNDS),
        ("ours", ours, 14, SHAPE, ROUNDS),
        ("ours_file_to_file", files, 14, SHAPE, ROUNDS),
        ("stock_monai_104", stock, 104, (288, 192, 96), 1),
        ("ours_104", ours, 104, (288, 192, 96), 1),
    ):
        result[name] = measured(make, classes, shape, rounds)
        print(name, json.dumps(result[name]), flush=True)
        Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
