"""Fixtures: tiny volumes, a tiny run, and the command line as a function."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from interpreted import interpreter, place  # noqa: F401 (fixtures)
from scipy.ndimage import gaussian_filter

REPOSITORY = Path(__file__).resolve().parents[1]

# tiny tensors are several times slower on two busy threads than on one: fixtures and processes too
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# of all runs of a session; gone with the interpreter
CACHE = tempfile.TemporaryDirectory(prefix="cache_")

TINY = {
    "cache_dir": CACHE.name,
    "spacing": [1, 1, 1],
    "roi_size": [16, 16, 8],
    "base_channels": 2,
    "network_def#num_dense_layers": 1,
    "network_def#growth_rate": 4,
    "strides": [[2, 2, 1], [2, 2, 2]],
    "batch_size": 2,
    "foreground_ratio": 0.67,
    "flip_axes": [],
    "num_folds": 3,
    "steps_per_epoch": 2,
    "max_epochs": 2,
    "val_interval": 1,
    "learning_rate": 0.005,
    "warmup_steps": 1,
    "log_every": 1,
    "final_scores": False,  # tests of their own have them
    "report": False,
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, a file's tests are one worker's, so that its runs are trained once."""
    from xdist.scheduler import LoadFileScheduling

    if config.getvalue("dist") != "load":
        return None  # another one is asked for
    config.option.loadscopereorder = False  # files with few tests are not the quick ones
    return LoadFileScheduling(config, log)


def further(*values: Any) -> Any:
    """Values of a parametrized test of which others stand for the kind: `chaos`."""
    return pytest.param(*values, marks=pytest.mark.chaos)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A test may have changed it."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A run sets it up for its process, which here goes on."""
    before, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = before
    logging.root.setLevel(level)


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """One that hangs fails its test; left alone, it would keep the interpreter from ending."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def write_case(root: Path, case_id: str, seed: int, size=(20, 18, 12), affine=None) -> None:
    """One image and label pair: two bright blobs of different brightness in noise."""
    rng = np.random.default_rng(seed)
    blobs = gaussian_filter(rng.normal(size=size), 2)
    label = np.digitize(blobs, np.quantile(blobs, [0.7, 0.9])).astype(np.uint8)
    image = (label * 40 + rng.normal(0, 5, size)).astype(np.float32)
    affine = np.diag([1.0, 1.0, 1.5, 1.0]) if affine is None else affine
    for folder, voxels in (("imagesTr", image), ("labelsTr", label)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, affine), root / folder / f"{case_id}.nii.gz")


def write_dataset_json(root: Path, case_ids: list[str], **changes: Any) -> None:
    """`dataset.json` over the cases, some of its keys replaced."""
    source = {
        "name": "tiny",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "dim", "2": "bright"},
        "training": [
            {"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in case_ids
        ],
    }
    (root / "dataset.json").write_text(json.dumps({**source, **changes}))


def make_dataset(root: Path, num_cases: int = 6) -> Path:
    """A Medical Segmentation Decathlon folder of tiny cases."""
    case_ids = [f"tiny_{n:03d}" for n in range(1, num_cases + 1)]
    for n, case_id in enumerate(case_ids):
        write_case(root, case_id, seed=n)
    write_dataset_json(root, case_ids)
    return root


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset that no test changes."""
    return make_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is the repository's."""
    monkeypatch.chdir(REPOSITORY)


def run_tiny(dataset: Path, output_dir: Path, *files: str, **changes: Any) -> int:
    """`pipeline.run` on a dataset with the tiny settings; returns the exit status."""
    pytest.importorskip("fcntl", reason="training needs Linux or macOS")
    from pipeline.run import main

    return main(["configs/amp.json", *files, *tiny_words(dataset, output_dir, **changes)])


def tiny_words(dataset: Path, output_dir: Path, **changes: Any) -> list[str]:
    """The tiny settings on the command line of `pipeline.run`."""
    values = {"dataset_dir": str(dataset), "output_dir": str(output_dir), **TINY, **changes}
    return [
        word
        for key, value in values.items()
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


def finished_run(dataset: Path, output_dir: Path, **changes: Any) -> Path:
    """A run on the tiny settings that came to its end, for fixtures of more than one test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        assert run_tiny(dataset, output_dir, **changes) == 0
    return output_dir


@pytest.fixture
def run(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`pipeline.run` on the tiny dataset: `run(output_dir, key=value, ...)` → exit status."""
    monkeypatch.chdir(REPOSITORY)
    return partial(run_tiny, dataset)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Callable[..., tuple[int, str]]:
    """`command("run", "configs/amp.json", "--key", "value")` → exit status, all that is printed."""
    monkeypatch.chdir(REPOSITORY)

    def call(name: str, *words: object) -> tuple[int, str]:
        capfd.readouterr()
        module = "pipeline.run" if name in ("run", "train") else f"pipeline.commands.{name}"
        try:
            status = import_module(module).main([str(word) for word in words])
        except SystemExit as end:
            status = end.code
        captured = capfd.readouterr()
        return status or 0, captured.out + captured.err

    return call


@pytest.fixture
def train(command: Callable[..., tuple[int, str]], dataset: Path) -> Callable[..., tuple[int, str]]:
    """`command("run", ...)` with the tiny settings: `train(output_dir, "a.json", key=value)`."""

    def call(output_dir: Path, *files: object, **changes: Any) -> tuple[int, str]:
        words = tiny_words(dataset, output_dir, **changes)
        return command("run", "configs/amp.json", *files, *words)

    return call


@pytest.fixture(scope="session")
def samples(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """`case_id`, `origin` and `seed` of the first 16 training samples of every tiny run."""
    from pipeline.training.trainer import MixedPrecisionTrainer

    seen: list[dict[str, Any]] = []
    iteration = MixedPrecisionTrainer._iteration

    def spy(self: MixedPrecisionTrainer, engine: Any, batch: dict) -> Any:
        rows = zip(batch["case_id"], batch["origin"].tolist(), batch["seed"].tolist(), strict=True)
        seen.extend(dict(zip(("case_id", "origin", "seed"), row, strict=True)) for row in rows)
        return iteration(self, engine, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixedPrecisionTrainer, "_iteration", spy)
        out = tmp_path_factory.mktemp("samples") / "r"
        finished_run(dataset, out, amp=False, max_epochs=4, val_interval=4)
    return seen


@pytest.fixture
def poisoned(run: Callable[..., int], samples: Any, tmp_path: Path) -> Callable[..., int]:
    """`run`, with `value` in one voxel of the training samples `numbers`, or of all samples."""

    def run_poisoned(
        output_dir: Path, numbers: Iterable[int] | None, *, value: float = math.inf, **changes: Any
    ) -> int:
        seeds = None if numbers is None else [samples[n]["seed"] for n in numbers]
        overlay = {
            "train#augment#_target_": "poison.PoisonedAugment",
            "train#augment#seeds": seeds,
            "train#augment#value": str(value),
        }
        file = tmp_path / "poisoned.json"
        file.write_text(json.dumps(overlay))
        return run(output_dir, str(file), allow="poison.PoisonedAugment", **changes)

    return run_poisoned


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that there is."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return request.param
