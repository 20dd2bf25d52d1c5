"""Runs that an earlier version made, and names of its that a user still writes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, finished_run, tiny_words

from pipeline.config import old_names
from pipeline.run import main

RECIPE = ("learning_rate", "steps_per_epoch", "max_epochs", "warmup_steps")
OLD_KEYS = {new: old for old, new in old_names.RENAMED.items()}
OLD_TARGETS = {new: old for old, new in old_names.TARGETS.items()}


def make_old(node: Any, key: str = "") -> Any:
    """A config of today as an earlier version wrote it."""
    if isinstance(node, list):
        return [make_old(one, "list") for one in node]
    if isinstance(node, str):
        node = re.sub(r"@(\w+)", lambda found: f"@{OLD_KEYS.get(found[1], found[1])}", node)
        node = node.replace("@lifecycle.initial_weights", "@lifecycle.start.tensors")
        module, _, name = node.rpartition(".")
        module = OLD_TARGETS.get(module, module)
        return OLD_TARGETS.get(node, f"{module}.{name}" if module else node)
    if not isinstance(node, dict):
        return node
    target = node.get("_target_", "")
    if target.endswith(".Scoring"):
        node = {key: value for key, value in node.items() if key not in old_names.SCORING}
        node["lifecycle"] = "@lifecycle"
    is_own = target.startswith("pipeline.") or key in ("", "split")
    return {OLD_KEYS.get(k, k) if is_own else k: make_old(one, k) for k, one in node.items()}


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = finished_run(dataset, tmp_path_factory.mktemp("old") / "r")
    for file in (run / "configs").glob("*.json"):
        file.write_text(json.dumps(make_old(json.loads(file.read_text()))))
    config = json.loads((run / "configs/train.json").read_text())
    assert "intake" in config
    plan = json.loads((run / "plan.json").read_text())
    for key in ("base_channels", "norm", *RECIPE):  # which plans did not have
        del plan[key], plan["reasons"][key], config["intake"]["settings"][key]
    del config["norm"], config["time_budget"]
    config["intake"]["base_channels"] = config["network_def"]["base_channels"] = "@base_channels"
    del config["lifecycle"]["time_budget"]
    config["lifecycle"]["max_epochs"] = "@train#trainer#max_epochs"
    config["network_def"]["norm"] = "instance"
    config["train"]["trainer"] |= {"max_epochs": "@max_epochs", "steps_per_epoch": 2}
    (run / "plan.json").write_text(json.dumps(plan))
    (run / "configs/train.json").write_text(json.dumps(config))
    return run


@pytest.fixture
def old_run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "r")


@pytest.mark.parametrize("name", ["amp", "inference", "evaluate"])
def test_translate_gives_todays_names(name):
    source = json.loads((REPOSITORY / f"configs/{name}.json").read_text())
    old = make_old(source)
    assert old != source
    assert old_names.translate(old) == source == old_names.translate(source)


def test_old_run_predicts(command, old_run, dataset, tmp_path):
    words = ["--run_dir", old_run, "--input", dataset / "imagesTr", "--output_dir", tmp_path / "p"]
    status, text = command("run", "configs/inference.json", *words)
    assert status == 0, text
    assert len(list((tmp_path / "p").glob("*.nii.gz"))) == 6


def test_old_run_is_evaluated(command, monkeypatch, old_run, dataset):
    words = ["configs/amp.json", "configs/evaluate.json", *tiny_words(dataset, old_run)]
    status, text = command("run", *words)
    assert status == 0, text
    monkeypatch.chdir(old_run)
    assert main(["configs/train.json", "configs/evaluate.json"]) == 0


def test_old_run_is_exported(command, old_run, tmp_path):
    status, text = command("export", old_run, "--output", tmp_path / "bundle")
    assert status == 0, text
    assert "pipeline.predict." not in (tmp_path / "bundle/configs/inference.json").read_text()


def test_old_run_is_not_continued(train, old_run):
    status, text = train(old_run, max_epochs=3)
    assert status == 2
    assert text.splitlines()[-1] == (
        f"{old_run}: expected a run of this version, got one that 0.1.0 began. Continue it with "
        "version 0.1.0, or choose another output_dir."
    )


@pytest.mark.parametrize(
    ("written", "words", "line"),
    [
        ({"check": "fast"}, [], "{file}:1: check: check was renamed to preflight"),
        ({"intake#device": "cpu"}, [],
         "{file}:1: intake#device: intake was renamed to data_module"),
        ({"precision": {"_target_": "pipeline.precision.Precision", "layout": "auto"}}, [],
         "{file}:1: precision#layout: layout was renamed to memory_format"),
        ({"loss_function#_target_": "pipeline.training.losses.SegmentationLoss"}, [],
         "{file}:1: loss_function#_target_: pipeline.training.losses.SegmentationLoss was renamed "
         "to pipeline.training.loss.SegmentationLoss"),
        ({}, ["--resident", "false"], "--resident: resident was renamed to cache_on_device"),
    ],
)  # fmt: skip
def test_renamed_key_is_answered_with_its_new_name(train, tmp_path, written, words, line):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(written))
    values = {words[0][2:]: words[1]} if words else {}
    status, text = train(tmp_path / "r", file, **values)
    assert status == 2
    assert line.format(file=file) in text.splitlines()
