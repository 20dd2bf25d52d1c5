"""What a config, a checkpoint or a file of weights cannot make a command do.

Everything goes through commands: no test knows a module of the package by its path.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, finished_run, tiny_words

NETWORK = {
    "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2,
    "channels": [2, 4], "strides": [2],
}  # fmt: skip
DATASET = {"_target_": "Dataset", "data": [{"image": [0.0]}]}
LOADER = {"_target_": "torch.utils.data.DataLoader", "dataset": DATASET, "num_workers": 1}
LOADS = "multiprocessing_context.reducer.ForkingPickler.loads"


def evaluator(**arguments: Any) -> dict[str, Any]:
    """One of MONAI's own engines."""
    data = {"_target_": "DataLoader", "dataset": DATASET}
    return {
        "_target_": "SupervisedEvaluator", "device": "cpu", "network": NETWORK,
        "val_data_loader": data, **arguments,
    }  # fmt: skip


def statistics(**arguments: Any) -> dict[str, Any]:
    return {"_target_": "DataStatsd", "keys": "image", **arguments}


@pytest.fixture
def overlay(train: Callable[..., tuple[int, str]], tmp_path: Path) -> Callable[..., list[str]]:
    """The lines of a training that refuses what is laid over its config."""

    def refused(changes: dict[str, Any], **values: Any) -> list[str]:
        (tmp_path / "mine.json").write_text(json.dumps(changes))
        status, text = train(tmp_path / "r", tmp_path / "mine.json", **values)
        assert status == 2, text
        assert not (tmp_path / "r").exists()
        return text.splitlines()

    return refused


# --- expressions: one attribute or method of a list for the object's class

ASKED = {
    "a chain that ends in unpickling": (
        {"train#loader": LOADER, "validate#postprocessing": statistics(
            additional_info=f"$@train#loader.{LOADS}")},
        "validate#postprocessing#additional_info: ", "has another form.",
    ),
    "its first step": (
        {"train#loader": LOADER, "train#context": "$@train#loader.multiprocessing_context"},
        "train#context: ", "asks for 'multiprocessing_context' of @train#loader",
    ),
    "an attribute of an argument": (
        {"train#loader": LOADER, "finalize": ["$@lifecycle.leave(@train#loader.dataset)"]},
        "finalize#0: ", "asks for 'dataset' of @train#loader",
    ),
    "an attribute that the class has beside those of the list": (
        {"train#x": "$@lifecycle.data_module"}, "train#x: ", "a Lifecycle. ",
    ),
    "a method called that is not to be called": (
        {"initialize": ["$@lifecycle.release()"]}, "initialize#0: ", "a Lifecycle. ",
    ),
    "an attribute of an attribute of one's own": (
        {"train#x": "$@lifecycle.run_dir", "train#y": "$@train#x.rmdir"},
        "train#y: ", "asks for 'rmdir' of @train#x",
    ),
    "a method of a plain value": (
        {"train#x": "{0.__class__}", "train#y": "$@train#x.format"},
        "train#x: ", "expected an object with 'format'",
    ),
    "a class that is handed on instead of made": (
        {"train#x": {"_target_": "Compose", "_mode_": "callable"}, "train#y": "$@train#x.func"},
        "train#x#_mode_: ", "expected default",
    ),
    "two values under one id": (
        {"train#x": {"a::b": LOADER, "a": {"b": {"_target_": "Dataset", "data": []}}},
         "train#y": "$@train#x#a#b.data"},
        "train#x#a#b: ", "expected an object with 'data'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_expression_asks_for_nothing_that_is_not_of_the_list(overlay, name):
    changes, place, message = ASKED[name]
    lines = [line for line in overlay(changes) if place in line]
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert lines[0].endswith((".", "?"))


def test_object_of_a_class_of_ones_own_is_asked_for_one_attribute(train, tmp_path, monkeypatch):
    """What `--allow` names is trusted, but not what is reached through it."""
    own = {"_target_": "poison.PoisonedAugment", "roi_size": [16, 16, 8], "spacing": [1, 1, 1],
           "flip_axes": [], "class_names": [], "spatial": {}, "intensity": {}}  # fmt: skip
    words = {"allow": "poison.PoisonedAugment", "dataset_dir": str(tmp_path)}

    def told(expression: str) -> str:
        (tmp_path / "mine.json").write_text(json.dumps({"train#own": own, "train#x": expression}))
        status, text = train(tmp_path / "r", tmp_path / "mine.json", **words)
        assert status == 2
        return text

    assert "train#x" not in told("$@train#own.seeds")
    assert "train#x: expected an expression" in told("$@train#own.seeds.append")
    assert "train#x: expected an expression" in told("$@train#own._seeds")


# --- arguments that compile, import, fetch, or write what Python executes

ARGUMENTS = {
    "compiler options": (
        {"train#x": evaluator(compile=True, compile_kwargs={"options": {"cpp.cxx": ["evil"]}})},
        ["train#x#compile: ", "train#x#compile_kwargs: "],
    ),
    "compiler of our evaluator": (
        {"validate#evaluator#compile": True, "train#trainer#compile_kwargs": {"mode": "x"}},
        ["validate#evaluator#compile: ", "train#trainer#compile_kwargs: "],
    ),
    "compiler by position": (
        {"train#x": {"_target_": "SupervisedEvaluator", "_mode_": "callable"}},
        ["train#x#_mode_: "],
    ),
    "a checkpoint under any name": (
        {"train#handlers": [{"_target_": "CheckpointSaver", "save_dir": "site",
                             "save_dict": {"a": "@network"}, "final_filename": "x.pth"}]},
        ["train#handlers#0#final_filename: "],
    ),
    "a format that reads attributes": (
        {"validate#handlers": [{"_target_": "StatsHandler", "key_var_format": "{0.__class__}"}]},
        ["validate#handlers#0#key_var_format: "],
    ),
    **{
        f"events elsewhere, by {name}": (
            {"train#place": "s3://there/x", "train#next": "@train#place",
             "train#plan": {"_target_": "pipeline.data.plan.Plan", "normalization": "s3://x",
                            "spacing": [1], "crop_empty_borders": False, "roi_size": [1],
                            "strides": [], "class_names": [], "in_channels": 1, "num_classes": 1},
             "validate#handlers": [{"_target_": handler, "log_dir": value}]},
            ["validate#handlers#0#log_dir: "],
        )
        for name, handler, value in (
            ("a string", "TensorBoardStatsHandler", "http://there/x"),
            ("a reference", "TensorBoardStatsHandler", "@train#next"),
            ("an expression", "TensorBoardStatsHandler", "$@train#plan.normalization"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_argument_that_does_more_than_a_value_is_refused(overlay, name):
    changes, places = ARGUMENTS[name]
    lines = overlay(changes)
    for place in places:
        assert sum(place in line and "expected" in line for line in lines) == 1, lines


# --- weights and checkpoints: tensors and plain values


class Executes:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(dataset, tmp_path_factory.mktemp("finished") / "r")


def checkpoint(run: Path, data: Path) -> tuple[str, Path, list[object]]:
    file = sorted((run / "checkpoints").iterdir())[-1]
    return "run", file, ["configs/amp.json", *tiny_words(data, run, max_epochs=3)]


def initial(run: Path, data: Path) -> tuple[str, Path, list[object]]:
    file = run / "models/last.pt"
    words = tiny_words(data, run.with_name("new"), init_weights=str(file))
    return "run", file, ["configs/amp.json", *words]


def evaluated(run: Path, data: Path) -> tuple[str, Path, list[object]]:
    words = ["configs/amp.json", "configs/evaluate.json", *tiny_words(data, run)]
    return "run", run / "models/model.pt", words


def predicted(run: Path, data: Path) -> tuple[str, Path, list[object]]:
    words = ["--run_dir", run, "--input", data / "imagesTr", "--output_dir", run.with_name("p")]
    return "run", run / "models/model.pt", ["configs/inference.json", *words]


PATHS = (checkpoint, initial, evaluated, predicted)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_pickle_in_the_place_of_weights_is_refused(path, finished, dataset, command, tmp_path):
    run = shutil.copytree(finished, tmp_path / "r")
    name, file, words = path(run, dataset)
    file.parent.mkdir(exist_ok=True)
    content = {"network": Executes(tmp_path / "executed"), "schema_version": 1}
    torch.save(content, file)
    try:
        status, text = command(name, *words)
    except Exception as error:  # of MONAI's own handler, which ends the command
        status, text = 1, f"{error} {error.__cause__}"
    assert status
    assert "weights only" in text.lower().replace("_", " ").replace("-", " ")
    assert not (tmp_path / "executed").exists()


def test_nothing_unpickles_and_every_load_says_so():
    """So that a new path that reads weights cannot leave the guard out."""
    loads = 0
    for folder in ("pipeline", "transforms", "networks"):
        for file in (REPOSITORY / folder).rglob("*.py"):
            tree = ast.parse(file.read_text())
            for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
                name, words = ast.unparse(call.func), [ast.unparse(one) for one in call.keywords]
                place = f"{file.name}:{call.lineno}"
                loads += name == "torch.load"
                assert name != "torch.load" or "weights_only=True" in words, place
                assert name.split(".")[0] not in ("pickle", "marshal", "shelve"), place
                assert name != "torch.jit.load", place
                assert "allow_pickle=True" not in words, place
    assert loads
