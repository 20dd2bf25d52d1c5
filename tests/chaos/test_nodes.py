"""Training on two nodes of which a rank dies: a torchrun launcher for each, on one machine."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engines import curve, read
from harness import digest_of, wait_for
from torchrun import CONFIGS, settings, torchrun

from pipeline.training.checkpoint import load_checkpoint, newest_checkpoint

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("at_the_root")]

SETTINGS = {
    "batch_size": 3, "steps_per_epoch": 10, "max_epochs": 2, "checkpoint_every": 4,
    "learning_rate": 0.001,  # with larger ones AdamW makes much of the last digits
}  # fmt: skip
# a node that is silent for three seconds is dead; the others wait two seconds for more to come
QUICK = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2,read_timeout=20"
# a store for each start of the ranks, without the addresses of former ones
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def launch(dataset: Path, run_dir: Path, *words: str) -> list[str]:
    """Train to the end with two launchers of one rank each; return what each printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def start(number: int) -> str:
        launcher = (
            "--nnodes=2", "--nproc_per_node=1", "--max-restarts=1", "--rdzv_backend=c10d",
            f"--rdzv_endpoint=localhost:{port}", f"--rdzv_id={port}", f"--rdzv_conf={QUICK}",
            f"--local_addr=127.0.0.{number}",
        )  # fmt: skip
        words_of_run = (*CONFIGS, *words, *settings(dataset, run_dir, **SETTINGS))
        found = torchrun("pipeline.run", *words_of_run, launcher=launcher, **OWN_STORE)
        assert found.returncode == 0, found.stdout
        return found.stdout

    def is_listening() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("localhost", port)) == 0

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(start, 1)  # has the rendezvous store and rank 0
        wait_for(is_listening)
        second = pool.submit(start, 2)
        return [first.result(), second.result()]


def digest(run_dir: Path) -> str:
    """Hash everything that the newest checkpoint holds but the time it took."""
    content = load_checkpoint(newest_checkpoint(run_dir / "checkpoints"))
    content["progress"].pop("wall_time_s")
    return digest_of(content)


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two nodes that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("whole") / "r"
    first, second = launch(dataset, run_dir)
    for line in ("Dataset tiny", "epoch 2/2"):
        assert (first.count(line), second.count(line)) == (1, 0)
    return run_dir


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_of_one_node_restarts_both(dataset, whole, tmp_path, rank):
    overlay, run_dir = tmp_path / "dies.json", tmp_path / "r"
    handler = {"_target_": "dying.DiesOnce", "rank": rank, "step": 13, "mark": f"{tmp_path}/died"}
    overlay.write_text(json.dumps({"+train#handlers": [handler]}))
    launch(dataset, run_dir, str(overlay), "--allow", "dying.DiesOnce")
    assert (tmp_path / "died").exists()
    for name in ("log.txt", "log_rank_1.txt"):
        assert (run_dir / name).read_text().count("Continuing from step_000000012.pt") == 1
    for tag in ("train/loss", "val/mean_dice"):
        assert curve(read(run_dir), tag) == curve(read(whole), tag)
    assert digest(run_dir) == digest(whole)
