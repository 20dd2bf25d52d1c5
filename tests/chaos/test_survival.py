"""A run survives: the part that belongs to every test run.

Of each kind of fault there is one that does; further ones of the same kind are `chaos`.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import further
from engines import curve, read
from harness import EVERY, SETTINGS, Run, kill_until_done, wait_for

from pipeline.training.checkpoint import checkpoints

pytestmark = pytest.mark.usefixtures("at_the_root")

STEPS = SETTINGS["steps_per_epoch"] * SETTINGS["max_epochs"]


@pytest.fixture(scope="session")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        run = Run(tmp_path_factory.mktemp("whole"), dataset)
        assert run.finish() == 0, run.output
    return run


def check_is_whole(run: Run, whole: Run) -> None:
    """Same final state as the undisturbed run, and curves without doubled or lost steps."""
    assert run.digest() == whole.digest()
    events, expected = read(run.dir), read(whole.dir)
    for tag in expected.Tags()["scalars"]:
        assert curve(events, tag) == curve(expected, tag), tag
    epochs = list(range(5, STEPS + 1, 5))
    assert [image.step for image in events.Images("val/first_case")] == epochs
    assert [step for step, _ in curve(events, "train/loss")] == list(range(1, STEPS + 1))
    assert json.loads((run.dir / "summary.json").read_text())["progress"]["phase"] == "done"


def test_killed_run_ends_as_the_one_that_was_not(dataset, tmp_path, whole):
    run = Run(tmp_path, dataset)
    found = kill_until_done(run, random.Random(1), deaths=3, within=1.5)
    assert found["kills"] == 3
    assert found["lost"] == 0
    assert found["most_steps_lost"] <= EVERY
    check_is_whole(run, whole)


@pytest.mark.parametrize("call", [*map(further, (1, 5, 17, 20, 23, 25)), 28])
def test_run_killed_at_its_beginning_starts_again(dataset, tmp_path, whole, call):
    """Inside its first directories and files, and the first checkpoint."""
    run = Run(tmp_path, dataset)
    assert run.finish(f"die {call}") == -signal.SIGKILL
    assert run.finish() == 0, run.output
    check_is_whole(run, whole)


# --- signals


@pytest.mark.parametrize(
    "number", [further(signal.SIGTERM), further(signal.SIGINT), signal.SIGUSR1]
)
def test_signal_ends_a_run_at_a_step_to_be_continued(dataset, tmp_path, whole, number):
    run = Run(tmp_path, dataset)
    process = run.start_and_pause(EVERY + 1)
    for _ in range(3):  # the first counts, the others must not harm
        os.kill(process.pid, number)
    run.go_on()
    process.join(60)
    assert process.exitcode == 75
    step = run.acknowledged_step()
    assert step == run.last_step() < STEPS
    assert f"Interrupted at step {step}; the same command continues." in run.output
    assert "Traceback" not in run.output
    assert run.finish() == 0
    check_is_whole(run, whole)


def test_signal_is_no_crash_to_an_elastic_launcher(dataset, tmp_path):
    run = Run(tmp_path, dataset)
    process = run.start_and_pause(1, TORCHELASTIC_RUN_ID="x")
    process.terminate()
    run.go_on()
    process.join(60)
    assert process.exitcode == 0
    assert not (run.dir / "summary.json").exists()


def test_signal_ends_a_run_in_time_when_no_step_comes(dataset, tmp_path):
    overlay = tmp_path / "faults.json"
    overlay.write_text(json.dumps({"train#dataset#_target_": "faults.HangingDataset"}))
    run = Run(tmp_path, dataset, grace_s=1, allow="faults.HangingDataset")
    run.words.insert(1, str(overlay))
    process = run.start()
    wait_for(lambda: run.last_step() >= EVERY)  # the next step's sample never comes
    started = time.monotonic()
    process.terminate()
    process.join(60)
    assert process.exitcode == 75
    assert 0.9 < time.monotonic() - started < 10
    assert run.acknowledged_step() == EVERY


# --- one writer


@pytest.mark.chaos
def test_run_whose_lock_was_deleted_stops_when_another_has_taken_its_place(
    dataset, tmp_path, whole
):
    """People delete a lock file that seems to be left over."""
    first = Run(tmp_path, dataset)
    process = first.start_and_pause(EVERY + 1)
    (first.dir / ".lock").unlink()
    second = Run(tmp_path / "second", dataset, output_dir=str(first.dir))
    second.dir = first.dir
    assert second.finish() == 0
    first.go_on()
    process.join(60)
    assert process.exitcode == 1
    assert "an unknown process has taken it over" in first.output
    assert "Traceback" not in first.output
    check_is_whole(second, whole)


def hold_from_elsewhere(run: Run) -> Path:
    """What a run on another host leaves that died before its first checkpoint."""
    run.dir.mkdir(parents=True)
    lock = run.dir / ".holder"
    lock.write_text("elsewhere 7 token")
    (run.dir / "run.json").write_text('{"fingerprint": ""}')
    (run.dir / "configs").mkdir()
    (run.dir / "configs" / "train.json").write_text("{}")
    return lock


def test_heartbeat_of_another_host_is_respected(dataset, tmp_path):
    run = Run(tmp_path, dataset)
    lock = hold_from_elsewhere(run)
    process = run.start()
    while process.is_alive():
        os.utime(lock)
        time.sleep(0.2)
    assert process.exitcode == 2
    assert "got one by process 7 on elsewhere" in run.output
    assert not (run.dir / "log.txt").exists()
    assert "elsewhere" in lock.read_text()


@pytest.mark.parametrize("age_s", [further(10**6), -(10**6)])
def test_holder_on_another_host_without_heartbeat_is_taken_for_dead(
    dataset, tmp_path, whole, age_s
):
    """Whatever its clock said."""
    run = Run(tmp_path, dataset)
    then = time.time() - age_s
    os.utime(hold_from_elsewhere(run), (then, then))
    assert run.finish() == 0
    assert "process 7 on elsewhere, is gone" in run.output
    check_is_whole(run, whole)


# --- workers


@pytest.mark.parametrize(
    ("kind", "message"), [("DyingDataset", "worker"), further("HangingDataset", "timed out")]
)
def test_worker_that_fails_ends_the_run_in_one_line(dataset, tmp_path, kind, message):
    overlay = tmp_path / "faults.json"
    overlay.write_text(json.dumps({"train#dataset#_target_": f"faults.{kind}"}))
    run = Run(tmp_path, dataset, num_workers=1, worker_timeout_s=2, allow=f"faults.{kind}")
    run.words.insert(1, str(overlay))
    assert run.finish() == 1
    line = next(line for line in run.output.splitlines() if "num_workers: expected " in line)
    assert message in line
    assert "Traceback" not in run.output


# --- disks


@pytest.fixture
def small_disk(tmp_path: Path):
    """Mounts a tmpfs of so many bytes."""
    point = tmp_path / "disk"
    point.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no right to mount a tmpfs here")
        return point

    yield mount
    subprocess.run(["umount", str(point)], capture_output=True)


def test_full_disk_ends_a_run_and_leaves_the_older_checkpoint(dataset, tmp_path, small_disk, whole):
    point = small_disk("size=3m")
    run = Run(tmp_path / "a", dataset, output_dir=str(point / "run"))
    run.dir = point / "run"
    process = run.start_and_pause(EVERY + 1)
    process.kill()
    process.join()
    step = run.acknowledged_step()
    room = os.statvfs(point)
    free = room.f_bavail * room.f_frsize
    (point / "other").write_bytes(
        bytes(free - checkpoints(run.dir / "checkpoints")[-1].stat().st_size // 2)
    )
    assert run.finish() in (1, 2)
    assert "free" in run.output or "No space left" in run.output
    assert "Traceback" not in run.output
    assert run.acknowledged_step() == step
    (point / "other").unlink()
    assert run.finish() == 0
    check_is_whole(run, whole)


def test_read_only_directory_is_told_at_the_start(dataset, tmp_path, small_disk):
    point = small_disk("size=1m,ro")
    run = Run(tmp_path / "a", dataset, output_dir=str(point / "run"))
    assert run.finish() == 2
    assert "expected a directory that can be written" in run.output
    assert os.strerror(errno.EROFS) in run.output
    assert "Traceback" not in run.output
