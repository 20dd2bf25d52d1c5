"""Configs: the table of keys, and what a change of one means.

A config is one JSON object as MONAI's ConfigParser reads it. Its top-level keys stand in `KEYS`
with their type, their class and what they mean. The class says what a change does to a run that
is continued:

    identity     another run: refused, the keys named
    continuable  logged and taken
    free         taken silently; it changes where things are, not what they are
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError

Config = dict[str, Any]
Path = tuple[str, ...]  # keys from the root of a config; "#".join of it is the id
MARKS = ("$", "@", "%")  # with which a string begins that is no text


@dataclass(frozen=True)
class Key:
    """One top-level key: what it may hold, its class, its meaning."""

    types: str
    kind: str
    meaning: str
    choices: tuple = ()
    least: float | None = None
    is_optional: bool = False


IDENTITY, CONTINUABLE, FREE = "identity", "continuable", "free"

KEYS: dict[str, Key] = {
    "bundle_root": Key("path", FREE, "folder that relative paths start from"),
    "dataset_dir": Key("path", FREE, "folder with dataset.json; data/phantom makes itself"),
    "output_dir": Key(
        "path null",
        FREE,
        "run directory; null: runs/<name of dataset_dir>; of predictions: their folder",
    ),
    "cache_dir": Key("path", FREE, "folder for what was read and preprocessed, shared by runs"),
    "cache_limit_bytes": Key("int", FREE, "that they may take; the oldest make room", least=1),
    "resume": Key("str bool", FREE, "continue a run found there", ("auto", True, False)),
    "accept_changed_data": Key(
        "bool", FREE, "continue a run where files of its cases were changed", is_optional=True
    ),
    "seed": Key("int", IDENTITY, "of weights, sample order, crops, augmentation and dropout"),
    "init_weights": Key(
        "path null",
        IDENTITY,
        "weights that a new run begins with: model.pt, .safetensors or a checkpoint",
    ),
    "reinit_head": Key("bool", IDENTITY, "draw the head anew, whatever init_weights has there"),
    "device": Key("str", CONTINUABLE, "auto, cpu, cuda or cuda:N"),
    "amp": Key("bool", CONTINUABLE, "mixed precision; false: plain float32, no scaler"),
    "amp_dtype": Key(
        "str",
        CONTINUABLE,
        "dtype of autocast; auto: float16 on CUDA, float32 on CPU",
        ("auto", "float16", "bfloat16"),
    ),
    "tf32": Key("bool", CONTINUABLE, "TF32 for float32 products and convolutions on CUDA"),
    "cudnn_benchmark": Key("bool", CONTINUABLE, "let cuDNN time its algorithms and choose"),
    "memory_format": Key(
        "str",
        CONTINUABLE,
        "memory format of images and weights; auto: channels last",
        ("auto", "channels_last_3d", "contiguous"),
    ),
    "cuda_graph": Key(
        "str",
        CONTINUABLE,
        "replay training steps as a CUDA graph; auto: on CUDA, with one rank",
        ("auto", "cuda_graphs", "none"),
    ),
    "max_consecutive_skips": Key(
        "int", CONTINUABLE, "skipped steps in a row after which training stops", least=1
    ),
    "overflow_keep": Key("int", FREE, "skipped steps whose weights are kept for replay", least=0),
    "checkpoint_every": Key(
        "int", FREE, "steps between checkpoints, beside those at ends of epochs", least=1
    ),
    "grace_s": Key("float", FREE, "seconds in which a run ends after a signal", least=1),
    "underflow_every": Key(
        "int", FREE, "steps between two measurements of gradient underflow; 0: none", least=0
    ),
    "cache_on_device": Key(
        "str bool",
        CONTINUABLE,
        "keep training cases in the device's memory; auto: on CUDA, where they fit",
        ("auto", True, False),
    ),
    "num_workers": Key(
        "int", CONTINUABLE, "processes that cut patches of cases not resident; 0: none", least=0
    ),
    "worker_timeout_s": Key("float", CONTINUABLE, "seconds that a batch may take them", least=1),
    "preflight": Key(
        "str", FREE, "preflight: headers and voxels, headers, or neither", ("full", "fast", "off")
    ),
    "data_roots": Key("paths", FREE, "folders beside dataset_dir that its files may lie in"),
    "exclude": Key("names", IDENTITY, "case ids to leave out"),
    "fold": Key(
        "int all", IDENTITY, "which of the folds is validated on; all: train on every case"
    ),
    "num_folds": Key("int", IDENTITY, "parts that the persons are divided into"),
    "split_seed": Key("int", IDENTITY, "which division into folds"),
    "split_file": Key("path null", IDENTITY, "JSON of case ids, as nnU-Net's splits_final.json"),
    "test_fraction": Key(
        "float", IDENTITY, "share of the persons that is never looked at", least=0
    ),
    "group_pattern": Key(
        "str object null",
        IDENTITY,
        "person of a case id: regular expression, or pairs (2k-1 and 2k are one person)",
    ),
    "memory_budget_bytes": Key(
        "int auto",
        FREE,
        "what roi_size and batch_size may need; auto: 8 GiB or what fits, on a CPU 2",
        least=1,
    ),
    "spacing": Key("triple auto", IDENTITY, "voxel size in mm that volumes are resampled to"),
    "crop_empty_borders": Key("bool auto", IDENTITY, "cut off what is zero around a volume"),
    "normalization": Key(
        "str list object auto", IDENTITY, "zscore, percentile_zscore, or clip, mean and std"
    ),
    "transforms_before": Key("list", IDENTITY, "your MONAI transforms after loading"),
    "transforms_after": Key("list", IDENTITY, "your MONAI transforms after normalisation"),
    "roi_size": Key("triple auto", IDENTITY, "network input in voxels"),
    "foreground_ratio": Key("float auto", IDENTITY, "share of patches centred on foreground"),
    "flip_axes": Key("list auto", IDENTITY, "axes that may be mirrored; auto spares left-right"),
    "augmentation": Key("object", IDENTITY, "probability and range of each augmentation"),
    "in_channels": Key("int auto", IDENTITY, "image channels", least=1),
    "num_classes": Key("int auto", IDENTITY, "classes, background included", least=2),
    "class_names": Key("names auto", IDENTITY, "names of the classes, background first"),
    "strides": Key("strides auto", IDENTITY, "pooling per level: an int, or one for each axis"),
    "base_channels": Key("int", IDENTITY, "channels of the first level; 32 for real work", least=1),
    "recompute_levels": Key(
        "int",
        CONTINUABLE,
        "finest levels whose activations are computed again in the backward pass: less memory",
        least=0,
    ),
    "batch_size": Key("int auto", IDENTITY, "patches in a micro-batch", least=1),
    "accumulation_steps": Key("int", IDENTITY, "micro-batches in an optimizer step", least=1),
    "steps_per_epoch": Key("int", IDENTITY, "optimizer steps in an epoch", least=1),
    "max_epochs": Key("int", CONTINUABLE, "epochs to train", least=1),
    "learning_rate": Key("float", CONTINUABLE, "peak of the learning rate", least=0),
    "weight_decay": Key("float", CONTINUABLE, "of AdamW", least=0),
    "warmup_steps": Key("int", CONTINUABLE, "steps of linear warm-up before the cosine", least=0),
    "grad_clip": Key(
        "float", CONTINUABLE, "largest 2-norm of the gradients; 0: no clipping", least=0
    ),
    "val_interval": Key("int", CONTINUABLE, "epochs between validations", least=1),
    "overlap": Key("float", CONTINUABLE, "of sliding windows in validation, 0 to 1"),
    "sw_batch_size": Key("int", CONTINUABLE, "sliding windows predicted at once", least=1),
    "log_every": Key("int", FREE, "steps between two points in TensorBoard", least=1),
    "final_scores": Key(
        "bool", FREE, "at the end score validation and test, best and last weights"
    ),
    "tolerance_mm": Key("float", FREE, "within which surfaces agree, in scores", least=0),
    "report": Key("bool", FREE, "write report/index.html at the end"),
    "data_module": Key("object", FREE, "how the dataset is looked at"),
    "lifecycle": Key("object", FREE, "the run from lock to last word"),
    "process_group": Key(
        "object", FREE, "the ranks of a run; of configs/multi_gpu.json", is_optional=True
    ),
    "cases": Key("object str", IDENTITY, "the dataset's cases and split"),
    "plan": Key("object str", IDENTITY, "what the dataset needs: the values that are auto"),
    "cache": Key("object", FREE, "the preprocessed cases on disk"),
    "precision": Key("object", CONTINUABLE, "owner of autocast and gradient scaler"),
    "network_def": Key("object", IDENTITY, "the network"),
    "network": Key("object str", IDENTITY, "the network on its device"),
    "loss_function": Key("object", IDENTITY, "Dice + cross-entropy, reduced in float32"),
    "optimizer": Key("object", IDENTITY, "of the network's parameters"),
    "lr_scheduler": Key("object", IDENTITY, "learning rate by step"),
    "preprocessing": Key("object", IDENTITY, "from files to regular volumes"),
    "train": Key("object", IDENTITY, "dataset, augmentation, handlers, trainer"),
    "validate": Key("object", CONTINUABLE, "dataset, inferer, metric, evaluator"),
    "scoring": Key("object", FREE, "scores the run at its end"),
    "initialize": Key("list", FREE, "what happens first"),
    "run": Key("list", FREE, "what happens then"),
    "finalize": Key("list", FREE, "what happens last"),
}

# of an inference config, beside those that it has in common with training
PREDICTION_KEYS: dict[str, Key] = {
    "device": Key("str object", CONTINUABLE, "auto, cpu, cuda or cuda:N; clients want one made"),
    "input": Key("path", FREE, "file or folder to predict: NIfTI, or DICOM series"),
    "weights": Key("path", FREE, "state dict of the network, as a path from bundle_root"),
    "ensemble": Key("paths", FREE, "further run directories; probabilities are averaged"),
    "mirror": Key("bool", FREE, "average over mirror images along flip_axes"),
    "max_blend_bytes": Key("int", FREE, "memory for the sums of a slab of all classes", least=1),
    "min_volume_ml": Key(
        "float object", FREE, "parts that are smaller become background; by class, or one number"
    ),
    "keep_largest": Key("names all", FREE, "classes of which only the largest part is kept"),
    "fill_holes": Key("names all", FREE, "classes whose holes are filled"),
    "probabilities": Key("bool", FREE, "write the probabilities of all classes as well"),
    "strict": Key("bool", FREE, "stop at the first case that cannot be predicted"),
    "trained_on": Key("object null", FREE, "what training images are like, to warn of others"),
    "dataset": Key("object", FREE, "the volumes, preprocessed"),
    "dataloader": Key("object", FREE, "of the dataset"),
    "inferer": Key("object", FREE, "the sliding window"),
    "cleanup": Key("object", FREE, "what is done to label maps at the end"),
    "segmenter": Key("object", FREE, "from a preprocessed image to labels on the file's grid"),
    "prediction": Key("object", FREE, "from files to files"),
    "postprocessing": Key("object", FREE, "of the evaluator"),
    "handlers": Key("list", FREE, "of the evaluator"),
    "evaluator": Key("object", FREE, "predicts whole volumes in all class channels, for clients"),
}

# of a command line alone
WORDS_OF_COMMANDS = {
    **dict.fromkeys(("run_dir", "ensemble"), "path paths null"),
    **dict.fromkeys(("config", "json", "output"), "path"),
    **dict.fromkeys(("metric", "case_column", "class_column", "person_column"), "str"),
}

# that clients of MONAI add of themselves: a name of theirs for the run
CLIENT_KEYS = ("run_name",)

# where the class of a nested key differs from that of its top-level key
NESTED = {
    "network_def::recompute_levels": CONTINUABLE,
    "train::trainer::initial_weights": FREE,  # init_weights says whose they are
    "train::trainer::max_epochs": CONTINUABLE,
    "train::trainer::cuda_graph": CONTINUABLE,
    "loss_function::backend": CONTINUABLE,
    "optimizer::fused": CONTINUABLE,
    "train::trainer::replica": FREE,
    "train::trainer::grad_clip": CONTINUABLE,
    "train::handlers": FREE,
    "train::dataloader::device": CONTINUABLE,
    "train::dataloader::num_workers": CONTINUABLE,
    "train::dataloader::cache_on_device": CONTINUABLE,
    "train::dataloader::timeout_s": CONTINUABLE,
    "train::trainer::grace_s": FREE,
    "validate::dataset::num_classes": FREE,  # in older runs' configs they are not yet
    "validate::dataset::ignore_value": FREE,
}

WORDS = ("auto", "all")  # that stand for themselves
_TYPES = {
    "str": str, "path": str, "int": int, "float": (int, float), "bool": bool, "list": list,
    "object": dict, "null": type(None),
}  # fmt: skip

_SHOWN = {
    "triple": "[x, y, z], each above 0",
    "path": "a path",
    "paths": "a list of paths",
    "names": "a list of strings",
    "strides": "a list of whole numbers or [x, y, z], each above 0,",
}


def check(source: Config, keys: Mapping[str, Key] = KEYS) -> None:
    """Compare top-level keys that are there with a table.

    Raises:
        InputError: One line for each value of another type.
    """
    if found := [f"{key}: {fault}" for key, fault in find_faults(source, keys)]:
        raise InputError(*found)


def find_faults(source: Config, keys: Mapping[str, Key] = KEYS) -> Iterator[tuple[str, str]]:
    """Yield each top-level key whose value is not what a table says, and what is expected."""
    for key in keys.keys() & source.keys():
        spec, value = keys[key], source[key]
        if isinstance(value, str) and value[:1] in ("$", "@"):
            continue
        if spec.types == "bool" and value in ("true", "false"):
            continue  # as monai.bundle passes them; see errors.as_bool
        if spec.choices and value not in spec.choices:
            shown = ", ".join(map(json.dumps, spec.choices))
            yield key, f"expected one of {shown}, got {json.dumps(value)}. Correct it."
        elif not is_one_of(value, spec.types):
            expected = " or ".join(_SHOWN.get(name, name) for name in spec.types.split())
            yield key, f"expected {expected} ({spec.meaning}), got {json.dumps(value)}. Correct it."
        elif spec.least is not None and not isinstance(value, str) and value < spec.least:
            expected = f"expected at least {spec.least} ({spec.meaning})"
            yield key, f"{expected}, got {value}. Correct it."


def read_word(key: str, word: str) -> Any:
    """A value of the command line: JSON, and a string where that is none, or none for its key.

    So a folder may be named 2024 or true. A path that begins as a reference does gets `./` before.
    """
    spec = {**PREDICTION_KEYS, **KEYS}.get(key)
    types = WORDS_OF_COMMANDS.get(key) or (spec.types if spec else "")
    try:
        value = json.loads(word)
    except (ValueError, RecursionError):
        value = word
    if {"str", "path"} & {*types.split()} and not is_one_of(value, types):
        value = word
    if "path" not in types:
        return value
    several = value if isinstance(value, list) else [value]
    marked = [f"./{one}" if str(one).lstrip().startswith(MARKS) else one for one in several]
    return marked if isinstance(value, list) else marked[0]


def is_one_of(value: Any, types: str) -> bool:
    """Whether a value is of one of the types of a `Key`."""
    return any(_is_a(value, name) for name in types.split())


def _is_a(value: Any, name: str) -> bool:
    if isinstance(value, bool) and name != "bool":
        return False  # Python counts booleans among the integers
    if name == "triple":
        numbers = isinstance(value, list) and all(_is_a(n, "float") and n > 0 for n in value)
        return numbers and len(value) == 3
    if name in WORDS:
        return bool(value == name)
    if name in ("names", "paths"):
        return isinstance(value, list) and all(isinstance(word, str) for word in value)
    if name == "strides":
        return isinstance(value, list) and bool(value) and all(map(_is_stride, value))
    return isinstance(value, _TYPES[name])  # type: ignore[arg-type]


def _is_stride(value: Any) -> bool:
    steps = value if isinstance(value, list) and len(value) == 3 else [value]
    return all(_is_a(step, "int") and step > 0 for step in steps)


def walk(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield each value of a config with its path, containers before their contents."""
    yield path, node
    if isinstance(node, (dict, list)):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from walk(child, (*path, str(key)))


def _leaves(source: Config) -> dict[str, Any]:
    """Values by id that contain no others; an empty list or object is one."""
    return {
        "::".join(path): value
        for path, value in walk(source)
        if not (isinstance(value, (dict, list)) and value)
    }


def kind_of(path: str) -> str:
    """Class of a possibly nested key such as `train::trainer::max_epochs`."""
    inside = [nested for nested in NESTED if (path + "::").startswith(nested + "::")]
    if inside:
        return NESTED[max(inside, key=len)]
    top = path.split("::")[0]
    return KEYS[top].kind if top in KEYS else FREE


def changes(old: Config, new: Config) -> dict[str, list[str]]:
    """Keys whose values differ, by class: `{"identity": [...], "continuable": [...], ...}`."""
    before, after = _leaves(old), _leaves(new)
    found: dict[str, list[str]] = {IDENTITY: [], CONTINUABLE: [], FREE: []}
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            found[kind_of(path)].append(path.replace("::", "#"))
    return found


def identity_hash(source: Config) -> str:
    """SHA-256 over all identity values: equal for runs that would train the same model."""
    values = {path: value for path, value in _leaves(source).items() if kind_of(path) == IDENTITY}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
