"""Configs: the table of keys, and what a change of one means for a run that is continued.

A change of an `identity` key makes another run, which is refused; a `continuable` one is logged and
taken; a `free` one changes where things are, not what they are, and is taken silently.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from pipeline.errors import refuse

Config = dict[str, Any]
Path = tuple[str, ...]  # keys from the root of a config; "#".join of it is the id
MARKS = ("$", "@", "%")  # with which a string begins that is no text
SPECIAL = ("_desc_", "_disabled_", "_mode_", "_requires_", "_target_")  # keys that MONAI reads
PHANTOM = "data/phantom"  # the one dataset_dir that makes itself
_PACKAGED = File(__file__).parents[1] / "configs"
# where amp.json and the others are: in the installed package, or in the repository
CONFIGS = _PACKAGED if _PACKAGED.is_dir() else File(__file__).parents[2] / "configs"
PRECISIONS: dict[str, Config] = {  # that a certificate compares
    "float32": {"amp": False, "tf32": False},
    "tf32": {"amp": False, "tf32": True},
    "float16": {"amp": True, "amp_dtype": "float16", "tf32": False},
    "bfloat16": {"amp": True, "amp_dtype": "bfloat16", "tf32": False},
}


@dataclass(frozen=True)
class Key:
    """A top-level key: the types of its value, its class, its meaning."""

    types: str
    kind: str
    meaning: str
    choices: tuple = ()
    least: float | None = None
    is_optional: bool = False


IDENTITY, CONTINUABLE, FREE = "identity", "continuable", "free"


def _read_table(text: str) -> dict[str, Key]:
    """Types may end with the least number, or be the valid values as JSON; `?`: optional."""
    table = {}
    for row in text.strip().splitlines():
        name, types, kind, meaning = (part.strip() for part in row.split("|", 3))
        types, _, least = types.partition(" >=")
        choices = tuple(json.loads(f"[{types}]")) if types.startswith('"') else ()
        if choices:
            types = "str bool" if True in choices else "str"
        number = int(least) if least else None
        table[name.strip("?")] = Key(types, kind, meaning, choices, number, name.endswith("?"))
    return table


KEYS = _read_table("""
bundle_root | path | free | folder that relative paths start from
dataset_dir | path | free | the dataset: a folder or a table; data/phantom is made if it is missing
output_dir | path null | free | run directory (null: runs/<name of dataset_dir>), or of predictions
cache_dir | path | free | folder for preprocessed cases and results of preflight, shared by runs
cache_limit_bytes | int >=1 | free | largest size of the cache; the oldest entries are removed
resume | "auto",true,false | free | continue the run in output_dir; auto: if there is one
accept_changed_data? | bool | free | continue a run although files of its cases were changed
seed | int | identity | seed of weights, sample order, crops, augmentation and dropout
init_weights | path null | identity | initial weights: model.pt, .safetensors or a checkpoint
reinit_head | bool | identity | initialise the head at random, whatever init_weights holds
device | str | continuable | auto, cpu, cuda or cuda:N
amp | bool | continuable | mixed precision; false: plain float32, no scaler
amp_dtype | "auto","float16","bfloat16" | continuable | autocast dtype; auto: float32 on a CPU
tf32 | bool | continuable | TF32 for float32 products and convolutions on CUDA
cudnn_benchmark | bool | continuable | let cuDNN time its algorithms and choose
memory_format | "auto","channels_last_3d","contiguous" | continuable | auto: channels last
cuda_graph | "auto","cuda_graphs","none" | continuable | replay steps; auto: on CUDA, with one rank
max_consecutive_skips | int >=1 | continuable | skipped steps in a row after which training stops
overflow_keep | int >=0 | free | skipped steps whose weights are kept for replay
underflow_every | int >=0 | free | steps between measurements of gradient underflow; 0: none
checkpoint_every | int >=1 | free | steps between checkpoints, beside those at the end of epochs
grace_s | float >=1 | free | seconds in which a run ends after a signal
cache_on_device | "auto",true,false | continuable | keep training cases there; auto: if they fit
num_workers | int >=0 | continuable | processes that cut patches of cases not on the device; 0: none
worker_timeout_s | float >=1 | continuable | seconds that workers may take for a batch
preflight | "full","fast","off" | free | what is checked: headers and voxels, headers, or neither
data_roots | list[path] | free | folders beside dataset_dir in which its files may lie
exclude | list[str] | identity | case ids to leave out
fold | int all | identity | fold that is validated on; all: train on every case
num_folds | int | identity | parts that the persons are divided into
split_seed | int | identity | seed of the division into folds
split_file | path null | identity | JSON of case ids, as nnU-Net's splits_final.json
test_fraction | float >=0 | identity | share of the persons that no fold trains or validates on
group_pattern | str object null | identity | person of a case id: regular expression, or pairs
memory_budget_bytes | int auto >=1 | free | memory of a step; auto: 8 GiB or what fits, 2 on a CPU
spacing | triple auto | identity | voxel size in mm that volumes are resampled to
crop_empty_borders | bool auto | identity | crop borders that are zero
normalization | str list object auto | identity | zscore, percentile_zscore, or clip, mean and std
transforms_before | list | identity | your MONAI transforms after loading
transforms_after | list | identity | your MONAI transforms after normalisation
roi_size | triple auto | identity | network input in voxels
foreground_ratio | float auto | identity | share of patches centred on foreground
flip_axes | list auto | identity | axes that may be mirrored; auto spares left-right
augmentation | object | identity | probability and range of each augmentation
in_channels | int auto >=1 | identity | image channels
num_classes | int auto >=2 | identity | classes, background included
class_names | list[str] auto | identity | names of the classes, background first
strides | strides auto | identity | pooling per level: a number, or one for each axis
base_channels | int auto >=1 | identity | channels of the first level
norm? | "auto","instance","batch" | identity | normalisation; auto: batch from 4 patches on
recompute_levels | int >=0 | continuable | finest levels that save memory by a second forward pass
batch_size | int auto >=1 | identity | patches in a micro-batch
accumulation_steps | int >=1 | identity | micro-batches in an optimizer step
steps_per_epoch | int auto >=1 | identity | optimizer steps in an epoch
max_epochs | int auto >=1 | continuable | epochs to train
learning_rate | float auto >=0 | continuable | peak of the learning rate
weight_decay | float >=0 | continuable | weight decay of AdamW
warmup_steps | int auto >=0 | continuable | steps of linear warm-up before the cosine
time_budget? | str null | free | time of the whole command, such as 30m: it fixes the steps
grad_clip | float >=0 | continuable | largest 2-norm of the gradients; 0: no clipping
val_interval | int >=1 | continuable | epochs between validations
overlap | float | continuable | overlap of sliding windows in validation, 0 to 1
sw_batch_size | int >=1 | continuable | sliding windows predicted at once
log_every | int >=1 | free | steps between two points in TensorBoard
final_scores | bool | free | score validation and test cases at the end, with best and last weights
tolerance_mm | float >=0 | free | distance within which surfaces agree, in scores
report | bool | free | write report/index.html at the end
data_module | object | free | dataset: cases, preflight and plan
lifecycle | object | free | the run: lock, preflight, plan, resume and summary
process_group? | object | free | ranks of a run; see configs/multi_gpu.json
cases | object str | identity | cases of the dataset and their split
plan | object str | identity | values that the dataset decides where they are auto
cache | object | free | preprocessed cases on disk
precision | object | continuable | autocast and gradient scaler
network_def | object | identity | the network
network | object str | identity | the network on its device
loss_function | object | identity | Dice + cross-entropy, reduced in float32
optimizer | object | identity | optimizer of the network's parameters
lr_scheduler | object | identity | learning rate by step
preprocessing | object | identity | from files to regular volumes
train | object | identity | dataset, augmentation, handlers, trainer
validate | object | continuable | dataset, inferer, metric, evaluator
scoring | object | free | final scores
initialize | list | free | expressions that are evaluated first
run | list | free | expressions that are evaluated then
finalize | list | free | expressions that are evaluated last
""")

# keys of an inference config, beside those that it has in common with training
PREDICTION_KEYS = _read_table("""
device | str object | continuable | auto, cpu, cuda or cuda:N; MONAI's clients need an object
input | path | free | file or folder to predict: volumes, or DICOM series
weights | path | free | state dict of the network, as a path from bundle_root
ensemble | list[path] | free | further run directories, whose probabilities are averaged
mirror | bool | free | average over mirror images along flip_axes
max_blend_bytes | int >=1 | free | memory for the blended windows of a slab, all classes
min_volume_ml | float object | free | smaller parts become background; one number, or one per class
keep_largest | list[str] all | free | classes of which only the largest part is kept
fill_holes | list[str] all | free | classes whose holes are filled
probabilities | bool | free | write the probabilities of all classes as well
dicom_seg | bool | free | write a DICOM Segmentation for each DICOM series as well
strict | bool | free | stop at the first case that cannot be predicted
trained_on | object null | free | range of the training images, to warn of others
evaluator | object | free | predicts whole volumes in all class channels, for clients
""")

CLIENT_KEYS = ("run_name",)  # that MONAI's clients add
# where the class of a nested key differs from that of its top-level key
_NESTED = {
    CONTINUABLE: """network_def::recompute_levels loss_function::backend optimizer::fused
        train::trainer::max_epochs train::trainer::cuda_graph train::trainer::grad_clip
        train::dataloader::device train::dataloader::num_workers train::dataloader::timeout_s
        train::dataloader::cache_on_device""",
    # init_weights says whose initial weights are; the last two are not in configs of older runs
    FREE: """train::trainer::initial_weights train::trainer::replica train::trainer::grace_s
        train::trainer::run_dir train::handlers validate::dataset::num_classes
        validate::dataset::ignore_value""",
}
NESTED = {name: kind for kind, names in _NESTED.items() for name in names.split()}

_TYPES = {
    "str": str, "path": str, "int": int, "float": (int, float), "bool": bool, "list": list,
    "object": dict, "null": type(None),
}  # fmt: skip
_SHOWN = {
    "bool": "true or false", "dict": "an object", "float": "a number", "int": "a whole number",
    "list": "a list", "list[path]": "a list of paths", "list[str]": "a list of strings",
    "object": "an object", "path": "a path", "str": "a string", "None": "null",
    "strides": "a list of whole numbers or [x, y, z], each above 0,",
    "triple": "[x, y, z], each above 0", "Callable": "something to call",
    "Handler": "a handler (with a method attach)",
}  # fmt: skip


def check_values(source: Config, keys: Mapping[str, Key] = KEYS) -> None:
    """Raise an `InputError` with a line for each value that is not as a table says."""
    refuse(f"{key}: {fault}" for key, fault in find_key_faults(source, keys))


def find_key_faults(source: Config, keys: Mapping[str, Key] = KEYS) -> Iterator[tuple[str, str]]:
    """Yield each top-level key whose value is not what a table says, and what is expected."""
    for key, spec in keys.items():
        value = source.get(key, "@")  # nothing is expected of a key that is not there
        is_word = spec.types == "bool" and value in ("true", "false")  # see errors.as_bool
        if is_word or (isinstance(value, str) and value[:1] in ("$", "@")):
            continue
        if spec.choices and value not in spec.choices:
            shown = ", ".join(map(json.dumps, spec.choices))
            yield key, f"expected one of {shown}, got {json.dumps(value)}. Correct it."
        elif not _is_one_of(value, spec.types):
            expected = describe_types(spec.types.split())
            yield key, f"expected {expected} ({spec.meaning}), got {json.dumps(value)}. Correct it."
        elif spec.least is not None and not isinstance(value, str) and value < spec.least:
            yield key, f"expected at least {spec.least} ({spec.meaning}), got {value}. Correct it."


def describe_types(names: Iterable[str]) -> str:
    """Return types in words, such as 'a number or null'."""
    return " or ".join(_SHOWN.get(name, name) for name in names)


def read_word(key: str, word: str) -> Any:
    """A value of the command line: JSON or text; a path that begins with a mark gets `./` first."""
    spec = {**PREDICTION_KEYS, **KEYS}.get(key)
    types = "path list[path]" if key in ("run_dir", "ensemble") else spec.types if spec else ""
    value: Any = word
    with suppress(ValueError, RecursionError):
        value = json.loads(word)
    if {"str", "path"} & {*types.split()} and not _is_one_of(value, types):
        value = word
    is_marked = "path" in types and str(value).lstrip().startswith(MARKS)
    return f"./{value}" if is_marked else value


def _is_one_of(value: Any, types: str) -> bool:
    return any(_is_a(value, name) for name in types.split())


def _is_a(value: Any, name: str) -> bool:
    if isinstance(value, bool) and name != "bool":
        return False  # Python counts booleans among the integers
    if name in ("auto", "all"):  # which stand for themselves
        return bool(value == name)
    if name in _TYPES:
        return isinstance(value, _TYPES[name])  # type: ignore[arg-type]
    if not isinstance(value, list):
        return False
    if name == "triple":
        return len(value) == 3 and all(_is_a(n, "float") and n > 0 for n in value)
    if name == "strides":
        steps = [n for one in value for n in (one if _is_a(one, "triple") else [one])]
        return bool(steps) and all(_is_a(n, "int") and n > 0 for n in steps)
    return all(isinstance(word, str) for word in value)


def walk(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield each value of a config with its path, containers before their contents."""
    yield path, node
    if isinstance(node, (dict, list)):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from walk(child, (*path, str(key)))


def _leaves(source: Config) -> dict[str, Any]:
    """Values by id that contain no others; an empty list or object is one."""
    inner = (
        value for value in walk(source) if not (isinstance(value[1], (dict, list)) and value[1])
    )
    return {"::".join(path): value for path, value in inner}


def _kind_of(path: str) -> str:
    """Class of a possibly nested key such as `train::trainer::max_epochs`."""
    top = path.split("::")[0]
    inside = (kind for name, kind in NESTED.items() if f"{path}::".startswith(f"{name}::"))
    return next(inside, KEYS[top].kind if top in KEYS else FREE)


def changes(old: Config, new: Config) -> dict[str, list[str]]:
    """Keys whose values differ, by class: `{"identity": [...], "continuable": [...], ...}`."""
    before, after = _leaves(old), _leaves(new)
    found: dict[str, list[str]] = {IDENTITY: [], CONTINUABLE: [], FREE: []}
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            found[_kind_of(path)].append(path.replace("::", "#"))
    return found


def identity_hash(source: Config) -> str:
    """SHA-256 over all identity values: equal for runs that would train the same model."""
    values = {path: value for path, value in _leaves(source).items() if _kind_of(path) == IDENTITY}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
