"""Nothing that people made is lost: foreign folders, finished runs, checkpoints, other data.

All through commands: no test here knows a module of the package by its path.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import finished_run, tiny_words


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> Path:
    """A run of two epochs that no test changes."""
    return finished_run(dataset, tmp_path_factory.mktemp("finished") / "r")


@pytest.fixture
def ended(finished, tmp_path) -> Path:
    """A copy of that run."""
    shutil.copytree(finished, tmp_path / "r")
    return tmp_path / "r"


# --- an output_dir that is somebody's


@pytest.mark.parametrize("files", ["configs models LICENSE", "configs", "configs log.txt"])
def test_output_dir_with_the_bundle_of_somebody_is_refused(train, finished, tmp_path, files):
    """Such as one of the model zoo: all but what only a run has."""
    for name in files.split():
        if (finished / name).is_dir():
            shutil.copytree(finished / name, tmp_path / "zoo" / name)
        else:
            shutil.copy(finished / name, tmp_path / "zoo" / name)
    before = contents(tmp_path / "zoo")
    status, told = train(tmp_path / "zoo")
    assert status == 2
    assert f"expected an empty directory or one with the run.json of a run, got {tmp_path}" in told
    assert contents(tmp_path / "zoo") == before


# --- a finished run without its checkpoints


def test_finished_run_without_checkpoints_stays_finished(train, ended):
    shutil.rmtree(ended / "checkpoints")
    before = contents(ended / "models")
    status, told = train(ended)
    assert status == 0
    assert "This run is finished; nothing to do." in told
    status, told = train(ended, seed=5)
    assert status == 2
    assert "expected the config of the run there, got other values of seed" in told
    assert contents(ended / "models") == before


def test_run_that_would_go_on_without_checkpoints_stops_with_a_remedy(train, ended, tmp_path):
    shutil.rmtree(ended / "checkpoints")
    before = contents(ended / "models")
    status, told = train(ended, max_epochs=3)
    assert status == 2
    assert "checkpoints: expected a whole checkpoint" in told
    weights = told.split("--init_weights ")[1].split()[0].rstrip(".")
    assert contents(ended / "models") == before
    assert train(tmp_path / "other", init_weights=weights)[0] == 0  # the remedy is one


def test_run_whose_checkpoints_are_all_damaged_never_begins_anew(train, ended):
    (ended / "summary.json").unlink()
    shutil.rmtree(ended / "models")
    for path in (ended / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    for _ in range(2):  # an automatic restart gets the same answer
        status, told = train(ended, max_epochs=3)
        assert status == 2
        assert "expected a whole checkpoint, found none. Restore one from a copy" in told
        assert {path.suffix for path in (ended / "checkpoints").iterdir()} == {".damaged"}


# --- a cache_dir that has other files, or goes


def test_cache_removes_no_file_of_others(train, tmp_path):
    """Names of other programs, old and large, beside entries that are over the limit."""
    folder = tmp_path / "shared"
    folder.mkdir()
    digest = hashlib.sha256().hexdigest()
    for name in (
        "thesis.tmp", "weights.safetensors", "hashes.json", f"{digest}.tmp", f"{digest}.safetensor",
        f"model_{digest}.safetensors", f"{digest.upper()}.safetensors", f"{digest}.old.tmp",
    ):  # fmt: skip
        (folder / name).write_bytes(b"precious" * 40_000)
        os.utime(folder / name, (time.time() - 90_000,) * 2)
    before = contents(folder)
    left = folder / f".{32 * '0'}.{digest}.safetensors"  # of a writer that died
    left.touch()
    os.utime(left, (time.time() - 90_000,) * 2)
    for n, spacing in enumerate(([1, 1, 1], [1, 1, 2])):  # the second set makes the first one go
        out = tmp_path / f"r{n}"
        assert train(out, cache_dir=str(folder), cache_limit_bytes=250_000, spacing=spacing)[0] == 0
    assert "to stay below cache_limit_bytes" in (tmp_path / "r1/log.txt").read_text()
    assert contents(folder).items() >= before.items()
    assert not left.exists()


def test_cache_that_is_deleted_while_a_run_trains_is_made_again(train, tmp_path):
    overlay = tmp_path / "overlay.json"
    cache_dir = str(tmp_path / "cache")
    augment = {"_target_": "poison.CacheDeletingAugment", "cache_dir": cache_dir}
    overlay.write_text(
        json.dumps({f"train#augment#{key}": value for key, value in augment.items()})
    )
    allowed = {"allow": "poison.CacheDeletingAugment"}
    status, told = train(tmp_path / "r", overlay, cache_dir=cache_dir, **allowed)
    assert status == 0, told
    assert list((tmp_path / "cache").iterdir())
    assert train(tmp_path / "undisturbed")[0] == 0
    assert contents(tmp_path / "r/models") == contents(tmp_path / "undisturbed/models")


# --- data that were corrected


@pytest.fixture(params=[".nii"])  # whose size does not change
def correctable(request, dataset, tmp_path):
    """A dataset, and a function that exchanges two classes in its first label, in place."""
    root = tmp_path / "data"
    for source in dataset.glob("*Tr/*.nii.gz"):
        folder = {"imagesTr": "images", "labelsTr": "labels"}[source.parent.name]
        (root / folder).mkdir(parents=True, exist_ok=True)
        nib.save(nib.load(source), root / folder / source.name.replace(".nii.gz", request.param))

    def correct(folder: str = "labels") -> None:
        path = root / folder / f"tiny_001{request.param}"
        image = nib.load(path)
        voxels = np.asarray(image.dataobj).copy()
        voxels = np.where(voxels == 1, 2, np.where(voxels == 2, 1, voxels)).astype(voxels.dtype)
        nib.save(nib.Nifti1Image(voxels[::-1], image.affine), path)

    return root, correct


@pytest.mark.parametrize("correctable", [".nii", ".nii.gz"], indirect=True)
def test_finished_run_says_that_its_data_changed(train, tmp_path, correctable):
    root, correct = correctable
    where = {"dataset_dir": str(root), "max_epochs": 1}
    assert train(tmp_path / "r", **where)[0] == 0
    status, told = train(tmp_path / "r", **where)
    assert (status, "data changed" in told) == (0, False)
    before = contents(tmp_path / "r/models")
    correct()
    for _ in range(2):
        status, told = train(tmp_path / "r", **where)
        assert status == 0
        assert "This run is finished; nothing to do." in told
        assert "Its data changed: files of tiny_001." in told
    assert contents(tmp_path / "r/models") == before


@pytest.mark.parametrize("folder", ["labels", "images"])
def test_run_goes_on_with_changed_data_only_when_told_to(train, tmp_path, correctable, folder):
    root, correct = correctable
    where = {"dataset_dir": str(root)}
    assert train(tmp_path / "r", **where, max_epochs=1)[0] == 0
    correct(folder)
    before = contents(tmp_path / "r/checkpoints")
    for _ in range(2):
        status, told = train(tmp_path / "r", **where)
        assert status == 2
        assert "got changed files of tiny_001. Restore them, choose another output_dir" in told
        assert contents(tmp_path / "r/checkpoints") == before
    status, told = train(tmp_path / "r", **where, accept_changed_data=True)
    assert status == 0, told
    assert "Continuing with changed files of tiny_001" in told
    status, told = train(tmp_path / "r", **where)
    assert (status, "data changed" in told) == (0, False)  # they are now the run's own


def test_switch_may_stand_without_a_value(command, train, tmp_path, correctable):
    root, correct = correctable
    words = ("run", "configs/amp.json", *tiny_words(root, tmp_path / "r"))
    assert command(*words, "--max_epochs", "1")[0] == 0
    correct()
    assert command(*words, "--accept_changed_data")[0] == 0
    correct()
    assert command(*words, "--accept_changed_data", "--max_epochs", "3")[0] == 0


def test_more_cases_are_another_run_whatever_is_accepted(train, tmp_path, correctable):
    root, correct = correctable
    assert train(tmp_path / "r", dataset_dir=str(root), max_epochs=1)[0] == 0
    correct()
    for path in root.glob("*/tiny_002.*"):
        shutil.copy(path, path.with_name(path.name.replace("002", "007")))
    changes = {"dataset_dir": str(root), "accept_changed_data": True}
    status, told = train(tmp_path / "r", **changes)
    assert status == 2
    assert "dataset_dir (other cases)" in told


# --- results of commands


def test_scores_are_not_written_over_a_run(command, dataset, ended):
    before = contents(ended)
    labels = dataset / "labelsTr"
    status, told = command("evaluate", labels, labels, "--output_dir", ended)
    assert status == 2
    assert "--output_dir: expected a folder without the summary.json of a run" in told
    assert contents(ended) == before
