"""Whole runs in two Gloo ranks on the tiny dataset: forked ones, and once under torchrun itself."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import finished_run, make_dataset, run_tiny
from engines import curve, read, snapshot
from in_ranks import in_ranks
from torchrun import CONFIGS, in_forks, settings, torchrun

from pipeline import distributed
from pipeline.run import main
from pipeline.training.checkpoint import checkpoints, load_checkpoint

LONG = {
    "device": "cpu", "batch_size": 3, "steps_per_epoch": 10, "max_epochs": 2, "final_scores": True,
    "learning_rate": 0.001,  # with larger ones AdamW makes much of the last digits
}  # fmt: skip


@pytest.fixture(scope="module")
def both(dataset, tmp_path_factory) -> dict[str, Path]:
    """The same run by one process and by two ranks."""
    root = tmp_path_factory.mktemp("ddp")
    finished_run(dataset, root / "one", **LONG)
    found = in_forks("pipeline.run", *CONFIGS, *settings(dataset, root / "two", **LONG))
    assert found.statuses == [0, 0], found.said
    (root / "two.txt").write_text(found.said)
    return {"one": root / "one", "two": root / "two", "said": root / "two.txt"}


def test_two_ranks_have_the_curve_of_one_process(both):
    one, two = (dict(curve(read(both[name]), "train/loss")) for name in ("one", "two"))
    assert list(one) == list(two) == list(range(1, 21))
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_two_cards_have_the_curve_of_one(dataset, tmp_path, monkeypatch, norm):
    """With SyncBatchNorm too, where each rank's samples are normalised by those of all."""
    monkeypatch.chdir(Path(__file__).parents[1])
    # wider than the tiny network, whose batch norms have next to nothing to average
    changes = {**LONG, "device": "cuda", "amp": False, "network_def#norm": norm}
    changes |= {"base_channels": 8, "final_scores": False}
    assert run_tiny(dataset, tmp_path / "one", **changes) == 0
    found = torchrun("pipeline.run", *CONFIGS, *settings(dataset, tmp_path / "two", **changes))
    assert found.returncode == 0, found.stdout
    one, two = (dict(curve(read(tmp_path / name), "train/loss")) for name in ("one", "two"))
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=1e-3)  # kernels there vary in the last digits
    told = json.loads((tmp_path / "two" / "summary.json").read_text())["process_group"]
    assert (told["backend"], told["num_ranks"]) == ("nccl", 2)
    assert told["batch_norm"] == {"batch": "synchronized", "instance": "none in the network"}[norm]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_ranks_than_cards_are_refused(dataset, tmp_path):
    found = torch.cuda.device_count()
    words = settings(dataset, tmp_path / "r", device="cuda")
    said = torchrun("pipeline.run", *CONFIGS, *words, num_ranks=found + 1).stdout
    (line,) = [line for line in said.splitlines() if line.startswith("--nproc_per_node")]
    assert f"expected at most {found}, the CUDA devices here, " in line
    assert f"got {found + 1} and" in line


def test_first_rank_alone_writes_and_each_has_a_log(both):
    names = [{p.name for p in both[n].iterdir()} for n in ("one", "two")]
    assert names[1] ^ names[0] == {"log_rank_1.txt"}
    assert len(list((both["two"] / "tensorboard").iterdir())) == 1
    assert "Rank 1 of 2" in (both["two"] / "log_rank_1.txt").read_text()
    assert "Rank 0 of 2" in (both["two"] / "log.txt").read_text()
    assert both["said"].read_text().count("epoch 2/2") == 1
    one, two = (json.loads((both[n] / "summary.json").read_text()) for n in ("one", "two"))
    assert one["process_group"] is None
    found = two["process_group"]
    assert (found["num_ranks"], found["backend"]) == (2, "gloo")


def test_checkpoint_of_two_ranks_goes_on_with_one_and_back(dataset, both, tmp_path, monkeypatch):
    """And with other config files; progress and names know nothing of ranks."""
    monkeypatch.chdir(Path(__file__).parents[1])
    run_dir = tmp_path / "two"
    short = {**LONG, "final_scores": False, "max_epochs": 1, "warmup_steps": 5}
    first = in_forks("pipeline.run", *CONFIGS, *settings(dataset, run_dir, **short))
    assert first.statuses == [0, 0], first.said
    assert run_tiny(dataset, run_dir, **{**short, "max_epochs": 2}) == 0
    words = settings(dataset, run_dir, **{**short, "max_epochs": 3})
    last = in_forks("pipeline.run", *CONFIGS, *words)
    assert last.statuses == [0, 0], last.said
    assert "Continuing from step_000000020.pt" in last.said
    saved = load_checkpoint(checkpoints(run_dir / "checkpoints")[-1])
    assert saved["progress"]["step"] == 30
    assert saved["progress"]["samples"] == 90
    assert not any(name.startswith("module.") for name in saved["network"])
    model = torch.load(run_dir / "models" / "last.pt", weights_only=True)
    assert model.keys() == torch.load(both["one"] / "models" / "last.pt", weights_only=True).keys()


def test_torchrun_starts_ranks_that_train(dataset, tmp_path):
    out = tmp_path / "r"
    found = torchrun("pipeline.run", *CONFIGS, *settings(dataset, out, max_epochs=1))
    assert found.returncode == 0, found.stdout
    assert found.stdout.count("epoch 1/1") == 1
    assert json.loads((out / "summary.json").read_text())["process_group"]["num_ranks"] == 2


def test_evaluation_divides_the_cases(both):
    run_dir = both["two"]
    files = [str(run_dir / "configs" / f"{name}.json") for name in ("train", "evaluate")]
    words = ("--bundle_root", str(run_dir))
    found = in_forks("monai.bundle", "run", "--config_file", str(files), *words)
    assert found.statuses == [0, 0], found.said
    summary = json.loads((run_dir / "summary.json").read_text())
    assert found.said.count(f"mean_dice {summary['best_mean_dice']:.4f}") == 1


def test_scores_of_two_ranks_are_those_of_one(both, dataset, tmp_path):
    """The weights are the same: two ranks score a run that one process has trained."""
    run_dir = shutil.copytree(both["one"], tmp_path / "r")
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "scores")
    found = in_forks("pipeline.run", *CONFIGS, *settings(dataset, run_dir, **LONG))
    assert found.statuses == [0, 0], found.said
    assert snapshot(run_dir / "scores") == snapshot(both["one"] / "scores") != {}


def test_prediction_of_two_ranks_is_that_of_one(both, dataset, tmp_path):
    images = shutil.copytree(dataset / "imagesTr", tmp_path / "images")
    broken = images / "tiny_002.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-200])
    words = ("configs/inference.json", "--run_dir", str(both["one"]), "--input", str(images))
    for num_ranks in (1, 2):
        out = ("--output_dir", str(tmp_path / str(num_ranks) / "out"))
        found = in_forks("pipeline.run", *words, *out, num_ranks=num_ranks)
        assert found.statuses == [1] * num_ranks, found.said
        for line in ("Not predicted: 1 of 6", "5 of 6 cases predicted"):
            assert found.said.count(line) == 1
    files = snapshot(tmp_path / "1")
    assert sum(str(name).endswith(".nii.gz") for name in files) == 5
    assert snapshot(tmp_path / "2") == files  # with the page and its tables


def dying_run(dataset: Path, tmp_path: Path) -> tuple[str, ...]:
    """Words of a run whose rank 1 dies after step 13, the first time."""
    overlay = tmp_path / "dies.json"
    handler = {"_target_": "dying.DiesOnce", "rank": 1, "step": 13, "mark": str(tmp_path / "died")}
    overlay.write_text(json.dumps({"+train#handlers": [handler]}))
    words = settings(dataset, tmp_path / "r", **LONG, checkpoint_every=4)
    return *CONFIGS, str(overlay), "--allow", "dying.DiesOnce", *words


def check_went_on(out: Path, said: str) -> None:
    """From the checkpoint before its death, on both ranks, to the end."""
    assert (out.parent / "died").exists()
    for text in (said, *((out / n).read_text() for n in ("log.txt", "log_rank_1.txt"))):
        assert "Continuing from step_000000012.pt (step 12)" in text
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["progress"]["samples"]) == (20, 60)


def test_killed_rank_ends_the_other_and_the_same_command_goes_on(dataset, tmp_path):
    words = dying_run(dataset, tmp_path)
    found = in_forks("pipeline.run", *words)
    assert found.statuses == [1, -signal.SIGKILL], found.said
    assert "rank 0: expected all ranks to go on, got: " in found.said
    again = in_forks("pipeline.run", *words)
    assert again.statuses == [0, 0], again.said
    check_went_on(tmp_path / "r", again.said)


@pytest.mark.chaos
def test_killed_rank_is_started_again_and_all_go_on_from_the_checkpoint(dataset, tmp_path):
    launcher = ("--standalone", "--nproc_per_node=2", "--max-restarts=1")
    words = dying_run(dataset, tmp_path)
    found = torchrun("pipeline.run", *words, launcher=launcher)
    assert found.returncode == 0, found.stdout
    check_went_on(tmp_path / "r", found.stdout)


# --- what is refused: in one line by the first rank, and by all at once


def run_in_ranks(capfd, *words: str, of_the_second: tuple[str, ...] = ()) -> list[str]:
    """What `pipeline.run` says that two forked ranks refuse, with status 2 on both."""

    def work() -> int:
        try:
            return main([*CONFIGS, *words, *(of_the_second if distributed.rank() else ())])
        except SystemExit as error:
            return int(error.code or 0)

    assert in_ranks(work) == [2, 2]
    return capfd.readouterr().err.splitlines()


def test_fewer_cases_than_ranks_are_refused(tmp_path, at_the_root, capfd):
    dataset = make_dataset(tmp_path / "data", 2)
    assert run_in_ranks(capfd, *settings(dataset, tmp_path / "r", num_folds=2)) == [
        "training cases: expected 2 or more, one for each rank, got 1. Start fewer ranks."
    ]
    assert not (tmp_path / "r").exists()


def test_replay_in_several_ranks_is_refused(dataset, tmp_path, at_the_root, capfd):
    words = (*settings(dataset, tmp_path / "r"), "--replay_step", "3")
    assert run_in_ranks(capfd, *words) == [
        "--replay_step: expected one process, got several. Use python."
    ]


def test_batch_that_cannot_be_divided_is_refused(dataset, tmp_path, at_the_root, capfd):
    assert run_in_ranks(capfd, *settings(dataset, tmp_path / "r", batch_size=1)) == [
        "batch_size: expected 2 or more, a patch for each rank, got 1. Start fewer ranks, or raise "
        "it."
    ]
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("learning_rate", "got other values of learning_rate."),
        ("output_dir", "got other values of output_dir."),
        ("dataset_dir", "got other values of dataset_dir."),
    ],
)
def test_ranks_of_other_configs_or_data_are_refused(
    dataset, tmp_path, at_the_root, capfd, key, told
):
    other = {
        "learning_rate": "0.5",
        "output_dir": str(tmp_path / "s"),
        "dataset_dir": str(make_dataset(tmp_path / "other", 5)),
    }
    words = settings(dataset, tmp_path / "r")
    (line,) = run_in_ranks(capfd, *words, of_the_second=(f"--{key}", other[key]))
    assert re.match(r"rank 1 on \S+: ranks: expected the config and dataset of rank 0", line)
    assert told in line
    assert not (tmp_path / "r").exists()


def test_config_without_the_overlay_is_refused(dataset, tmp_path):
    found = in_forks("pipeline.run", "configs/amp.json", *settings(dataset, tmp_path / "r"))
    assert found.statuses == [2, 2]
    assert found.said.splitlines() == [
        "process_group: expected one for 2 ranks, got none. Add configs/multi_gpu.json to the "
        "config files."
    ]
    assert not (tmp_path / "r").exists()
