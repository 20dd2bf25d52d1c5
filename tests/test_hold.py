"""The lock on a run directory, within one process and beside others."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY

from pipeline.errors import InputError
from pipeline.lifecycle import run_directory
from pipeline.lifecycle.run_directory import RunLock

TRY = """
import sys; from pathlib import Path; from pipeline.lifecycle.run_directory import RunLock
RunLock(Path(sys.argv[1]))
"""


def other_process(run_dir) -> subprocess.CompletedProcess[str]:
    """Another process that takes the directory, and ends."""
    command = [sys.executable, "-c", TRY, str(run_dir)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)


@pytest.fixture
def held(tmp_path):
    holder = RunLock(tmp_path)
    yield holder
    holder.close()


def test_directory_is_refused_to_another_process_until_it_is_closed(tmp_path, held):
    assert held.lost() is None  # nor does looking let go of the lock
    refused = other_process(tmp_path)
    assert f"got one by process {os.getpid()}" in refused.stderr
    held.close()
    assert other_process(tmp_path).returncode == 0
    assert (tmp_path / ".lock").read_text() == ""  # it left no name, though it did not close
    held.close()  # once more does nothing


def test_lost_says_who_has_the_directory(tmp_path, held):
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    assert held.lost() == "process 7 on elsewhere"
    (tmp_path / ".lock").unlink()
    assert held.lost() == "nobody (.lock was deleted)"
    other = tmp_path / "other"
    other.write_text(json.dumps({"host": "elsewhere", "pid": 8}))
    other.rename(tmp_path / ".lock")
    assert held.lost() == "process 8 on elsewhere"


def test_heartbeat_goes_on_after_an_error(tmp_path, monkeypatch):
    beats, real = [], os.utime

    def utime(*args):
        beats.append(1)
        if len(beats) < 3:
            raise OSError(errno.ESTALE, "stale file handle")
        real(*args)

    monkeypatch.setattr(os, "utime", utime)
    monkeypatch.setattr(run_directory, "HEARTBEAT_S", 0.02)
    holder = RunLock(tmp_path)
    before = (tmp_path / ".lock").stat().st_mtime_ns
    end = time.monotonic() + 20
    while (tmp_path / ".lock").stat().st_mtime_ns == before and time.monotonic() < end:
        time.sleep(0.02)
    assert (tmp_path / ".lock").stat().st_mtime_ns > before
    holder.close()


def test_holder_that_comes_from_elsewhere_in_the_last_moment_is_respected(tmp_path, monkeypatch):
    """Where the kernel's lock does not reach the other host."""
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 6}))
    monkeypatch.setattr(run_directory, "WATCH_S", 0.1)
    lock, locked = run_directory.fcntl.lockf, []

    def late(*args):
        lock(*args)
        locked.append(1)
        if len(locked) == 2:  # the first was let go for the watch
            (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 7}))

    monkeypatch.setattr(run_directory.fcntl, "lockf", late)
    with pytest.raises(InputError, match="process 7 on elsewhere"):
        RunLock(tmp_path)


def test_file_system_without_locks_is_not_taken_for_another_process(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_directory.fcntl, "lockf", refuse)
    with pytest.raises(OSError, match="No locks available"):
        RunLock(tmp_path)
