"""Mistakes in a config: some made on purpose, and configs in which there are none."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from pipeline.config import keys
from pipeline.config.compose import Composed, compose_located
from pipeline.config.validate import check_config
from pipeline.errors import InputError

OVERLAYS = ("evaluate.json", "multi_gpu.json")  # merged over a training config
NOT_ALONE = ("metadata.json", *OVERLAYS)
CONFIGS = sorted(
    path for path in (REPOSITORY / "configs").glob("*.json") if path.name not in NOT_ALONE
)
AMP = "configs/amp.json"


@pytest.fixture(autouse=True)
def in_the_repository(at_the_root):
    """Configs are named as the user names them."""


def faults_of(composed: Composed, **options: Any) -> list[str]:
    try:
        check_config(composed, **options)
    except InputError as error:
        return list(error.faults)
    return []


def faults_in(tmp_path: Path, overlay: dict, **options: Any) -> list[str]:
    """The faults of `configs/amp.json` with an overlay."""
    (tmp_path / "mine.json").write_text(json.dumps(overlay, indent=1))
    return faults_of(compose_located([AMP, str(tmp_path / "mine.json")], {}), **options)


# --- mutations: every key of every config, in every way that makes a mistake of it
#
# A string is never changed into another that may be as good. What another type makes legal by
# chance (a list of strings is an iterable, which is all that a loader has to be) counts as missed.


def walk(node: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Every key below a node, those of objects in lists too, with its value."""
    children = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in children:
        if isinstance(node, dict) or isinstance(child, str):
            yield (*path, key), child
        if isinstance(child, (dict, list)):
            yield from walk(child, (*path, key))


def at(node: Any, path: tuple) -> Any:
    for key in path:
        node = node[key]
    return node


def another_type(value: Any, source: dict) -> Any:
    """A value of another type; "auto" and expressions stand for a value of any plain type."""
    while isinstance(value, str) and value.startswith("@"):
        value = at(source, tuple(value[1:].split("#")))
    if value is None or value == "auto" or str(value).startswith("$"):
        return {"wrong": [True]}
    if isinstance(value, bool):
        return "perhaps"
    if isinstance(value, str):
        return 7
    if isinstance(value, (int, float)):
        return "seven"
    return ["wrong"] if isinstance(value, dict) else {"wrong": 1}


# Names that are free: a metric may be called anything, and so may what a checkpoint calls the
# network. A rename there makes another legal config, and is no mistake.
FREE = {("validate", "key_metric", "mean_dice"), ("handlers", 0, "load_dict", "model")}


def mutations(source: dict) -> Iterator[tuple[str, tuple, dict]]:
    """Kind, path and mutated config."""
    for path, value in walk(source):
        parent, key = path[:-1], path[-1]

        def changed(new: Any, parent=parent, key=key) -> dict:
            mutated = deepcopy(source)
            at(mutated, parent)[key] = new
            return mutated

        if isinstance(key, str) and path not in FREE:
            mutated = deepcopy(source)
            place = at(mutated, parent)
            items = [(key + "x" if k == key else k, v) for k, v in place.items()]
            place.clear()
            place.update(items)
            yield "rename", path, mutated
        if not isinstance(key, int):
            yield "wrong type", path, changed(another_type(value, source))
        yield "missing id", path, changed("@no_such_id")
        if isinstance(value, str) and value[:1] in ("@", "$"):
            yield "@ dropped", path, changed(value.replace("@", "", 1))
            yield "misspelt id", path, changed(misspelt(value))
        if key == "_target_":
            yield "misspelt target", path, changed(value[:-2] + value[-1])
            yield "unknown target", path, changed("os.system")


def misspelt(value: str) -> str:
    """One letter of the id twice."""
    start = value.index("@")
    return value[: start + 3] + value[start + 2] + value[start + 3 :]


def located(source: dict, name: str) -> Composed:
    """A config as if read from a file with a line for each key, without the file."""
    places = {path: f"{name}:{line}" for line, (path, _) in enumerate(keys.walk(source), 1)}
    return Composed(source, places)


def is_pinpointed(lines: list[str], composed: Composed, kind: str, path: tuple) -> bool:
    """Whether a line begins with place and id of what was mutated, and there are at most ten.

    For a rename the key under its new or its old name, or the object that holds it. Where a key
    and the one reference to it differ, either may be meant; then both places must be named.
    """
    path = tuple(map(str, path))
    spots = [path]
    if kind == "rename":
        spots = [(*path[:-1], path[-1] + "x"), path, path[:-1]]
    for spot in spots:
        start = ": ".join(filter(None, [composed.place(spot), "#".join(spot)])) + ":"
        below = start[:-1] + "#"  # a part of the mutated value, which may have a line of its own
        name = ": " + "#".join(spot) + "#"
        whole = kind != "rename" and any(name in line.split(" expected ")[0] for line in lines)
        if whole or any(line.startswith((start, below)) for line in lines):
            return len(lines) <= 10
    both = f"'@{'#'.join(spots[0])}' ({composed.place(spots[0])})"
    return kind == "rename" and any(both in line for line in lines) and len(lines) <= 10


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.chaos)])
def test_check_pinpoints_mutations_of_every_key(monkeypatch, every):
    """By default of every twelfth one, of all kinds together."""
    monkeypatch.setattr("nibabel.load", None)  # no data are read
    caught: Counter[str] = Counter()
    missed: dict[str, list[str]] = defaultdict(list)
    for file in CONFIGS:
        found = mutations(json.loads(file.read_text()))
        for kind, path, mutated in itertools.islice(found, 0, None, every):
            composed = located(mutated, file.name)
            lines = faults_of(composed, training=file.name == "amp.json")
            if is_pinpointed(lines, composed, kind, path):
                caught[kind] += 1
            else:
                missed[kind].append(f"{file.name} {'#'.join(map(str, path))}: {lines[:2]}")
    num_caught, num_missed = sum(caught.values()), sum(map(len, missed.values()))
    print(f"\n{num_caught} of {num_caught + num_missed} are pinpointed; not:")
    for kind, cases in missed.items():
        print(f"{kind}: {len(cases)} of {len(cases) + caught[kind]}", *cases, sep="\n  ")
    assert num_caught + num_missed >= 1900 / every
    assert num_caught >= 0.93 * (num_caught + num_missed)


# --- configs in which nothing is wrong

# classes of the list are in overlays of tests/test_allowed.py
LEGAL = {
    "nothing": {},
    "part of an object": {"network_def#dropout": 0.25, "train::trainer::grad_clip": 3},
    "names that are ids too": {
        "validate#key_metric": {"cases": {"_target_": "MeanDice"}},
        "validate#handlers": [
            {"_target_": "MetricsSaver", "save_dir": "x", "metrics": ["cases"]},
            {"_target_": "LrScheduleHandler", "lr_scheduler": "@lr_scheduler"},
            {"_target_": "ConfusionMatrix", "metric_name": ["sensitivity", "precision"]},
        ],
    },
    "further handlers": {
        "+train#handlers": [
            {"_target_": "StatsHandler", "tag_name": "loss", "iteration_log": False},
            {"_target_": "ignite.handlers.EMAHandler", "model": "@network", "momentum": 0.01},
            {"_target_": "GarbageCollector", "_desc_": "frees memory"},
        ],
        "validate#handlers": [
            {"_target_": "MetricsSaver", "save_dir": "$@lifecycle.run_dir", "metrics": "mean_dice"},
            {"_target_": "MetricsSaver", "save_dir": "x", "metrics": ["*"], "_disabled_": True},
        ],
    },
    "further metric": {
        "validate#more": {"loss": {"_target_": "ignite.metrics.Average"}},
        "validate#evaluator#additional_metrics": "@validate#more",
        "+validate#handlers": [
            {"_target_": "MetricsSaver", "save_dir": "x", "metrics": ["mean_dice", "loss"]}
        ],
    },
    "transforms": {
        "transforms_before": [{"_target_": "EnsureTyped", "keys": ["image", "label"]}],
        "transforms_after": [
            {"_target_": "ScaleIntensityd", "keys": "image", "minv": 0, "maxv": 1.0},
            {
                "_target_": "OneOf",
                "transforms": [
                    {"_target_": "RandGaussianNoised", "keys": "image", "prob": 0.1, "std": 0.1},
                    {"_target_": "Identityd", "keys": "image"},
                ],
            },
        ],
    },
    "relative ids": {"train#sampler#batch_size": "@###accumulation_steps", "train#seed": "@##seed"},
    "values as monai.bundle passes them": {"amp": "false", "network_def#deep_supervision": "true"},
    "augmentation off": {"augmentation": {"spatial": {"flip": {"prob": 0}}, "intensity": {}}},
    "a file's own remark": {"_meta_": {"version": "1", "note": "any text, 100 %"}},
    "no groups": {"group_pattern": "^([^_]+)_\\d+$"},
}  # fmt: skip


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.name)
def test_config_as_it_is_has_no_fault(file):
    check_config(compose_located([str(file)], {}), training=file.name == "amp.json")


@pytest.mark.parametrize("name", LEGAL)
def test_legal_overlay_has_no_fault(tmp_path, name):
    assert faults_in(tmp_path, LEGAL[name], training=True) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_has_no_fault(name):
    composed = compose_located([AMP, f"configs/{name}"], {})
    check_config(composed, training=True)
    assert name != "multi_gpu.json" or set(keys.KEYS) == set(composed.source)


def test_config_under_monai_bundle_is_checked_but_for_its_names():
    source = json.loads((REPOSITORY / AMP).read_text())
    source["optimizer"]["_target_"] = "torch.optim.lr_scheduler.LambdaLR"  # not on the list
    source["network_def"]["dropuot"] = 0.1
    source["train"]["inferer"] = "$__import__('os')"
    source["loss_function"]["_target_"] = "monai.losses.DiceLos"
    del source["seed"]
    assert [fault.partition(", got ")[0] for fault in faults_of(Composed(source), allow=None)] == [
        "seed: expected seed for the config",
        "network_def#dropuot: expected an argument of DenseUNet",
        "loss_function#_target_: expected a class or function that is there",
        "optimizer#_target_: expected a class that takes params, fused, lr, weight_decay",
    ]


# --- one mistake each

# 30 of 33 that were once chosen; names of metrics and circles are left to MONAI
CASES = [  # overlay, line and id of the place in it, what is said there
    ({"learning_rat": 1},
     "2: learning_rat: expected a known key, got 'learning_rat'. Did you mean 'learning_rate'?"),
    ({"network_def#dropuot": 0.5},
     "2: network_def#dropuot: expected an argument of DenseUNet, got 'dropuot'. Did you mean"
     " 'dropout'?"),
    ({"optimizer#_target_": "torch.optim.lr_scheduler.StepLR"},
     "2: optimizer#_target_: expected a class that takes params, fused, lr, weight_decay, "
     "got StepLR, which takes optimizer, step_size, gamma, last_epoch. Name another."),
    ({"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}},
     "2: optimizer#params: expected params for SGD, got none. Add it."),
    ({"train#trainer#grad_clip": "twelve"},
     '2: train#trainer#grad_clip: expected a number, got "twelve". Correct it.'),
    ({"loss_function#batch_dice": "yes"},
     '2: loss_function#batch_dice: expected true or false, got "yes". Correct it.'),
    ({"network_def#base_channels": True},
     "2: network_def#base_channels: expected a whole number, got true. Correct it."),
    ({"loss_function#class_weights": [1, "2"]},
     '2: loss_function#class_weights#1: expected a number, got "2". Correct it.'),
    ({"optimizer#lr": "@network"},
     '2: optimizer#lr: expected a number or Tensor, got "@network", which is a Module.'),
    ({"optimizer#lr": "$@cases.train"},
     '2: optimizer#lr: expected a number or Tensor, got "$@cases.train", which is a list'),
    ({"validate#limit": "x", "validate#inferer#overlap": "@validate#limit"},
     '2: validate#limit: expected a number for validate#inferer#overlap, got "x". Correct it.'),
    ({"train#sampler#batch_size": "@batch_sise"},
     "2: train#sampler#batch_size: expected an id that is there, got '@batch_sise'. Did you "
     "mean '@batch_size' (configs/amp.json:"),
    ({"finalize": ["$@lifecycle.leave(@train#trainr)"]},
     "2: finalize#0: expected an id that is there, got '@train#trainr'. Did you mean "
     "'@train#trainer' (configs/amp.json:"),
    ({"steps_per_epoch": "$@plan.batch_sise"},
     "2: steps_per_epoch: expected an expression on an id, got '$@plan.batch_sise', which "
     "asks for 'batch_sise' of @plan, a Plan. Did you mean 'batch_size'?"),
    ({"cases": "$@lifecycle.casez"},
     "2: cases: expected an expression on an id, got '$@lifecycle.casez', which asks for "
     "'casez' of @lifecycle, a Lifecycle. Did you mean 'cases'?"),
    ({"initialize": ["$@precision.enter()"]},
     "2: initialize#0: expected an expression on an id, got '$@precision.enter()', which "
     "asks for 'enter()' of @precision, a Precision. Valid are: device, place()."),
    ({"run": ["$@train#trainer.runn()"]},
     "2: run#0: expected an expression on an id, got '$@train#trainer.runn()', which asks "
     "for 'runn()' of @train#trainer, a MixedPrecisionTrainer. Did you mean 'run()'?"),
    ({"train#sampler#batch_size": "batch_size"},
     '2: train#sampler#batch_size: expected a reference, got the string "batch_size". Did '
     "you mean '@batch_size'?"),
    ({"lifecycle#bundle_root": "bundle_root"},
     '2: lifecycle#bundle_root: expected a reference, got the string "bundle_root". Did you '
     "mean '@bundle_root'?"),
    ({"train#dataset#data": "@cases.train"},
     '2: train#dataset#data: expected @id, got "@cases.train". With attributes: '
     "'$@cases.train'."),
    ({"loss_function": {"_target_": "DiceCELos"}},
     "3: loss_function#_target_: expected a class or function of the list, got 'DiceCELos'. "
     "Did you mean 'DiceCELoss'? If you trust it: --allow DiceCELos"),
    ({"loss_function": {"_targt_": "DiceCELoss"}},
     "3: loss_function#_targt_: expected one of _desc_, _disabled_, _mode_, _requires_, "
     "_target_, got '_targt_'. Did you mean '_target_'?"),
    ({"+train#handlers": [{"_target_": "DiceLoss"}]},
     "2: train#handlers#5: expected a handler (with a method attach) for "
     'train#trainer#train_handlers#5, got {"_target_": "DiceLoss"}, which is a DiceLoss.'),
    ({"validate#handlers": ["StatsHandler"]},
     "2: validate#handlers#0: expected a handler (with a method attach) for "
     'validate#evaluator#val_handlers#0, got "StatsHandler".'),
    ({"augmentation#spatial#rotation": {"prob": 1.5, "degrees": [-30, 30]}},
     "3: augmentation#spatial#rotation#prob: expected a probability from 0 to 1, got 1.5."),
    ({"augmentation#intensity#nois": {"prob": 0.1}},
     ": augmentation#intensity: expected one of noise, blur, brightness, contrast, "
     "gamma_inverted, gamma, got 'nois'. Use 'noise'"),
    ({"data_module#split#group_patern": None},
     "2: data_module#split#group_patern: expected an argument of split, got 'group_patern'. "
     "Did you mean 'group_pattern'?"),
    ({"transforms_after": [{"_target_": "ScaleIntensityd", "key": "image"}]},
     "5: transforms_after#0#key: expected an argument of ScaleIntensityd, got 'key'. Did you"
     " mean 'keys'?"),
    ({"transforms_after": ["ScaleIntensityd"]},
     "2: transforms_after#0: expected something to call for preprocessing#after#0, got "
     '"ScaleIntensityd".'),
    ({"train": "renamed"},
     "2: train: expected an object (dataset, augmentation, handlers, trainer), got"),
]  # fmt: skip


@pytest.mark.parametrize(("overlay", "message"), CASES)
def test_mistake_is_one_line(tmp_path, overlay, message):
    lines = faults_in(tmp_path, overlay, training=True)
    assert len(lines) == 1, lines
    start = "" if message.startswith(":") else f"{tmp_path}/mine.json:"
    assert start + message in lines[0]


def test_override_is_named_in_the_place_of_file_and_line():
    overrides = {"network_def#dropout": "much", "seed": "a"}
    assert faults_of(compose_located([AMP], overrides)) == [
        "--seed: expected a whole number (seed of weights, sample order, crops, augmentation and "
        'dropout), got "a". Correct it.',
        '--network_def#dropout: expected a number, got "much". Correct it.',
    ]  # fmt: skip


def test_value_that_the_dataset_decides_is_not_referred_to_as_auto(tmp_path):
    (tmp_path / "mine.json").write_text('{"optimizer#lr": "@learning_rate"}')
    files = [AMP, str(tmp_path / "mine.json")]
    (line,) = faults_of(compose_located(files, {}))
    assert line.endswith(
        "got '@learning_rate', which the dataset decides. Write '$@plan.learning_rate'."
    )
    assert faults_of(compose_located(files, {"learning_rate": 0.1})) == []


def test_later_file_and_not_the_first_is_blamed(tmp_path):
    (tmp_path / "a.json").write_text('{\n\n"seed": "a",\n"fold": "b"}')
    (tmp_path / "b.json").write_text('{"seed": 3}')
    lines = faults_of(compose_located([AMP, f"{tmp_path}/a.json", f"{tmp_path}/b.json"], {}))
    assert [line.split(": ")[0] for line in lines] == [f"{tmp_path}/a.json:4"]


def test_unknown_id_is_pointed_out_in_an_inference_config(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{\n"postprocesing": {"_target_": "Identityd", "keys": "a"}}')
    composed = compose_located(["configs/inference.json", str(file)], {})
    assert faults_of(composed, training=False) == [
        f"{file}:2: postprocesing: expected a known key, got 'postprocesing'. "
        "Did you mean 'postprocessing'?"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": 1,\n"a": [1 2]}', ": expected JSON, got: Expecting ',' delimiter: line 2 "),
        ("[" * 100000, ": expected JSON, got: "),
        ('{"seed": 1, "seed": 2}', ": expected JSON, got: the key 'seed' twice in an object."),
        ("[1]", ": expected a JSON object, got a list."),
        ('{"train#trainr#max_epochs": 1}', ":1: train#trainr#max_epochs: expected a known key"),
        (
            '{"+train#handlers": {}}',
            ":1: +train#handlers: expected what fits the list there, got {}.",
        ),
        ('{"+nothing": []}', ":1: +nothing: expected a known key, got 'nothing'."),
        (
            '{"train#handlers#7": {}}',
            ":1: train#handlers#7: expected what fits the list there, got {}.",
        ),
    ],
)
def test_file_that_cannot_be_merged_is_one_line(tmp_path, text, message):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(InputError) as error:
        compose_located([AMP, str(tmp_path / "mine.json")], {})
    assert len(error.value.faults) == 1
    assert str(error.value).startswith(f"{tmp_path}/mine.json{message}")


@pytest.mark.parametrize("name", ["run", "certify"])
def test_commands_end_with_status_2_before_data_are_read(command, tmp_path, name):
    (tmp_path / "mine.json").write_text('{"optimizer#lr": "@network"}')
    words = (AMP, tmp_path / "mine.json", "--dataset_dir", tmp_path)
    status, text = command(name, *words)
    assert (status, text.count("\n")) == (2, 1)
    assert "mine.json:1: optimizer#lr: expected a number" in text


def test_lines_are_those_of_the_file():
    text = (REPOSITORY / AMP).read_text().splitlines()
    composed = compose_located([AMP], {})
    for path, place in composed.places.items():
        if path and not path[-1].isdigit():
            assert f'"{path[-1]}":' in text[int(place.rpartition(":")[2]) - 1]
