"""The directory of a run: who may write into it, and its log.

One process at a time holds a run directory; see `RunLock`. Of several ranks the first one holds it,
and the others only write a log there.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import platform
import shutil
import socket
import threading
import time
import uuid
from pathlib import Path

from pipeline import distributed
from pipeline.errors import InputError, escape_record, require
from pipeline.files import make_directory
from pipeline.progress_bar import details
from pipeline.training.checkpoint import newest_checkpoint

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
HEARTBEAT_S = 10.0
WATCH_S = 35.0  # without a heartbeat for this long, a holder on another host is taken for dead
# what a run may leave that dies before its run.json is written; `configs` is then empty
BEGINNING = {".lock", ".holder", "log.txt", "run.json.tmp", "configs"}


class RunDirectory:
    """A run directory, which may not exist yet. `resume` has the meaning it has in `Lifecycle`."""

    def __init__(self, path: Path, resume: str) -> None:
        self.path, self.resume = path, resume

    @property
    def is_held(self) -> bool:
        """Return whether this process holds it, or logs into it as another rank."""
        return self.path in _HELD

    @property
    def log_file(self) -> Path:
        """The file that this process logs into, while it holds the directory."""
        rank = distributed.rank()
        return self.path / (f"log_rank_{rank}.txt" if rank else "log.txt")

    def lock(self) -> None:
        """Take the directory for this process, and log into its `log.txt`.

        Raises:
            InputError: If another process holds it. Nothing has been written then.
            OSError: If the directory cannot be written.
        """
        make_directory(self.path)
        self._hold(RunLock(self.path))
        for path in (*self.path.glob("*.tmp"), *self.path.glob("*/*.tmp")):
            path.unlink()  # of a write that was cut off

    def follow(self) -> None:
        """Log into the directory, as a rank other than the first."""
        if not self.is_held:
            self._hold(None)

    def _hold(self, lock: RunLock | None) -> None:
        handler = logging.FileHandler(self.log_file)
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        logging.getLogger().addHandler(handler)
        for one in logging.getLogger().handlers:
            one.addFilter(escape_record)
        details.addHandler(handler)
        details.setLevel(logging.INFO)
        details.propagate = False
        _HELD[self.path] = lock, handler

    def lost(self) -> str | None:
        """Return who took it from this process, if another one did; see `RunLock.lost`."""
        lock, _ = _HELD.get(self.path, (None, None))
        return lock.lost() if lock else None

    def release(self) -> None:
        """Let go of the directory, where it is held."""
        if self.is_held:
            lock, handler = _HELD.pop(self.path)
            logging.getLogger().removeHandler(handler)
            details.removeHandler(handler)
            details.propagate = not _HELD
            handler.close()
            if lock:
                lock.close()

    @staticmethod
    def require_locks() -> None:
        """Refuse a platform without locks on files; macOS has them."""
        remedy = "Predict, evaluate and check work here; train on Linux or in WSL2."
        require(fcntl, "platform", "Linux to train on", platform.system(), remedy)

    def require_usable(self) -> None:
        """Refuse a directory in which a run can neither start nor continue.

        Raises:
            InputError: If there is something that is no run, or `resume` does not allow it.
        """
        present = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
        occupied = any(n not in BEGINNING and not n.startswith("log_rank_") for n in present)
        occupied |= "configs" in present and any((self.path / "configs").iterdir())
        is_usable, expected = not occupied or self.resume != "false", "an empty directory"
        remedy = "Choose another output_dir."
        require(is_usable, "output_dir", f"{expected} with resume=false", self.path, remedy)
        if occupied and not self._has_record():
            raise InputError(
                f"output_dir: expected an empty directory or one with the run.json of a run, got "
                f"{self.path} with other files and no run.json. If this is a run, restore it; "
                "otherwise choose another output_dir."
            )
        if self.resume == "true" and not self.has_begun():
            raise InputError(
                f"resume: expected a run with a checkpoint in {self.path}, found none. "
                "Use resume=auto to start one."
            )

    def _has_record(self) -> bool:
        """Return whether there is a `run.json`, which runs have and other bundles do not."""
        try:
            return "fingerprint" in json.loads((self.path / "run.json").read_bytes())
        except (OSError, ValueError, TypeError):
            return False

    def has_begun(self) -> bool:
        """Return whether a run has saved something here; a damaged checkpoint counts."""
        saved = self.path.glob("checkpoints/*"), self.path.glob("models/*.pt")
        found = {path.suffix for paths in saved for path in paths}
        return bool(found & {".pt", ".damaged"}) or (self.path / "summary.json").exists()

    def continues(self) -> bool:
        """Return whether there is a run to continue; else remove what another run left."""
        # a client that initializes anew with resume=false begins anew as well
        continues = self.resume != "false" and self.has_begun()
        if not continues and self.is_held:
            for folder in ("checkpoints", "models"):
                shutil.rmtree(self.path / folder, ignore_errors=True)
        return continues

    def checkpoint(self) -> Path:
        """Return the file that a run which has begun here continues from.

        Raises:
            InputError: If none is whole. What there is stays.
        """
        if (newest := newest_checkpoint(self.path / "checkpoints")) is None:
            raise InputError(
                f"{self.path / 'checkpoints'}: expected a whole checkpoint, found none. Restore "
                "one from a copy, or start a run in another output_dir with "
                f"--init_weights {self.path / 'models' / 'last.pt'}."
            )
        return newest


class RunLock:
    """The lock on a run directory, until `close` or the end of the process.

    The kernel's lock on `.lock` ends with the process, but some file systems do not pass it on to
    other hosts. Therefore the process writes `host pid token` into `.holder` and renews the file's
    modification time as a heartbeat; a holder on another host is replaced only if it has none. Only
    changes of the time are compared: the clocks of the hosts need not agree.

    Raises:
        InputError: If another process holds it; nothing has been written then.
        OSError: If the directory, which must exist, cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.holder = run_dir / ".holder"
        # Never opened twice: closing any descriptor of a file drops the process's locks on it.
        self.file = open(run_dir / ".lock", "a")  # noqa: SIM115 - held until close()
        try:
            # a record lock, unlike flock, is not inherited by loader workers that outlive us
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._require_silence()
        except OSError as error:
            self.file.close()
            if not isinstance(error, (BlockingIOError, PermissionError)):
                raise  # such as a file system without locks
            raise InputError(
                f"output_dir: expected no other run in {run_dir}, got one by "
                f"{_name(self._pulse()[1])}. Wait for it or choose another output_dir."
            ) from None
        self.content = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
        self.holder.write_text(self.content)
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        atexit.register(self.close)  # a process that ends leaves no name behind

    def close(self) -> None:
        """Release the lock; a second call does nothing."""
        self._closed.set()
        atexit.unregister(self.close)
        with contextlib.suppress(OSError):  # where nothing can be written any more
            if self.lost() is None:
                self.holder.write_text("")
        self.file.close()

    def lost(self) -> str | None:
        """Return who took the directory, such as after `.lock` was deleted; `None`: nobody."""
        try:
            content = self.holder.read_text()
        except OSError:
            return None  # a file system that does not answer says nothing
        return None if content == self.content else _name(content)

    def _require_silence(self) -> None:
        """Watch a holder on another host; raise BlockingIOError if it has a heartbeat."""
        pulse, end = self._pulse(), time.monotonic() + WATCH_S
        if not pulse[1]:
            return
        if pulse[1].split()[0] != socket.gethostname():
            log.info("Watching for a heartbeat of %s, %.0f s at most", _name(pulse[1]), WATCH_S)
            while time.monotonic() < end:
                time.sleep(WATCH_S / 35)
                if self._pulse() != pulse:
                    raise BlockingIOError
        log.info("The run's former process, %s, is gone; replacing it", _name(pulse[1]))

    def _pulse(self) -> tuple[int, str]:
        """Time of the last heartbeat and name of the holder."""
        try:
            with open(self.holder) as file:  # anew, since network file systems cache attributes
                return os.fstat(file.fileno()).st_mtime_ns, file.read().strip()
        except FileNotFoundError:
            return 0, ""

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):  # the next one may reach the disk
                os.utime(self.holder)


_HELD: dict[Path, tuple[RunLock | None, logging.Handler]] = {}  # by this process


def holder_of(run_dir: Path) -> str | None:
    """Return who holds a run directory, as far as one can tell from outside; `None`: nobody."""
    with contextlib.suppress(OSError):  # there is no such file, or no such process here
        content = (run_dir / ".holder").read_text()
        host, pid, *_ = [*content.split(), "", ""]
        if host == socket.gethostname():
            os.kill(int(pid), 0)
        return _name(content) if host else None
    return None


def _name(holder: str) -> str:
    host, pid, *_ = [*holder.split(), "", ""]
    return f"process {pid} on {host}" if pid else "an unknown process"
