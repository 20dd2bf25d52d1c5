"""Training on two nodes whose ranks die: a torchrun launcher for each, on one machine.

The processes of a node are found by a mark in their environment, because torchrun gives each worker
a session of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import REPOSITORY
from engines import curve, read
from harness import digest_of, wait_for
from torchrun import CONFIGS, settings

from pipeline import distributed
from pipeline.training.checkpoint import load_checkpoint, newest_checkpoint
from pipeline.training.trainer import StepEvents

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("at_the_root")]

STEPS, EVERY = 20, 2
SETTINGS = {
    "batch_size": 3, "steps_per_epoch": 10, "max_epochs": 2, "checkpoint_every": EVERY,
    "learning_rate": 0.001,  # with larger ones AdamW makes much of the last digits
    "grace_s": 10, "allow": "test_nodes.Paced",
}  # fmt: skip
WITHIN_S = 120  # from a start to the end of all steps
AGAIN_S = 60  # from a death to the next step; some ten where the machine does nothing else
# a node that is silent for three seconds is dead; the others wait two seconds for more to come
QUICK = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2,read_timeout=20"
# a store for each start of the ranks, without the addresses of former ones
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Paced:
    """Writes down each step of each rank when everything that belongs to it is done; then waits."""

    def __init__(self, folder: str, pause_s: float) -> None:
        self.folder, self.pause_s = Path(folder), pause_s

    def attach(self, trainer) -> None:
        trainer.add_event_handler(StepEvents.STEP_COMPLETED, self.after_step)

    def after_step(self, trainer) -> None:
        line = [os.getpid(), distributed.rank(), trainer.progress.step]
        with open(self.folder / "steps.txt", "a") as file:
            file.write(json.dumps(line) + "\n")
        time.sleep(self.pause_s)


class Launcher:
    """A torchrun process: a node, with one rank."""

    def __init__(self, words: list[str], output: Path) -> None:
        mark = uuid.uuid4().hex
        self.output, self.mark = output, f"NODE_OF_TEST={mark}".encode()
        paths = os.pathsep.join(str(REPOSITORY / folder) for folder in ("tests", "tests/chaos"))
        ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "NODE_OF_TEST": mark, **OWN_STORE}
        with open(output, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *words],
                cwd=REPOSITORY, env=os.environ | ours, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self.output.read_text()

    def processes(self) -> list[int]:
        """All that descend from it, also when it is gone."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and (
                    self.mark in (entry / "environ").read_bytes().split(b"\0")
                ):
                    found.append(int(entry.name))
        return found

    def workers(self) -> list[int]:
        """Its ranks: one, or none while there is none."""
        return [pid for pid in self.processes() if _parent(pid) == self.process.pid]

    def kill_worker(self) -> int:
        """SIGKILL to its rank, as soon as there is one; its number."""
        killed: list[int] = []

        def kill() -> bool:
            for pid in self.workers():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            return bool(killed)

        wait_for(kill, WITHIN_S)
        return killed[0]

    def kill(self) -> None:
        """SIGKILL to all of the node, the launcher first, until there is nothing."""
        while pids := self.processes():
            for pid in sorted(pids, key=lambda pid: pid != self.process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.05)
        self.process.wait()

    def wait(self, seconds: float = WITHIN_S) -> int:
        """Its exit status; it must come in time, and with it the end of all its processes."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it hangs: {self.said[-3000:]}") from None
        assert not self.processes()
        return status


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


class Nodes:
    """One run directory, and the launchers that work on it."""

    def __init__(self, folder: Path, dataset: Path, pause_s: float = 0.15) -> None:
        self.folder, self.dir = folder, folder / "run"
        overlay = folder / "paced.json"
        handler = {"_target_": "test_nodes.Paced", "folder": str(folder), "pause_s": pause_s}
        overlay.write_text(json.dumps({"+train#handlers": [handler]}))
        self.words = [*CONFIGS, str(overlay), *settings(dataset, self.dir, **SETTINGS)]
        self.launchers: list[Launcher] = []

    def launch(self, restarts: int = 3) -> list[Launcher]:
        """Two launchers; the first one has the rendezvous store and rank 0."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        words = [
            "--nnodes=2", "--nproc_per_node=1", f"--max-restarts={restarts}",
            "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}",
            f"--rdzv_id={uuid.uuid4().hex}", f"--rdzv_conf={QUICK}",
        ]  # fmt: skip

        def is_listening() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("localhost", port)) == 0

        for address in (1, 2):
            own = [*words, f"--local_addr=127.0.0.{address}", "-m", "pipeline.run", *self.words]
            said = self.folder / f"said_{len(self.launchers)}.txt"
            self.launchers.append(Launcher(own, said))
            wait_for(is_listening, WITHIN_S)
        return self.launchers[-2:]

    def kill(self) -> None:
        for launcher in self.launchers:
            launcher.kill()

    def steps(self) -> list[tuple[int, int, int]]:
        """`(pid, rank, step)` of each step that was done, in the order of their ends."""
        file = self.folder / "steps.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        return [tuple(json.loads(line)) for line in lines]

    def wait_for_step(self, step: int) -> None:
        wait_for(lambda: any(done >= step for *_, done in self.steps()), WITHIN_S)

    def sessions(self) -> list[list[int]]:
        """The steps of rank 0, for each of its processes."""
        found: dict[int, list[int]] = {}
        for pid, rank, step in self.steps():
            if rank == 0:
                found.setdefault(pid, []).append(step)
        return list(found.values())

    def digest(self) -> str:
        """Of everything the newest checkpoint holds but the time it took."""
        content = load_checkpoint(newest_checkpoint(self.dir / "checkpoints"))
        content["progress"].pop("wall_time_s")
        return digest_of(content)

    def log(self, rank: int) -> str:
        return (self.dir / (f"log_rank_{rank}.txt" if rank else "log.txt")).read_text()


@pytest.fixture
def nodes(dataset: Path, tmp_path: Path) -> Iterator[Nodes]:
    found = Nodes(tmp_path, dataset)
    yield found
    found.kill()


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Nodes:
    """Two nodes that nothing happened to."""
    found = Nodes(tmp_path_factory.mktemp("whole"), dataset, pause_s=0)
    try:
        first, second = found.launch()
        assert (first.wait(), second.wait()) == (0, 0), first.said + second.said
    finally:
        found.kill()
    return found


def check_is_whole(nodes: Nodes, whole: Nodes) -> None:
    """All steps, each written once, none that was acknowledged lost, and the end of the other."""
    summary = json.loads((nodes.dir / "summary.json").read_text())
    assert (summary["steps"], summary["progress"]["samples"]) == (STEPS, 3 * STEPS)
    assert summary["progress"]["phase"] == "done"
    before = 0
    for steps in nodes.sessions():
        assert steps == list(range(steps[0], steps[-1] + 1))
        assert before - before % EVERY <= steps[0] - 1 <= before
        before = steps[-1]
    assert before == STEPS
    for tag in ("train/loss", "val/mean_dice"):
        assert curve(read(nodes.dir), tag) == curve(read(whole.dir), tag)
    assert nodes.digest() == whole.digest()


def test_two_nodes_write_once_and_each_has_a_log(whole):
    check_is_whole(whole, whole)
    steps = [(rank, step) for _, rank, step in whole.steps()]
    assert sorted(steps) == [(rank, n) for rank in (0, 1) for n in range(1, STEPS + 1)]
    assert len(list((whole.dir / "tensorboard").iterdir())) == 1
    assert "Rank 0 of 2" in whole.log(0)
    assert "Rank 1 of 2" in whole.log(1)
    first, second = (launcher.said for launcher in whole.launchers)
    for line in ("Dataset tiny", "epoch 2/2"):
        assert (first.count(line), second.count(line)) == (1, 0)


@pytest.mark.parametrize("node", [0, 1])
def test_killed_rank_of_one_node_restarts_both(nodes, whole, node):
    pair = nodes.launch()
    nodes.wait_for_step(13)
    killed = pair[node].kill_worker()
    wait_for(lambda: len(nodes.sessions()) == 2, AGAIN_S)
    assert [launcher.wait() for launcher in pair] == [0, 0]
    assert killed in {pid for pid, *_ in nodes.steps()}
    after = nodes.sessions()[1][0] - 1
    for rank in (0, 1):
        assert nodes.log(rank).count(f"Continuing from step_{after:09d}.pt (step {after})") == 1
    check_is_whole(nodes, whole)


def test_sigterm_to_the_launchers_ends_all_ranks_at_one_step(nodes, whole):
    pair = nodes.launch()
    nodes.wait_for_step(5)
    for launcher in pair:
        launcher.process.terminate()
    assert [launcher.wait(30) for launcher in pair] == [1, 1]  # the launchers' own
    ((*_, step),) = nodes.sessions()
    assert {rank: last for _, rank, last in nodes.steps()} == {0: step, 1: step}
    assert step < STEPS
    for rank in (0, 1):
        assert f"Interrupted at step {step}; the same command continues." in nodes.log(rank)
        assert "Traceback" not in nodes.log(rank)
    assert [launcher.wait() for launcher in nodes.launch()] == [0, 0]
    assert nodes.sessions()[1][0] == step + 1
    check_is_whole(nodes, whole)
