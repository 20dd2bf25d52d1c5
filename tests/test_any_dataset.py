"""Training with nothing set but the dataset, whatever its layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import any_datasets
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import CACHE
from monai.bundle import ConfigWorkflow

# small, so that a test is quick; nothing that a plan decides
SMALL = {
    "cache_dir": CACHE.name,
    "base_channels": 2,
    "network_def#num_dense_layers": 1,
    "network_def#growth_rate": 4,
    "num_folds": 3,
    "steps_per_epoch": 2,
    "max_epochs": 1,
    "val_interval": 1,
    "learning_rate": 0.005,
    "warmup_steps": 1,
    "final_scores": False,
    "report": False,
}


@pytest.fixture
def train(command, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """A run into `tmp_path / "r"`: `train(dataset, key=value, ...)` → exit status and output."""

    def run(dataset: Path, **changes: Any) -> tuple[int, str]:
        given = {"dataset_dir": str(dataset), "output_dir": str(tmp_path / "r"), **SMALL, **changes}
        words = [
            (f"--{key}", v if isinstance(v, str) else json.dumps(v)) for key, v in given.items()
        ]
        return command("run", "configs/amp.json", *sum(words, ()))

    return run


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def predict(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that the bundle in a run directory predicts."""
    monkeypatch.chdir(run_dir)
    config = "configs/inference.json"
    workflow = ConfigWorkflow(config, workflow_type="inference", logging_file=False)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return sorted((run_dir / "predictions").glob("*.nii.gz"))


@pytest.mark.parametrize("make", any_datasets.MAKERS, ids=lambda make: make.__name__)
def test_run_trains_on_any_layout_with_nothing_set(train, tmp_path, make):
    dataset = make(tmp_path / "data")
    assert train(dataset, final_scores=True)[0] == 0
    out = tmp_path / "r"
    plan, inference = read(out / "plan.json"), read(out / "configs/inference.json")
    assert "auto" not in [value for key, value in inference.items() if key in plan]
    shared = inference.keys() & plan.keys()
    assert len(shared) == 11
    assert {key: inference[key] for key in shared} == {key: plan[key] for key in shared}
    assert read(out / "configs/train.json")["spacing"] == "auto"
    summary = read(out / "summary.json")
    assert summary["steps"] == 2
    assert summary["best_mean_dice"] is not None
    assert all((out / f"models/{name}.pt").is_file() for name in ("model", "last"))
    assert [case for case in read(out / "validation.json")["cases"]]


@pytest.mark.parametrize("name", ["nnunet", "dicom"])
def test_inference_of_a_run_predicts_on_the_grid_of_the_files(train, tmp_path, monkeypatch, name):
    assert train(getattr(any_datasets, name)(tmp_path / "data"))[0] == 0
    predicted = predict(tmp_path / "r", monkeypatch)
    assert [path.name for path in predicted] == [
        f"{case}.nii.gz" for case in any_datasets.case_ids()
    ]
    for path in predicted:
        pred = nib.load(path)
        assert pred.shape == any_datasets.SIZE
        assert np.allclose(pred.affine, any_datasets.AFFINE, atol=1e-4)
        assert set(np.unique(pred.dataobj)) <= {0, 1, 2}


def test_inference_of_a_run_says_background_outside_when_borders_were_cut_off(
    train, tmp_path, monkeypatch
):
    dataset = any_datasets.with_borders(tmp_path / "data")
    assert train(dataset)[0] == 0
    out = tmp_path / "r"
    assert read(out / "plan.json")["crop_empty_borders"] is True
    weights = torch.load(out / "models/model.pt", weights_only=True)
    # finds class 2 everywhere
    weights["head.bias"][:] = torch.tensor([0.0, 0.0, 99.0])
    torch.save(weights, out / "models/model.pt")
    for path in predict(out, monkeypatch):
        image = nib.load(dataset / "images" / path.name)
        pred = nib.load(path)
        assert np.allclose(pred.affine, image.affine, atol=1e-4)
        np.testing.assert_array_equal(np.asarray(pred.dataobj) == 2, image.get_fdata() != 0)


def test_run_validates_on_annotated_voxels_alone(train, tmp_path, monkeypatch):
    dataset = any_datasets.nnunet(tmp_path / "data")
    assert train(dataset)[0] == 0
    scores = read(tmp_path / "r/validation.json")["cases"]
    predict(tmp_path / "r", monkeypatch)  # one epoch: the best network is the validated one
    for case, dice in scores.items():
        label = np.asarray(nib.load(dataset / f"labelsTr/{case}.nii.gz").dataobj)
        pred = np.asarray(nib.load(tmp_path / f"r/predictions/{case}.nii.gz").dataobj)
        assert pred[label == 3].any()  # there is something to leave out
        for value, name in ((1, "dim"), (2, "bright")):
            p, t = (pred == value)[label != 3], (label == value)[label != 3]
            expected = 2 * (p & t).sum() / (p.sum() + t.sum())
            assert dice[name] == pytest.approx(expected, abs=1e-6)


def test_run_trains_on_all_and_says_that_nothing_is_validated(train, tmp_path, monkeypatch):
    status, told = train(any_datasets.folders(tmp_path / "data"), fold="all")
    assert status == 0
    assert "6 training, 0 validation and 0 test cases" in told
    assert "There was no validation; the model is the last network" in told
    end = told.partition("There was no validation")[2]
    assert "predict: ampseg predict " in end
    assert "Dice" not in end
    models = tmp_path / "r/models"
    last, model = (torch.load(models / f"{x}.pt", weights_only=True) for x in ("last", "model"))
    assert all(torch.equal(last[name], model[name]) for name in last)
    assert read(tmp_path / "r/summary.json")["best_mean_dice"] is None
    assert len(predict(tmp_path / "r", monkeypatch)) == 6


def test_run_goes_on_with_its_plan_when_the_budget_is_another(train, tmp_path):
    dataset = any_datasets.folders(tmp_path / "data")
    assert train(dataset)[0] == 0
    before = read(tmp_path / "r/plan.json")
    assert train(dataset, max_epochs=2, memory_budget_bytes=10)[0] == 0
    assert read(tmp_path / "r/plan.json") == {**before, "max_epochs": 2}
    assert read(tmp_path / "r/summary.json")["steps"] == 4


def test_run_goes_on_when_a_value_is_given_that_was_chosen(train, tmp_path):
    dataset = any_datasets.folders(tmp_path / "data")
    assert train(dataset)[0] == 0
    chosen = read(tmp_path / "r/plan.json")
    given = {key: chosen[key] for key in ("spacing", "roi_size", "strides", "class_names")}
    assert train(dataset, max_epochs=2, **given)[0] == 0
    status, told = train(dataset, max_epochs=3, spacing=[1, 1, 2], batch_size=1)
    assert (status, "Traceback" in told) == (2, False)
    assert "got other values of batch_size, spacing" in told


@pytest.mark.parametrize("text", ["{", '{"spacing": [1, 1, 1]}', None])
def test_run_refuses_a_damaged_plan_in_one_line(train, tmp_path, text):
    dataset = any_datasets.folders(tmp_path / "data")
    assert train(dataset)[0] == 0
    plan = tmp_path / "r/plan.json"
    plan.write_text(text) if text else plan.unlink()
    status, told = train(dataset, max_epochs=2)
    assert (status, "Traceback" in told) == (2, False)
    assert told.splitlines()[-1].startswith(f"{plan}: expected the plan of the run there, got: ")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("spacing", [0.001, 0.001, 0.0005], "spacing: expected mm that leave 1 to 10000 voxels"),
        ("roi_size", [1.5, 8, 8], "roi_size#0: expected a whole number"),
        ("normalization", ["zscore", "zscore"], "normalization: expected 1 entries, one per"),
        ("class_names", ["a", "b", "b"], "class_names: expected different names, got a, b, b."),
        ("num_classes", 2, "class_names: expected 2 names, background included, got 3."),
        ("in_channels", 4, "in_channels: expected 1, the channels of the images, got 4."),
        ("test_fraction", 2, "test_fraction: expected 0 to below 1, got 2."),
        (
            "split_file",
            "missing.json",
            "--split_file: expected a JSON file, found nothing at missing.json",
        ),
    ],
)
def test_run_answers_a_mistyped_value_and_starts_without_it(train, tmp_path, key, value, message):
    dataset = any_datasets.folders(tmp_path / "data")
    status, told = train(dataset, **{key: value})
    assert status == 2
    assert message in told
    assert not (tmp_path / "r/checkpoints").exists()
    if (tmp_path / "r").exists():  # else there is nothing to be in the way
        assert train(dataset)[0] == 0
