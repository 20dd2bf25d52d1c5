"""A run directory in the hands of MONAI's bundle tools: their own commands, offline.

`cli` is `python -m monai.bundle ...` in this process; what the issue of a whole run is, training,
evaluation and prediction, is started as a process in the run directory.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import socket
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, make_dataset, run_tiny, write_dataset_json
from forked import monai_bundle
from monai.bundle import ConfigParser, create_workflow, load_bundle_config, verify_metadata

from pipeline.run import main

SCHEMA = REPOSITORY / "pipeline/bundle/metadata_schema.json"
EVALUATE = ["configs/train.json", "configs/evaluate.json"]
METADATA = json.loads((REPOSITORY / "configs/metadata.json").read_text())

pytestmark = [
    # MONAI says of every config that it executes what it says
    pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning"),
    # and of the schema, which is not downloaded here
    pytest.mark.filterwarnings("ignore:No hash value provided:UserWarning"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """What would fetch something fails."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("expected no connection, got one.")

    monkeypatch.setattr(socket, "create_connection", refused)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A dataset of one CT channel that names its licence."""
    root = make_dataset(tmp_path_factory.mktemp("ct"))
    case_ids = [f"tiny_{n:03d}" for n in range(1, 7)]
    write_dataset_json(root, case_ids, modality={"0": "CT"}, licence="CC-BY-SA 4.0")
    return root


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A finished tiny run, which no test changes."""
    out = tmp_path_factory.mktemp("runs") / "r"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        assert run_tiny(data, out, final_scores=True) == 0
    return out


@pytest.fixture(scope="module")
def before(finished) -> dict[str, bytes]:
    """Every file of the finished run."""
    return files_of(finished)


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def cli(monkeypatch) -> Callable[..., None]:
    def command(*words: str, cwd: Path) -> None:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["monai.bundle", *words])
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)

    return command


@pytest.fixture(params=["repository", "run"])
def bundle(request) -> Path:
    """Both that are bundles."""
    return REPOSITORY if request.param == "repository" else request.getfixturevalue("finished")


# --- verify_metadata


def test_verify_metadata_accepts_the_metadata(bundle, cli):
    cli(
        "verify_metadata", "--meta_file", "configs/metadata.json", "--filepath", str(SCHEMA),
        cwd=bundle,
    )  # fmt: skip


def test_verify_metadata_refuses_a_field_that_is_missing(tmp_path):
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps({k: v for k, v in METADATA.items() if k != "network_data_format"}))
    with pytest.raises(ValueError, match="Failed validating"):
        verify_metadata(meta_file=str(path), filepath=str(SCHEMA))


FIELDS = sorted(METADATA.keys() - {"schema", "python_version"})  # without one MONAI stops before
OPTIONAL = {"data_source", "data_license", "intended_use"}
IMAGE = ("network_data_format", "inputs", "image")
PRED = ("network_data_format", "outputs", "pred")
GONE = object()
SPOILT = [
    *(((field,), GONE) for field in FIELDS if field not in OPTIONAL),
    *(((*p, name), GONE) for p in (IMAGE, PRED) for name in METADATA[p[0]][p[1]][p[2]]),
    *(((field,), 7) for field in FIELDS),
    (("version",), "latest"),
    (("changelog",), {}),
    (("required_packages_version",), {"nibabel": 5}),
    ((*IMAGE, "format"), "hounsfields"),
    ((*IMAGE, "num_channels"), "1"),
    ((*IMAGE, "spatial_shape"), [0, 48, 28]),
    ((*IMAGE, "value_range"), [0]),
    ((*IMAGE, "value_range"), ["0", "1"]),
    ((*IMAGE, "is_patch_data"), "true"),
    ((*IMAGE, "channel_def"), {"first": "MRI"}),
    ((*PRED, "type"), "labels"),
    ((*PRED, "dtype"), "single"),
    ((*PRED, "channel_def"), ["background", "liver"]),
    (IMAGE[:2], {}),
    (PRED[:2], {"logits": METADATA["network_data_format"]["outputs"]["pred"]}),
]


def test_schema_has_a_rule_for_every_field():
    """What is missing or of a wrong kind is refused, whatever field it is."""
    schema = json.loads(SCHEMA.read_text())
    rules = jsonschema.validators.validator_for(schema)(schema)
    assert rules.is_valid(METADATA)
    accepted = []
    for place, value in SPOILT:
        metadata = deepcopy(METADATA)
        node: Any = metadata
        for key in place[:-1]:
            node = node[key]
        if value is GONE:
            del node[place[-1]]
        else:
            node[place[-1]] = value
        if rules.is_valid(metadata):
            accepted.append((place, value))
    assert accepted == []


# --- verify_net_in_out


NET = (
    "verify_net_in_out", "network_def", "--meta_file", "configs/metadata.json", "--config_file",
    "configs/inference.json", "--device", "cpu",
)  # fmt: skip


def test_verify_net_in_out_accepts_the_network(bundle, cli):
    cli(*NET, cwd=bundle)


def test_verify_net_in_out_refuses_other_channels(finished, cli):
    with pytest.raises(ValueError, match="output channel number `3` doesn't match: `4`"):
        cli(*NET, "--_meta_#network_data_format#outputs#pred#num_channels", "4", cwd=finished)


# --- ckpt_export and load_bundle_config


@pytest.fixture
def exported(finished, cli, tmp_path) -> Path:
    path = tmp_path / "model.ts"
    cli(
        "ckpt_export", "network_def", "--filepath", str(path), "--config_file",
        "configs/inference.json", cwd=finished,
    )  # fmt: skip
    return path


def test_ckpt_export_makes_a_torchscript_of_the_best_network(exported, finished):
    source = json.loads((finished / "configs/inference.json").read_text())
    network = ConfigParser(source).get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(finished / "models/model.pt", weights_only=True))
    script = torch.jit.load(exported).eval()
    image = torch.randn(1, 1, 16, 32, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(script(image), network(image), rtol=0, atol=1e-5)


def test_load_bundle_config_reads_the_torchscript(exported, finished, before):
    parser = load_bundle_config(str(exported), "inference.json")
    metadata = parser["_meta_"]
    stated = json.loads((finished / "configs/metadata.json").read_text())
    assert {key: metadata[key] for key in stated} == stated
    inference = json.loads((finished / "configs/inference.json").read_text())
    assert {key: parser[key] for key in inference} == inference
    assert files_of(finished) == before


# --- check_properties


def test_train_workflow_lacks_nothing(finished, tmp_path, monkeypatch, before):
    monkeypatch.chdir(finished)
    workflow = create_workflow(
        config_file="configs/train.json", workflow_type="train", output_dir=str(tmp_path / "new")
    )
    try:
        assert workflow.check_properties() == []
        assert workflow.evaluator is not None
    finally:
        workflow.parser.get_parsed_content("lifecycle").release()
    assert files_of(finished) == before


def test_evaluate_workflow_lacks_nothing(finished, monkeypatch, before):
    monkeypatch.chdir(finished)
    workflow = create_workflow(config_file=EVALUATE, workflow_type="train")
    workflow.initialize()  # clients do it twice
    assert workflow.check_properties() == []
    assert isinstance(workflow.parser["validate#handlers"], list)  # where clients look for loaders
    workflow.evaluator.run()
    assert 0 < workflow.evaluator.state.metrics["mean_dice"] < 1
    assert files_of(finished) == before


def test_inference_workflow_lacks_nothing(finished, monkeypatch, before):
    monkeypatch.chdir(finished)
    workflow = create_workflow(config_file="configs/inference.json", workflow_type="infer")
    assert workflow.check_properties() == []
    assert workflow.version == METADATA["version"]
    assert workflow.channel_def == {"0": "background", "1": "dim", "2": "bright"}
    assert files_of(finished) == before


# --- run


def test_monai_bundle_run_trains_beside_the_run(finished, before):
    words = ("--config_file", "configs/train.json", "--report", "false")
    assert monai_bundle(*words, cwd=finished).returncode == 0
    again = finished.parent / "r_again"
    assert files_of(finished) == before
    weights = [
        torch.load(folder / "models/last.pt", weights_only=True) for folder in (finished, again)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for name in ("LICENSE", "docs/README.md", "configs/metadata.json", "configs/evaluate.json"):
        assert (again / name).read_text()


def test_monai_bundle_run_evaluates_and_changes_nothing(finished, before):
    told = monai_bundle("--config_file", str(EVALUATE), cwd=finished).stdout
    best = json.loads((finished / "summary.json").read_text())["best_mean_dice"]
    assert f"mean_dice {best:.4f}" in told
    assert files_of(finished) == before


def test_monai_bundle_run_predicts(finished, data, before, tmp_path):
    words = ("--config_file", "configs/inference.json", "--output_dir", str(tmp_path / "out"))
    assert monai_bundle(*words, cwd=finished).returncode == 0
    images = sorted((data / "imagesTr").iterdir())
    for path in images:
        assert nib.load(tmp_path / "out" / path.name).shape == nib.load(path).shape
    assert len(list((tmp_path / "out").iterdir())) == len(images)
    # what was predicted of the validation cases to be scored is the same
    for path in (finished / "scores/validation_best").glob("*.nii.gz"):
        ours, theirs = (nib.load(p).get_fdata() for p in (path, tmp_path / "out" / path.name))
        np.testing.assert_array_equal(ours, theirs)
    assert files_of(finished) == before


# --- evaluate.json by the other entry, and its bad input


def test_pipeline_run_evaluates(finished, monkeypatch, capfd, before):
    monkeypatch.chdir(finished)
    assert main(EVALUATE) == 0
    best = json.loads((finished / "summary.json").read_text())["best_mean_dice"]
    assert f"mean_dice {best:.4f}" in capfd.readouterr().out
    assert files_of(finished) == before


def test_evaluation_takes_the_plan_of_the_run_to_other_data(
    finished, tmp_path, monkeypatch, before, capfd
):
    other = make_dataset(tmp_path / "other", num_cases=9)
    (tmp_path / "cache").mkdir()
    monkeypatch.chdir(finished)
    words = ["--dataset_dir", str(other), "--cache_dir", str(tmp_path / "cache")]
    assert main([*EVALUATE, *words]) == 0
    assert "on 3 validation cases of tiny" in capfd.readouterr().out
    assert files_of(finished) == before


@pytest.fixture
def a_copy(finished, tmp_path) -> Path:
    copy = tmp_path / "runs" / "copy"
    shutil.copytree(finished, copy)
    source = json.loads((copy / "configs/train.json").read_text())
    for key in ("dataset_dir", "cache_dir"):
        source[key] = os.path.relpath(finished / source[key], copy)
    (copy / "configs/train.json").write_text(json.dumps(source))
    return copy


def evaluation_refused(folder: Path, monkeypatch, capfd, *words: str) -> str:
    """The line that it is refused with."""
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stopped:
        main([*EVALUATE, *words])
    assert stopped.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


def test_evaluation_is_refused_without_a_best_network(a_copy, monkeypatch, capfd):
    (a_copy / "models/model.pt").unlink()
    line = evaluation_refused(a_copy, monkeypatch, capfd)
    assert "model.pt: expected the best network of the run, found none." in line


def test_evaluation_is_refused_without_a_run(a_copy, monkeypatch, capfd, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    line = evaluation_refused(a_copy, monkeypatch, capfd, "--output_dir", nowhere)
    assert "output_dir: expected a run directory, found none" in line
    assert not (tmp_path / "nowhere").exists()


def test_evaluation_is_refused_of_another_network(a_copy, monkeypatch, capfd):
    line = evaluation_refused(a_copy, monkeypatch, capfd, "--base_channels", "4")
    assert "got other values of base_channels" in line


def test_evaluate_of_a_run_is_the_repositorys_for_that_directory(finished):
    ours = json.loads((REPOSITORY / "configs/evaluate.json").read_text())
    assert json.loads((finished / "configs/evaluate.json").read_text()) == {
        "output_dir": ".", **ours
    }  # fmt: skip
