"""The log lines with which a run begins and ends, and its `summary.json`."""

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

from pipeline.config.keys import Config
from pipeline.data.dataset import Cases
from pipeline.data.plan import Plan
from pipeline.evaluation.final_scores import describe_score
from pipeline.progress_bar import details, format_duration
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


def log_beginning(cases: Cases, plan: Plan, source: Config) -> None:
    """Log dataset and plan, with what `source`, the config, says beside it; reasons in details."""
    text = "Dataset %s (%s): %d training, %d validation and %d test cases, %d excluded"
    numbers = (len(part) for part in (cases.train, cases.validation, cases.test, cases.excluded))
    log.info(text, cases.name, cases.kind, *numbers)
    patch, spacing = ("x".join(f"{n:.4g}" for n in size) for size in (plan.roi_size, plan.spacing))
    values = {**source, **plan.as_dict(), "patch": patch, "mm": spacing}
    text = "Plan: patches of %(patch)s voxels of %(mm)s mm, %(batch_size)s in a batch; "
    text += "%(base_channels)s channels; %(max_epochs)s epochs of %(steps_per_epoch)s steps"
    log.info(text, values)
    for line in plan.lines():
        details.info("  %s", line)


def log_whereabouts(run_dir: Path, summary: dict[str, Any]) -> None:
    """Log how good the run became, how long it took, where its results are and what uses them."""
    scores, here = summary.get("scores") or {}, shlex.quote(os.path.relpath(run_dir))
    here = shlex.quote(str(run_dir)) if here.startswith("..") else here
    for split in ("test", "validation"):
        for weights in [w for w in ("best", "last") if f"{split}_{w}" in scores][:1]:
            score = describe_score(scores[f"{split}_{weights}"])
            log.info("%s cases, %s weights: %s", split.capitalize(), weights, score)
    if summary["best_epoch"] is None and (run_dir / "models/model.pt").exists():
        log.info("There was no validation; the model is the last network")
    elif not scores and summary["best_epoch"] is not None:
        log.info("Best mean Dice %(best_mean_dice).4f at epoch %(best_epoch)d", summary)
    took = format_duration(summary["wall_time_s"])
    log.info("%d epochs, %d steps in %s", summary["epochs"], summary["steps"], took)
    if (run_dir / "report/index.html").exists():
        log.info("  report:  %s/report/index.html", here)
    if (run_dir / "models/model.pt").exists():
        log.info("  predict: ampseg predict %s INPUT OUTPUT", here)
    log.info("  curves:  tensorboard --logdir %s/tensorboard", here)
    log.info("  files:   %s: models, scores, summary.json, log.txt", here)
