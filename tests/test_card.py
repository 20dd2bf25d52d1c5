"""The model card that a run leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY, finished_run, make_dataset, write_dataset_json

from pipeline.reporting.model_card import render_model_card

CASE_IDS = [f"tiny_{n:03d}" for n in range(1, 7)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with a test share, on a dataset of which there is much to tell."""
    root = make_dataset(tmp_path_factory.mktemp("secret_place"))
    facts = {"licence": "CC-BY-SA 4.0", "reference": "A hospital, 2020", "name": "livers"}
    write_dataset_json(root, CASE_IDS, modality={"0": "CT"}, **facts)
    values = {"test_fraction": 0.2, "num_folds": 2, "final_scores": True, "preflight": "full"}
    return finished_run(root, tmp_path_factory.mktemp("runs") / "r", **values)


@pytest.fixture(scope="module")
def card(finished) -> str:
    return (finished / "docs/README.md").read_text()


@pytest.fixture
def a_copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_card_tells_what_the_run_was(card, finished):
    summary = json.loads((finished / "summary.json").read_text())
    plan = json.loads((finished / "plan.json").read_text())
    (clip,) = plan["normalization"]
    low, high = clip["clip"]
    for words in (
        "# Dense U-Net, livers\n", "segment dim, bright", "| 1 | dim |", "| 2 | bright |",
        "Modality: CT", "Channels: 0: CT", "1 x 1 x 1.5 mm (left-right",
        "Resampled to 1 x 1 x 1 mm", "16 x 16 x 8 voxels",
        f"clipped to {low:.4g} to {high:.4g}, minus {clip['mean']:.4g}, over {clip['std']:.4g}",
        "Cases: 2 for training, 2 for validation, 2 for the test\n",
        "Steps: 4 in 2 epochs, 0 skipped", f"in {summary['wall_time_s']:.0f} s",
        "Precision: float32, without loss scaling", "(cpu), torch ",
        f"Weights: of epoch {summary['best_epoch']}, the best by validation",
        "configs/inference.json --input", "['configs/train.json','configs/evaluate.json']",
        "Predictor(", "not a medical device", "Apache-2.0; see `LICENSE`",
        "Data: A hospital, 2020; licence: CC-BY-SA 4.0.",
    ):  # fmt: skip
        assert words in card, words
    assert (finished / "LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_card_has_the_scores_with_their_intervals(card, finished, split):
    summary = json.loads((finished / f"scores/{split}_best/summary.json").read_text())
    for name, figures in summary["classes"].items():
        mean, (low, high) = figures["dice"]["mean"], figures["dice"]["interval"]
        assert f"| {name} | {mean:.4f} ({low:.4f} to {high:.4f}) |" in card
    low, high = summary["mean_dice_interval"]
    assert f"| {summary['mean_dice']:.4f} ({low:.4f} to {high:.4f}) |" in card
    assert f"2 {split} cases of 2 persons, best weights" in card
    assert ("somewhat too good" in card) is False  # there were test cases


def test_card_names_no_case_and_no_place(card, finished):
    command = json.loads((finished / "summary.json").read_text())["command"]
    for secret in (*CASE_IDS, "secret_place", str(finished), str(Path.home()), command):
        assert secret not in card, secret
    assert "/" not in card.replace("configs/", "").replace("python -m", "")


def test_card_tells_what_is_undefined_and_who_was_not_scored(a_copy):
    path = a_copy / "scores/test_best/summary.json"
    summary = json.loads(path.read_text())
    nothing = {"n": 0, "mean": None, "median": None, "q1": None, "q3": None, "interval": None}
    summary["classes"]["bright"]["dice"] = nothing
    summary["refused"] = {"tiny_001": "expected finite logits"}
    summary["over_classes"]["dice"]["interval"] = None
    path.write_text(json.dumps(summary))
    card = render_model_card(a_copy)
    assert "| bright | undefined |" in card
    assert "1 could not be scored" in card
    assert f"| all, case by case | {summary['mean_dice']:.4f} |" in card
    assert "tiny_001" not in card


def test_card_leaves_out_what_is_not_known(a_copy):
    for folder in (a_copy / "scores").glob("test_*"):
        shutil.rmtree(folder)
    assert "somewhat too good" in render_model_card(a_copy)
    shutil.rmtree(a_copy / "scores")
    (a_copy / "summary.json").unlink()
    change(a_copy / "configs/inference.json", trained_on=None)
    card = render_model_card(a_copy)
    assert "It was not scored." in card
    for part in ("## Scores", "## Training", "Voxel sizes"):
        assert part not in card


def test_card_keeps_the_words_of_a_dataset_on_their_line(a_copy):
    path = a_copy / "configs/metadata.json"
    change(path, data_source="x\n# Injected\n| a <b>", data_license="y", name="z\x1b[2J")
    card = render_model_card(a_copy)
    assert card.startswith("# z\\\\x1b\\[2J\n")
    assert "\n# Injected" not in card
    assert "x # Injected \\| a \\<b\\>" in card


def test_card_is_of_the_latest_end_of_a_run(run, tmp_path):
    for epochs in (1, 2):
        assert run(tmp_path / "r", max_epochs=epochs) == 0
        assert f"in {epochs} epochs, " in (tmp_path / "r/docs/README.md").read_text()


def test_run_outlives_a_card_that_cannot_be_written(run, tmp_path, monkeypatch, capsys):
    def fail(_):
        raise OSError("no room")

    monkeypatch.setattr("pipeline.lifecycle.stored_configs.render_model_card", fail)
    assert run(tmp_path / "r", max_epochs=1) == 0
    assert "README.md: expected to write it, got: no room" in capsys.readouterr().out
    assert (tmp_path / "r/summary.json").exists()
