"""The configs as MONAI bundles: the other entry, the other file, and what tools look for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY
from monai.bundle import ConfigParser, ConfigWorkflow

AMP = json.loads((REPOSITORY / "configs/amp.json").read_text())
INFERENCE = json.loads((REPOSITORY / "configs/inference.json").read_text())
REQUIRED_METADATA = {
    "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version",
    "task", "description", "authors", "copyright", "network_data_format", "schema", "changelog",
    "name",
}  # fmt: skip


def monai_bundle(*words: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "monai.bundle", "run", *words]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def as_words(values: dict) -> list[str]:
    return [
        word
        for key, value in values.items()
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


def test_monai_bundle_run_ends_with_the_same_weights(run, tmp_path, dataset):
    assert run(tmp_path / "ours") == 0
    values = {"dataset_dir": str(dataset), "output_dir": str(tmp_path / "theirs"), **TINY}
    done = monai_bundle("--config_file", "configs/amp.json", *as_words(values))
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        torch.load(tmp_path / who / "models/last.pt", weights_only=True)
        for who in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    a, b = (
        json.loads((tmp_path / w / "configs/train.json").read_text()) for w in ("ours", "theirs")
    )
    for source in (a, b):
        for key in ("output_dir", "final_scores", "report"):  # 'false' there is a word
            source.pop(key)
    assert a == b
    summaries = [
        json.loads((tmp_path / w / "summary.json").read_text()) for w in ("ours", "theirs")
    ]
    assert summaries[0]["config_hash"] == summaries[1]["config_hash"]
    assert summaries[0]["last_mean_dice"] == summaries[1]["last_mean_dice"]


def test_monai_bundle_run_says_a_mistake_in_one_line_and_status_2(tmp_path):
    done = monai_bundle(
        "--config_file", "configs/amp.json", "--dataset_dir", str(tmp_path / "no"),
        "--output_dir", str(tmp_path / "r"),
    )  # fmt: skip
    assert done.returncode == 2
    assert "dataset_dir: expected a folder with dataset.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()


def test_train_workflow_has_all_properties(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    values = {"dataset_dir": str(dataset), "output_dir": str(tmp_path / "r"), **TINY}
    workflow = ConfigWorkflow("configs/amp.json", workflow_type="train", **values)
    try:
        workflow.initialize()
        workflow.initialize()  # clients do it twice
        assert workflow.check_properties() == []
        assert workflow.max_epochs == 2
        assert len(workflow.train_handlers) == len(AMP["train"]["handlers"])
    finally:
        workflow.parser.get_parsed_content("lifecycle").release()


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> Path:
    """A finished tiny run, two epochs with one validation each."""
    out = tmp_path_factory.mktemp("runs") / "r"
    values = {"dataset_dir": str(dataset), "output_dir": str(out), **TINY}
    done = monai_bundle("--config_file", "configs/amp.json", *as_words(values))
    assert done.returncode == 0, done.stderr
    return out


def test_run_directory_predicts_as_a_bundle(finished, dataset):
    done = monai_bundle("--config_file", "configs/inference.json", cwd=finished)
    assert done.returncode == 0, done.stderr
    for path in sorted((dataset / "imagesTr").iterdir()):
        image = nib.load(path)
        pred = nib.load(finished / "predictions" / path.name)
        assert pred.shape == image.shape
        assert np.allclose(pred.affine, image.affine, atol=1e-4)
        assert pred.get_data_dtype() == np.uint8
        assert set(np.unique(pred.dataobj)) <= {0, 1, 2}


def test_inference_workflow_has_all_properties(finished, monkeypatch):
    monkeypatch.chdir(finished)
    workflow = ConfigWorkflow("configs/inference.json", workflow_type="inference")
    workflow.initialize()
    assert workflow.check_properties() == []


def test_inference_config_of_a_run_states_the_runs_values(finished):
    inference = json.loads((finished / "configs/inference.json").read_text())
    assert inference["num_classes"] == 3
    assert inference["in_channels"] == 1
    assert inference["normalization"] == ["zscore"]
    assert inference["roi_size"] == [16, 16, 8]
    train = json.loads((finished / "configs/train.json").read_text())
    for key in ("network_def", "preprocessing", "network"):
        assert inference[key] == train[key], key


def test_inference_loads_the_best_weights(finished, monkeypatch):
    monkeypatch.chdir(finished)
    parser = ConfigParser(ConfigParser.load_config_file("configs/inference.json"))
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load("models/model.pt", weights_only=True))


def test_ids_that_files_share_are_equal():
    for key in ("network_def", "network", "preprocessing", "precision"):
        assert AMP[key] == INFERENCE[key], key
    for key in ("base_channels", "overlap", "seed"):
        assert AMP[key] == INFERENCE[key], key


@pytest.mark.parametrize("where", ["repository", "run"])
def test_metadata_has_the_required_fields(where, finished):
    root = REPOSITORY if where == "repository" else finished
    metadata = json.loads((root / "configs/metadata.json").read_text())
    assert metadata.keys() >= REQUIRED_METADATA
    pred = metadata["network_data_format"]["outputs"]["pred"]
    names = list(pred["channel_def"].values())
    assert len(names) == pred["num_channels"]
    if where == "run":
        assert names == ["background", "dim", "bright"]
    else:
        assert pred["num_channels"] == INFERENCE["num_classes"]


def test_metadata_names_the_pinned_versions():
    metadata = json.loads((REPOSITORY / "configs/metadata.json").read_text())
    pins = dict(
        line.split("==")
        for line in (REPOSITORY / "requirements.txt").read_text().split()
        if "==" in line
    )
    assert metadata["monai_version"] == pins["monai"]
    assert metadata["pytorch_version"] == pins["torch"]
    assert metadata["numpy_version"] == pins["numpy"]
    for name, version in metadata["required_packages_version"].items():
        assert pins[name] == version


def test_logging_config_is_one_that_monai_accepts():
    from monai.bundle.workflows import _apply_logging_file

    _apply_logging_file(str(REPOSITORY / "configs/logging.conf"))
