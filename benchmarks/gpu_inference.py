"""Prediction of 512 x 512 x 400 on a card: beside stock MONAI, memory, and file to file.

    python -m benchmarks.gpu_inference OUTPUT.json

The network has random weights: neither time nor memory depends on them. The volume is noise with
smooth structure, int16, compressed; its grid is that of the plan, and for one row is not.
"""

from __future__ import annotations

import gc
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai
import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer

from benchmarks.stock import torchs_own_layers
from networks.dense_unet import DenseUNet
from pipeline.data.cases import list_images
from pipeline.precision import Precision
from pipeline.prediction.predict_files import Prediction
from pipeline.prediction.segmenter import Segmenter
from pipeline.prediction.sliding_window import SlidingWindow
from transforms.postprocess import to_original_grid
from transforms.preprocess import preprocessing

SHAPE, ROI = (512, 512, 400), (128, 128, 128)
ROUNDS = 3


def network_of(num_classes: int, precision: Precision) -> torch.nn.Module:
    network = DenseUNet(1, num_classes, base_channels=32, norm="batch", seed=0)
    return precision.place(network).eval()


def volume_of(shape: tuple[int, ...], scale: float = 1.0) -> MetaTensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 1, *(n // 16 for n in shape), generator=generator)
    voxels = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")[0]
    voxels = voxels + 0.3 * torch.randn(shape, generator=generator)
    meta = {"original_affine": np.diag([scale] * 3 + [1.0]), "spatial_shape": np.array(shape)}
    return MetaTensor(voxels, affine=torch.eye(4, dtype=torch.float64), meta=meta)


def measured(work: Callable[[], Any], rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds of each round after one that does not count, and peak memory above what was there."""
    work()
    times = []
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {
        "median_s": round(statistics.median(times), 3),
        "min_s": round(min(times), 3),
        "max_s": round(max(times), 3),
        "peak_gb_above": round((torch.cuda.max_memory_allocated() - before) / 1e9, 2),
        "peak_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
    }


def windows(precision: Precision, num_classes: int, *, stock: bool) -> dict[str, Any]:
    """The sliding window over a volume on the card, to logits or to labels."""
    network = network_of(num_classes, precision)
    image = volume_of(SHAPE)
    on_card = image.as_tensor()[None].to(precision.device)
    found = {}

    def in_precision(batch: torch.Tensor) -> torch.Tensor:
        with precision.autocast():
            return network(batch)

    if stock:
        inferer = SlidingWindowInferer(ROI, 4, 0.5, "gaussian")
        network.to(memory_format=torch.contiguous_format)
        with torch.inference_mode(), torchs_own_layers():
            found["stock_monai_logits"] = measured(lambda: inferer(on_card, in_precision))
        network = precision.place(network)
    segmenter = Segmenter([network], precision, SlidingWindow(ROI, num_classes))
    moved = MetaTensor(on_card[0], affine=image.affine, meta=image.meta)
    found["ours_labels"] = measured(lambda: segmenter(moved))
    return found


def same_labels(precision: Precision, num_classes: int) -> dict[str, Any]:
    """Labels slab by slab, in lanes, against blending of the whole volume in one piece."""
    image = volume_of((224, 208, 192))
    network = network_of(num_classes, precision)
    roi = (96, 96, 96)
    narrow = SlidingWindow(roi, num_classes, 1, max_blend_bytes=200 * 2**20)
    slabs = Segmenter([network], precision, narrow)(image).labels
    whole = SlidingWindow(roi, num_classes, 1, max_blend_bytes=2**40)

    def in_precision(batch: torch.Tensor) -> torch.Tensor:
        with precision.autocast():
            return network(batch)

    with torch.inference_mode():
        logits = whole(image.as_tensor()[None].to(precision.device), in_precision)[0]
        labels = to_original_grid(torch.softmax(logits, dim=0), image).argmax(0).cpu().numpy()
    return {"voxels": int(labels.size), "different": int((labels != slabs).sum()),
            "classes_found": len(np.unique(labels))}  # fmt: skip


def file_to_file(precision: Precision, folder: Path, spacing: float) -> dict[str, Any]:
    """From a compressed file to a compressed file, reading, checking and preprocessing included."""
    images = folder / f"images_{spacing}"
    images.mkdir()
    voxels = (volume_of(SHAPE)[0].numpy() * 200).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([0.8, 0.8, 1.0, 1.0])), images / "case.nii.gz")
    network = network_of(14, precision)
    segmenter = Segmenter([network], precision, SlidingWindow(ROI, 14))
    prepare = preprocessing((0.8 * spacing, 0.8 * spacing, 1.0), keys=("image",))
    prediction = Prediction(
        list_images(images, 1), prepare, segmenter, str(folder), f"out_{spacing}", 1
    )
    size = (images / "case.nii.gz").stat().st_size
    return {"input_mb": round(size / 1e6), **measured(prediction.run, 1)}


def main() -> None:
    logging.getLogger("pipeline").setLevel(logging.WARNING)
    precision = Precision("cuda", amp_dtype="float16")
    result: dict[str, Any] = {
        "machine": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "monai": monai.__version__},
        "work": "512x512x400, roi 128^3, overlap 0.5, Gaussian, float16, 32 base channels",
    }
    steps: dict[str, Callable[[], Any]] = {
        "14_classes": lambda: windows(precision, 14, stock=True),
        "104_classes": lambda: windows(precision, 104, stock=False),
        "labels_slabs_against_whole": lambda: same_labels(precision, 104),
    }
    with tempfile.TemporaryDirectory() as name:
        steps["file_to_file_same_spacing"] = lambda: file_to_file(precision, Path(name), 1.0)
        steps["file_to_file_resampled_1.25"] = lambda: file_to_file(precision, Path(name), 1.25)
        for step, work in steps.items():
            result[step] = work()
            print(step, json.dumps(result[step]), flush=True)
            Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n")
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
