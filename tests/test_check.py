"""`python -m pipeline check`: what it tells of sound and broken datasets, and of mistakes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import any_datasets
import nibabel as nib
import numpy as np
import pytest
from conftest import CACHE, REPOSITORY

from pipeline.commands.check import main

Check = Callable[..., int]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Check:
    """The command, from the repository's root."""
    monkeypatch.chdir(REPOSITORY)
    return lambda *words: main([*map(str, words), "--cache_dir", CACHE.name])


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Folders of six cases, of which the first four have a fault and the last a warning."""
    root = any_datasets.folders(tmp_path / "data")
    a, b, c, d, _, f = any_datasets.case_ids()
    (root / f"labels/{a}.nii.gz").unlink()
    (root / f"images/{b}.nii.gz").write_bytes(b"no image")
    image, label = any_datasets.volumes(2)
    image[0, 0, 0] = np.nan
    any_datasets.save(root / f"images/{c}.nii.gz", image)
    moved = any_datasets.AFFINE + np.eye(4)[[3, 0, 0, 0]].T * 5
    nib.save(nib.Nifti1Image(label, moved), root / f"labels/{d}.nii.gz")
    any_datasets.save(root / f"labels/{f}.nii.gz", np.zeros_like(label))
    return root


def test_check_tells_that_a_dataset_is_sound(check, dataset, capsys):
    assert check(dataset) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first == "tiny (msd): 4 train, 2 validation, 0 test"
    assert last == "0 faults in 0 cases, 0 warnings; 6 cases were looked at"


def test_check_shows_the_plan_with_reasons(check, dataset, capsys):
    assert check(dataset, "--plan") == 0
    lines = capsys.readouterr().out.split("Plan:\n")[1].splitlines()
    assert len(lines) == 20
    assert all(line.endswith(")") for line in lines[:17])
    assert lines[17] == "  steps              8 epochs x 250 = 2,000"
    assert re.fullmatch(
        r"  time here          about \S+ (min|h), in steps of \S+ s on cpu", lines[18]
    )
    assert re.fullmatch(r"  memory             \S+ GiB in float32, estimated for .*", lines[19])
    assert "  spacing            [1.0, 1.0, 1.5]  (median spacing of the images)" in lines


def test_check_writes_a_report_for_programs(check, dataset, tmp_path):
    assert check(dataset, "--json", tmp_path / "r.json", "--exclude", '["tiny_002"]') == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["dataset"], report["layout"], report["num_cases"]) == ("tiny", "msd", 5)
    assert report["excluded"] == ["tiny_002"]
    assert (report["faults"], report["warnings"]) == ([], [])
    assert sum(map(len, report["split"].values())) == 5
    assert report["fingerprint"]["num_cases"] == 5
    assert report["plan"]["class_names"] == ["background", "dim", "bright"]


def test_check_reports_why_there_is_no_plan(check, dataset, tmp_path, capsys):
    assert check(dataset, "--json", tmp_path / "r.json", "--memory_budget_bytes", 10) == 2
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["faults"] == []
    assert report["plan_faults"] == capsys.readouterr().err.splitlines()
    assert report["plan_faults"][0].startswith("memory_budget_bytes: expected ")


def test_check_finds_all_faults_at_once_and_blames_no_other_case(check, broken, tmp_path, capsys):
    assert check(broken, "--plan", "--json", tmp_path / "r.json") == 2
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    found = {f["case_id"]: f["check"] for f in report["faults"] + report["warnings"]}
    assert found == {
        "case_000": "unpaired", "case_001": "unreadable", "case_002": "finite",
        "case_003": "affine", "case_005": "no_foreground",
    }  # fmt: skip
    assert [f["case_id"] for f in report["warnings"]] == ["case_005"]
    assert "case_004" not in out
    assert "Plan:" not in out
    assert "plan" not in report
    assert "4 faults in 4 cases, 1 warning;" in out
    assert all(f["message"] in out for f in report["faults"])


@pytest.mark.parametrize("key", ["labels", "modality"])
def test_check_refuses_names_with_control_characters_and_shows_them_escaped(
    check, dataset, tmp_path, key, capsys
):
    evil = "a\x1b[31m\x07\u202eb"
    changes = {"labels": {"0": "background", "1": evil}, "modality": {"0": evil}}
    source = json.loads((dataset / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**source, key: changes[key]}))
    assert check("--dataset_dir", str(tmp_path)) == 2
    (line,) = (told := "".join(capsys.readouterr())).splitlines()
    assert line.isprintable(), told
    shown = r"got 'a\x1b[31m\x07\u202eb'. Rename it."
    assert (
        line == f"{tmp_path / 'dataset.json'}: expected names without control characters, {shown}"
    )


def test_check_reads_headers_alone_when_fast(check, broken, tmp_path, capsys):
    assert check(broken, "--preflight", "fast", "--json", tmp_path / "r.json") == 2
    faults = json.loads((tmp_path / "r.json").read_text())["faults"]
    assert [f["check"] for f in faults] == ["unpaired", "unreadable", "affine"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "command line: expected DATASET_DIR, got none. Name a folder or a table."),
        (["{tmp}/no"], "DATASET_DIR: expected a dataset, found nothing at "),
        (["{tmp}"], "dataset_dir: expected a folder with dataset.json"),
        (
            ["{data}", "--fld", "1"],
            "--fld: expected a known option, got '--fld'. Did you mean '--fold'?",
        ),
        (["{data}", "{data}"], "expected an option or no more, got it."),
        (["{data}", "--json"], "command line: argument --json: expected one argument. usage: "),
        (["{data}", "--json", "{tmp}/no/r.json"], "r.json: expected to write "),
        (["{data}", "--fold", "9"], "fold: expected 0 to 4 or 'all', got 9. Change it."),
        (["{data}", "--exclude", "nobody"], "--exclude: expected a list of strings"),
        (["{data}", "--exclude", '["nobody"]'], "exclude: expected cases of the dataset, got"),
        (["{data}", "--config", "no.json"], "no.json: expected a config file, found none."),
    ],
)
def test_check_answers_a_mistake_in_one_line(
    dataset, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(REPOSITORY)
    named = [word.format(tmp=tmp_path, data=dataset) for word in words]
    cache = [] if named[-1:] == ["--json"] or not named else ["--cache_dir", CACHE.name]
    assert main([*named, *cache]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
