"""A whole run on a card: training, validation, scores, prediction, export."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, run_tiny

from pipeline.bundle.package import export_run
from pipeline.prediction.predictor import Predictor
from pipeline.reporting.model_card import render_model_card
from pipeline.run import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("amp_dtype", ["float16", "bfloat16"])
def test_run_trains_scores_predicts_and_leaves_as_a_bundle(
    dataset, tmp_path, monkeypatch, amp_dtype
):
    monkeypatch.chdir(REPOSITORY)
    out = tmp_path / "r"
    values = {"device": "cuda", "amp_dtype": amp_dtype, "test_fraction": 0.2, "num_folds": 2}
    assert run_tiny(dataset, out, final_scores=True, **values) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["effective"]["dtype"] == amp_dtype
    assert summary["peak_memory_bytes"] > 0
    assert len(summary["scores"]) == 4
    words = ["--run_dir", str(out), "--input", str(dataset / "imagesTr")]
    assert main(["configs/inference.json", *words, "--output_dir", str(tmp_path / "p")]) == 0
    predictor = Predictor(out)
    assert predictor.segmenter.precision.device.type == "cuda"
    for path in (dataset / "imagesTr").iterdir():
        image = nib.load(path)
        labels = np.asarray(nib.load(tmp_path / "p" / path.name).dataobj)
        assert (predictor(image.get_fdata(), image.affine) == labels).float().mean() > 0.99
    facts = export_run(out, tmp_path / "b", render_model_card, ["torchscript"])
    assert facts["formats"]["torchscript"]["made"]
