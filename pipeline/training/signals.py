"""Ending on a signal: at the next step boundary, with a checkpoint, in time."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from pipeline.errors import interrupted_status

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
NO_MORE = 0  # no signal has this number


@contextlib.contextmanager
def interruptible(interrupt: Callable[[], None], grace_s: float) -> Iterator[None]:
    """Inside, the first SIGTERM, SIGINT or SIGUSR1 calls `interrupt`; further ones do nothing.

    If the block has not ended `grace_s` seconds after the first signal (a long validation, a
    loader that hangs, native code that does not return), the process ends there and then, with
    the same exit status: whatever was acknowledged is on the disk.

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
                    os._exit(interrupted_status())

    watcher = threading.Thread(target=watch, name="grace", daemon=True)
    watcher.start()
    # The system's handler writes the number into the pipe, even while native code keeps the
    # interpreter from running ours. Ours does nothing: a signal may come in the middle of it, and
    # if it held a lock then, the next call would wait for it for ever.
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda number, frame: None) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_before)
        ended.set()
        os.set_blocking(writer, True)  # the watcher reads it empty
        os.write(writer, bytes([NO_MORE]))
        watcher.join()
        os.close(reader)
        os.close(writer)
