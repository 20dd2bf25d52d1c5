"""What a user writes reaches its place unchanged, and what the README shows works: by commands."""

import csv
import json
import re
import subprocess
import sys

import monai.bundle
import pytest
from conftest import REPOSITORY, write_case, write_dataset_json

from ampseg import COMMANDS

# MONAI's own entry says that it executes what a config says
pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")

SHORT = {"max_epochs": 1, "steps_per_epoch": 1}
NAMES = [
    "run #1", "a::b", "@home", "$scratch", "%temp", "user@site, 100%#3", "@#x", "2024", "007",
    "1e5", "true", "NaN", "-0.0", "[1]", "{}", "~", " spaced ", "Schädel 头",
]  # fmt: skip


# --- a string reaches its place unchanged


@pytest.mark.parametrize("name", NAMES)
def test_folder_is_reached_by_the_name_that_is_typed(command, train, tmp_path, name):
    """Each is refused for a reason of its own, in a line that says where it was looked for."""
    place = tmp_path / name
    status, told = train(name, bundle_root=str(tmp_path), dataset_dir=name)
    assert (status, f"found nothing at {place}. " in told) == (2, True), told
    place.mkdir()
    (place / "mine.txt").touch()
    status, told = train(name, bundle_root=str(tmp_path))
    assert (status, f"got {place} with other files" in told) == (2, True), told
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["out #2", "@home", "1e5", "true", "007"])
@pytest.mark.usefixtures("at_the_root")
def test_run_is_reached_by_the_name_that_is_typed(command, name):
    status, told = command("run", "configs/inference.json", "--run_dir", name)
    assert (status, "expected the directory of a run, got" in told) == (2, True), told
    assert name in told


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A table of cases `a#1` to `a#5`, in a folder with such a name, and a split of them."""
    root = tmp_path_factory.mktemp("in") / "CT #3, user@site 100%#"
    lines = ["case_id,image,label"]
    for n in range(1, 6):
        write_case(root, f"CT #{n}", seed=n)
        lines.append(f"a#{n},imagesTr/CT #{n}.nii.gz,labelsTr/CT #{n}.nii.gz")
    (root / "cases.csv").write_text("\n".join(lines))
    split = {"train": ["a#2", "a#3"], "val": ["a#1"]}
    (root / "split #1.json").write_text(json.dumps(split))
    return root


def test_cases_are_called_as_the_user_calls_them(
    command, train, numbered, tmp_path, monkeypatch, capfd
):
    out, words = tmp_path / "run #1", {"exclude": ["a#4", "a#5"], "final_scores": True}
    how = {**SHORT, **words, "dataset_dir": str(numbered)}
    status, told = train(out, split_file=str(numbered / "split #1.json"), **how)
    assert status == 0, told
    assert [path.name for path in tmp_path.iterdir()] == ["run #1"]
    assert list(json.loads((out / "validation.json").read_text())["cases"]) == ["a#1"]
    scores = out / "scores" / "validation_best"
    assert (scores / "a#1.nii.gz").is_file()
    with open(scores / "metrics.csv") as file:
        assert {row["case_id"] for row in csv.DictReader(file)} == {"a#1"}

    made = tmp_path / "out #2"
    images = numbered / "imagesTr"
    status, told = command(
        "run", "configs/inference.json", "--run_dir", out, "--input", images, "--output_dir", made
    )
    assert status == 0, told
    assert {path.name for path in made.glob("*.nii.gz")} == {path.name for path in images.iterdir()}

    # the run directory is a bundle under its name too
    monkeypatch.chdir(out)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "more").symlink_to(images)
    monai.bundle.run(config_file="configs/inference.json", input="../more", output_dir="labels")
    assert (out / "labels" / "CT #1.nii.gz").is_file()
    capfd.readouterr()
    with pytest.raises(SystemExit, match="2"):
        monai.bundle.run(config_file="configs/inference.json", input="../more", output_dir="#2")
    assert "output_dir: expected no # under monai.bundle" in capfd.readouterr().err


def test_person_is_told_by_a_pattern_as_it_is_written(train, numbered, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"group_pattern": "^a#(.)"}))
    how = {**SHORT, "dataset_dir": str(numbered)}
    status, told = train(tmp_path / "r", tmp_path / "mine.json", **how)
    assert status == 0, told


@pytest.mark.usefixtures("at_the_root")
def test_path_that_monai_alone_would_alter_is_refused(dataset, tmp_path, capfd):
    with pytest.raises(SystemExit, match="2"):
        monai.bundle.run(
            config_file="configs/amp.json",
            dataset_dir=str(dataset),
            output_dir=str(tmp_path / "run #1"),
        )
    assert "output_dir: expected no # under monai.bundle" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_names_that_a_config_could_not_hold_are_told_before_training(train, tmp_path):
    for n in range(3):
        write_case(tmp_path / "d", f"c{n}", seed=n)
    labels = {"0": "background", "1": "@left", "2": "right"}
    write_dataset_json(tmp_path / "d", ["c0", "c1", "c2"], labels=labels, reference="$5")
    status, told = train(tmp_path / "r", dataset_dir=str(tmp_path / "d"))
    assert (status, told.count("\n")) == (2, 1)
    assert "tiny: expected names of classes and channels" in told
    assert "got @left. Rename them." in told


# --- what is shown works, and nothing ends silently


def test_normalization_as_it_is_documented(command, dataset, tmp_path):
    given = {"clip": [0, 120], "mean": 40, "std": 30}
    words = ["--num_folds", 3, "--cache_dir", tmp_path, "--normalization", json.dumps(given)]
    status, told = command("check", dataset, "--plan", *words)
    assert status == 0
    assert f"  normalization      {json.dumps(given)}" in told


def test_prediction_says_what_to_type(command):
    status, told = command("predict", "runs/there")
    assert status == 2
    assert "arguments are required: INPUT. usage: ampseg predict RUN INPUT OUTPUT_DIR" in told
    status, told = command("predict", "--help")
    assert (status, "RUN INPUT OUTPUT_DIR" in told) == (0, True)


@pytest.mark.parametrize("name", ["scoring", "train", "bundle.package", "data.plan", "predict"])
def test_module_that_is_no_command_says_what_to_type(name):
    done = subprocess.run(
        [sys.executable, "-m", f"pipeline.{name}"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"pipeline.{name}: expected python -m pipeline ")


def test_package_lists_its_commands_at_once():
    for words, status in (["--help"], 0), ([], 2):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "pipeline", *words],
            cwd=REPOSITORY, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == status
        assert not re.search(r"\| +(torch|monai|numpy)$", done.stderr, re.MULTILINE)
        for name in COMMANDS:
            assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)
