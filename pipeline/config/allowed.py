"""What a config may name: a guard against configs that run code, not a sandbox.

Classes stay off the list that take code or the name of a class as a value, unpickle, download, or
write text under any name. `python -m monai.bundle` does not ask here.
"""

from __future__ import annotations

import pydoc
import re
from collections.abc import Collection
from contextlib import suppress
from functools import cache
from typing import Any

from monai.bundle import ConfigComponent, ConfigParser, ReferenceResolver

from pipeline.config import old_names
from pipeline.config.keys import MARKS, SPECIAL, Path, walk
from pipeline.errors import nearest, refuse

_ROOT = __name__.rpartition("pipeline")[0]  # empty but in an exported bundle
LISTED = {  # classes and functions by package; those of MONAI may be named without it
    "ignite": "handlers.EMAHandler metrics.Average",
    "monai": """data.DataLoader data.Dataset engines.SupervisedEvaluator inferers.SimpleInferer
        inferers.SliceInferer inferers.SlidingWindowInferer losses.DiceCELoss losses.DiceLoss""",
    "monai.handlers": """CheckpointLoader CheckpointSaver ConfusionMatrix GarbageCollector
        LrScheduleHandler MeanDice MetricsSaver StatsHandler TensorBoardImageHandler
        TensorBoardStatsHandler ValidationHandler""",
    "monai.networks.nets": "DynUNet SegResNet UNet",
    "monai.transforms": """CenterSpatialCropd Compose DataStatsd EnsureTyped Flipd Identityd OneOf
        RandFlipd RandGaussianNoised Resized Rotate90d SaveImaged ScaleIntensityd""",
    f"{_ROOT}networks": "dense_unet.DenseUNet",
    f"{_ROOT}pipeline": """distributed.DistributedSettings evaluation.final_scores.Scoring
        evaluation.metrics.MeanDice lifecycle.lifecycle.Lifecycle
        lifecycle.read_only_run.ReadOnlyRun precision.Precision precision.resolve_device""",
    "pipeline.data": """cache.CachedDataset cache.CaseSampler cache.VolumeCache cases.list_images
        data_module.DataModule plan.Plan sampling.EpochSampler sampling.PatchDataset
        sampling.PatchLoader""",
    "pipeline.prediction": """predict_files.Prediction predictor.load_networks segmenter.Segmenter
        segmenter.SlidingWindowLabels sliding_window.SlidingWindow""",
    "pipeline.training": """checkpoint.CheckpointHandler evaluator.EvaluationLog
        evaluator.MixedPrecisionEvaluator flight_recorder.FlightRecorder
        logging_handlers.LoggingHandler loss.SegmentationLoss schedule.warmup_cosine
        trainer.MixedPrecisionTrainer trial.TrialStep""",
    "torch": "optim.AdamW optim.SGD utils.data.DataLoader",
    "torch.optim.lr_scheduler": """ChainedScheduler CosineAnnealingLR ExponentialLR LinearLR
        MultiStepLR OneCycleLR PolynomialLR SequentialLR StepLR""",
    f"{_ROOT}transforms": """augment.Augment cleanup.Cleanup postprocess.ToOriginalGridd
        preprocess.ValidationPreprocessing preprocess.preprocessing""",
}
DOTTED = [f"{package}.{name}" for package, names in LISTED.items() for name in names.split()]
BARE = {name.rpartition(".")[2]: name for name in DOTTED if name.startswith("monai.")}
NAMES = {*DOTTED, *BARE}

RESTRICTED = {  # arguments of listed classes that are left out or match a pattern, and why
    "compile": ("", "the compiler runs programs"),
    "compile_kwargs": ("", "the compiler runs programs"),
    "final_filename": (r".*\.pt", "Python might execute a file that is not named *.pt"),
    "key_metric_filename": (r".*\.pt", "Python might execute a file that is not named *.pt"),
    "key_var_format": (r"([^{}]|{(:[^{}]*)?})*", "it could print what is inside of objects"),
    "log_dir": (r"(?!.*://).*", "what is behind :// would be fetched or sent"),
    "writer": ("", "it names any class by dotted path"),
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
        in_channels normalization num_classes roi_size spacing strides base_channels norm
        learning_rate steps_per_epoch max_epochs warmup_steps""",
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

_ID, _MEMBER = r"@(\w+(?:::\w+)*)", r"\.([A-Za-z][A-Za-z0-9_]*)"
USE = re.compile(rf"{_ID}(?:{_MEMBER}(\()?)?")
_PLAIN = r"None|True|False|\d+(?:\.\d+)?(?:e-?\d+)?|'[\w .:/+-]*'"
_ARGUMENT = rf"(?:[A-Za-z][A-Za-z0-9_]*=)?(?:{_ID}(?:{_MEMBER})?|{_PLAIN})"
EXPRESSION = re.compile(rf"\${_ID}(?:{_MEMBER}(\((?:{_ARGUMENT}(?:, *{_ARGUMENT})*)?\))?)?")


def is_allowed(name: str, allow: Collection[str] = ()) -> bool:
    """Return whether `_target_` may hold a name: listed, in `allow`, or of a package there."""
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
    with suppress(pydoc.ErrorDuringImport):
        return pydoc.locate(BARE.get(name, name))  # as MONAI does
    return None


def check_names(source: Any, allow: Collection[str] = ()) -> None:
    """Raise an `InputError` with a line for each place that names what configs may not name."""
    refuse(f"{'#'.join(path)}: {text}" for path, text in find_faults(source, allow).items())


def find_faults(source: Any, allow: Collection[str] = ()) -> dict[Path, str]:
    """Find the path of each refused value, and what is expected there."""
    guard = _Guard(source, allow)
    for path, value in walk(source):
        if isinstance(value, str) and path[-1:] != ("_target_",):
            guard.check_string(path, value)
        elif isinstance(value, dict):
            guard.check_object(path, value)
    return guard.faults


class _Guard:
    """The values of a config, and which of them are refused."""

    def __init__(self, source: Any, allow: Collection[str]) -> None:
        self.allow, self.faults = allow, dict[Path, str]()
        self.nodes: dict[str, Any] = {}
        for path, node in walk(source):
            name = "::".join(path)
            self.nodes[name] = {} if name in self.nodes else node  # of two MONAI takes either

    def follow(self, name: str, seen: tuple[str, ...] = ()) -> tuple[str, str | None]:
        """Find where an id leads, and its class: empty if unknown, `None` if refused or missing."""
        if name not in self.nodes or name in seen:
            return name, None
        node = self.nodes[name]
        if isinstance(node, dict) and "_target_" in node:
            target = str(node["_target_"])
            listed = target.rpartition(".")[2] if target in NAMES else USERS
            return name, listed if is_allowed(target, self.allow) else None
        is_expression = str(node).startswith("$")
        if not (uses := read_uses((name,), node) if isinstance(node, str) else []):
            return name, (None if is_expression else "")
        other, used = uses[0]
        end, kind = self.follow(other, (*seen, name))
        if used:
            kind = MEMBERS.get(kind or "", {}).get(used, "" if kind == USERS else None)
        return (name if is_expression else end), kind

    def check_string(self, path: Path, written: str) -> None:
        if not _resolve("::".join(path), written).startswith(("$", "%")):
            return
        uses = read_uses(path, written)
        reasons = [self.refuse(*use) for use in uses] if uses else ["has another form."]
        if reason := next(filter(None, reasons), None):
            hint = f"{reason} Write @id, $@id.attribute or $@id.method(@id, 1)."
            self.faults[path] = f"expected an expression on an id, got {written!r}, which {hint}"

    def refuse(self, name: str, member: str) -> str:
        """Say why a member of an id may not be used; a value without members is a fault itself."""
        end, kind = self.follow(name)
        known = MEMBERS.get(kind or "", {})
        if not member or kind in (None, USERS) or member in known:
            return ""
        node = self.nodes[end]
        if not ConfigComponent.is_instantiable(node) and not str(node).startswith("$"):
            fault = f"expected an object with {member!r}, got {str(node)[:60]!r}. Correct it."
            self.faults[tuple(end.split("::"))] = fault
            return ""
        what = f"a {kind}. {nearest(member, known)}" if known else "of which nothing may be asked."
        return f"asks for {member!r} of @{name.replace('::', '#')}, {what}"

    def check_object(self, path: Path, node: dict[str, Any]) -> None:
        """Check the keys that MONAI reads itself, and restricted arguments."""
        for key in (key for key in node if key.startswith("_") and key not in (*SPECIAL, "_meta_")):
            near = nearest(key, SPECIAL)
            if "_target_" in node or near.startswith("Did"):
                fault = f"expected one of {', '.join(SPECIAL)}, got '{key}'. {near}"
                self.faults[*path, key] = fault
        if "_target_" not in node:
            return
        target = str(node["_target_"])
        if not is_allowed(target, self.allow):
            near = nearest(target, [*DOTTED, *BARE]).partition("Valid are")[0]
            fault = f"expected a class or function of the list, got '{target}'. {near}".rstrip()
            fault += f" If you trust it: --allow {target}"
            if (today := old_names.translate(target)) != target:
                fault = f"{target} was renamed to {today}"
            self.faults[*path, "_target_"] = fault
        if node.get("_mode_", "default") != "default":
            self.faults[*path, "_mode_"] = f"expected default, got {node['_mode_']}. Leave it out."
        for key in RESTRICTED.keys() & node.keys() if target in NAMES else ():
            pattern, reason = RESTRICTED[key]
            end, kind = self.follow("::".join((*path, key)))
            value = self.nodes.get(end)
            is_text = isinstance(value, str) and re.fullmatch(rf"(?!\$){pattern}", value)
            if not (value in (None, False) or is_text or kind == "Path"):
                fault = f"expected no such {key}, since {reason}, got {node[key]!r}. Leave it out."
                self.faults[*path, key] = fault


def _resolve(name: str, written: str) -> str:
    if not written.startswith(MARKS):
        return written
    with suppress(ValueError):
        return str(ConfigParser.resolve_relative_ids(name, written))
    return "$"  # an id that leads out of the config


def read_uses(path: Path, written: str) -> list[tuple[str, str]]:
    """Each id in a reference or expression, its object first, with the member used of it."""
    text = ReferenceResolver.normalize_id(_resolve("::".join(path), written))
    if not (EXPRESSION.fullmatch(text) or re.fullmatch(_ID, text)):
        return []
    return [(name, member + "()" * bool(call)) for name, member, call in USE.findall(text)]
