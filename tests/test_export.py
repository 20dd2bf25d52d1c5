"""A run exported as a bundle of its own: it works elsewhere, and says nothing of the data."""

from __future__ import annotations

import ast
import importlib
import io
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import CACHE, REPOSITORY, make_dataset, run_tiny
from monai.bundle import ConfigWorkflow, load_bundle_config
from safetensors.torch import load_file

from pipeline.bundle.formats import NetworkExporter
from pipeline.bundle.package import is_safe, make_package_name, rename_modules
from pipeline.commands.export import main
from pipeline.prediction.predictor import Predictor
from pipeline.run import main as run_main

PERSON, HOST = "zq_radiologist", "zq-scanner7"
MOST_MODULES = 34  # that a bundle packs


class Export:
    """An exported tiny run."""

    def __init__(self, root: Path) -> None:
        self.dataset, self.run, self.bundle = root / "zq_data", root / "runs" / "r", root / "out/b"
        self.root, self.zip = root, Path(f"{self.bundle}.zip")

    @property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.bundle / "export.json").read_text())


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Export:
    """A finished run on data of its own, some of whose keys name cases, and its bundle."""
    root = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        for name in ("USER", "LOGNAME"):
            patch.setenv(name, PERSON)
        patch.setenv("HOME", str(root / "home" / PERSON))
        patch.setattr(socket, "gethostname", lambda: HOST)
        patch.setattr(platform, "node", lambda: HOST)
        there = Export(root)
        make_dataset(there.dataset)
        settings = {"exclude": ["tiny_006"], "group_pattern": "^(tiny_00.)", "final_scores": True}
        assert run_tiny(there.dataset, there.run, **settings) == 0
        assert main([str(there.run), "--output", str(there.bundle)]) == 0
    return there


def python(cwd: Path, *words: str) -> subprocess.CompletedProcess:
    """A Python that knows the working directory and what is installed, but no repository."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_bundle_holds_what_a_bundle_has(export):
    files = files_in(export.bundle)
    package = export.facts["code"]["package"]
    assert [name for name in files if not name.startswith(package)] == [
        "LICENSE", "configs/evaluate.json", "configs/evaluate_files.json", "configs/inference.json",
        "configs/logging.conf", "configs/metadata.json", "configs/train.json", "docs/README.md",
        "export.json",
        "models/model.onnx", "models/model.pt", "models/model.pt2", "models/model.safetensors",
        "models/model.ts", "plan.json",
    ]  # fmt: skip
    assert f"{package}/networks/dense_unet.py" in files
    readme = (export.bundle / "docs/README.md").read_text()
    assert f"from {package}.pipeline.prediction.predictor import Predictor" in readme
    assert "Training anew, beside this directory, needs the project's package" in readme


def test_packed_code_is_what_prediction_and_evaluation_need(export):
    """Of other rooms there is nothing, and each module that is imported is there."""
    package = export.facts["code"]["package"]
    folder = export.bundle / package
    modules = {
        ".".join(path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.py")
    }
    rooms = ("reporting", "bundle", "lifecycle", "commands", "run", "data.plan", "data.preflight")
    assert not [name for name in modules if name.startswith(tuple(f"pipeline.{r}" for r in rooms))]
    code = [name for name in modules if not name.endswith("__init__")]
    assert export.facts["code"]["num_modules"] == len(code) <= MOST_MODULES
    nodes = (n for path in folder.rglob("*.py") for n in ast.walk(ast.parse(path.read_text())))
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            own, _, module = str(node.module).partition(".")
            assert own not in ("pipeline", "transforms", "networks")
            assert own != package or {f"{module}.__init__", module} & modules, module


def test_export_says_how_each_format_compares(export):
    formats = export.facts["formats"]
    assert formats.keys() == {"torchscript", "onnx", "torch_export"}
    for of in formats.values():
        assert of["made"] is True
        assert of["max_abs_difference"] <= 1e-3
        assert of["bytes"] == (export.bundle / "models" / of["file"]).stat().st_size


def test_weights_are_the_runs_bit_for_bit(export):
    trained = torch.load(export.run / "models/model.pt", weights_only=True)
    plain = torch.load(export.bundle / "models/model.pt", weights_only=True)
    safe = load_file(export.bundle / "models/model.safetensors")
    for state in (plain, safe):
        assert state.keys() == trained.keys()
        assert all(torch.equal(state[name], trained[name]) for name in trained)


def test_zip_is_the_bundle_as_monai_reads_it(export):
    with zipfile.ZipFile(export.zip) as archive:
        names = [entry for entry in archive.namelist() if not entry.endswith("/")]
        assert sorted(names) == [f"b/{n}" for n in files_in(export.bundle)]
        for entry in names:
            assert archive.read(entry) == (export.bundle.parent / entry).read_bytes()
    inference = json.loads((export.bundle / "configs/inference.json").read_text())
    for path in (export.zip, export.bundle, export.bundle / "models/model.ts"):
        parser = load_bundle_config(str(path), "inference.json")
        assert {k: v for k, v in parser.get().items() if k != "_meta_"} == inference, path


TWO_COMMANDS = """
import json, os, runpy, sys
sys.path.insert(0, os.getcwd())  # as with -m
for words in json.loads(sys.argv[1]):
    sys.argv = ["monai.bundle", "run", "--config_file", *words]
    try:
        runpy.run_module("monai.bundle", run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
    print("---", flush=True)
"""


@pytest.fixture(scope="module")
def away(export, tmp_path_factory) -> tuple[Path, str]:
    """What the bundle made where nothing else is, and said of its evaluation, in one process."""
    folder = tmp_path_factory.mktemp("away")
    with zipfile.ZipFile(export.zip) as archive:
        archive.extractall(folder)
    assert python(folder / "b", "-c", "import pipeline").returncode != 0  # there is no repository
    (folder / "images").mkdir()
    for name in files_in(export.run / "scores/validation_best"):
        if name.endswith(".nii.gz"):
            shutil.copyfile(export.dataset / "imagesTr" / name, folder / "images" / name)
    images = str(export.dataset / "imagesTr")
    pairs = ["--input", str(folder / "images"), "--labels", str(export.dataset / "labelsTr")]
    commands = [
        ["configs/inference.json", "--input", images, "--output_dir", str(folder / "p")],
        ["['configs/inference.json','configs/evaluate_files.json']", *pairs],
    ]
    before = files_in(folder / "b")
    done = python(folder / "b", "-c", TWO_COMMANDS, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    assert files_in(folder / "b") == before
    return folder / "p", done.stdout.split("---")[1]


def test_bundle_predicts_elsewhere_as_the_run_does(export, away, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    own = tmp_path / "own"
    words = ["--input", str(export.dataset / "imagesTr"), "--output_dir", str(own)]
    assert run_main(["configs/inference.json", "--run_dir", str(export.run), *words]) == 0
    volumes = [path.name for path in own.glob("*.nii.gz")]
    assert len(volumes) == 6
    assert files_in(away[0]) == files_in(own)  # with page, tables and pictures
    for name in volumes:
        one, other = (nib.load(folder / name) for folder in (own, away[0]))
        assert np.array_equal(one.dataobj, other.dataobj)
        assert np.array_equal(one.affine, other.affine)


def test_bundle_evaluates_elsewhere_as_the_run_did(export, away):
    validation = json.loads((export.run / "summary.json").read_text())["best_mean_dice"]
    assert f"mean_dice {validation:.4f}" in away[1]


def test_bundle_trains_as_the_run_does_where_the_package_is(export, tmp_path, monkeypatch):
    same = [f"--dataset_dir={export.dataset}", f"--cache_dir={tmp_path / 'c'}", "--max_epochs=1"]
    # what is reset in the bundle, since it names cases
    reset = ["--exclude=[]", "--group_pattern=null"]
    states = []
    for root, more in ((export.run, reset), (export.bundle, [])):
        monkeypatch.chdir(root)
        out = tmp_path / root.name
        assert run_main(["configs/train.json", *same, *more, f"--output_dir={out}"]) == 0
        states.append(torch.load(out / "models/last.pt", weights_only=True))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_two_bundles_live_in_one_process(export, tmp_path, monkeypatch):
    other = shutil.copytree(export.run, tmp_path / "other")
    change_weights(other, factor=2.0)
    assert main([str(other), "--formats", "torchscript"]) == 0
    packages = []
    for bundle in (export.bundle, tmp_path / "other_bundle"):
        monkeypatch.syspath_prepend(bundle)  # as a client does that only initializes
        monkeypatch.chdir(bundle)
        workflow = ConfigWorkflow(
            str(bundle / "configs/inference.json"), workflow_type="inference", logging_file=False,
            bundle_root=str(bundle), dataset_dir=str(export.dataset / "imagesTr"),
        )  # fmt: skip
        workflow.initialize()
        assert workflow.check_properties() == []
        packages.append(json.loads((bundle / "export.json").read_text())["code"]["package"])
        segmenter = workflow.parser.get_parsed_content("segmenter")
        assert type(segmenter).__module__ == f"{packages[-1]}.pipeline.prediction.segmenter"
        state = segmenter.networks[0].state_dict()
        stored = torch.load(bundle / "models/model.pt", weights_only=True)
        assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert len(set(packages)) == 2
    errors = importlib.import_module(f"{packages[0]}.pipeline.errors")
    mistake = errors.InputError("x")
    mistake.__cause__ = ValueError("y")
    assert errors.innermost(mistake) is mistake  # it knows that it is its own
    predictor = importlib.import_module(f"{packages[0]}.pipeline.prediction.predictor")
    image = nib.load(next((export.dataset / "imagesTr").iterdir()))
    found, expected = (
        make(root, device="cpu")(image.get_fdata(), image.affine)
        for make, root in ((predictor.Predictor, export.bundle), (Predictor, export.run))
    )
    assert torch.equal(found, expected)


def everything_in(content: bytes) -> Iterator[bytes]:
    """A file, and what is packed in it, as often as it is packed."""
    yield content
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for entry in archive.infolist():
                yield entry.filename.encode() + bytes(entry.comment) + entry.extra
                yield from everything_in(archive.read(entry))


def test_nothing_of_patient_place_or_person_leaves(export):
    secrets = {
        *(f"tiny_00{n}".encode() for n in range(1, 7)),
        *(str(p).encode() for p in (export.root, REPOSITORY, Path(sys.prefix))),
        *(word.encode() for word in (PERSON, HOST, "zq_data", "zq_", "imagesTr/", "runs/r")),
        *(word.encode() for word in (CACHE.name, "conftest", "pytest-of")),
    }
    for image in (export.dataset / "imagesTr").iterdir():
        voxels = np.asarray(nib.load(image).dataobj, dtype=np.float32)
        secrets |= {np.ascontiguousarray(line[4:8]).tobytes() for line in voxels[8:10, 8]}
    files = [export.zip, *(export.bundle / name for name in files_in(export.bundle))]
    found = {
        (path.name, secret)
        for path in files
        for content in everything_in(path.read_bytes())
        for secret in secrets
        # code of the repository speaks of imagesTr, and of nobody's
        if secret in content and not (secret == b"imagesTr/" and path.suffix in (".py", ".zip"))
    }
    assert found == set()
    # the search looks into archives in the zip, such as the code in model.ts
    assert any(b"class DenseUNet(Module)" in one for one in everything_in(export.zip.read_bytes()))


def test_configs_say_neither_places_nor_cases(export):
    train, inference = (
        json.loads((export.bundle / "configs" / f"{name}.json").read_text())
        for name in ("train", "inference")
    )
    assert train["dataset_dir"] == inference["dataset_dir"] == "dataset"
    assert (train["exclude"], train["group_pattern"], train["split_file"]) == ([], None, None)
    assert train["output_dir"] == "../r_again"
    low, high = inference["trained_on"]["spacing_mm"]  # ranges stay
    assert low == high == pytest.approx([1.0, 1.0, 1.5])
    assert train["roi_size"] == [16, 16, 8]


def test_client_s_cases_and_weights_do_not_leave(copied):
    cases = [{"image": "/somewhere/a.nii.gz", "label": "b.nii.gz", "case_id": "tiny_004"}]
    source = json.loads((copied / "configs/train.json").read_text())
    loader = {"_target_": "CheckpointLoader", "load_path": "/somewhere/model.pt"}
    source["train"]["handlers"].insert(0, loader)
    source["validate"]["dataset"]["data"] = cases
    source["data_module"]["split"]["exclude"] = ["case_7"]
    changes = {key: source[key] for key in ("train", "validate", "data_module")}
    change_json(copied / "configs/train.json", learning_rate=0.25, **changes)
    (copied / "docs/README.md").write_text(f"Worst: tiny_004, in {copied}")
    (out := copied.parent / "o").mkdir()  # an empty one is taken
    assert main([str(copied), "--formats", "torchscript", "--output", str(out)]) == 0
    assert "tiny_004" not in (out / "docs/README.md").read_text()
    found = json.loads((out / "configs/train.json").read_text())
    template = json.loads((REPOSITORY / "configs/amp.json").read_text())
    assert {key: found[key] for key in changes} == {key: template[key] for key in changes}
    assert found["learning_rate"] == 0.25


def test_value_is_safe_without_a_place_and_without_a_case():
    unsafe = [
        "/home/somebody/b.pt", "~/e", "../c", "see /data/x", "C:\\x", ["a", {"b": "(/data/x)"}],
        {"data": ["a.nii.gz"]},
    ]  # fmt: skip
    safe = [
        1, None, "$@network.parameters()", "edema/necrosis", "https://a.org/b", {"data": "@cases"},
        ["GROUP", {"num_groups": 8}],
    ]  # fmt: skip
    assert [value for value in unsafe if is_safe(value)] == []
    assert [value for value in safe if not is_safe(value)] == []


def test_only_modules_are_renamed():
    renamed = """from +pipeline import errors
from +pipeline.errors import InputError
A = {"+pipeline.errors": "InputError"}, "+networks.dense_unet.DenseUNet"
B = "python -m pipeline.run", "monai.transforms.Compose"
def f(transforms): return transforms.append(1), self.transforms.preprocess
"""
    modules = ["pipeline", "pipeline.errors", "transforms.preprocess", "networks.dense_unet"]
    source, expected = renamed.replace("+", ""), renamed.replace("+", "p_1.")
    assert rename_modules(source, "p_1", modules) == expected


def test_package_name_is_an_identifier():
    for name, expected in {"Task04 left-right": "task04_left_right", "2024": "bundle_2024"}.items():
        assert make_package_name(name, "1a2b3c4d5e6f") == f"{expected}_1a2b3c4d"


@pytest.fixture
def copied(export, tmp_path) -> Path:
    """The run in another place, of which a test may change files; its dataset is not there."""
    return shutil.copytree(export.run, tmp_path / "in" / "r")


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(run: Path, prefix: str = "", factor: float = 1.0) -> None:
    path = run / "models/model.pt"
    weights = torch.load(path, weights_only=True)
    torch.save({prefix + name: one * factor for name, one in weights.items()}, path)


INFERENCE, METADATA = "configs/inference.json", "configs/metadata.json"
AFTER = [{"_target_": "Flipd", "keys": "/home/somebody/file.csv"}]


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda run: (run / "models/model.pt").unlink(),
         "RUN: expected the best network of a run, found nothing at "),
        (lambda run: change_weights(run, prefix="other."),
         "model.pt: expected the weights of this network, got: "),
        (lambda run: (run / INFERENCE).unlink(), "run_dir: expected the directory of a run, got "),
        (lambda run: (run / METADATA).write_text("["),
         "metadata.json: expected a config of the run, got: "),
        (lambda run: change_json(run / INFERENCE, network_def=None), "network_def: expected "),
        (lambda run: change_json(run / INFERENCE, network_def={"_target_": "os.system"}),
         "network_def#_target_: expected a class or function of the list"),
        (lambda run: change_json(run / INFERENCE, transforms_after=AFTER),
         "inference.json: transforms_after: expected no path, got one."),
        (lambda run: shutil.copytree(run / "models", run.parent / "r_bundle"),
         "--output_dir: expected an empty folder or none, and no zip of it, got "),
        (lambda run: (run.parent / "r_bundle.zip").write_text("mine"), "r_bundle.zip. Choose"),
    ],
)  # fmt: skip
def test_bad_run_is_one_line_and_leaves_nothing(spoil, expected, copied, capsys):
    spoil(copied)
    before = files_in(copied.parent), sorted(copied.parent.iterdir())
    assert main([str(copied), "--formats", "torchscript"]) == 2
    told = capsys.readouterr().err.strip()
    assert len(told.splitlines()) == 1
    assert expected in told
    assert "somebody" not in told
    assert (files_in(copied.parent), sorted(copied.parent.iterdir())) == before


def test_format_that_cannot_be_made_leaves_the_others(copied, capsys, monkeypatch):
    def write(*_: Any) -> Any:
        raise RuntimeError(f"no such operator\n in {REPOSITORY}/networks/dense_unet.py")

    monkeypatch.setattr(NetworkExporter, "_write_onnx", write)
    out = copied.parent / "o"
    assert main([str(copied), "--formats", "torchscript", "onnx", "--output", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.err == "onnx: not made: no such operator in dense_unet.py\n"
    made = json.loads((out / "export.json").read_text())["formats"]
    assert (made["torchscript"]["made"], made["onnx"]["made"]) == (True, False)
    assert not (out / "models/model.onnx").exists()
    assert Path(f"{out}.zip").is_file()


def test_interruption_while_it_is_made_leaves_nothing(copied, monkeypatch, capsys):
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.bundle.package.shutil.make_archive", fail)
    assert main([str(copied), "--formats", "torchscript"]) == 130
    assert capsys.readouterr().err.endswith("Interrupted.\n")
    assert [path.name for path in copied.parent.iterdir()] == ["r"]


def test_class_that_is_allowed_by_name_is_exported(copied, capsys):
    loss = {"_target_": "mypackage.losses.MyLoss"}
    change_json(copied / "configs/train.json", loss_function=loss)
    words = [str(copied), "--formats", "torchscript"]
    assert main(words) == 2
    assert "loss_function#_target_" in capsys.readouterr().err
    assert main([*words, "--allow", "mypackage.losses.MyLoss"]) == 0
