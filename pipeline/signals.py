"""Ending on a signal: in training at the next step, before and after it at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from pipeline.errors import TrainingInterrupted, interrupted_status

# Windows has neither SIGUSR1 nor SIGUSR2
SIGNALS = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, n))
END_REQUESTS: list[int] = []  # SIGUSR2s, each of which asks training to end early and properly
ENDING = {
    getattr(signal, name): lambda number, frame: END_REQUESTS.append(number)
    for name in ("SIGUSR2",)
    if hasattr(signal, name)
}


@contextlib.contextmanager
def interruptible(interrupt: Callable[[], None], grace_s: float) -> Iterator[None]:
    """Inside, the first SIGTERM, SIGINT or SIGUSR1 calls `interrupt`; further ones do nothing.

    If the block has not ended `grace_s` seconds later (a long validation, a loader that hangs), the
    process ends with the same exit status, unless a call of native code never returns.

    Args:
        interrupt: Sets a flag. It must not take a lock, since a signal may come at any time.
    """

    def end_now(number: int, frame: FrameType | None) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()  # one that hangs would survive this process
        text = f"Not done within {grace_s:g} s of the signal; the same command continues.\n"
        os.write(2, text.encode())
        os._exit(interrupted_status())

    def handle(number: int, frame: FrameType | None) -> None:
        if not signal.getitimer(signal.ITIMER_REAL)[0]:  # the first one
            signal.setitimer(signal.ITIMER_REAL, max(grace_s, 0.001))
            interrupt()

    handlers = {**dict.fromkeys(SIGNALS, handle), signal.SIGALRM: end_now, **ENDING}
    with signal_handlers(handlers):
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def interruptible_at_once() -> Iterator[None]:
    """Inside, SIGTERM, SIGINT or SIGUSR1 raises TrainingInterrupted; further ones do nothing."""

    def end(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, lambda number, frame: None)
        os.write(2, b"Interrupted outside of training; the same command continues.\n")
        raise TrainingInterrupted

    with signal_handlers({**dict.fromkeys(SIGNALS, end), **ENDING}):
        yield


@contextlib.contextmanager
def signal_handlers(handlers: dict[signal.Signals, Callable]) -> Iterator[None]:
    """Inside, signals have these handlers; outside of the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
