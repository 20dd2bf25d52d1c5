"""Mixed-precision segmentation of 3D medical images: the public names, and the command `ampseg`.

Names are imported when they are first used, so that `import ampseg` takes no time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__version__ = "0.2.0"

PACKAGES = ("networks", "pipeline", "transforms")
PUBLIC = {  # names by module
    "networks.dense_unet": "DenseUNet",
    "pipeline.data.data_module": "DataModule",
    "pipeline.data.sampling": "EpochSampler PatchDataset PatchLoader",
    "pipeline.errors": "InputError",
    "pipeline.evaluation.metrics": "MeanDice",
    "pipeline.precision": "Precision",
    "pipeline.prediction.predictor": "Predictor",
    "pipeline.prediction.segmenter": "Segmenter",
    "pipeline.prediction.sliding_window": "SlidingWindow",
    "pipeline.training.evaluator": "MixedPrecisionEvaluator",
    "pipeline.training.loss": "SegmentationLoss",
    "pipeline.training.schedule": "warmup_cosine",
    "pipeline.training.trainer": "MixedPrecisionTrainer StepEvents",
    "transforms.augment": "Augment",
}
MODULES = {name: module for module, names in PUBLIC.items() for name in names.split()}
__all__ = ["__version__", "main", *sorted(MODULES)]

COMMANDS = {
    "check": "DATASET_DIR --plan          look at a dataset and at what training would do",
    "train": "--dataset_dir DATASET_DIR   train, or go on training",
    "stop": "RUN                         end a run early, but properly",
    "predict": "RUN INPUT OUTPUT_DIR        predict with a run or a bundle",
    "evaluate": "PRED_DIR LABEL_DIR          score predictions",
    "compare": "--a A.csv ... --b B.csv ... compare two ways of training",
    "certify": "--dataset_dir DATASET_DIR   compare precisions",
    "report": "RUN                         write the report of a run again",
    "export": "RUN                         pack a bundle to hand on",
}


def __getattr__(name: str) -> Any:
    """Import a public name."""
    if name not in MODULES:
        raise AttributeError(f"module 'ampseg' has no attribute '{name}'")
    if fault := find_foreign_package():
        raise ImportError(fault)
    value = globals()[name] = getattr(import_module(MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__


def find_foreign_package() -> str | None:
    """Say which package of another project stands in the place of one of ours, if one does."""
    here = Path(__file__).resolve().parent
    for name in PACKAGES:
        spec = find_spec(name)
        folders = [Path(place) for place in (spec and spec.submodule_search_locations) or []]
        place = folders[0] if folders else Path(str(spec.origin if spec else "nowhere"))
        if place.resolve() != here / name:
            remedy = "Rename it, or use an environment, and a folder, of its own for ampseg."
            return f"{name}: expected the package in {here / name}, got {place}. {remedy}"
    return None


def main(words: Sequence[str] | None = None) -> int:
    """Run the command that the first word names; returns the exit status."""
    words = list(sys.argv[1:] if words is None else words)
    name = words[0] if words else ""
    if name == "--version":
        print(f"ampseg {__version__}")
    elif name in ("", "-h", "--help"):
        print("usage: ampseg COMMAND ...\n\nEach command tells more with --help:\n")
        print("\n".join(f"  {command:<9} {what}" for command, what in COMMANDS.items()))
    elif fault := find_foreign_package():
        print(fault, file=sys.stderr)
        return 2
    elif name not in COMMANDS:
        from pipeline.errors import nearest

        fault = f"ampseg: expected a command, got '{name}'. {nearest(name, COMMANDS)}"
        print(fault, file=sys.stderr)
        return 2
    else:
        module = "pipeline.run" if name == "train" else f"pipeline.commands.{name}"
        return int(import_module(module).main(words[1:]))
    return 0 if words else 2


if __name__ == "__main__":
    sys.exit(main())
