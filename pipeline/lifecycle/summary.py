"""The end of a run: `summary.json`, and the log lines that say where everything is."""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import monai
import torch

from pipeline.training.protocols import DescribesItself
from pipeline.training.trainer import MixedPrecisionTrainer

log = logging.getLogger(__name__)


def summarize_run(
    trainer: MixedPrecisionTrainer, run_dir: Path, **made_from: Any
) -> dict[str, Any]:
    """Return the result of a run as plain values, with what it was `made_from` (names, hashes)."""
    progress, device = trainer.progress, trainer.precision.device
    loader = trainer.data_loader
    return {
        "best_mean_dice": progress.best_metric,
        "best_epoch": progress.best_epoch,
        "last_mean_dice": progress.last_metric,
        "scores": _final_scores(run_dir),
        "epochs": progress.epoch,
        "steps": progress.step,
        "skipped_steps": progress.skipped_steps,
        "wall_time_s": round(progress.wall_time_s, 1),
        **trainer.describe(),
        "training_data": loader.describe() if isinstance(loader, DescribesItself) else None,
        "device_name": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "trial_step": trainer.trial_step,
        "peak_memory_bytes": trainer.peak_memory_bytes,
        "peak_reserved_bytes": trainer.peak_reserved_bytes,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "monai": monai.__version__,
        },
        "num_parameters": sum(p.numel() for p in trainer.network.parameters()),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        **made_from,
        "progress": progress.state_dict(),
    }


def _final_scores(run_dir: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted((run_dir / "scores").glob("*/summary.json")):
        summary = json.loads(path.read_text())
        found[path.parent.name] = {k: summary[k] for k in ("mean_dice", "mean_dice_interval")}
    return found


def log_whereabouts(run_dir: Path, summary: dict[str, Any]) -> None:
    """Log how good the run became, and where its results are."""
    if summary["best_epoch"] is not None:
        log.info("Best mean Dice %(best_mean_dice).4f at epoch %(best_epoch)d", summary)
    elif (run_dir / "models/model.pt").exists():
        log.info("There was no validation; the model is the last network")
    log.info("%(epochs)d epochs, %(steps)d steps in %(wall_time_s).0f s", summary)
    here = os.path.relpath(run_dir)
    for name in ("models/model.pt", "report/index.html", "scores", "summary.json", "log.txt"):
        if (run_dir / name).exists():
            log.info("  %s/%s", here, name)
    log.info("  curves: python -m tensorboard.main --logdir %s/tensorboard", here)
