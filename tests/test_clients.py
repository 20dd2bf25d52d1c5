"""MONAI's clients on a run directory, and on the bundle that is exported of it.

MONAI's federated client is driven itself. The Deploy App SDK and MONAI Label are not installed:
what they call is called here in the same order and with the same arguments, read from

    monai-deploy-app-sdk 0d8fd45 (2026-01-16), monai/deploy/operators/
        monai_bundle_inference_operator.py
    MONAILabel 058ddfc (2025-12-24), monailabel/tasks/infer/bundle.py, .../infer/basic_infer.py,
        .../train/bundle.py, monailabel/transform/post.py and writer.py
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import finished_run
from ignite.engine import Events
from monai.bundle import ConfigItem, ConfigParser
from monai.data import MetaTensor
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, FlStatistics, ModelType, WeightType
from monai.fl.utils.exchange_object import ExchangeObject
from monai.inferers import SimpleInferer
from monai.transforms import Compose, LoadImaged, MapTransform, SaveImaged

from pipeline.bundle.package import export_run
from pipeline.prediction.predictor import Predictor
from pipeline.reporting.model_card import render_model_card

pytestmark = [  # MONAI warns of every config that it is given
    pytest.mark.filterwarnings("ignore:executing the bundle config:UserWarning"),
    pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning"),
]


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    return finished_run(dataset, tmp_path_factory.mktemp("runs") / "r")


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that is exported of it."""
    bundle = tmp_path_factory.mktemp("exports") / "b"
    facts = export_run(finished, bundle, render_model_card, ["torchscript"])
    assert facts["formats"]["torchscript"]["made"]
    return bundle


@pytest.fixture(params=["finished", "exported"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """Each kind of bundle; it is afterwards what it was, and started from another directory."""
    root: Path = request.getfixturevalue(request.param)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(root), *sys.path])  # as the clients do
    before = contents(root)
    yield root
    assert contents(root) == before


def contents(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- federated: monai.fl.client.MonaiAlgo


def federated(bundle: Path, dataset: Path, out: Path, **changes: Any) -> MonaiAlgo:
    """A client of one local epoch a round, that trains and evaluates in float16."""
    both = {"bundle_root": str(bundle), "dataset_dir": str(dataset), "amp_dtype": "float16"}
    return MonaiAlgo(
        bundle_root=str(bundle),
        local_epochs=1,
        train_kwargs={**both, "output_dir": str(out), "resume": False, **changes},
        eval_kwargs=both,
        best_model_filepath=str(out / "models/model.pt"),
        final_model_filepath=str(out / "models/last.pt"),
    )  # fmt: skip


class Log:
    """What a trainer does in each round."""

    def __init__(self, trainer: Any) -> None:
        self.began: list[dict[str, torch.Tensor]] = []
        self.rates: list[list[float]] = []
        trainer.add_event_handler(Events.STARTED, self.begin)
        trainer.add_event_handler(Events.ITERATION_STARTED, self.step)

    def begin(self, trainer: Any) -> None:
        self.began.append(copied(trainer.network.state_dict()))
        self.rates.append([])

    def step(self, trainer: Any) -> None:
        self.rates[-1].append(trainer.optimizer.param_groups[0]["lr"])


def test_federated_client_trains_two_rounds(bundle, dataset, tmp_path):
    """initialize (twice), get_weights, train, evaluate, get_weights by type, finalize."""
    out = tmp_path / "client"
    algo = federated(bundle, dataset, out)
    for _ in range(2):
        algo.initialize({ExtraItems.CLIENT_NAME: "site_1"})
    trainer, scaler = algo.trainer, algo.trainer.scaler
    log = Log(trainer)
    sent = copied(trainer.network.state_dict())
    for number in (1, 2):
        sent = {name: value + 0.01 * number for name, value in sent.items()}  # of other clients too
        algo.train(ExchangeObject(weights=copied(sent)))
        assert equal(log.began[-1], sent)
        assert (trainer.progress.step, trainer.progress.epoch) == (2 * number, number)
        assert trainer.scaler is scaler
        assert scaler.state_dict()["_growth_tracker"] == 2 * number
        moments = next(iter(trainer.optimizer.state.values()))
        assert moments["step"] == 2 * number
        got = algo.get_weights()
        assert got.weight_type == WeightType.WEIGHT_DIFF
        assert got.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS] == 2
        now = trainer.network.state_dict()
        assert equal(got.weights, {name: now[name] - sent[name] for name in now})
        assert any(value.abs().max() > 0 for value in got.weights.values())
        sent = copied(now)
    assert log.rates[0] == log.rates[1] == [0.005, 0.005]

    evaluator = algo.evaluator
    assert not equal(evaluator.network.state_dict(), sent)
    evaluated: list[bool] = []
    evaluator.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda engine: evaluated.append(equal(engine.network.state_dict(), sent)),
    )
    metrics = algo.evaluate(ExchangeObject(weights=copied(sent))).metrics
    assert evaluated == [True, True]  # one for each case
    assert evaluator.precision.describe() == trainer.precision.describe()
    assert metrics["mean_dice"] == trainer.progress.last_metric  # the same windows by the same code

    best = algo.get_weights({ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL}).weights
    final = algo.get_weights({ExtraItems.MODEL_TYPE: ModelType.FINAL_MODEL}).weights
    assert best.keys() == final.keys() == sent.keys()
    assert equal(final, sent)
    algo.finalize()
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["epochs"], summary["steps"]) == (2, 4)
    assert summary["effective"]["dtype"] == "float16"
    assert "run_name" not in json.loads((out / "configs/train.json").read_text())


def test_client_that_initializes_anew_begins_anew_when_resume_is_false(finished, dataset, tmp_path):
    """The checkpoints of the round before are there, and are not gone on from."""
    algo = federated(finished, dataset, tmp_path / "client")
    algo.initialize()
    begun = copied(algo.trainer.network.state_dict())
    algo.train(ExchangeObject(weights=copied(begun)))
    assert list((tmp_path / "client/checkpoints").glob("step_*.pt"))
    algo.initialize()
    assert algo.trainer.progress.step == 0
    assert equal(algo.trainer.network.state_dict(), begun)
    algo.train(ExchangeObject(weights=begun))
    assert algo.trainer.progress.step == 2
    algo.finalize()


# --- Deploy App SDK: MonaiBundleInferenceOperator


def config_of_directory(bundle: Path) -> ConfigParser:
    """`_read_directory_bundle_config(path, ["inference"])`."""
    parser = ConfigParser()
    parser.read_meta(f=json.loads((bundle / "configs/metadata.json").read_text()))
    parser.read_config([bundle / "configs/inference.json"])
    parser.parse()
    return parser


def filtered(compose: Compose) -> Compose:
    """`filter_compose(compose, ["LoadImage", "SaveImage"])`; what is left is of dictionaries."""
    names = ("LoadImage", "SaveImage")
    kept = [t for t in compose.transforms if not any(n in type(t).__name__ for n in names)]
    compose.transforms = tuple(kept)
    assert isinstance(compose.transforms[0], MapTransform)  # `is_map_compose`
    return compose


def deployed(parser: ConfigParser, network: Callable, value: np.ndarray, meta: dict) -> MetaTensor:
    """`_init_config`, then `compute` up to `_send_output`."""
    device = parser.get_parsed_content("device")
    inferer = parser.get_parsed_content("inferer")
    meta_info = parser["_meta_"]["network_data_format"]
    assert [*meta_info["inputs"]] == ["image"]
    assert [*meta_info["outputs"]] == ["pred"]
    assert meta_info["outputs"]["pred"]["type"] == "image"
    preprocessing = filtered(parser.get_parsed_content("preprocessing"))
    postprocessing = filtered(parser.get_parsed_content("postprocessing"))
    with torch.no_grad():
        inputs = preprocessing({"image": MetaTensor.ensure_torch_and_prune_meta(value, meta)})
        image = inputs.pop("image")
        assert [k for k, v in inputs.items() if isinstance(v, torch.Tensor)] == []
        logits = inferer(inputs=image[None].to(device), network=network)
        outputs = postprocessing({"pred": next(iter(logits)), **inputs, "image": image})
    return outputs["pred"]


@pytest.fixture
def volume(dataset: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """As `_convert_from_image_dicom_source` hands it over: W, H, D and no channel."""
    image = nib.load(dataset / "imagesTr/tiny_001.nii.gz")
    affine = np.diag([-1.0, -1.0, 1.5, 1.0])  # of a series whose first voxel is right anterior
    affine[:3, 3] = [12.0, -7.0, 3.0]
    voxels = np.asarray(image.dataobj).astype(np.int16)
    return voxels, {
        "row_pixel_spacing": 1.0,
        "col_pixel_spacing": 1.0,
        "depth_pixel_spacing": 1.5,
        "spacing": np.array([1.0, 1.0, 1.5]),
        "original_affine": affine,
        "affine": affine.copy(),
        "spatial_shape": np.asarray(voxels.shape),
        "original_channel_dim": "no_channel",
    }


def test_deploy_operator_predicts_with_a_directory(bundle, finished, volume):
    """`bundle_path` is a directory: `_load_model_from_directory_bundle`, strict.

    It takes models/model.ts before models/model.pt, and `network` of the config for the latter.
    """
    parser = config_of_directory(bundle)
    if (bundle / "models/model.ts").is_file():
        network = torch.jit.load(str(bundle / "models/model.ts"), map_location="cpu").eval()
    else:
        network = parser.get_parsed_content("network")
        weights = torch.load(str(bundle / "models/model.pt"), map_location="cpu")
        assert not {"state_dict", "model"} & weights.keys()
        network.load_state_dict(weights, strict=True)
        network.eval()
    pred = deployed(parser, network, *volume)
    check_prediction(pred, finished, volume)


def check_prediction(pred: MetaTensor, finished: Path, volume: tuple[np.ndarray, dict]) -> None:
    """What `_send_output` needs, and what `Predictor` says of the same volume."""
    voxels, meta = volume
    expected = Predictor(finished)(voxels, meta["original_affine"])
    assert isinstance(pred, torch.Tensor)
    squeezed = np.squeeze(pred.cpu().numpy(), 0)
    assert squeezed.shape == voxels.shape
    assert squeezed.dtype == np.uint8
    assert len(np.unique(squeezed)) > 1
    assert np.mean(squeezed == expected.numpy()) > 0.999


# --- MONAI Label: BundleInferTask


def of_label(bundle: Path, name: str) -> ConfigParser:
    """`_load_bundle_config`."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / name))
    parser.config.update({"bundle_root": str(bundle)})
    return parser


def update_device(parser: ConfigParser, device: str) -> None:
    """`_update_device`."""
    parser.config.update({"device": device})
    if parser.ref_resolver.items.get("device"):
        parser.ref_resolver.items["device"] = ConfigItem(config=device, id="device")


def test_label_infers(bundle, finished, dataset):
    """`BundleInferTask(path, conf)`, then `__call__({"image": path, "device": "cpu"})`."""
    parser = of_label(bundle, "inference.json")
    parser.config["use_click"] = False
    network = parser.get_parsed_content("network_def", instantiate=True)
    metadata = json.loads((bundle / "configs/metadata.json").read_text())
    key_image, _ = next(iter(metadata["network_data_format"]["inputs"].items()))
    key_pred, pred = next(iter(metadata["network_data_format"]["outputs"].items()))
    labels = {v.lower(): int(k) for k, v in pred["channel_def"].items() if v != "background"}
    assert (key_image, key_pred, labels) == ("image", "pred", {"dim": 1, "bright": 2})
    assert metadata["description"]
    assert metadata["version"]

    path = str(dataset / "imagesTr/tiny_002.nii.gz")
    data = {"image": path, "image_path": path, "device": "cpu", "model_filename": ["model.pt"]}
    update_device(parser, "cpu")
    before = list(parser.get_parsed_content("preprocessing", instantiate=True).transforms)
    assert not any(isinstance(t, LoadImaged) for t in before)  # none to be wrapped
    for transform in before:
        data = transform(data)

    update_device(parser, "cpu")
    inferer = parser.get_parsed_content("inferer", instantiate=True)
    assert not isinstance(inferer, SimpleInferer)
    state = torch.load(bundle / "models/model.pt", map_location=torch.device("cpu"))
    state = state.get("model", state)
    assert state.keys() == network.state_dict().keys()
    network.load_state_dict(state, strict=False)
    network.eval()
    assert torch.is_tensor(data["image"])
    with torch.no_grad():
        data["pred"] = inferer(data["image"][None].to("cpu"), network)[0]

    update_device(parser, "cpu")
    after = list(parser.get_parsed_content("postprocessing", instantiate=True).transforms)
    for transform in [t for t in after if not isinstance(t, SaveImaged)]:
        data = transform(data)
    labelled, affine = restored(data)
    image = nib.load(path)
    expected = Predictor(finished)(np.asarray(image.dataobj), image.affine)
    assert labelled.shape == image.shape
    assert np.allclose(affine, image.affine, atol=1e-4)
    assert np.mean(labelled == expected.numpy()) > 0.999  # its weights are channels last


def restored(data: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine as `Restored(keys="pred", ref_image="image")` and `Writer` have them."""
    meta, pred = data["image"].meta, data["pred"]
    size = pred.shape[1:]
    shape = meta.get("spatial_shape", size)
    assert tuple(shape[-len(size) :]) == tuple(size)  # else it is resized
    pred = pred[0]
    affine = meta.get("original_affine")
    return pred.array, np.asarray(pred.affine if affine is None else affine)


# --- MONAI Label: BundleTrainTask


def label_trains(bundle: Path, cases: list[dict[str, str]], num_train: int, **changes: Any) -> Path:
    """`__call__` with `pretrained` on one device, up to `run_single_gpu`; the run it makes."""
    parser = of_label(bundle, "train.json")
    handlers = parser.get("train#handlers", [])
    assert not [t for t in handlers if t.get("_target_") == "CheckpointLoader"]
    loader = {
        "_target_": "CheckpointLoader",
        "load_path": str(bundle / "models/model.pt"),
        "load_dict": {"model": "$@network"},
        "strict": False,
    }
    handlers.insert(0, loader)
    overrides = {
        "bundle_root": str(bundle),
        "train#trainer#max_epochs": 1,
        "train#dataset#data": cases[:num_train],
        "device": "cpu",
        "train#handlers": handlers,
        "validate#dataset#data": cases[num_train:],
        **changes,  # `_update_overrides`
    }
    monai.bundle.run(
        run_id="run",
        init_id=None,
        final_id=None,
        meta_file=str(bundle / "configs/metadata.json"),
        config_file=str(bundle / "configs/train.json"),
        **overrides,
    )
    stated = json.loads((bundle / "configs/train.json").read_text())["output_dir"]
    return (bundle / stated).resolve()


@pytest.fixture
def store(dataset: Path, tmp_path: Path) -> list[dict[str, str]]:
    """As `_fetch_datalist` makes it: images and labels, and nothing that names a case."""
    cases, folder = [], tmp_path / "store"
    (folder / "labels/final").mkdir(parents=True)
    for path in sorted((dataset / "imagesTr").iterdir()):
        image, label = folder / path.name, folder / "labels/final" / path.name
        shutil.copyfile(path, image)
        shutil.copyfile(dataset / "labelsTr" / path.name, label)
        cases.append({"image": str(image), "label": str(label)})
    return cases


def test_label_trains(bundle, store, monkeypatch):
    """The exported bundle has no dataset beside it: the lists stand for it.

    Without a learning rate the pretrained weights, which the handler loads, stay as they are.
    """
    out = label_trains(bundle, store, 4, learning_rate=0.0)
    try:
        summary = json.loads((out / "summary.json").read_text())
        assert summary["epochs"] == 1
        assert summary["num_cases"] == {"train": 4, "validation": 2, "test": 0}
        last, pretrained = (
            torch.load(path / "models" / name, weights_only=True)
            for path, name in ((out, "last.pt"), (bundle, "model.pt"))
        )
        assert equal(last, pretrained)
        inference = json.loads((out / "configs/inference.json").read_text())
        assert (out / inference["dataset_dir"]).resolve() == Path(store[0]["image"]).parent
    finally:
        shutil.rmtree(out)


def test_label_trains_again_beside_what_there_is(finished, store):
    """Active learning: another training with more cases."""
    first = label_trains(finished, store, 3, learning_rate=0.0)
    beside = first.with_name(f"{first.name}_2")
    try:
        label_trains(finished, store, 4, learning_rate=0.0)
        summaries = [json.loads((out / "summary.json").read_text()) for out in (first, beside)]
        assert [summary["num_cases"]["train"] for summary in summaries] == [3, 4]
    finally:
        shutil.rmtree(first)
        shutil.rmtree(beside, ignore_errors=True)


def test_data_whose_classes_are_numbered_otherwise_are_refused(finished, dataset, tmp_path, capfd):
    other = tmp_path / "data"
    shutil.copytree(dataset, other)
    source = json.loads((other / "dataset.json").read_text())
    source["labels"] = {"0": "background", "1": "bright", "2": "dim"}
    (other / "dataset.json").write_text(json.dumps(source))
    algo = federated(finished, other, tmp_path / "client")
    with pytest.raises(SystemExit) as ended:
        algo.initialize()
    assert ended.value.code == 2
    told = "expected the classes background, dim, bright, in the order of their label values, got"
    assert told in capfd.readouterr().err


def test_label_is_told_what_is_wrong_with_its_data(finished, store, capfd):
    """As of a dataset: a line for each, before there is a run."""
    Path(store[1]["label"]).unlink()
    image = nib.load(store[5]["label"])
    nib.save(nib.Nifti1Image(np.full(image.shape, 7, np.uint8), image.affine), store[5]["label"])
    with pytest.raises(SystemExit) as ended:
        label_trains(finished, store, 4)
    assert ended.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tiny_")]
    assert len(lines) == 2
    assert lines[0].startswith("tiny_002: expected label file ")
    assert lines[1].startswith("tiny_006: expected label values ")
    assert not (finished.parent / "r_again").exists()


def test_client_takes_the_plan_of_the_bundle(finished, dataset, tmp_path, monkeypatch):
    """Else each site would have the network that its own data ask for."""
    root = tmp_path / "bundle"
    shutil.copytree(finished, root)
    plan = json.loads((root / "plan.json").read_text())
    assert json.loads((root / "configs/train.json").read_text())["normalization"] == "auto"
    plan["normalization"] = ["percentile_zscore"]
    (root / "plan.json").write_text(json.dumps(plan))
    algo = federated(root, dataset, tmp_path / "client")
    algo.initialize()
    lifecycle = algo.train_workflow.parser.get_parsed_content("lifecycle")
    assert list(lifecycle.plan.normalization) == ["percentile_zscore"]
    algo.finalize()
