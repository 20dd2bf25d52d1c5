"""The directory of a run in the hands of a process, from being taken to being released.

Of several ranks the first one takes it, and the others follow it.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline import distributed
from pipeline.errors import InputError
from pipeline.files import CheckpointStore, make_directory
from pipeline.lifecycle.run_lock import RunLock, RunLog

# what a run may leave that dies before its run.json is written; `configs` is then empty
BEGINNING = {".launch", ".lock", "log.txt", "run.json.tmp", "configs"}
FOLDERS = (".", "configs", "docs", "models", "checkpoints", "overflow")

_HELD: dict[Path, RunLock | RunLog] = {}  # by this process, whichever object took it


class RunDirectory:
    """A run directory, which may not be there yet.

    Args:
        path: Absolute.
        resume: `auto` (continue what is there), `True` (there must be something) or `False` (there
            must be nothing).

    Attributes:
        store: Its checkpoints.
    """

    def __init__(self, path: Path, resume: str | bool) -> None:
        self.path, self._launch = path, path / ".launch"
        # where torchrun starts the processes anew, what is there is this run's own
        self.resume = "auto" if resume is False and self._is_of_this_launch() else resume
        self.store = CheckpointStore(path / "checkpoints")

    @property
    def is_held(self) -> bool:
        """Whether this process has it, or follows the one that does."""
        return self.path in _HELD

    def lost(self) -> str | None:
        """Who has it now, if it was taken from this process; see `RunLock.lost`."""
        hold = _HELD.get(self.path)
        return hold.lost() if isinstance(hold, RunLock) else None

    def release(self) -> None:
        """Let go of it, where it is held."""
        if self.is_held:
            _HELD.pop(self.path).close()

    def take(self, require_same_run: Callable[[], object]) -> None:
        """Lock it, for a run that may start or continue there; a second call does nothing.

        Args:
            require_same_run: Refuses a run that has begun there and is another one.

        Raises:
            InputError: If the run can neither start nor continue there.
            OSError: If the directory cannot be written; see `told_to_user`.
        """
        if self.is_held:
            return
        self._require_right(require_same_run)
        make_directory(self.path)
        hold = RunLock(self.path)
        try:
            self._require_right(require_same_run)  # another may have come and gone in between
            for folder in FOLDERS:
                for path in (self.path / folder).glob("*.tmp"):
                    path.unlink()  # of a write that was cut off
            if (launch := distributed.launch_id()) is not None:
                self._launch.write_text(launch)
        except BaseException:
            hold.close()
            raise
        _HELD[self.path] = hold

    def forget_launch(self) -> None:
        """What comes after the end of a run is another launch, whatever its name."""
        self._launch.unlink(missing_ok=True)

    def _is_of_this_launch(self) -> bool:
        launch = distributed.launch_id()
        return launch is not None and self._launch.is_file() and self._launch.read_text() == launch

    def follow(self, rank: int) -> None:
        """Log into it, as a rank that has not taken it."""
        if self.is_held:
            return
        with told_to_user():
            _HELD[self.path] = RunLog(self.path / f"log_rank_{rank}.txt")

    def begun(self) -> bool:
        """Whether there is a run to continue; what one left that is not to be continued goes."""
        # a client that initializes anew with resume=false begins anew as well
        begun = self.resume is not False and self._has_begun()
        if not begun and self.is_held:
            for folder in ("checkpoints", "models"):
                shutil.rmtree(self.path / folder, ignore_errors=True)
        return begun

    def checkpoint(self) -> Path:
        """File that a run which has begun here continues from.

        Raises:
            InputError: If none is whole. What there is stays.
        """
        if (newest := self.store.newest()) is not None:
            return newest
        files = [*self.store.directory.glob("*.pt"), *(self.path / "models").glob("*.pt")]
        weights = max(files, key=lambda path: path.stat().st_mtime, default="FILE")
        raise InputError(
            f"{self.store.directory}: expected a whole checkpoint that manifest.jsonl lists, found "
            "none of those that there were. Restore it and manifest.jsonl from a copy, or start a "
            f"run elsewhere from weights that are there: --init_weights {shlex.quote(str(weights))}"
            " --output_dir OTHER."
        )

    def _is_run(self) -> bool:
        """Whether there is the file that runs have, and no other bundle."""
        try:
            return "fingerprint" in json.loads((self.path / "run.json").read_bytes())
        except (OSError, ValueError, TypeError):
            return False

    def _has_begun(self) -> bool:
        """Whether there ever was a checkpoint, be it lost since or not."""
        made = ("summary.json", "models/model.pt", "models/last.pt")
        return self.store.has_begun() or any((self.path / name).exists() for name in made)

    def _require_right(self, require_same_run: Callable[[], object]) -> None:
        present = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
        occupied = any(n not in BEGINNING and not n.startswith("log_rank_") for n in present)
        occupied |= "configs" in present and any((self.path / "configs").iterdir())
        if occupied and self.resume is False:
            raise InputError(
                f"output_dir: expected an empty directory with resume=false, got {self.path}. "
                "Choose another output_dir."
            )
        if occupied and not self._is_run():
            raise InputError(
                f"output_dir: expected an empty directory or one with the run.json of a run, got "
                f"{self.path} with other files and no run.json. If this is a run, restore it; "
                "otherwise choose another output_dir."
            )
        if self.resume is True and not self._has_begun():
            raise InputError(
                f"resume: expected a run with a checkpoint in {self.path}, found none. "
                "Use resume=auto to start one."
            )
        if self._has_begun():  # before, there is nothing to be true to
            require_same_run()


@contextlib.contextmanager
def told_to_user() -> Iterator[None]:
    """Inside, what the system refuses in the run directory becomes one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"output_dir: expected a directory that can be written, got: {error}."
        ) from error
