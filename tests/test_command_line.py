"""The command `ampseg`: what its words mean, what it answers before torch, and its installation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, TINY, make_dataset, tiny_words
from dicom_series import describe, write_series
from monai.bundle import ConfigParser

import ampseg
from pipeline.config.command_line import CommandParser
from pipeline.config.compose import compose_located
from pipeline.config.keys import KEYS, PREDICTION_KEYS
from pipeline.errors import InputError

WRONG = [  # words, and what the one line about them says
    ("blub", "expected a command, got 'blub'. Valid are: check, train,"),
    ("tran", "Did you mean 'train'?"),
    (
        "check {data} --plann",
        "--plann: expected a known option, got '--plann'. Did you mean '--plan'",
    ),
    ("check", "expected DATASET_DIR, got none"),
    (
        "check {tmp}/dta",
        "DATASET_DIR: expected a dataset, found nothing at {tmp}/dta. Did ",
    ),
    ("train {tmp}/mne.json", "mne.json: expected a config file, found none."),
    ("train --dataset_dir {tmp}/dta", "--dataset_dir: expected a dataset, found nothing at"),
    ("train --dataset_dir", "--dataset_dir: expected a value after it, got none."),
    ("train --dataset_dir --seed 3", "--dataset_dir: expected a value after it, got none."),
    ("train --lerning_rate 3", "Did you mean '--learning_rate'?"),
    ("train --network_def#dropuot 0.3", "expected an argument of DenseUNet, got 'dropuot'."),
    ("train --optimiser#lr 0.3", "--optimiser#lr: expected a known key, got 'optimiser'. Did you"),
    (
        "train --max_epochs x",
        "--max_epochs: expected a whole number or auto (epochs to train), got",
    ),
    ("train --class_names a b", "b: expected an option or a .json file, got it. Put a list into"),
    (
        "train --exclude [case_7]",
        "--exclude: expected JSON, got '[case_7]'. Put a list into",
    ),
    ("train --compile true", "--compile: compile was renamed to cuda_graph"),
    ("predict {data} {data} {tmp}/out", "run_dir: expected the directory of a run, got {data}"),
    ("predict {tmp}/mine.json {data} out", "expected a run directory, or a bundle as a zip file"),
    ("predict {tmp}/untrained {data} out", "untrained/models/model.pt. Check the path."),
    ("predict {tmp}/untrained {tmp}/no out", "INPUT: expected images to predict, found nothing at"),
    ("predict {tmp}/untrained {data}", "expected OUTPUT_DIR after RUN and INPUT, got none."),
    ("evaluate {tmp}/no {data}", "PRED_DIR: expected a folder of label maps, found nothing at"),
    ("compare --a {tmp}/no --b {tmp}/mine.json", "expected scores, found nothing at {tmp}/no."),
    ("report {tmp}/no", "RUN: expected the directory of a run, found nothing at {tmp}/no/"),
    ("export {data}", "run_dir: expected the directory of a run, got {data}"),
    ("stop {tmp}/no", "RUN: expected the directory of a run, found nothing at {tmp}/no."),
    ("certify --dtypes fp16", "argument --dtypes: invalid choice: 'fp16'"),
]
ANSWERS = """
import contextlib, io, json, sys
import ampseg
for words in json.load(sys.stdin):
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            status = ampseg.main(words)
        except SystemExit as end:
            status = end.code
    assert not {"torch", "monai", "numpy"} & {*sys.modules}, words
    sys.__stdout__.write(json.dumps([status, told.getvalue()]) + "\\n")
"""


@pytest.fixture
def answers(tmp_path, dataset, monkeypatch):
    """Exit status and text of each command line, of one process that must not import torch."""
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / "mine.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "untrained" / "configs").mkdir(parents=True)
    (tmp_path / "untrained" / "configs" / "inference.json").write_text(
        '{"weights": "models/model.pt"}'
    )

    def ask(lines: list[str]) -> list[tuple[int, str]]:
        words = [[w.format(tmp=tmp_path, data=dataset) for w in line.split()] for line in lines]
        done = subprocess.run(
            [sys.executable, "-c", ANSWERS], input=json.dumps(words), text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        return [tuple(json.loads(line)) for line in done.stdout.splitlines()]

    return ask


def test_command_answers_what_is_typed_wrong_in_one_line_before_torch(answers, tmp_path, dataset):
    found = answers([line for line, _ in WRONG])
    for (line, expected), (status, told) in zip(WRONG, found, strict=True):
        assert (status, told.count("\n")) == (2, 1), (line, told)
        assert expected.format(tmp=tmp_path, data=dataset) in told, line


def test_command_tells_its_help_before_torch(answers):
    names = [*ampseg.COMMANDS]
    short, full = (answers([f"{name} --help{more}" for name in names]) for more in ("", " all"))
    for name, (status, told), (_, all_of_it) in zip(names, short, full, strict=True):
        assert (status, told.splitlines()[0].startswith(f"usage: ampseg {name} ")) == (0, True)
        assert len(told.splitlines()) < 50
        assert len(all_of_it) >= len(told)
    assert "--worker_timeout_s" not in short[names.index("train")][1]
    assert "--worker_timeout_s" in full[names.index("train")][1]


@pytest.mark.parametrize(
    "words",
    [
        "a.json b.json --seed 3 --mirror --fold=-1",
        "--seed 3 a.json --mirror --fold -1 b.json",
        "--fold=-1 --mirror --seed 3 a.json b.json",
    ],
)
def test_options_stand_in_any_order(words):
    parser = CommandParser("train", None, keys={**PREDICTION_KEYS, **KEYS})
    parser.add_argument("configs", nargs="*")
    given = parser.parse(words.split())
    assert given.configs == ["a.json", "b.json"]
    assert given.overrides == {"seed": 3, "mirror": True, "fold": -1}


@pytest.mark.parametrize(
    "overlay",
    [
        {"network_def#dropout": 0.5, "optimizer": {"_target_": "torch.optim.SGD"}},
        {"+augmentation#spatial": {"flip": {"prob": 1}}, "+data_roots": ["a", "b"]},
        {"+train#handlers": [{"_target_": "StatsHandler"}], "train#handlers#0#interval": 7},
        {"validate::key_metric": {"a": 1}, "strides": [[1, 2, 3]]},
    ],
)
def test_files_are_merged_as_monai_merges_them(tmp_path, overlay):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(overlay))
    amp = str(REPOSITORY / "configs/amp.json")
    parser = ConfigParser()
    parser.read_config([amp, str(file)])
    expected = {key: value for key, value in parser.get().items() if key != "_meta_"}
    assert compose_located([amp, str(file)], {}).source == expected


def test_part_of_a_config_is_merged_over_the_shipped_one(tmp_path, dataset, command):
    (tmp_path / "mine.json").write_text('{"max_epochs": 1, "steps_per_epoch": 1}')
    words = tiny_words(dataset, tmp_path / "r", report=False)
    for key in ("--max_epochs", "--steps_per_epoch"):
        del words[words.index(key) : words.index(key) + 2]
    status, told = command("train", tmp_path / "mine.json", *words)
    assert status == 0, told
    assert json.loads((tmp_path / "r/summary.json").read_text())["steps"] == 1


def test_configs_of_the_working_directory_do_not_disturb(command, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    for name in ("amp.json", "inference.json"):
        (tmp_path / "configs" / name).write_text("{")
    monkeypatch.chdir(tmp_path)
    for name in ("train", "check", "predict", "certify"):
        assert command(name, "--help")[0] == 0
    status, told = command("train", "--seed", 1)
    assert (status, told.count("\n")) == (2, 1)
    assert told.startswith("configs/amp.json: expected JSON, got: ")
    status, told = command("predict", ".", tmp_path, "out")
    assert (status, told.count("\n")) == (2, 1)
    assert told.startswith("run_dir: expected the directory of a run, got . (")


def test_public_names_are_there_and_loaded_when_used():
    code = "import ampseg, sys; assert 'torch' not in sys.modules; ampseg.DenseUNet(1, 2)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
    assert all(getattr(ampseg, name) is not None for name in ampseg.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = ampseg.Nothing
    assert ampseg.InputError is InputError


# --- the installation


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel, unpacked into a folder as pip does, with the launcher of the console script."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    for name in ("configs", "networks", "pipeline", "transforms"):
        shutil.copytree(REPOSITORY / name, source / name)
    for name in ("ampseg.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "-w", root, source], check=True)
    (wheel,) = root.glob("ampseg-*.whl")
    subprocess.run([*pip, "install", *options, "--target", root / "site", wheel], check=True)
    return root / "site"


def ampseg_command(installed: Path, folder: Path, *words: object) -> subprocess.CompletedProcess:
    """Run the installed command in a folder, without the repository on the path."""
    paths = [str(installed), sysconfig.get_paths()["purelib"]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, installed / "bin" / "ampseg", *map(str, words)],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_wheel_trains_predicts_reports_and_exports_from_another_folder(installed, tmp_path):
    data = make_dataset(tmp_path / "data")
    for name in ("one", "two"):  # as a clinician has it who was handed the export
        voxels = np.random.default_rng(0).integers(0, 99, (18, 16, 12)).astype(np.int16)
        write_series(tmp_path / "study" / name, voxels, np.eye(4), change=describe)
    settings = {**TINY, "max_epochs": 1, "steps_per_epoch": 1, "report": True}
    words = [word for key, value in settings.items() for word in (f"--{key}", json.dumps(value))]
    for line in (
        ["train", "--dataset_dir", data, "--output_dir", "run", *words],
        ["report", "run", "--output_dir", "page"],
        ["export", "run", "--formats", "torchscript"],
        ["predict", "run_bundle.zip", "study", "labels", "--dicom_seg", "true"],
    ):
        done = ampseg_command(installed, tmp_path, *line)
        assert done.returncode == 0, (line[0], done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
    wanted = "run/report/index.html run/LICENSE run/configs/logging.conf page/index.html"
    for name in (*wanted.split(), "run_bundle/models/model.ts"):
        assert (tmp_path / name).stat().st_size > 0
    made = {f.name for f in (tmp_path / "labels").iterdir()}
    assert made >= {"one.nii.gz", "one.dcm", "two.nii.gz", "two.dcm", "index.html"}
    with zipfile.ZipFile(tmp_path / "run_bundle.zip") as bundle:
        assert any(name.endswith("configs/inference.json") for name in bundle.namelist())


@pytest.mark.parametrize("name", ["pipeline", "networks", "transforms"])
def test_foreign_package_of_the_same_name_is_one_line(installed, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-m", "ampseg", "check", "."], capture_output=True, text=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"{name}: expected the package in {installed / name}, got ")
