"""Reads stored configs, in which earlier versions used other names than today's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, require

INFERENCE = Path("configs", "inference.json")  # of a run directory
TOP_LEVEL = {
    "check": "preflight", "compile": "cuda_graph", "init_head": "reinit_head",
    "intake": "data_module", "layout": "memory_format", "resident": "cache_on_device",
    "sums_bytes": "max_blend_bytes", "test_share": "test_fraction",
}  # fmt: skip
LOGGING = "pipeline.training.logging_handlers.LoggingHandler"
TARGETS = {  # of modules, or of single classes
    "pipeline.data.images": "pipeline.data.cases",
    "pipeline.data.intake.Intake": "pipeline.data.data_module.DataModule",
    "pipeline.lifecycle": "pipeline.lifecycle.lifecycle",
    "pipeline.predict": "pipeline.prediction.predict_files",
    "pipeline.process_group.ProcessGroup": "pipeline.distributed.DistributedSettings",
    "pipeline.prediction.metrics": "pipeline.evaluation.metrics",
    "pipeline.predictor": "pipeline.prediction.predictor",
    "pipeline.scoring": "pipeline.evaluation.final_scores",
    "pipeline.training.handlers": "pipeline.training.logging_handlers",
    "pipeline.training.handlers.ConsoleHandler": LOGGING,
    "pipeline.training.handlers.ScoreHandler": LOGGING,
    "pipeline.training.handlers.TensorBoardHandler": LOGGING,
    "pipeline.training.losses": "pipeline.training.loss",
    "pipeline.training.optimization": "pipeline.training.schedule",
    "pipeline.training.recorder": "pipeline.training.flight_recorder",
    "pipeline.visit.Visit": "pipeline.lifecycle.read_only_run.ReadOnlyRun",
}
SCORING = {"run_dir": "$@lifecycle.run_dir", "is_held": "$@lifecycle.is_held", "cases": "@cases",
           "class_names": "$@plan.class_names", "ignore_value": "$@plan.ignore_value",
           "group_pattern": "@group_pattern", "preprocessing": "@preprocessing"}  # fmt: skip
PREDICTION = {"class_names": "@class_names", "dicom_seg": "@dicom_seg"}  # since 0.3
RENAMED = {**TOP_LEVEL, "recipe": "preprocessing_key"}  # arguments of our own classes, too
DROPPED = {
    "DataModule": ("amp", "amp_dtype", "base_channels", "windows"),
    "Lifecycle": ("max_epochs",),
    "MixedPrecisionTrainer": ("roi_size",),
}
EXPRESSIONS = {rf"@{old}\b": f"@{new}" for old, new in TOP_LEVEL.items()} | {
    r"@lifecycle\.start\.tensors\b": "@lifecycle.initial_weights",
    r"@lifecycle\.recipe\b": "@lifecycle.preprocessing_key",
}


def translate(node: Any, key: str = "") -> Any:
    """A config that an earlier version stored, with today's names."""
    if isinstance(node, list):
        return [translate(one, key="list") for one in node]
    if isinstance(node, str):
        for old, new in EXPRESSIONS.items() if node.startswith(("@", "$")) else ():
            node = re.sub(old, new, node)
        module, _, name = node.rpartition(".")
        return TARGETS.get(node) or (f"{TARGETS[module]}.{name}" if module in TARGETS else node)
    if not isinstance(node, dict):
        return node
    target = str(translate(node.get("_target_", "")))
    owner = target.rpartition(".")[2]
    names = RENAMED if target.startswith("pipeline.") or key in ("", "split") else {}
    kept = {name: node[name] for name in node if name not in DROPPED.get(owner, ())}
    node = {names.get(name, name): translate(value, name) for name, value in kept.items()}
    is_old = owner == "Scoring" and node.pop("lifecycle", None)
    added = PREDICTION if owner == "Prediction" else {}
    return {**added, **node, **(SCORING if is_old else {})}


def name_own_classes(path: Path, text: str) -> str:
    """Return the text of a config with our own classes in the place of those an export packs."""
    facts = path.absolute().parents[1] / "export.json"
    if not facts.is_file() or not __name__.startswith("pipeline."):
        return text
    package = json.loads(facts.read_text())["code"]["package"]
    return text.replace(f'"{package}.', '"')


def read_inference_config(run_dir: str | Path) -> dict[str, Any]:
    """Read the inference config of a run or bundle; an `InputError` says that there is none."""
    path = Path(run_dir, INFERENCE)
    try:
        source = translate(json.loads(name_own_classes(path, path.read_text())))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"run_dir: expected the directory of a run, got {run_dir} ({error}). Name one that "
            "holds configs and models."
        ) from None
    return {**source, "bundle_root": str(Path(run_dir).absolute())}


def require_todays_names(run_dir: Path) -> None:
    """Raise an `InputError` if the config of a run holds earlier names: it is not continued."""
    source = json.loads((run_dir / "configs" / "train.json").read_text())
    plan = run_dir / "plan.json"
    text = plan.read_text() if plan.is_file() else ""
    is_old = '"roi_size"' in text and '"max_epochs"' not in text
    is_todays = not is_old and translate(source) == source
    remedy = "Continue it with version 0.1.0, or choose another output_dir."
    require(is_todays, run_dir, "a run of this version", "one that 0.1.0 began", remedy)
