"""The scores of a run at its end."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, make_dataset, run_tiny

from pipeline.commands.evaluate import main as evaluate
from pipeline.data.dataset import load_cases
from pipeline.evaluation import final_scores
from pipeline.evaluation.scores import read_scores
from pipeline.lifecycle.lifecycle import Lifecycle

SPLITS = ("validation", "test")


@pytest.fixture(scope="module")
def scored(dataset, tmp_path_factory) -> Path:
    """A run with a test share, whose best weights are not its last."""
    out = tmp_path_factory.mktemp("runs") / "r"
    torch.set_num_threads(1)  # as in the tests, whose runs it is compared with
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        values = {"test_fraction": 0.2, "num_folds": 2, "max_epochs": 3}
        assert run_tiny(dataset, out, final_scores=True, **values) == 0
    return out


def test_run_scores_both_splits_with_both_weights(scored):
    folders = sorted(path.name for path in (scored / "scores").iterdir())
    assert folders == ["test_best", "test_last", "validation_best", "validation_last"]
    for name in folders:
        folder = scored / "scores" / name
        rows = read_scores(folder / "metrics.csv")
        cases = json.loads((folder / "cases.json").read_text())
        assert {row["case_id"] for row in rows} == cases.keys()
        assert len(rows) == 2 * len(cases) == 4
        assert {row["class"] for row in rows} == {"dim", "bright"}
        for case_id, files in cases.items():
            (image,), (label,) = files["image"], files["label"]
            assert not Path(label).is_absolute()
            assert (scored / label).is_file()
            pred = nib.load(folder / f"{case_id}.nii.gz")
            np.testing.assert_array_equal(pred.affine, nib.load(scored / image).affine)
    assert sorted(json.loads((scored / "summary.json").read_text())["scores"]) == folders


def test_scores_of_the_last_weights_are_those_of_the_last_validation(scored):
    validation = json.loads((scored / "validation.json").read_text())["cases"]
    rows = read_scores(scored / "scores/validation_last/metrics.csv")
    for row in rows:
        assert row["dice"] == pytest.approx(validation[row["case_id"]][row["class"]])
    summary = json.loads((scored / "summary.json").read_text())
    scores = summary["scores"]
    assert scores["validation_last"]["mean_dice"] == pytest.approx(summary["last_mean_dice"])
    assert scores["validation_best"]["mean_dice"] == pytest.approx(summary["best_mean_dice"])


def test_evaluate_of_what_was_predicted_gives_the_same_scores(scored, dataset, tmp_path, capsys):
    folder = scored / "scores/test_best"
    # labels of other cases have no prediction there, which it says
    out = tmp_path / "scores"
    assert evaluate([str(folder), str(dataset / "labelsTr"), "--output_dir", str(out)]) == 0
    assert "no prediction and are not scored" in capsys.readouterr().out
    assert (out / "metrics.csv").read_bytes() == (folder / "metrics.csv").read_bytes()


def test_run_that_dies_while_it_is_scored_goes_on_there(run, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(final_scores, "write_scores", kill)
        with pytest.raises(Killed):
            run(tmp_path / "r", final_scores=True)
    assert not (tmp_path / "r/summary.json").exists()
    before = (tmp_path / "r/models/last.pt").read_bytes()
    assert run(tmp_path / "r", final_scores=True) == 0
    assert (tmp_path / "r/models/last.pt").read_bytes() == before
    assert (tmp_path / "r/scores/validation_last/metrics.csv").exists()
    with pytest.raises(SystemExit) as end:  # finished now
        run(tmp_path / "r", final_scores=True)
    assert end.value.code == 0


def test_broken_test_case_is_named_and_the_rest_scored(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    dataset = make_dataset(tmp_path / "data", 9)
    values = {"test_fraction": 0.3, "num_folds": 2, "max_epochs": 1, "preflight": "fast"}
    cases = load_cases(dataset, test_fraction=0.3, num_folds=2)
    path = Path(cases.test[0]["image"])
    path.write_bytes(path.read_bytes()[:-200])
    assert run_tiny(dataset, tmp_path / "r", final_scores=True, **values) == 0
    summary = json.loads((tmp_path / "r/scores/test_best/summary.json").read_text())
    assert list(summary["refused"]) == [cases.test[0]["case_id"]]
    assert summary["num_cases"] == 2
    assert (tmp_path / "r/summary.json").exists()


def test_scores_of_an_earlier_end_do_not_outlive_it(run, tmp_path):
    assert run(tmp_path / "r", final_scores=True, report=True, max_epochs=1) == 0
    assert (tmp_path / "r/scores/validation_last").exists()
    assert run(tmp_path / "r", max_epochs=2) == 0
    assert not (tmp_path / "r/scores").exists()
    assert not (tmp_path / "r/report/index.html").exists()
    assert json.loads((tmp_path / "r/summary.json").read_text())["scores"] == {}


def test_full_disk_while_scoring_ends_the_run_to_be_continued(run, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("write_scores", "save_like"):
        with monkeypatch.context() as patch:
            patch.setattr(final_scores, name, full)
            with pytest.raises(SystemExit) as end:
                run(tmp_path / "r", final_scores=True)
        assert end.value.code == 1
        assert "No space left" in capsys.readouterr().out
        assert not (tmp_path / "r/summary.json").exists()
    assert run(tmp_path / "r", final_scores=True) == 0


def test_ignored_voxels_count_in_no_score(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    import any_datasets

    dataset = any_datasets.nnunet(tmp_path / "data")
    out = tmp_path / "r"
    values = {"roi_size": "auto", "spacing": "auto", "strides": "auto", "num_folds": 2}
    assert run_tiny(dataset, out, final_scores=True, max_epochs=1, **values) == 0
    validation = json.loads((out / "validation.json").read_text())["cases"]
    for row in read_scores(out / "scores/validation_last/metrics.csv"):
        assert row["dice"] == pytest.approx(validation[row["case_id"]][row["class"]])


def test_a_run_outlives_a_report_that_fails(run, tmp_path, monkeypatch, capsys):
    def fail(_):
        raise OSError("no room")

    monkeypatch.setattr("pipeline.reporting.report.write_report", fail)
    assert run(tmp_path / "r", report=True) == 0
    assert "report/index.html: expected to write it, got: no room" in capsys.readouterr().out
    assert (tmp_path / "r/summary.json").exists()


@pytest.fixture(scope="module")
def reported(dataset, tmp_path_factory) -> Path:
    """A run that was killed right after its summary."""
    out = tmp_path_factory.mktemp("killed") / "r"

    def kill(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        patch.setattr(Lifecycle, "_write_pages", kill)
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            run_tiny(dataset, out, **SCORED)
    assert (out / "summary.json").exists()
    assert not (out / "docs").exists()
    return out


SCORED = {"final_scores": True, "report": True}
PAGES = ("docs/README.md", "report/index.html")


def test_same_command_writes_what_a_killed_run_lacks(reported, train, command, monkeypatch):
    kept = [path for path in reported.rglob("*") if path.suffix in (".pt", ".csv", ".gz", ".json")]
    before = {path: path.read_bytes() for path in kept if path.parent.name != "configs"}

    def refuse(source, target):
        if Path(target).name == "index.html":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        refused, fault = command("report", reported)
        status, told = train(reported, **SCORED)
    assert refused == 1
    assert re.search(r"report/index.html: expected to write \d+ bytes, got: No space", fault)
    assert status == 0
    assert "This run is finished; writing docs/README.md and report/index.html." in told
    assert re.search(r"report/index.html: expected to write \d+ bytes, got: No space", told)
    assert [(reported / page).exists() for page in PAGES] == [True, False]
    card = (reported / PAGES[0]).stat()
    status, told = train(reported, **SCORED)
    assert "This run is finished; writing report/index.html." in told
    assert (reported / PAGES[1]).stat().st_size > 1000
    assert (reported / PAGES[0]).stat() == card
    assert "nothing to do" in train(reported, **SCORED)[1]
    assert {path: path.read_bytes() for path in before} == before
