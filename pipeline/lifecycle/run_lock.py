"""A run directory in one process's hands: a kernel lock, and a heartbeat where that is blind."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from pipeline.errors import InputError

log = logging.getLogger(__name__)

Holder = dict[str, str | int]  # what `.lock` says: host, pid, token

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
HEARTBEAT_S = 10.0
WATCH_S = 35.0  # without a heartbeat for so long, a holder on another host is taken for dead


class RunLog:
    """A log file in a run directory, of all that is logged until `close`.

    Args:
        path: Of the file, which is appended to.
    """

    def __init__(self, path: Path) -> None:
        self._handler = logging.FileHandler(path)
        self._handler.setFormatter(logging.Formatter(LOG_FORMAT))
        logging.getLogger().addHandler(self._handler)

    def close(self) -> None:
        """Log no more."""
        logging.getLogger().removeHandler(self._handler)
        self._handler.close()


class RunLock:
    """The lock on a run directory and its `log.txt`, until `close` or the end of the process.

    `.lock` names the holder and its modification time is the heartbeat. The kernel's lock tells
    at once, and drops with the process; between hosts some file systems do not pass it on, so the
    lock of another host is watched for a heartbeat. It is the change of the time that counts:
    clocks of hosts need not agree.

    Args:
        run_dir: An existing directory.

    Raises:
        InputError: If another process holds it; nothing has been written then.
        OSError: If the directory cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / ".lock"
        self._take()
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        self.log = RunLog(run_dir / "log.txt")
        atexit.register(self.close)  # a process that ends leaves no name behind

    def close(self) -> None:
        """Release the lock and close the log; a second call does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        atexit.unregister(self.close)
        self.log.close()
        with contextlib.suppress(OSError):  # where nothing can be written any more
            self.file.truncate(0)
        self.file.close()

    def lost(self) -> str | None:
        """Who has the directory now, if `.lock` is no longer ours: deleted by hand, or overwritten.

        Both happen where a kernel lock does not help: after a deletion another process locks
        another file, and of two hosts that start at the same moment the later one overwrites.
        """
        try:
            if self.path.stat().st_ino != os.fstat(self.file.fileno()).st_ino:
                return _named(_parsed(self.path.read_text()))
            content = self._read()
        except FileNotFoundError:
            return "nobody (.lock was deleted)"
        except OSError:
            return None  # a file system that does not answer says nothing
        return None if content == self.content else _named(_parsed(content))

    def _take(self, watched: Holder | None = None) -> None:
        """Lock the file and write our name; `watched` was seen to have no heartbeat."""
        # Opened without truncation: what it says is the holder's until the lock is ours. Never
        # opened again after that: closing any descriptor of a file drops the process's locks on it.
        self.file = open(self.path, "a+")  # noqa: SIM115 - held until close()
        try:
            self._lock()
            holder = _parsed(self._read())
            here = holder.get("host", socket.gethostname()) == socket.gethostname()
            if here or holder == watched:
                self._sign(holder)
                return
        except BaseException:
            self.file.close()
            raise
        self.file.close()
        if watched is not None or self._beats(holder):
            self._refuse(holder)
        self._take(watched=holder)

    def _lock(self) -> None:
        try:
            # a record lock, unlike flock, is not inherited by loader workers that outlive us
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise  # a file system without locks, say
            self._refuse(_parsed(self._read()))

    def _sign(self, former: Holder) -> None:
        if former:
            log.info("The run's former process, %s, is gone; going on in its place", _named(former))
        self.content = json.dumps(
            {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        )
        self.file.truncate(0)
        self.file.write(self.content)
        self.file.flush()

    def _beats(self, holder: Holder) -> bool:
        """Whether the heartbeat of another host's holder goes on, watched for `WATCH_S`."""
        log.info("Watching for a heartbeat of %s, %.0f s at most", _named(holder), WATCH_S)
        first, end = self._pulse(), time.monotonic() + WATCH_S
        while time.monotonic() < end:
            time.sleep(WATCH_S / 35)
            if self._pulse() != first:
                return True
        return False

    def _pulse(self) -> tuple[int, str] | None:
        try:
            with open(self.path) as file:  # anew, since network file systems cache attributes
                return os.fstat(file.fileno()).st_mtime_ns, file.read()
        except FileNotFoundError:
            return None

    def _read(self) -> str:
        self.file.seek(0)
        return self.file.read()

    def _refuse(self, holder: Holder) -> None:
        raise InputError(
            f"output_dir: expected no other run in {self.path.parent}, got one by "
            f"{_named(holder)}. Wait for it or choose another output_dir."
        )

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError, ValueError):  # the next one may reach the disk
                os.utime(self.file.fileno())


def _parsed(content: str) -> Holder:
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError):
        return {}


def _named(holder: Holder) -> str:
    if not holder:
        return "an unknown process"
    return f"process {holder.get('pid')} on {holder.get('host')}"
