"""The main job on the command line: what it makes, and what it answers to mistakes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import nibabel as nib
import pytest
import torch
from conftest import REPOSITORY, make_dataset
from engines import snapshot

from pipeline.config import keys
from pipeline.run import main

CONFIG = "configs/amp.json"
AMP = json.loads((REPOSITORY / "configs/amp.json").read_text())


# --- what a run makes


def test_summary_says_what_was_asked_and_what_was_in_force(run, tmp_path):
    assert run(tmp_path / "r", amp_dtype="bfloat16") == 0
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    assert summary["requested"] == {
        "device": "auto", "amp": True, "amp_dtype": "bfloat16", "tf32": False,
        "cudnn_benchmark": False, "memory_format": "auto", "loss_backend": "auto",
        "cuda_graph": "auto",
    }  # fmt: skip
    assert summary["effective"]["dtype"] == "bfloat16"
    log = (tmp_path / "r/log.txt").read_text()
    assert "Precision in force: device cpu, dtype bfloat16, loss_scaling False" in log
    assert "asked for: device auto, amp True, amp_dtype bfloat16" in log
    assert summary["effective"]["loss_backend"] == "torch"
    assert "cuda_graph in force: none; asked for: auto" in log
    assert summary["effective"]["loss_scaling"] is False
    assert (summary["epochs"], summary["steps"], summary["skipped_steps"]) == (2, 4, 0)
    assert summary["versions"]["torch"] == torch.__version__
    assert len(summary["dataset_hash"]) == len(summary["config_hash"]) == 64


# --- the same command again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1, "learning_rate": 0.1}, "got other values of seed. Choose"),
        ({"network_def#dropout": 0.5}, "got other values of network_def#dropout"),
        ({"resume": False}, "expected an empty directory with resume=false"),
    ],
)
def test_continuing_another_run_is_refused_and_nothing_lost(run, tmp_path, capfd, changes, message):
    assert run(tmp_path / "r") == 0
    before = snapshot(tmp_path / "r")
    with pytest.raises(SystemExit) as exit:
        run(tmp_path / "r", **{"max_epochs": 3, **changes})
    assert exit.value.code == 2
    assert message in capfd.readouterr().err
    assert snapshot(tmp_path / "r") == before


# --- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("configs/apm.json", "expected a config file, found none. Did you mean 'configs/amp.json'"),
        (f"{CONFIG} --max_epoch 3", "got '--max_epoch'. Did you mean '--max_epochs'"),
        (f"{CONFIG} --max_epochs many", 'a whole number or auto (epochs to train), got "many"'),
        (f"{CONFIG} --max_epochs", "--max_epochs: expected a value after it"),
        (f"{CONFIG} --amp_dtype fp16", 'expected one of "auto", "float16", "bfloat16", got "fp16"'),
        (f"{CONFIG} --seed $__import__('os')", "Expressions and references belong into a file"),
        (f"{CONFIG} --batch_size 0", "batch_size: expected at least 1"),
    ],
)
def test_command_line_mistake_is_one_line(words, message, capfd, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert main(words.split()) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bad_dataset_is_refused_before_anything_is_written(run, tmp_path, capfd):
    root = make_dataset(tmp_path / "data")
    (root / "imagesTr/tiny_002.nii.gz").unlink()
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "r", dataset_dir=str(root))
    error = capfd.readouterr().err
    assert "tiny_002: expected image file" in error
    assert "Traceback" not in error
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network_def#norm": "layer"}, "layer"),
        ({"roi_size": [2, 2, 2]}, "Choose roi_size in multiples"),
        ({"augmentation#spatial#scale#range": [2, 1]}, "augment"),
    ],
)
def test_value_that_an_object_refuses_is_one_line(run, tmp_path, capfd, changes, message):
    try:
        status = run(tmp_path / "r", **changes)
    except SystemExit as ended:  # of `initialize`, where it ends `monai.bundle run` as well
        status = ended.code
    assert status == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    # what was refused does not bind the directory: the corrected command runs there
    assert run(tmp_path / "r") == 0


# --- failures that are no mistake in the config


def failed(run, tmp_path, capfd, status: int, **values) -> str:
    """The one line of a run that ends with a status."""
    overlay = str(tmp_path / "overlay.json")
    Path(overlay).write_text(json.dumps(values))
    allow = "poison.BreakingLoss,poison.BreakingTransform"
    with pytest.raises(SystemExit) as ended:
        sys.exit(run(tmp_path / "r", overlay, allow=allow))
    assert ended.value.code == status
    (line,) = capfd.readouterr().err.splitlines()
    return line


def test_loss_that_raises_in_the_middle_is_one_line(run, tmp_path, capfd):
    loss = {"_target_": "poison.BreakingLoss", "at": 3}
    line = failed(run, tmp_path, capfd, 1, loss_function=loss)
    assert line.startswith("run#0: RuntimeError: this loss is broken (poison.py:")
    assert re.search(r", step \d, cases tiny_", line)
    assert line.endswith(f"The traceback is in {tmp_path}/r/log.txt.")
    log = (tmp_path / "r/log.txt").read_text()
    assert "Traceback" in log
    assert "in forward" in log


def test_circle_of_references_is_one_line(run, tmp_path, capfd):
    circle = {"train#a": "@train#b", "train#b": "@train#a", "train#trainer#grad_clip": "@train#a"}
    assert "circular references" in failed(run, tmp_path, capfd, 2, **circle)


def test_transform_that_raises_names_its_case(run, tmp_path, capfd, dataset):
    """Of the brightest image alone."""
    brightest = {
        path.name.removesuffix(".nii.gz"): nib.load(path).get_fdata().max()
        for path in (dataset / "imagesTr").iterdir()
    }
    case_id = max(brightest, key=brightest.__getitem__)
    transform = {"_target_": "poison.BreakingTransform", "brightest": brightest[case_id]}
    line = failed(run, tmp_path, capfd, 2, transforms_before=[transform])
    assert line == f"{case_id}: this transform is broken"


# --- help and table


def test_help_lists_every_key_with_value_and_meaning(capfd, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit, match="0"):
        main(["--help", "all"])
    out = " ".join(capfd.readouterr().out.split())
    for key, spec in keys.KEYS.items():
        assert f"--{key} " in out
        assert spec.meaning in out
    assert '"data/phantom"' in out


def test_changes_are_sorted_by_class():
    other = json.loads(json.dumps(AMP))
    other["seed"] = 1
    other["max_epochs"] = 99
    other["log_every"] = 3
    other["train"]["trainer"]["grad_clip"] = 1.0
    other["train"]["trainer"]["max_epochs"] = 1
    assert keys.changes(AMP, other) == {
        "identity": ["seed"],
        "continuable": ["max_epochs", "train#trainer#grad_clip", "train#trainer#max_epochs"],
        "free": ["log_every"],
    }
    assert keys.identity_hash(AMP) != keys.identity_hash(other)
    other["seed"] = 0
    assert keys.identity_hash(AMP) == keys.identity_hash(other)
