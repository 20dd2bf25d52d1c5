"""What a config may name: a guard against configs that run code, not a sandbox.

`_target_` holds a name of `LISTED`, which is what the shipped configs and the documentation use, or
one that `--allow` admits. An expression reads one attribute of an `@id`, or calls one method with
ids and literals as arguments: one of `MEMBERS` for the class of the object. Some arguments of
listed classes are restricted (`RESTRICTED`). Classes stay off the list that take code or the name
of a class as a value, unpickle, download, or write text under any name (`Lambdad`, `LambdaLR`,
`LoadImaged`, `LogfileHandler`, ...). `python -m monai.bundle` does not ask here.
"""

from __future__ import annotations

import argparse
import pydoc
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from monai.bundle import ConfigComponent, ConfigParser, ReferenceResolver

from pipeline.config.keys import MARKS, Path, walk
from pipeline.errors import InputError, nearest

LISTED = {  # classes and functions by module; those of MONAI may be named without it
    "ignite.handlers": "EMAHandler",
    "ignite.metrics": "Average",
    "monai.data": "DataLoader Dataset",
    "monai.engines": "SupervisedEvaluator",
    "monai.handlers": """CheckpointLoader CheckpointSaver ConfusionMatrix GarbageCollector
        LrScheduleHandler MeanDice MetricsSaver StatsHandler TensorBoardImageHandler
        TensorBoardStatsHandler ValidationHandler""",
    "monai.inferers": "SimpleInferer SliceInferer SlidingWindowInferer",
    "monai.losses": "DiceCELoss DiceLoss",
    "monai.networks.nets": "DynUNet SegResNet UNet",
    "monai.transforms": """CenterSpatialCropd Compose DataStatsd EnsureTyped Flipd Identityd OneOf
        RandFlipd RandGaussianNoised Resized Rotate90d SaveImaged ScaleIntensityd""",
    "networks.dense_unet": "DenseUNet",
    "pipeline.data.cache": "CachedDataset CaseSampler VolumeCache",
    "pipeline.data.cases": "list_images",
    "pipeline.data.data_module": "DataModule",
    "pipeline.data.plan": "Plan",
    "pipeline.data.sampling": "EpochSampler PatchDataset PatchLoader",
    "pipeline.distributed": "DistributedSettings",
    "pipeline.evaluation.final_scores": "Scoring",
    "pipeline.evaluation.metrics": "MeanDice",
    "pipeline.lifecycle.lifecycle": "Lifecycle",
    "pipeline.lifecycle.read_only_run": "ReadOnlyRun",
    "pipeline.precision": "Precision resolve_device",
    "pipeline.prediction.predict_files": "Prediction",
    "pipeline.prediction.predictor": "load_networks",
    "pipeline.prediction.segmenter": "Segmenter SlidingWindowLabels",
    "pipeline.prediction.sliding_window": "SlidingWindow",
    "pipeline.training.checkpoint": "CheckpointHandler",
    "pipeline.training.evaluator": "EvaluationLog MixedPrecisionEvaluator",
    "pipeline.training.flight_recorder": "FlightRecorder",
    "pipeline.training.logging_handlers": "LoggingHandler",
    "pipeline.training.loss": "SegmentationLoss",
    "pipeline.training.schedule": "warmup_cosine",
    "pipeline.training.trainer": "MixedPrecisionTrainer",
    "pipeline.training.trial": "TrialStep",
    "torch.optim": "AdamW SGD",
    "torch.optim.lr_scheduler": """ChainedScheduler CosineAnnealingLR ExponentialLR LinearLR
        MultiStepLR OneCycleLR PolynomialLR SequentialLR StepLR""",
    "torch.utils.data": "DataLoader",
    "transforms.augment": "Augment",
    "transforms.cleanup": "Cleanup",
    "transforms.postprocess": "ToOriginalGridd",
    "transforms.preprocess": "ValidationPreprocessing preprocessing",
}
DOTTED = [f"{module}.{name}" for module, names in LISTED.items() for name in names.split()]
BARE = {name.rpartition(".")[2]: name for name in DOTTED if name.startswith("monai.")}
NAMES = {*DOTTED, *BARE}

# Arguments of listed classes that are left out or match a pattern, and why.
_COMPILE = dict.fromkeys(("compile", "compile_kwargs"), ("", "the compiler runs programs"))
_LOG_DIR = {"log_dir": (r"(?!.*://).*", "what is behind :// would be fetched or sent")}
_FILE = (r".*\.pt", "Python might execute a file that is not named *.pt")
_FORMAT = (r"([^{}]|{(:[^{}]*)?})*", "it could print what is inside of objects")
RESTRICTED: dict[str, dict[str, tuple[str, str]]] = {
    "CheckpointSaver": {"final_filename": _FILE, "key_metric_filename": _FILE},
    "MixedPrecisionEvaluator": _COMPILE,
    "MixedPrecisionTrainer": _COMPILE,
    "SaveImaged": {"writer": ("", "it names any class by dotted path")},
    "StatsHandler": {"key_var_format": _FORMAT},
    "SupervisedEvaluator": _COMPILE,
    "TensorBoardImageHandler": _LOG_DIR,
    "TensorBoardStatsHandler": _LOG_DIR,
}
# Members that expressions may use, by class, and after a colon the class of their value.
_LIFECYCLE = """cache_dir:Path cases:Cases checkpoint:Path enter() initial_weights is_held leave()
    lost plan:Plan preprocessing_key run_dir:Path"""
_MEMBERS = {
    "Augment": "input_size",
    "Cases": "test train validation",
    "EpochSampler": "samples_per_epoch",
    "Lifecycle": _LIFECYCLE,
    "Plan": """batch_size class_names crop_empty_borders flip_axes foreground_ratio ignore_value
        in_channels normalization num_classes roi_size spacing strides""",
    "Precision": "device place():Module",
    "DistributedSettings": "replica()",
    "ReadOnlyRun": _LIFECYCLE + " best_model:Path",
    "MixedPrecisionEvaluator MixedPrecisionTrainer SupervisedEvaluator Prediction Scoring": "run()",
    "Module DenseUNet DynUNet SegResNet UNet": "named_parameters() parameters() state_dict()",
}
MEMBERS = {
    kind: dict(member.partition(":")[::2] for member in members.split())
    for kinds, members in _MEMBERS.items()
    for kind in kinds.split()
}
USERS = "*"  # the kind of what --allow admits, of which any public member may be used
MEMBERS[USERS] = {member: kind for known in MEMBERS.values() for member, kind in known.items()}

OUTSIDE = "#"  # stands for a relative id that leads out of the config
SPECIAL = sorted(ConfigComponent.non_arg_keys)
KNOWN = (*SPECIAL, "_meta_")
OBJECT = re.compile(r"_target_[\"']?\s*[:=]")  # in malformed JSON, too
_ID, _MEMBER = r"@(\w+(?:::\w+)*)", r"\.([A-Za-z][A-Za-z0-9_]*)"
USE = re.compile(rf"{_ID}(?:{_MEMBER}(\()?)?")
_PLAIN = r"None|True|False|\d+(?:\.\d+)?(?:e-?\d+)?|'[\w .:/+-]*'"
_ARGUMENT = rf"(?:[A-Za-z][A-Za-z0-9_]*=)?(?:{_ID}(?:{_MEMBER})?|{_PLAIN})"
EXPRESSION = re.compile(rf"\${_ID}(?:{_MEMBER}(\((?:{_ARGUMENT}(?:, *{_ARGUMENT})*)?\))?)?")


def is_allowed(name: str, allow: Collection[str] = ()) -> bool:
    """Whether `_target_` may hold a name: a listed one, one of `allow`, or of a package there."""
    if name in NAMES or name in allow:
        return True
    packages = tuple(f"{package}." for package in allow if name.startswith(f"{package}."))
    target = find(name) if packages else None
    module = f"{getattr(target, '__module__', '')}."  # what a package imports is not its own
    return bool(packages) and (target is None or module.startswith(packages))


@cache
def find(name: str) -> Any:
    """Import the class or function of an allowed name; `None` if there is none."""
    if name not in BARE and "." not in name:
        name = str(ConfigComponent({"_target_": name}).resolve_module_name())
    try:
        return pydoc.locate(BARE.get(name, name))  # as MONAI does
    except pydoc.ErrorDuringImport:
        return None


def check_names(source: Any, allow: Collection[str] = ()) -> None:
    """Raise an `InputError` with a line for each place that names what configs may not name."""
    if found := [f"{'#'.join(path)}: {fault}" for path, fault in find_faults(source, allow)]:
        raise InputError(*found)


def find_faults(source: Any, allow: Collection[str] = ()) -> Iterator[tuple[Path, str]]:
    """Yield the path of each refused value, and what is expected there."""
    guard = _Guard(source, allow)
    for path, value in walk(source):
        if isinstance(value, str) and path[-1:] != ("_target_",):
            if fault := guard.check_string("::".join(path), value):
                yield path, fault
        elif isinstance(value, dict):
            for key, fault in guard.check_object("::".join(path), value):
                yield (*path, key), fault
    for name, member in guard.plain_values.items():
        got = repr(guard.nodes[name])[:60]
        yield tuple(name.split("::")), f"expected an object with {member!r}, got {got}. Correct it."


class _Guard:
    """What is known of the objects of a config before they are made."""

    def __init__(self, source: Any, allow: Collection[str]) -> None:
        self.allow = allow
        self.nodes: dict[str, Any] = {}
        for path, node in walk(source):
            name = "::".join(path)
            self.nodes[name] = {} if name in self.nodes else node  # of two MONAI takes either
        self.plain_values: dict[str, str] = {}  # ids of what is no object, and a member used of it

    def follow(self, name: str, seen: tuple[str, ...] = ()) -> tuple[str, str | None]:
        """Where the references of an id end, and the class of its object as `MEMBERS` names it.

        The class is empty if not known; `None`: nothing is there, a circle, or a refused value.
        """
        if name not in self.nodes or name in seen:
            return name, None
        node = self.nodes[name]
        if isinstance(node, dict) and "_target_" in node:
            target, is_made = node["_target_"], node.get("_mode_", "default") == "default"
            if not isinstance(target, str) or not is_allowed(target, self.allow):
                return name, None
            listed = target.rpartition(".")[2] if target in NAMES else USERS
            return name, listed if is_made else ""
        is_expression = str(node).startswith("$")
        if not (uses := read_uses((name,), node) if isinstance(node, str) else []):
            return name, (None if is_expression else "")
        (other, used), *_ = uses
        end, kind = self.follow(other, (*seen, name))
        unknown = "" if kind == USERS else None
        of_used = MEMBERS.get(kind or "", {}).get(used, unknown) if used else kind
        return (name if is_expression else end), of_used

    def check_string(self, name: str, written: str) -> str | None:
        text = _resolve(name, written)
        if text == OUTSIDE:
            return f"expected a relative id within the config, got {written!r}. Use fewer #."
        if text.startswith("%"):
            return f"expected no macro, got {written!r}. Write the value, or refer to it by @."
        if not text.startswith("$"):
            return None
        chain = re.match(r"\$@[\w:]+\.(\w+\..*?)(\(|$)", text)
        reasons = [self._refuse_member(*use) for use in read_uses((name,), written)] or [
            f"reaches for {chain[1]!r}." if chain else "has another form."
        ]
        reason = next(filter(None, reasons), None)
        what = f"expected an expression on an id, got {written!r}, which {reason}"
        return reason and f"{what} Write @id, $@id.attribute or $@id.method(@id, 1)."

    def _refuse_member(self, name: str, member: str) -> str:
        end, kind = self.follow(name)
        known = MEMBERS.get(kind or "", {})
        if not member or kind in (None, USERS) or member in known:
            return ""
        node = self.nodes[end]
        if not ConfigComponent.is_instantiable(node) and not str(node).startswith("$"):
            self.plain_values.setdefault(end, member)
            return ""
        what = f"a {kind}. {nearest(member, known)}" if known else "of which nothing may be asked."
        return f"asks for {member!r} of @{name.replace('::', '#')}, {what}"

    def check_object(self, name: str, node: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield the keys that are refused: those that MONAI reads itself, and restricted ones."""
        for key in (key for key in node if key.startswith("_") and key not in KNOWN):
            near = nearest(key, SPECIAL)
            if "_target_" in node or near.startswith("Did"):
                yield key, f"expected one of {', '.join(SPECIAL)}, got '{key}'. {near}"
        if "_target_" not in node:
            return
        target = node["_target_"]
        restricted: dict[str, tuple[str, str]] = {}
        if not isinstance(target, str):
            yield "_target_", f"expected the name of a class, got {target!r}. Write a string."
        elif target in NAMES:
            restricted = RESTRICTED.get(target.rpartition(".")[2], {})
        elif not is_allowed(target, self.allow):
            near = nearest(target, [*NAMES, *self.allow])
            hint = f"{near} If" if near.startswith("Did") else "If"
            fault = f"expected a class or function of the list, got '{target}'. {hint} you trust it"
            yield "_target_", f"{fault}: --allow {target}"
        for key in restricted.keys() & node.keys():
            pattern, reason = restricted[key]
            end, kind = self.follow(f"{name}::{key}")
            value = self.nodes.get(end)
            is_text = isinstance(value, str) and re.fullmatch(rf"(?!\$){pattern}", value)
            if not (value in (None, False) or is_text or kind == "Path"):
                fault = f"expected no such {key}, since {reason}, got {node[key]!r}. Leave it out."
                yield key, fault
        modes = ("default",) if restricted else ("default", "callable")  # its arguments come later
        for key, valid in (("_mode_", modes), ("_disabled_", (True, False, "true", "false"))):
            if node.get(key, valid[0]) not in valid:
                shown = " or ".join(map(str, valid))
                yield key, f"expected {shown}, got {node[key]!r}. Leave it out."


def _resolve(name: str, written: str) -> str:
    if not written.startswith(MARKS):
        return written
    with suppress(ValueError):
        return str(ConfigParser.resolve_relative_ids(name, written))
    return OUTSIDE


def read_uses(path: Path, written: str) -> list[tuple[str, str]]:
    """Each id in a reference or expression, with the `attribute` or `method()` used of it.

    The object of the expression is the first. Nothing for text, and for another form of expression.
    """
    text = ReferenceResolver.normalize_id(_resolve("::".join(path), written))
    if not (EXPRESSION.fullmatch(text) or re.fullmatch(_ID, text)):
        return []
    return [(name, member + "()" * bool(call)) for name, member, call in USE.findall(text)]


def override_fault(key: str, value: Any) -> str | None:
    """Why `--key value` is no plain value, or `None`."""
    for path, inner in walk(value, tuple(ReferenceResolver.split_id(key))):
        special = next((part for part in path if part in SPECIAL), None)
        text = inner if isinstance(inner, str) else ""
        if special or text.lstrip().startswith(MARKS) or OBJECT.search(text):
            got = f"--{key}: expected a JSON value or a plain string, got {special or text!r}."
            return f"{got} Expressions and references belong into a file, `_target_` likewise."
    return None


def split_allow(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the names of its `--allow` options and the other words.

    Raises:
        InputError: If a name is not a dotted name.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--allow", action="append", nargs="?", const="", default=[])
    options, rest = parser.parse_known_args(words)
    names = [name.strip() for given in options.allow for name in given.split(",")]
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise InputError(f"--allow: expected a name such as package.Class, got {name!r}.")
    return names, rest
