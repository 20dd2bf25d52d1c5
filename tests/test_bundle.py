"""The configs as MONAI bundles: the other entry, the other file, and what tools look for."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY
from forked import monai_bundle
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import MetaTensor

from pipeline.bundle.metadata import modality_of, run_metadata
from pipeline.data.dataset import Cases, load_cases
from pipeline.data.plan import Plan

AMP = json.loads((REPOSITORY / "configs/amp.json").read_text())
INFERENCE = json.loads((REPOSITORY / "configs/inference.json").read_text())
REQUIRED_METADATA = {
    "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version",
    "task", "description", "authors", "copyright", "network_data_format", "schema", "changelog",
    "name",
}  # fmt: skip


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


# --- the metadata of a run is true for that run


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
    names = read["inference"]["class_names"]
    assert pred["channel_def"] == {str(n): name for n, name in enumerate(names)}
    assert image["channel_def"] == {"0": "MRI"}  # as dataset.json has it
    assert image["modality"] == "MR"
    assert image["spatial_shape"] == pred["spatial_shape"] == read["inference"]["roi_size"]
    assert image["value_range"] == []  # a z-score promises none
    assert metadata["task"] == "Segmentation of dim, bright"
    assert metadata["data_license"] == "not stated by the dataset"
    for key, package in (("monai", "monai"), ("pytorch", "torch"), ("numpy", "numpy")):
        stated = metadata[f"{key}_version"]
        assert importlib.metadata.version(package).partition("+")[0] == stated
    for package, stated in metadata["required_packages_version"].items():
        assert importlib.metadata.version(package) == stated
    assert "runs" not in json.dumps(metadata)


def metadata_of(
    normalization: Any = "zscore", channels: Any = ("CT",), description: Any = (), **source: Any
) -> dict[str, Any]:
    """Of a run on a dataset that is not there."""
    cases = Cases(
        name="liver",
        train=[],
        validation=[],
        fingerprint="",
        description=dict(description),
        channel_names=channels,
    )
    plan = Plan(
        spacing=[1, 1, 1], crop_empty_borders=False, normalization=normalization,
        roi_size=[8, 8, 8], strides=[2], class_names=["background", "liver"],
        in_channels=len(channels or "1"), num_classes=2,
    )  # fmt: skip
    template = json.loads((REPOSITORY / "configs/metadata.json").read_text())
    return run_metadata(template, {**AMP, **source}, cases, plan)


def image_of(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return metadata_of(*args, **kwargs)["network_data_format"]["inputs"]["image"]


CLIPS = [
    {"clip": [-100, 300], "mean": 40.0, "std": 25.0},
    {"clip": [0, 1], "mean": 0.5, "std": 0.125},
]


@pytest.mark.parametrize("clips", [CLIPS[:1], CLIPS], ids=["one channel", "two channels"])
def test_value_range_is_what_the_network_is_given(clips):
    image = image_of(clips, channels=["CT"] * len(clips))
    parser = ConfigParser(
        {
            **INFERENCE, "normalization": clips, "spacing": [1, 1, 1], "roi_size": [8, 8, 8],
            "in_channels": len(clips),
        }
    )  # fmt: skip
    voxels = torch.randn(len(clips), 8, 8, 8, generator=torch.Generator().manual_seed(0)) * 1e4
    meta = {"original_affine": np.eye(4), "spatial_shape": np.array([8, 8, 8])}
    volume = {"image": MetaTensor(voxels, affine=torch.eye(4), meta=meta)}
    given = parser.get_parsed_content("preprocessing").regularize(volume)["image"]
    low, high = image["value_range"]
    assert (low, high) == pytest.approx((float(given.min()), float(given.max())), abs=1e-5)
    assert low == (-100 - 40) / 25


@pytest.mark.parametrize(
    "changes",
    [
        {"normalization": "percentile_zscore"},
        {"normalization": [CLIPS[0], "zscore"], "channels": ["CT", "MRI"]},
        {"transforms_after": [{"_target_": "ScaleIntensityd", "keys": "image"}]},
        {"preprocessing": {"_target_": "Compose", "transforms": []}},
    ],
    ids=["percentiles", "one channel of two", "transforms of the user", "another preprocessing"],
)
def test_value_range_is_empty_where_none_is_certain(changes):
    assert image_of(**{"normalization": CLIPS[:1], **changes})["value_range"] == []


@pytest.mark.parametrize(
    ("names", "modality"),
    [
        (["CT"], "CT"), (["ct"], "CT"), (["MRI"], "MR"), (["T2", "ADC"], "MR"),
        (["FLAIR", "T1w", "t1gd", "T2w"], "MR"), (["CT", "PET"], "CT, PT"), (["OCT"], "OCT"),
        (["noNorm"], "n/a"), (None, "n/a"),
    ],
)  # fmt: skip
def test_modality_is_what_the_dataset_says(names, modality):
    assert modality_of(names) == modality
    assert image_of(channels=names)["modality"] == modality


def test_channels_have_the_names_that_the_dataset_gives_them():
    assert image_of(channels=["T2", "ADC"])["channel_def"] == {"0": "T2", "1": "ADC"}
    assert image_of(channels=None)["channel_def"] == {"0": "image"}


@pytest.mark.parametrize("spelling", ["licence", "license"])
def test_metadata_names_licence_and_reference_of_the_dataset(dataset, tmp_path, spelling):
    source = json.loads((dataset / "dataset.json").read_text())
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).symlink_to(dataset / folder)
    facts = {spelling: "CC-BY-SA 4.0", "reference": "A hospital, 2020", "description": "Livers"}
    (tmp_path / "dataset.json").write_text(json.dumps({**source, **facts}))
    found = load_cases(tmp_path, num_folds=3, data_roots=[dataset]).description
    metadata = metadata_of(description=found)
    assert metadata["data_license"] == "CC-BY-SA 4.0"
    assert metadata["data_source"] == "A hospital, 2020"


def test_metadata_names_the_network_that_there_is():
    assert metadata_of()["name"] == "Dense U-Net, liver"
    metadata = metadata_of(network_def={"_target_": "monai.networks.nets.SegResNet"})
    assert metadata["name"] == "SegResNet, liver"
    assert metadata["description"] == "A SegResNet, trained on liver to segment liver."


def test_metadata_requires_every_package_that_the_code_imports():
    """What is imported and is neither Python's own nor ours comes with a package named there."""
    imported = set()
    for folder in ("pipeline", "transforms", "networks"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                imported |= {name.split(".")[0] for name in names}
    ours = {"pipeline", "transforms", "networks"}
    providers = importlib.metadata.packages_distributions()
    foreign = imported - ours - sys.stdlib_module_names
    needed = {providers.get(name, [name])[0] for name in foreign}
    metadata = json.loads((REPOSITORY / "configs/metadata.json").read_text())
    stated = {*metadata["required_packages_version"], "monai", "torch", "numpy"}
    # matplotlib's own, what writes an export's other formats, and what comes with torch for CUDA
    apart = {"pillow", "onnx", "onnxruntime", "onnxscript", "triton"}
    assert needed - apart - stated == set()
    assert stated - needed == {"fire"}  # of the command line


def test_logging_config_is_one_that_monai_accepts():
    from monai.bundle.workflows import _apply_logging_file

    _apply_logging_file(str(REPOSITORY / "configs/logging.conf"))
