"""Names that earlier versions used in configs, and what they are called today."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pipeline.errors import InputError

LAST_VERSION = "0.1.0"  # the last one that continues runs with these names
TOP_LEVEL = {
    "check": "preflight", "compile": "cuda_graph", "init_head": "reinit_head",
    "intake": "data_module", "layout": "memory_format", "resident": "cache_on_device",
    "sums_bytes": "max_blend_bytes", "test_share": "test_fraction",
}  # fmt: skip
TARGETS = {  # of modules, or of single classes
    "pipeline.data.images": "pipeline.data.cases",
    "pipeline.data.input_images": "pipeline.data.cases",
    "pipeline.data.intake.Intake": "pipeline.data.data_module.DataModule",
    "pipeline.lifecycle": "pipeline.lifecycle.lifecycle",
    "pipeline.predict": "pipeline.prediction.predict_files",
    "pipeline.process_group.ProcessGroup": "pipeline.distributed.DistributedSettings",
    "pipeline.prediction.metrics": "pipeline.evaluation.metrics",
    "pipeline.predictor": "pipeline.prediction.predictor",
    "pipeline.scoring": "pipeline.evaluation.final_scores",
    "pipeline.training.handlers": "pipeline.training.logging_handlers",
    "pipeline.training.losses": "pipeline.training.loss",
    "pipeline.training.optimization": "pipeline.training.schedule",
    "pipeline.training.recorder": "pipeline.training.flight_recorder",
    "pipeline.visit.Visit": "pipeline.lifecycle.read_only_run.ReadOnlyRun",
}
SCORING = {"run_dir": "$@lifecycle.run_dir", "is_held": "$@lifecycle.is_held", "cases": "@cases",
           "class_names": "$@plan.class_names", "ignore_value": "$@plan.ignore_value",
           "group_pattern": "@group_pattern", "preprocessing": "@preprocessing"}  # fmt: skip
# by class or key of today; `None`: dropped, a dict: arguments that replace it
ARGUMENTS: dict[str, dict[str, Any]] = {
    "": {**TOP_LEVEL},
    "DataModule": {"check": "preflight", "amp": None, "amp_dtype": None, "windows": None},
    "Lifecycle": {"init_head": "reinit_head", "intake": "data_module"},
    "MixedPrecisionTrainer": {"compile": "cuda_graph", "roi_size": None},
    "PatchLoader": {"resident": "cache_on_device"},
    "ReadOnlyRun": {"init_head": "reinit_head", "intake": "data_module"},
    "Precision": {"layout": "memory_format"},
    "Scoring": {"lifecycle": SCORING},
    "SlidingWindow": {"sums_bytes": "max_blend_bytes"},
    "VolumeCache": {"recipe": "preprocessing_key"},
    "split": {"test_share": "test_fraction"},
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
    node = {name: translate(value, name) for name, value in node.items()}
    names = ARGUMENTS.get(str(node.get("_target_", key)).rpartition(".")[2], {})
    kept = {name: value for name, value in node.items() if name not in names}
    present = {old: new for old, new in names.items() if old in node}
    for several in (new for new in present.values() if isinstance(new, dict)):
        kept |= several
    return {new: node[old] for old, new in present.items() if isinstance(new, str)} | kept


def renamed(name: str, owner: str = "") -> str | None:
    """Today's name of a top-level key, or of an argument of a class, if it was renamed."""
    new = ARGUMENTS.get(owner, {}).get(name)
    return new if isinstance(new, str) else None


def require_todays_names(run_dir: Path) -> None:
    """Raise an `InputError` if the config of a run holds earlier names: it is not continued."""
    source = json.loads((run_dir / "configs" / "train.json").read_text())
    if translate(source) != source:
        raise InputError(
            f"{run_dir}: expected a run of this version, got one that {LAST_VERSION} began. "
            f"Continue it with version {LAST_VERSION}, or choose another output_dir."
        )
