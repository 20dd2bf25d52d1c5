"""Ending on a signal: in training at the next step boundary and in time, else at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from pipeline.distributed import SIGNALS
from pipeline.errors import TrainingInterrupted, interrupted_status

NO_MORE = 0  # no signal has this number


@contextlib.contextmanager
def interruptible(interrupt: Callable[[], None], grace_s: float) -> Iterator[None]:
    """Inside, the first SIGTERM, SIGINT or SIGUSR1 calls `interrupt`; further ones do nothing.

    If the block has not ended `grace_s` seconds after the first signal (a long validation, a
    loader that hangs, native code that does not return but lets other threads run), the process
    ends there and then, with the same exit status: whatever was acknowledged is on the disk.

    Only the main thread can take over signals; elsewhere nothing happens.

    Args:
        interrupt: Sets a flag; called from a thread of its own.
        grace_s: Seconds from the signal to the end of the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # as set_wakeup_fd wants it
    ended = threading.Event()

    def watch() -> None:
        while (number := os.read(reader, 1)[0]) != NO_MORE:
            if number in SIGNALS and not ended.is_set():
                interrupt()
                if not ended.wait(grace_s):
                    _end_now(grace_s)

    watcher = threading.Thread(target=watch, name="grace", daemon=True)
    watcher.start()
    # The system's handler writes the number into the pipe, even while native code keeps the
    # interpreter from running ours. Ours does nothing: a signal may come in the middle of it, and
    # if it held a lock then, the next call would wait for it for ever.
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        with _handled_by(lambda number, frame: None):
            yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        ended.set()
        os.set_blocking(writer, True)  # the watcher reads it empty
        os.write(writer, bytes([NO_MORE]))
        watcher.join()
        os.close(reader)
        os.close(writer)


def _end_now(grace_s: float) -> None:
    for worker in multiprocessing.active_children():
        worker.kill()  # one that hangs would outlive us
    text = f"Not through within {grace_s:g} s of the signal; the same command continues.\n"
    os.write(2, text.encode())
    os._exit(interrupted_status())


@contextlib.contextmanager
def interruptible_at_once() -> Iterator[None]:
    """Inside, SIGTERM, SIGINT or SIGUSR1 raises TrainingInterrupted; further ones do nothing.

    For the time before and after training, in which there is nothing to be saved. Inside it,
    `interruptible` has precedence.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, lambda number, frame: None)
        os.write(2, b"Interrupted outside of training; the same command continues.\n")
        raise TrainingInterrupted

    with _handled_by(end):
        yield


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
