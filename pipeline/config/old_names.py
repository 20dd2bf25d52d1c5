"""Names that earlier versions used in configs, and what they are called today.

Stored runs are read through `translate`; a person who types an old name is told the new one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pipeline.config.keys import Config
from pipeline.errors import InputError

LAST_VERSION = "0.1.0"  # the last one that continues runs with these names
TOP_LEVEL = {
    "check": "preflight",
    "compile": "cuda_graph",
    "init_head": "reinit_head",
    "intake": "data_module",
    "layout": "memory_format",
    "resident": "cache_on_device",
    "sums_bytes": "max_blend_bytes",
    "test_share": "test_fraction",
}
MODULES = {
    "pipeline.data.images": "pipeline.data.input_images",
    "pipeline.lifecycle": "pipeline.lifecycle.lifecycle",
    "pipeline.predict": "pipeline.prediction.predict_files",
    "pipeline.prediction.metrics": "pipeline.evaluation.metrics",
    "pipeline.predictor": "pipeline.prediction.predictor",
    "pipeline.scoring": "pipeline.evaluation.final_scores",
    "pipeline.training.handlers": "pipeline.training.logging_handlers",
    "pipeline.training.losses": "pipeline.training.loss",
    "pipeline.training.optimization": "pipeline.training.schedule",
    "pipeline.training.recorder": "pipeline.training.flight_recorder",
}
CLASSES = {
    "pipeline.data.intake.Intake": "pipeline.data.data_module.DataModule",
    "pipeline.visit.Visit": "pipeline.lifecycle.read_only_run.ReadOnlyRun",
}
ARGUMENTS = {  # by class
    "DataModule": {"check": "preflight"},
    "Lifecycle": {"init_head": "reinit_head", "intake": "data_module"},
    "MixedPrecisionTrainer": {"compile": "cuda_graph"},
    "PatchLoader": {"resident": "cache_on_device"},
    "Precision": {"layout": "memory_format"},
    "SlidingWindow": {"sums_bytes": "max_blend_bytes"},
}
_REFERENCE = re.compile(rf"@({'|'.join(TOP_LEVEL)})\b")


def translate(source: Config) -> Config:
    """A config that an earlier version stored, with today's names."""
    renamed = {TOP_LEVEL.get(key, key): value for key, value in source.items()}
    now = {key: value for key, value in source.items() if key not in TOP_LEVEL}
    return {key: _translate(value) for key, value in {**renamed, **now}.items()}


def _translate(node: Any) -> Any:
    if isinstance(node, str):
        if node.startswith(("@", "$")):
            node = _REFERENCE.sub(lambda found: f"@{TOP_LEVEL[found[1]]}", node)
            return node.replace(".start.tensors", ".initial_weights")
        module, _, name = node.rpartition(".")
        return CLASSES.get(node, f"{MODULES[module]}.{name}" if module in MODULES else node)
    if isinstance(node, list):
        return [_translate(one) for one in node]
    if not isinstance(node, dict):
        return node
    node = {key: _translate(value) for key, value in node.items()}
    arguments = ARGUMENTS.get(str(node.get("_target_")).rpartition(".")[2], {})
    return {arguments.get(key, key): value for key, value in node.items()}


def renamed(name: str, owner: str | None = None) -> str | None:
    """Today's name of a top-level key, or of an argument of the class `owner`, if it had another.

    `None` if it had no other name.
    """
    return (TOP_LEVEL if owner is None else ARGUMENTS.get(owner, {})).get(name)


def require_todays_names(run_dir: Path) -> None:
    """Refuse to continue a run that an earlier version began.

    Raises:
        InputError: If its config has earlier names.
    """
    configs = run_dir / "configs"
    source = json.loads((configs / "train.json").read_text())
    if translate(source) != source:
        raise InputError(
            f"{run_dir}: expected a run of this version to continue, got one of version "
            f"{LAST_VERSION} or earlier. Continue it with version {LAST_VERSION}, or choose "
            "another output_dir."
        )
