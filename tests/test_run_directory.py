"""Who may write into a run directory: within one process, beside others, and after a restart."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from pipeline import distributed
from pipeline.errors import InputError
from pipeline.lifecycle import run_directory
from pipeline.lifecycle.run_directory import RunDirectory, RunLock

# --- the lock


def other_process(run_dir) -> subprocess.CompletedProcess[str]:
    """Another process that takes the directory, and ends."""
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline.lifecycle.run_directory import RunLock\n"
        "RunLock(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(run_dir)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)


@pytest.fixture
def held(tmp_path):
    holder = RunLock(tmp_path)
    yield holder
    holder.close()


def test_directory_is_refused_to_another_process_until_it_is_closed(tmp_path, held):
    refused = other_process(tmp_path)
    assert f"got one by process {os.getpid()}" in refused.stderr
    held.close()
    assert other_process(tmp_path).returncode == 0
    assert (tmp_path / ".holder").read_text() == ""  # it left no name, though it did not close
    held.close()  # once more does nothing


def test_lost_says_who_has_the_directory(tmp_path, held):
    assert held.lost() is None
    (tmp_path / ".holder").write_text("elsewhere 7 token")
    assert held.lost() == "process 7 on elsewhere"
    held.close()
    assert (tmp_path / ".holder").read_text() == "elsewhere 7 token"


def test_file_system_without_locks_is_not_taken_for_another_process(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_directory.fcntl, "lockf", refuse)
    with pytest.raises(OSError, match="No locks available"):
        RunLock(tmp_path)


# --- launches of torchrun, which starts the processes anew


@pytest.fixture
def launch(monkeypatch):
    """Become a process of the launch of a name; `None`: of none."""

    def become(name: str | None) -> None:
        for key, value in (("TORCHELASTIC_RUN_ID", name), ("RANK", "0")):
            monkeypatch.setenv(key, value) if name else monkeypatch.delenv(key, raising=False)

    return become


def begin(path, resume):
    """Take the directory as a run does, and leave it as one that was killed."""
    directory = RunDirectory(path, resume)
    directory.require_usable()
    directory.lock()
    launch = distributed.launch_id()
    (path / "run.json").write_text(json.dumps({"fingerprint": "", "launch": launch}))
    (path / "models").mkdir(exist_ok=True)
    directory.release()
    return directory


def test_restart_of_a_launch_goes_on_with_what_it_began(launch, tmp_path):
    launch("a")
    assert begin(tmp_path / "r", False).resume is False
    assert begin(tmp_path / "r", False).resume == "auto"


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("none", "none"), (None, "a")])
def test_another_launch_refuses_what_is_there(launch, tmp_path, first, second):
    """torchrun calls every launch `none` that is given no name."""
    launch(first)
    begin(tmp_path / "r", False)
    launch(second)
    for _ in range(2):  # a restart of it as well
        with pytest.raises(InputError, match="expected an empty directory with resume=false"):
            begin(tmp_path / "r", False)


def test_refusal_for_want_of_a_run_stays_one(launch, tmp_path):
    launch("a")
    for _ in range(2):
        with pytest.raises(InputError, match="resume: expected a run with a checkpoint"):
            begin(tmp_path / "r", True)
    assert not (tmp_path / "r").exists()
