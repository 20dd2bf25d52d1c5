"""Who may write into a run directory: within one process, beside others, and after a restart."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from pipeline.lifecycle import run_directory
from pipeline.lifecycle.run_directory import RunLock

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
