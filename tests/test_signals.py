"""Signals, each in a process of its own: what is tried here has hung processes before."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import forked
import pytest
from conftest import further

from pipeline.lifecycle import lifecycle

BEGIN = """
import os, signal, threading, time
from pipeline.signals import SIGNALS, interruptible
told = []
"""


def run_python(code: str) -> forked.Ended:
    return forked.python(BEGIN + code, within_s=60)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_interrupts_once_and_handlers_of_before_are_back(name):
    ended = run_python(f"""
mine = lambda number, frame: print("mine")
signal.signal(signal.{name}, mine)
with interruptible(lambda: told.append(1), grace_s=50):
    for _ in range(3):
        os.kill(os.getpid(), signal.{name})
    while not told:
        time.sleep(0.01)
    print("still here")
os.kill(os.getpid(), signal.{name})
print(len(told), signal.getitimer(signal.ITIMER_REAL)[0], signal.getsignal(signal.SIGALRM))
""")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.split("\n")[:3] == ["still here", "mine", "1 0.0 0"]


def test_signals_that_interrupt_one_another_do_not_hang():
    """A handler that takes a lock deadlocks when the next signal comes in the middle of it."""
    ended = run_python("""
def flood():
    for n in range(30_000):
        os.kill(os.getpid(), SIGNALS[n % 3])

with interruptible(lambda: told.append(1), grace_s=50):
    sender = threading.Thread(target=flood)
    sender.start()
    while sender.is_alive():
        pass
print(len(told))
""")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "1\n", "")


def test_process_and_its_workers_end_in_time_when_the_block_does_not():
    started = time.monotonic()
    ended = run_python("""
import multiprocessing
def work():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(50)

worker = multiprocessing.get_context("fork").Process(target=work)
with interruptible(lambda: told.append(1), grace_s=1):
    worker.start()
    print(worker.pid, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(50)
""")
    assert ended.returncode == 75
    assert "Not done within 1 s" in ended.stderr
    assert 1 <= time.monotonic() - started < 20
    state, until = Path(f"/proc/{int(ended.stdout)}/stat"), time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z":  # killed, on a busy machine
        assert time.monotonic() < until
        time.sleep(0.01)


def test_other_threads_are_left_alone():
    ended = run_python("""
def work():
    with interruptible(lambda: told.append(1), grace_s=50):
        print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)

thread = threading.Thread(target=work)
thread.start()
thread.join()
""")
    assert (ended.returncode, ended.stdout) == (0, "True\n")


@pytest.mark.parametrize("name", ["SIGTERM", further("SIGINT"), further("SIGUSR1")])
@pytest.mark.parametrize("moment", ["write_configs", "summarize_run"])
def test_signal_outside_of_training_ends_a_run_to_be_continued(
    run, tmp_path, monkeypatch, capfd, name, moment
):
    with monkeypatch.context() as patch:

        def signalled(*args, **kwargs):
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(50)

        patch.setattr(lifecycle, moment, signalled)
        with pytest.raises(SystemExit) as ended:
            run(tmp_path / "r")
    assert ended.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "the same command continues" in capfd.readouterr().err
    assert run(tmp_path / "r") == 0
