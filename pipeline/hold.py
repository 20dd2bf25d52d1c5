"""A run directory in one process's hands: a kernel lock, and a heartbeat where that is blind."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
from pathlib import Path

from pipeline.errors import InputError

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
STALE_S = 60.0  # without a heartbeat for so long, a holder on another host is taken for dead


class Hold:
    """The lock on a run directory and its `log.txt`, until `close` or the end of the process.

    `.lock` names the holder and its modification time is the heartbeat. The kernel's lock tells
    at once, and drops with the process; between hosts some file systems do not pass it on, so a
    fresh heartbeat of another host counts too.

    Args:
        run_dir: An existing directory.

    Raises:
        InputError: If another process holds it; nothing has been written then.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / ".lock"
        # opened without truncation: what it says is the holder's until the lock is ours
        self.file = open(self.path, "a+")  # noqa: SIM115 - held until close()
        try:
            # a record lock, unlike flock, is not inherited by loader workers that outlive us
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._refuse(self._holder())
        holder = self._holder()
        if holder.get("host", socket.gethostname()) != socket.gethostname() and self._is_fresh():
            self._refuse(holder)
        if holder:
            log.info("The run's former process, %s, is gone; going on in its place", _named(holder))
        self.file.truncate(0)
        self.file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self.file.flush()
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        self.log_file = logging.FileHandler(run_dir / "log.txt")
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        self.log_file.setFormatter(logging.Formatter(form))
        logging.getLogger().addHandler(self.log_file)

    def close(self) -> None:
        """Release the lock and close the log."""
        logging.getLogger().removeHandler(self.log_file)
        self.log_file.close()
        self._closed.set()
        self.file.truncate(0)
        self.file.close()

    def _holder(self) -> dict[str, str | int]:
        self.file.seek(0)
        try:
            return dict(json.loads(self.file.read()))
        except (ValueError, TypeError):
            return {}

    def _refuse(self, holder: dict[str, str | int]) -> None:
        self.file.close()
        raise InputError(
            f"output_dir: expected no other run in {self.path.parent}, got one by "
            f"{_named(holder)}. Wait for it (of another host that died: {STALE_S:.0f} s) or choose "
            "another output_dir."
        )

    def _is_fresh(self) -> bool:
        """Whether the heartbeat is recent, by the clock of the file system's host."""
        probe = self.path.with_name(f".probe-{os.getpid()}")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now - self.path.stat().st_mtime < STALE_S

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            os.utime(self.path)


def _named(holder: dict[str, str | int]) -> str:
    if not holder:
        return "an unknown process"
    return f"process {holder.get('pid')} on {holder.get('host')}"
