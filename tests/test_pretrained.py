"""Fine-tuning: a new run that begins with the weights of a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import finished_run, make_dataset, run_tiny, write_dataset_json

from networks.dense_unet import DenseUNet
from pipeline.errors import InputError
from pipeline.training.pretrained import read_pretrained
from pipeline.training.trainer import MixedPrecisionTrainer

HEAD = ["head.weight", "head.bias"]


@pytest.fixture(scope="module")
def former(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run to begin from."""
    return finished_run(dataset, tmp_path_factory.mktemp("former") / "r")


@pytest.fixture
def first_weights(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Of each run that trains, the weights that its first step sees, before it."""
    seen: list[dict[str, torch.Tensor]] = []
    iteration = MixedPrecisionTrainer._iteration

    def spy(self: MixedPrecisionTrainer, engine: Any, batch: Any) -> Any:
        if self.last_step is None:
            state = self.network.state_dict()
            seen.append({name: value.clone() for name, value in state.items()})
        return iteration(self, engine, batch)

    monkeypatch.setattr(MixedPrecisionTrainer, "_iteration", spy)
    return seen


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def refused(capfd: Any, run: Callable[..., int], *args: Any, **values: Any) -> list[str]:
    """Lines of a run that ends with status 2."""
    with pytest.raises(SystemExit) as ended:
        run(*args, **values)
    assert ended.value.code == 2
    return capfd.readouterr().err.splitlines()


def as_model(former: Path, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    path = former / "models/model.pt"
    return path, weights(path)


def as_safetensors(former: Path, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    path, state = folder / "model.safetensors", weights(former / "models/model.pt")
    safetensors.torch.save_file({name: t.contiguous() for name, t in state.items()}, path)
    return path, state


def as_checkpoint(former: Path, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    path = sorted((former / "checkpoints").glob("step_*.pt"))[-1]
    return path, weights(path)["network"]


@pytest.mark.parametrize("kind", [as_model, as_safetensors, as_checkpoint])
def test_run_begins_with_the_weights_of_the_file(kind, run, former, first_weights, tmp_path):
    path, state = kind(former, tmp_path)
    assert run(tmp_path / "r", init_weights=str(path), max_epochs=1) == 0
    assert differing(first_weights[0], state) == []
    record = {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "num_tensors": len(state),
        "drawn_anew": [],
    }
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    assert summary["init_weights"] == record
    log = (tmp_path / "r/log.txt").read_text()
    assert log.index(record["sha256"]) < log.index("Precision in force")


@pytest.fixture(scope="module")
def four_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset that declares one class more."""
    root = make_dataset(tmp_path_factory.mktemp("four"))
    labels = {"0": "background", "1": "dim", "2": "bright", "3": "glaring"}
    write_dataset_json(root, [f"tiny_{n:03d}" for n in range(1, 7)], labels=labels)
    return root


def test_other_number_of_classes_keeps_all_but_the_head(
    four_classes, former, first_weights, tmp_path, at_the_root
):
    path = former / "models/model.pt"
    values = {"init_weights": str(path), "max_epochs": 1}
    assert run_tiny(four_classes, tmp_path / "r", **values, reinit_head=True) == 0
    assert run_tiny(four_classes, tmp_path / "random", max_epochs=1) == 0
    state, (begun, random) = weights(path), first_weights
    assert begun["head.weight"].shape[0] == 4
    assert all(torch.equal(begun[name], random[name]) for name in HEAD)
    body = [name for name in state if name not in HEAD]
    assert all(torch.equal(begun[name], state[name]) for name in body)
    record = json.loads((tmp_path / "r/summary.json").read_text())["init_weights"]
    assert record["drawn_anew"] == HEAD
    assert record["num_tensors"] == len(body)


def test_run_that_continues_ignores_the_file(run, former, first_weights, tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes((former / "models/model.pt").read_bytes())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert run(tmp_path / "r", init_weights=str(path), max_epochs=1) == 0
    last = weights(tmp_path / "r/models/last.pt")
    path.write_text("no weights any more")
    assert run(tmp_path / "r", init_weights=str(path), max_epochs=2) == 0
    assert differing(first_weights[1], last) == []
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    assert summary["epochs"] == 2
    assert summary["init_weights"]["sha256"] == sha256


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [(False, True, "init_weights"), (True, False, "init_weights"), (True, True, "reinit_head")],
)
def test_other_start_is_another_run(run, former, tmp_path, capfd, before, after, named):
    path = {"init_weights": str(former / "models/model.pt")}
    assert run(tmp_path / "r", **(path if before else {}), max_epochs=1) == 0
    other = {**(path if after else {}), "reinit_head": named == "reinit_head"}
    capfd.readouterr()
    (line,) = refused(capfd, run, tmp_path / "r", **other, max_epochs=2)
    assert f"got other values of {named}. Choose another output_dir" in line


def test_reinit_head_without_a_file_is_refused(run, tmp_path, capfd):
    (line,) = refused(capfd, run, tmp_path / "r", reinit_head=True)
    assert line == "reinit_head: expected init_weights beside it, got null. Name a file."
    assert not (tmp_path / "r").exists()


def write_text(path: Path) -> None:
    path.write_text("weights")


def write_nested(path: Path) -> None:
    torch.save({"model": {"w": torch.ones(1)}, "optimizer": {}}, path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("w.pt", lambda path: None, "expected a state dict or a checkpoint in .*No such file"),
        ("w.pt", write_text, "expected a state dict or a checkpoint in "),
        ("w.safetensors", write_text, "expected a state dict or a checkpoint in .*header"),
        ("w.pt", write_nested, "expected a state dict or a checkpoint in .*tensors by name"),
    ],
)
def test_file_that_holds_no_weights_is_told_in_one_line(
    name, write: Callable, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with pytest.raises(InputError, match=f"^init_weights: {message}") as refused:
        read_pretrained(tmp_path / name, torch.nn.Identity())
    assert len(str(refused.value).splitlines()) == 1


def test_all_faults_of_layers_are_told_at_once(tmp_path):
    network = DenseUNet(base_channels=2, strides=[2], num_dense_layers=1, growth_rate=2, seed=0)
    state = network.state_dict()
    state["deepest.conv1.weight"] = torch.ones(1, 2)
    state["encoders.0.norm1.bias"] = state["encoders.0.norm1.bias"].half()
    state["head.bias"][0] = -torch.inf
    state["stranger"] = state.pop("deepest.norm1.weight")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InputError) as refused:
        read_pretrained(tmp_path / "w.pt", network)
    assert [fault.split(" in w.pt. ")[0] for fault in refused.value.faults] == [
        "init_weights: deepest.conv1.weight: expected float32 [4, 2, 3, 3, 3], got float32 [1, 2]",
        "init_weights: deepest.norm1.weight: expected float32 [4], got no such tensor",
        "init_weights: encoders.0.norm1.bias: expected float32 [2], got float16 [2]",
        "init_weights: head.bias: expected finite values, got NaN or infinity",
        "init_weights: stranger: expected no such tensor, got float32 [4]",
    ]
