"""A run from lock to last word, the same whichever command drives the config.

The config enters it from `initialize` and leaves it from `finalize`. In between, other objects
of the config ask it for the run directory and the cases.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.bundle.metadata import run_inference_config, run_metadata
from pipeline.compose import source_being_resolved
from pipeline.data.datasets import Cases, load_cases
from pipeline.data.integrity import preflight
from pipeline.data.phantom import make_phantom
from pipeline.errors import InputError, TrainingStopped
from pipeline.hold import Hold
from pipeline.summary import log_whereabouts, summarize
from pipeline.training.durable import CheckpointStore, make_directory, write_json
from pipeline.training.trainer import MixedPrecisionTrainer

log = logging.getLogger(__name__)

# what a run may leave that dies before its config is written
BEGINNING = {".lock", "log.txt", "run.json", "run.json.tmp", "configs"}
PHANTOM = Path("data/phantom")  # the one dataset_dir that makes itself


_HELD: dict[Path, Hold] = {}


class Lifecycle:
    """One run: its directory, its data, its beginning and its end.

    Args:
        bundle_root: Folder that relative paths start from.
        dataset_dir: Folder with `dataset.json`; `data/phantom` is made if it is not there.
        output_dir: The run directory; `None` stands for `runs/<name of dataset_dir>`.
        resume: `auto` (continue what is there), `true` (there must be something) or `false`
            (there must be nothing).
        max_epochs: Epochs of the whole run; a run that has them all is finished.
        split: Arguments of `load_cases` that say how the cases are split.

    Attributes:
        run_dir: Absolute path of the run directory.
        cases: The dataset's `Cases`; there after `enter`.
        checkpoint: File that the run continues from, or None; there after `enter`.
    """

    def __init__(
        self,
        bundle_root: str,
        dataset_dir: str,
        output_dir: str | None,
        resume: str | bool,
        max_epochs: int,
        split: dict[str, Any],
    ) -> None:
        self.source = source_being_resolved()
        self.bundle_root = Path(bundle_root).resolve()
        self.dataset_dir = (self.bundle_root / dataset_dir).resolve()
        name = self.dataset_dir.name
        self.run_dir = (self.bundle_root / (output_dir or f"runs/{name}")).resolve()
        self.resume = {"true": True, "false": False}.get(str(resume).lower(), "auto")
        self.max_epochs = max_epochs
        self.split = split
        self.checkpoint: Path | None = None
        self.store = CheckpointStore(self.run_dir / "checkpoints")
        self._cases: Cases | None = None

    @property
    def cases(self) -> Cases:
        """The dataset's cases, read by `enter`."""
        if self._cases is None:
            raise RuntimeError("lifecycle: expected enter() before cases, got it after.")
        return self._cases

    def enter(self) -> None:
        """Check config and data, then take the run directory.

        Nothing is written into an existing run before everything has been found right. A second
        call does nothing; a second object of the same process, as clients make by initializing
        twice, goes on with the directory it already holds.

        Raises:
            SystemExit: With status 2 and a line per fault for a user's mistake, with status 0
                if the run is finished.
        """
        if self._cases is not None:
            return
        try:
            config.check(self.source)
            if self.dataset_dir == self.bundle_root / PHANTOM:
                make_phantom(self.dataset_dir)
            self._cases = load_cases(self.dataset_dir, **self.split)
            with _told_to_user():
                # voxels are read when the directory is right and ours, or before one is made
                if self.run_dir.exists():
                    self._take_run_dir()
                preflight(self._cases)
                self._take_run_dir()
                self.checkpoint = self.store.newest()
                self._write_configs()
        except InputError as error:
            self.release()
            print(error, file=sys.stderr)
            raise SystemExit(2) from None
        self._log_start()

    def look(self) -> None:
        """Read the data of the run that is there, and leave the run as it is.

        Raises:
            InputError: If there is no run, or the config is another run's.
        """
        config.check(self.source)
        stored = self.run_dir / "configs" / "train.json"
        if not stored.is_file():
            raise InputError(
                f"output_dir: expected a run directory, found none in {self.run_dir}. "
                "Name that of the run you mean."
            )
        self._cases = load_cases(self.dataset_dir, **self.split)
        self._compare_with(stored)

    def leave(self, trainer: MixedPrecisionTrainer) -> None:
        """Write `summary.json`, release the lock and say where everything is."""
        if self.run_dir not in _HELD:
            return
        trainer.finish()
        summary = summarize(
            trainer,
            dataset_hash=self.cases.fingerprint,
            config_hash=config.identity_hash(self._portable_source()),
        )
        try:
            write_json(self.run_dir / "summary.json", summary)
        except OSError as error:
            log.error("%s", error)
            raise TrainingStopped(str(error)) from error
        log_whereabouts(self.run_dir, summary)
        self.release()

    def lost(self) -> str | None:
        """Who has the run directory now, if it was taken from this process; see `Hold.lost`."""
        return _HELD[self.run_dir].lost() if self.run_dir in _HELD else None

    def release(self) -> None:
        """Let go of the run directory; for a run that fails as well."""
        if self.run_dir in _HELD:
            _HELD.pop(self.run_dir).close()

    def _take_run_dir(self) -> None:
        """Lock the directory of a run that may start or continue there."""
        if self.run_dir in _HELD:
            return
        self._require_right_run_dir()
        make_directory(self.run_dir)
        hold = Hold(self.run_dir)
        try:
            self._require_right_run_dir()  # another process may have come and gone in between
            for folder in (".", "configs", "models", "checkpoints", "overflow"):
                for path in (self.run_dir / folder).glob("*.tmp"):
                    path.unlink()  # of a write that was cut off
        except BaseException:
            hold.close()
            raise
        _HELD[self.run_dir] = hold

    def _require_right_run_dir(self) -> None:
        """Refuse a directory in which this run can neither start nor continue."""
        stored = self.run_dir / "configs" / "train.json"
        present = {path.name for path in self.run_dir.iterdir()} if self.run_dir.exists() else set()
        occupied = bool(present - BEGINNING)
        if occupied and self.resume is False:
            raise InputError(
                f"output_dir: expected an empty directory with resume=false, got {self.run_dir}. "
                "Choose another output_dir."
            )
        if occupied and not stored.is_file():
            raise InputError(
                f"output_dir: expected a run directory or an empty one, got {self.run_dir} with "
                "other files. Choose another output_dir."
            )
        if self.resume is True and not self.store.has_begun():
            raise InputError(
                f"resume: expected a run with a checkpoint in {self.run_dir}, found none. "
                "Use resume=auto to start one."
            )
        if self.store.has_begun():  # before, there is nothing to be true to
            for key in self._compare_with(stored):
                log.info("Continuing with a changed %s", key)
            self._stop_if_finished()

    def _compare_with(self, stored: Path) -> list[str]:
        """Refuse another run than that of the `stored` config; returns what may change and did."""
        try:
            former = json.loads(stored.read_text())
            recorded = json.loads((self.run_dir / "run.json").read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.run_dir}: expected configs/train.json and run.json of the run there, got: "
                f"{error}. Restore them, or choose another output_dir."
            ) from error
        changed = config.changes(former, self._portable_source())
        if recorded["fingerprint"] != self.cases.fingerprint:
            changed[config.IDENTITY].append("dataset_dir (other cases)")
        if changed[config.IDENTITY]:
            raise InputError(
                f"{self.run_dir}: expected the config of the run there, got other values of "
                f"{', '.join(changed[config.IDENTITY])}. "
                "Choose another output_dir, or leave them as they were."
            )
        return changed[config.CONTINUABLE]

    def _stop_if_finished(self) -> None:
        path = self.run_dir / "summary.json"
        summary = json.loads(path.read_text()) if path.is_file() else None
        if summary and summary["progress"]["epoch"] >= self.max_epochs:
            log.info("This run is finished; nothing to do.")
            log_whereabouts(self.run_dir, summary)
            raise SystemExit(0)

    def _portable_source(self) -> config.Config:
        """The source as a bundle in the run directory states it: paths relative to that root."""
        source = {key: value for key, value in self.source.items() if key != "_meta_"}
        source["bundle_root"] = "."
        source["dataset_dir"] = os.path.relpath(self.dataset_dir, self.run_dir)
        source["output_dir"] = f"../{self.run_dir.name}_again"
        return source

    def _write_configs(self) -> None:
        """Make the run directory a bundle."""
        target, source = self.run_dir / "configs", self._portable_source()
        repository = self.bundle_root / "configs"
        make_directory(target)
        write_json(self.run_dir / "run.json", {"fingerprint": self.cases.fingerprint})
        write_json(target / "train.json", source)
        if (repository / "logging.conf").is_file():
            shutil.copyfile(repository / "logging.conf", target / "logging.conf")
        for name, make in (("inference", run_inference_config), ("metadata", run_metadata)):
            template = repository / f"{name}.json"
            if template.is_file():
                made = make(json.loads(template.read_text()), source, self.cases)
                write_json(target / f"{name}.json", made)
            else:
                log.warning("%s is not there: the run directory gets no %s", template, name)

    def _log_start(self) -> None:
        cases = self.cases
        log.info(
            "Dataset %s: %d training and %d validation cases, classes %s",
            cases.name, len(cases.train), len(cases.validation), ", ".join(cases.class_names),
        )  # fmt: skip
        log.info("Run directory %s", self.run_dir)


@contextlib.contextmanager
def _told_to_user() -> Iterator[None]:
    """Inside, what the system refuses in the run directory becomes one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"output_dir: expected a directory that can be written, got: {error}."
        ) from error
