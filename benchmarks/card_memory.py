"""Plans for cards of 8, 12 and 24 GB, tried on a larger card that this process may use a part of.

    python -m benchmarks.card_memory --output FILE.json [--limit_s 240]

For each size and each of three kinds of datasets `auto` chooses patch and batch as on such a card,
whose CUDA context takes half a GiB. The real trainer takes six steps on noise in float16 and in
float32, and the network predicts one batch of windows. A card's speed is not imitated.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import gpu_memory, machine
from networks import fused_layers
from networks.kernels import fused_loss
from pipeline.data.data_module import DataModule
from pipeline.data.memory import available_bytes
from pipeline.data.plan import AUTO, SETTINGS, Plan
from pipeline.data.statistics import ClassFingerprint, DatasetFingerprint
from pipeline.errors import InputError
from pipeline.precision import Precision
from pipeline.prediction.sliding_window import SlidingWindow
from pipeline.training import graph

GIB = 2**30
CONTEXT_BYTES = GIB // 2
CARDS_GIB = (8, 12, 24)
DATASETS: dict[str, dict[str, Any]] = {
    "hippocampus": {
        "cases": 260, "shape": (35, 50, 35), "spacing": (1.0, 1.0, 1.0), "classes": 3,
        "channel": "MRI",
    },
    "cardiac_mr": {
        "cases": 200, "shape": (220, 250, 10), "spacing": (1.4, 1.4, 10.0), "classes": 4,
        "channel": "MRI",
    },
    "abdominal_ct": {
        "cases": 100, "shape": (512, 512, 400), "spacing": (0.8, 0.8, 1.5), "classes": 14,
        "channel": "CT",
    },
}  # fmt: skip


def planned(dataset: dict[str, Any], device: str) -> Plan:
    """The plan of a dataset whose cases all have one shape, as a run makes it on `device`."""
    number, shape, spacing = dataset["cases"], list(dataset["shape"]), list(dataset["spacing"])
    names = ["background", *(f"class_{n}" for n in range(1, dataset["classes"]))]
    fingerprint = DatasetFingerprint(
        num_cases=number,
        num_channels=1,
        spacings_mm=[spacing] * number,
        shapes=[shape] * number,
        occupied_shapes=[shape] * number,
        occupied_share=1.0,
        classes=[ClassFingerprint(name, number, 1.0) for name in names],
    )
    cases = SimpleNamespace(
        class_names=names, channel_names=[dataset["channel"]], ignore_value=None, name="noise",
        description={}, train=range(number * 4 // 5),
    )  # fmt: skip
    found: Any = SimpleNamespace(fingerprint=fingerprint, cases=cases, require_sound=lambda: None)
    split: Any = {"split_file": None, "data_roots": []}
    settings: Any = dict.fromkeys(SETTINGS, AUTO)
    return DataModule(".", "noise", "cache", split, "full", settings, AUTO, device).plan(found)


def config_of(plan: Plan, mode: str) -> gpu_memory.Config:
    """What `gpu_memory` trains."""
    names = "strides", "base_channels", "num_classes", "norm"
    values = {name: getattr(plan, name) for name in names}
    sizes = {"roi_size": list(plan.roi_size), "batch_size": plan.batch_size}
    return {"mode": mode, **sizes, **values, "recompute_levels": 0}


def predicted(config: gpu_memory.Config) -> dict[str, int]:
    """Memory of one batch of windows, of as many as inference takes at once."""
    gpu_memory.clean()
    amp = config["mode"] != "float32"
    precision = Precision("cuda", amp=amp, amp_dtype=config["mode"] if amp else "auto")
    network = gpu_memory.network_of(config, precision).eval()
    number = SlidingWindow(config["roi_size"], config["num_classes"]).batch_size
    windows = torch.randn(number, 1, *config["roi_size"], device="cuda")
    with torch.inference_mode(), precision.autocast():
        finite = bool(network(windows).isfinite().all())
    return {"windows": number, "finite": finite, **gpu_memory.peak()}


def tried(config: gpu_memory.Config) -> dict[str, Any]:
    """Readings of training and prediction, and whether both fitted."""
    found = gpu_memory.measured(config)
    found["predicted_bytes"] = round(gpu_memory.step_of(config).estimate_bytes())
    try:
        found["predict"] = predicted(config)
    except torch.OutOfMemoryError as error:
        found["predict"] = {"error": str(error).splitlines()[0]}
    gpu_memory.clean()
    return {**found, "fitted": "error" not in found and "error" not in found["predict"]}


def limit_to(card_gib: int) -> dict[str, Any]:
    """Let this process use as much as it could on a card of that size."""
    total = torch.cuda.mem_get_info()[1]
    fraction = (card_gib * GIB - CONTEXT_BYTES) / total
    torch.cuda.set_per_process_memory_fraction(fraction)
    available = available_bytes(torch.device("cuda"))
    return {"card_gib": card_gib, "fraction": fraction, "available_bytes": available}


def self_check_seconds() -> dict[str, float]:
    """Seconds of each comparison of kernels, the first time and with compiled kernels."""
    device, seconds = torch.device("cuda", torch.cuda.current_device()), {}
    compares = fused_layers.compare_layers, fused_loss.compare_loss, graph.compare_replay
    for turn in ("first", "again"):
        for compare in compares:
            started = time.monotonic()
            compare(device)
            torch.cuda.synchronize()
            seconds[f"{compare.__name__}_{turn}"] = round(time.monotonic() - started, 3)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit_s", type=float, default=240)
    arguments = parser.parse_args()
    logging.getLogger("pipeline").setLevel(logging.ERROR)
    started = time.monotonic()
    result: dict[str, Any] = {**machine.facts(), "self_check_s": self_check_seconds()}
    result["readings"] = []
    for card_gib in CARDS_GIB:
        for name, dataset in DATASETS.items():
            gpu_memory.clean()
            limit = limit_to(card_gib)
            try:
                plan = planned(dataset, "cuda")
            except InputError as error:
                result["readings"].append({**limit, "dataset": name, "refused": str(error)})
                continue
            for mode in ("float16", "float32"):
                if time.monotonic() - started > arguments.limit_s:
                    break
                config = config_of(plan, mode)
                row = {**limit, "dataset": name, **config, **tried(config)}
                result["readings"].append(row)
                print(round(time.monotonic() - started), json.dumps(row), flush=True)
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    result["seconds"] = round(time.monotonic() - started)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
