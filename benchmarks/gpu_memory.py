"""Peak memory of a training step on a CUDA card, beside what the plan expects of it.

    python -m benchmarks.gpu_memory [--output FILE.json]

Forward, loss, backward and AdamW on noise, for several widths, class counts, patches, strides and
precisions. `coefficients` is the least-squares fit of the plan's formula to these readings.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch

from benchmarks import machine
from networks.dense_unet import DenseUNet
from pipeline.data.memory import activation_terms
from pipeline.precision import Precision
from pipeline.training.losses import SegmentationLoss

ISOTROPIC = [[2, 2, 2]] * 3
THICK = [[2, 2, 1], [2, 2, 2], [2, 2, 2]]
CASES = [  # base channels, classes, patch, batch, strides
    *itertools.product([8, 16, 32], [3], [(64, 64, 64)], [2], [ISOTROPIC]),
    (32, 14, (64, 64, 64), 2, ISOTROPIC),
    (32, 70, (64, 64, 64), 2, ISOTROPIC),
    (32, 3, (64, 64, 64), 8, ISOTROPIC),
    (32, 14, (96, 96, 96), 2, ISOTROPIC),
    (32, 14, (128, 128, 128), 2, ISOTROPIC),
    (32, 6, (128, 128, 32), 4, THICK),
    (64, 6, (96, 96, 32), 2, THICK),
]


def peak_bytes(kind: str, base: int, classes: int, size, batch: int, strides) -> int:
    """Peak of allocated memory over three steps."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    amp = kind != "float32"
    precision = Precision("cuda", amp=amp, amp_dtype=kind if amp else "auto")
    network = precision.place(DenseUNet(1, classes, base_channels=base, strides=strides, seed=0))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    loss_function = SegmentationLoss()
    image = torch.randn(batch, 1, *size, device="cuda")
    label = torch.randint(0, classes, (batch, 1, *size), device="cuda")
    for _ in range(3):
        with precision.autocast():
            logits = network(image)
            loss = loss_function(logits, label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/gpu_memory.json")
    arguments = parser.parse_args()
    result: dict = {**machine.facts(), "readings": [], "coefficients": {}}
    for kind in ("float32", "float16", "bfloat16"):
        rows = []
        for base, classes, size, batch, strides in CASES:
            measured = peak_bytes(kind, base, classes, size, batch, strides)
            terms = activation_terms(size, batch, strides, base, classes)
            rows.append((*terms, measured))
            result["readings"].append(
                {
                    "precision": kind, "base_channels": base, "num_classes": classes,
                    "roi_size": size, "batch_size": batch, "strides": strides,
                    "peak_bytes": measured, "terms": terms,
                }
            )  # fmt: skip
            print(result["readings"][-1], flush=True)
        table = np.array(rows, float)
        weights = 1 / table[:, -1]  # relative errors
        fit = np.linalg.lstsq(table[:, :-1] * weights[:, None], np.ones(len(rows)), rcond=None)[0]
        error = (table[:, :-1] @ fit) * weights - 1
        result["coefficients"][kind] = {
            "bytes_per_term": fit.tolist(),
            "relative_error": [float(error.min()), float(error.max())],
        }
        print(kind, result["coefficients"][kind], flush=True)
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
