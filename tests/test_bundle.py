"""Configs and run directories in the hands of MONAI's bundle tools: their own commands, offline.

`cli` is `python -m monai.bundle ...` in this process; training, evaluation and prediction are
started as a process in the run directory.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import runpy
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, finished_run, make_dataset, tiny_words, write_dataset_json
from forked import monai_bundle
from monai.bundle import ConfigParser, create_workflow

from pipeline.bundle.metadata import modality_of
from pipeline.config.parser import config_of_monai
from pipeline.run import main

SCHEMA = Path(__file__).with_name("metadata_schema.json")
EVALUATE = ["configs/train.json", "configs/evaluate.json"]
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
    return finished_run(data, tmp_path_factory.mktemp("runs") / "r", final_scores=True)


@pytest.fixture(scope="module")
def before(finished) -> dict[str, bytes]:
    """Every file of the finished run."""
    return files_of(finished)


def assert_equal_weights(*runs: Path) -> None:
    ours, theirs = (torch.load(run / "models/last.pt", weights_only=True) for run in runs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


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


def test_verify_metadata_accepts_the_metadata(bundle, cli):
    words = ("--meta_file", "configs/metadata.json", "--filepath", str(SCHEMA))
    cli("verify_metadata", *words, cwd=bundle)


def test_verify_net_in_out_accepts_the_network(bundle, cli):
    words = ("--meta_file", "configs/metadata.json", "--config_file", "configs/inference.json")
    cli("verify_net_in_out", "network_def", *words, "--device", "cpu", cwd=bundle)


def test_ckpt_export_makes_a_torchscript_of_the_best_network(finished, cli, tmp_path):
    words = ("--filepath", str(tmp_path / "model.ts"), "--config_file", "configs/inference.json")
    cli("ckpt_export", "network_def", *words, cwd=finished)
    source = json.loads((finished / "configs/inference.json").read_text())
    network = ConfigParser(source).get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(finished / "models/model.pt", weights_only=True))
    script = torch.jit.load(tmp_path / "model.ts").eval()
    image = torch.randn(1, 1, 16, 32, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(script(image), network(image), rtol=0, atol=1e-5)


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
    assert workflow.channel_def == {"0": "background", "1": "dim", "2": "bright"}
    assert files_of(finished) == before


def test_monai_bundle_run_trains_beside_the_run(finished, before):
    words = ("--config_file", "configs/train.json", "--report", "false")
    assert monai_bundle(*words, cwd=finished).returncode == 0
    again = finished.parent / "r_again"
    assert files_of(finished) == before
    assert_equal_weights(finished, again)
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
    names = {path.name for path in (data / "imagesTr").iterdir()}
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == names
    # what was predicted of the validation cases to be scored is the same
    for path in (finished / "scores/validation_best").glob("*.nii.gz"):
        ours, theirs = (nib.load(p).get_fdata() for p in (path, tmp_path / "out" / path.name))
        assert np.array_equal(ours, theirs)
    assert files_of(finished) == before


def test_evaluation_takes_the_plan_of_the_run_to_other_data(
    finished, tmp_path, monkeypatch, before, capfd
):
    other = make_dataset(tmp_path / "other", num_cases=9)
    monkeypatch.chdir(finished)
    words = [f"--dataset_dir={other}", f"--cache_dir={tmp_path}"]
    assert main([*EVALUATE, *words]) == 0
    assert "on 3 validation cases of tiny" in capfd.readouterr().out
    assert files_of(finished) == before


@pytest.fixture
def a_copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished, finished.with_name(tmp_path.name))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model.pt: expected the best network of the run, found none."),
        (["--output_dir", "nowhere"], "output_dir: expected a run directory, found none"),
        (["--base_channels", "4"], "got other values of base_channels"),
    ],
    ids=["no best network", "no run", "another network"],
)
def test_evaluation_is_refused_in_one_line(a_copy, monkeypatch, capfd, words, message):
    if not words:
        (a_copy / "models/model.pt").unlink()
    monkeypatch.chdir(a_copy)
    with pytest.raises(SystemExit) as stopped:
        main([*EVALUATE, *words])
    assert stopped.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert not (a_copy / "nowhere").exists()


def test_monai_bundle_run_says_a_mistake_in_one_line_and_status_2(tmp_path):
    done = monai_bundle(
        "--config_file", "configs/amp.json", "--dataset_dir", str(tmp_path / "no"),
        "--output_dir", str(tmp_path / "r"),
    )  # fmt: skip
    assert done.returncode == 2
    assert "dataset_dir: expected a folder with dataset.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()


def test_monai_bundle_run_tells_a_failure_in_one_line(tmp_path, dataset):
    """What fails in training, after the lifecycle was entered; the traceback is in the log."""
    overlay = tmp_path / "mine.json"
    overlay.write_text(json.dumps({"loss_function": {"_target_": "poison.BreakingLoss", "at": 3}}))
    files = f"['configs/amp.json','{overlay}']"
    done = monai_bundle("--config_file", files, *tiny_words(dataset, tmp_path / "r"))
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    assert line.startswith("RuntimeError: this loss is broken (poison.py:")
    assert "Traceback" not in done.stderr
    assert "Traceback" in (tmp_path / "r/log.txt").read_text()


class AsksForConfig:
    """A component that MONAI's own parser builds."""

    def __init__(self) -> None:
        self.found = config_of_monai()


def test_config_of_monai_is_the_merged_config_that_is_being_resolved(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "__name__", "test_bundle")
    parser = ConfigParser({"a": {"_target_": "test_bundle.AsksForConfig"}, "b": 1})
    parser.update({"b": 2})
    assert parser.get_parsed_content("a").found == {**parser.get(), "b": 2}
    with pytest.raises(RuntimeError, match="expected to be built from a config"):
        AsksForConfig()


def test_metadata_of_a_run_contradicts_nothing_there(finished):
    read = {
        name: json.loads((finished / f"configs/{name}.json").read_text())
        for name in ("metadata", "inference", "train")
    }
    metadata = read["metadata"]
    image = metadata["network_data_format"]["inputs"]["image"]
    pred = metadata["network_data_format"]["outputs"]["pred"]
    network = ConfigParser(read["inference"]).get_parsed_content("network_def")
    weights = torch.load(finished / "models/model.pt", weights_only=True)
    network.load_state_dict(weights)
    found = network.eval()(torch.zeros(1, image["num_channels"], *image["spatial_shape"]))
    assert found.shape == (1, pred["num_channels"], *pred["spatial_shape"])
    assert str(found.dtype) == f"torch.{pred['dtype']}"
    assert [*pred["channel_def"].values()] == read["inference"]["class_names"]
    assert image["channel_def"] == {"0": "CT"}  # as dataset.json has it
    assert image["modality"] == "CT"
    assert image["spatial_shape"] == pred["spatial_shape"] == read["inference"]["roi_size"]
    assert metadata["task"] == "Segmentation of dim, bright"
    assert metadata["data_license"] == "CC-BY-SA 4.0"
    for key, package in (("monai", "monai"), ("pytorch", "torch"), ("numpy", "numpy")):
        stated = metadata[f"{key}_version"]
        assert importlib.metadata.version(package).partition("+")[0] == stated
    for package, stated in metadata["required_packages_version"].items():
        assert importlib.metadata.version(package) == stated
    assert "runs" not in json.dumps(metadata)


def test_modality_is_what_the_dataset_says():
    for names, modality in {("ct",): "CT", ("T2", "ADC"): "MR", ("CT", "PET"): "CT, PT"}.items():
        assert modality_of(names) == modality
    assert modality_of(["noNorm"]) == modality_of(None) == "n/a"


def test_metadata_requires_every_package_that_the_code_imports():
    imported = set()
    for folder in ("pipeline", "transforms", "networks"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                imported |= {name.split(".")[0] for name in names}
    providers = importlib.metadata.packages_distributions()
    foreign = imported - {"ampseg", "pipeline", "transforms", "networks"} - sys.stdlib_module_names
    needed = {providers.get(name, [name])[0] for name in foreign}
    metadata = json.loads((REPOSITORY / "configs/metadata.json").read_text())
    stated = {*metadata["required_packages_version"], "monai", "torch", "numpy"}
    # what comes with matplotlib, Jinja2, or torch for CUDA, and what only extras need
    apart = {"pillow", "contourpy", "MarkupSafe", "triton"}
    apart |= {"onnx", "onnxruntime", "onnxscript", "highdicom"}
    assert needed - apart == stated - {"fire"}  # of the command line
