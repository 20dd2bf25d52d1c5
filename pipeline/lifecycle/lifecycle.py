"""A run from lock to last word, the same whichever command drives the config.

The config enters it from `initialize` and leaves it from `finalize`. In between, other objects
of the config ask it for the run directory and the cases.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.config import keys, validate
from pipeline.config.compose import Composed, require_unaltered, source_being_resolved
from pipeline.config.old_names import require_todays_names
from pipeline.config.parser import Parser
from pipeline.data.cache import preprocessing_key
from pipeline.data.content import contents_of
from pipeline.data.data_module import DataModule
from pipeline.data.dataset import Cases
from pipeline.data.issues import some
from pipeline.data.plan import AUTO, Plan
from pipeline.data.preflight import Preflight
from pipeline.distributed import DistributedSettings
from pipeline.errors import InputError, TrainingStopped, as_bool
from pipeline.files import write_json
from pipeline.lifecycle.clients import given_data, is_clients, require_same_classes
from pipeline.lifecycle.run_directory import RunDirectory, told_to_user
from pipeline.lifecycle.start import Start
from pipeline.lifecycle.stored_configs import (
    changed_cases,
    changes_since,
    portable,
    stored_plan,
    write_configs,
    write_docs,
)
from pipeline.lifecycle.summary import log_whereabouts, summarize
from pipeline.precision import resolve_device
from pipeline.training.trainer import MixedPrecisionTrainer
from pipeline.training.trial import fit_batch_size

log = logging.getLogger(__name__)

PARTS = ("train", "validation", "test")  # of the cases
# that hosts may have in places of their own; the run directory is compared as a path
PLACES = {"dataset_dir", "cache_dir", "data_roots", "output_dir"}


class Lifecycle:
    """One run: its directory, its data, its beginning and its end.

    Args:
        bundle_root: Folder that relative paths start from.
        output_dir: The run directory; `None` stands for `runs/<name of dataset_dir>`.
        resume: `auto` (continue what is there), `true` (there must be something) or `false`
            (there must be nothing).
        max_epochs: Epochs of the whole run; a run that has them all is finished.
        data_module: Looks at the dataset.
        report: Whether to write `report/index.html` at the end.
        init_weights: File of the weights that a new run begins with; see `Start`.
        reinit_head: Whether its head is drawn anew all the same.
        accept_changed_data: Whether a run goes on where files of its cases were changed.
        process_group: Of several ranks. The first one has the run directory and writes what is of
            the run; each of the others writes a log there, and predictions that are scored.

    Attributes:
        directory: The run's.
        cache_dir: Absolute path of the folder where preprocessed cases are kept.
        cases: The dataset's `Cases`; there after `enter`.
        plan: The dataset's `Plan`; there after `enter`.
        checkpoint: File that the run continues from, or None; there after `enter`.
        start: The weights that a new run begins with, after `enter`.
    """

    def __init__(
        self,
        bundle_root: str,
        output_dir: str | None,
        resume: str | bool,
        max_epochs: int,
        data_module: DataModule,
        report: bool | str = True,
        init_weights: str | None = None,
        reinit_head: bool | str = False,
        process_group: DistributedSettings | None = None,
        accept_changed_data: bool | str = False,
    ) -> None:
        self.source = source_being_resolved()
        self.bundle_root = Path(bundle_root).resolve()
        self.dataset_dir = data_module.dataset_dir
        name = self.dataset_dir.name
        run_dir = (self.bundle_root / (output_dir or f"runs/{name}")).resolve()
        self.cache_dir = data_module.cache_dir
        asked = {"true": True, "false": False}.get(str(resume).lower(), "auto")
        self.directory = RunDirectory(run_dir, asked)
        self.max_epochs = max_epochs
        self.data_module, self.process_group = data_module, process_group
        self.report = as_bool(report, "report")
        self.accept_changed_data = as_bool(accept_changed_data, "accept_changed_data")
        self.start = Start(self.source, self.bundle_root, init_weights, reinit_head)
        self.checkpoint: Path | None = None
        self._cases: Cases | None = None
        self._plan: Plan | None = None

    @property
    def run_dir(self) -> Path:
        """Absolute path of the run directory."""
        return self.directory.path

    @property
    def cases(self) -> Cases:
        """The dataset's cases, read by `enter`."""
        if self._cases is None:
            raise RuntimeError("lifecycle: expected enter() before cases, got it after.")
        return self._cases

    @property
    def plan(self) -> Plan:
        """The dataset's plan, made by `enter`."""
        if self._plan is None:
            raise RuntimeError("lifecycle: expected enter() before plan, got it after.")
        return self._plan

    @property
    def initial_weights(self) -> dict[str, torch.Tensor] | None:
        """What a new run begins with beside the network's own weights; there after `enter`."""
        return self.start.tensors

    @property
    def preprocessing_key(self) -> dict[str, Any]:
        """What preprocessing does in this run, for the keys of the cache."""
        return preprocessing_key(self.source, self.plan)

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
            with distributed.sync_errors():
                self._meet()
                require_unaltered()
                validate.check(Composed(self.source), None, training=True)
                self._cases = self._load()
                with distributed.sync_errors():  # before the first one begins
                    self._require_same_on_all_ranks()
                    self._require_case_for_each_rank()
                self._plan, self.checkpoint = distributed.run_on_main(self._begin)
                if not distributed.is_main():
                    self._follow()
        except InputError as error:
            self.release()
            error.tell()
            raise SystemExit(2) from None
        self._log_start()

    def _meet(self) -> None:
        """Set up what several ranks need.

        Raises:
            InputError: If the config is not made for them.
        """
        if self.process_group is not None:
            self.process_group.enter()
        elif distributed.size() > 1:
            raise InputError(
                f"process_group: expected one for {distributed.size()} ranks, got none. Add "
                "configs/multi_gpu.json to the config files."
            )

    def _require_same_on_all_ranks(self) -> None:
        mine = self.run_dir, self.source, self.cases.fingerprint
        run_dir, source, fingerprint = distributed.broadcast_object(mine)
        differing = [
            key
            for keys in keys.changes(source, self.source).values()
            for key in keys
            if key.partition("#")[0] not in PLACES
        ]
        if self.run_dir != run_dir:
            differing.append(f"output_dir ({self.run_dir})")
        if self.cases.fingerprint != fingerprint:
            differing.append("dataset_dir (other cases)")
        if differing:
            raise InputError(
                f"ranks: expected the config and dataset of rank 0, got other values of "
                f"{', '.join(differing)}. Start all ranks with the same."
            )

    def _require_case_for_each_rank(self) -> None:
        if len(self.cases.train) < distributed.size():
            raise InputError(
                f"training cases: expected {distributed.size()} or more, one for each rank, got "
                f"{len(self.cases.train)}. Start fewer ranks."
            )

    def _begin(self) -> tuple[Plan, Path | None]:
        """Take the run directory, for all ranks; the plan, and what the run continues from."""
        with told_to_user():
            # voxels are read when the directory is right and ours, or before one is made
            if self.run_dir.exists():
                self.directory.take(self._require_same_run)
            begun = self.directory.begun()
            self.start.read(self.run_dir if begun else None)
            found = self.data_module.run_preflight(self.cases)
            found.require_sound()
            # of a run that began: another card must not change it
            plan = stored_plan(self.run_dir) if begun else self._make_plan(found)
            if plan.batch_size < distributed.size():
                raise InputError(
                    f"batch_size: expected {distributed.size()} or more, a patch for each rank, "
                    f"got {plan.batch_size}. Start fewer ranks{'' if begun else ', or raise it'}."
                )
            self.start.fit(plan)
            self.directory.take(self._require_same_run)
            for line in (*found.notes, *(issue.line for issue in found.warnings)):
                log.warning("%s", line)  # now that there is a log.txt
            if begun and (changed := self._changed_cases()):
                log.warning("Continuing with changed files of %s", some(changed))
            checkpoint = self.directory.checkpoint() if begun else None
            facts = found.fingerprint, self.start.record, self._contents
            write_configs(self.run_dir, self._portable_source(), self.cases, plan, *facts)
        return plan, checkpoint

    def _make_plan(self, found: Preflight) -> Plan:
        """Decide the plan; where the batch size is left to it, by what fits on the card as well."""
        plan = self.data_module.plan(found)
        device = resolve_device(self.data_module.device)
        if self.source.get("batch_size") != AUTO or device.type != "cuda":
            return plan
        names = ("network", "loss_function", "optimizer", "precision")
        with torch.random.fork_rng():
            parser = Parser({**self.source, "plan": plan})
            return fit_batch_size({name: parser.get_parsed_content(name) for name in names}, plan)

    def _follow(self) -> None:
        """What the other ranks do when the first one has begun."""
        if self.checkpoint is None:
            self.start.read()
            self.start.fit(self.plan)
        self.directory.follow(distributed.rank())

    def look(self, *, any_data: bool = False) -> None:
        """Read the data of the run that is there, and leave the run as it is.

        Args:
            any_data: Whether they may be others than it was trained on.

        Raises:
            InputError: If there is no run, or the config is another run's.
        """
        require_unaltered()
        validate.check(Composed(self.source), None, training=True)
        stored = self.run_dir / "configs" / "train.json"
        if not stored.is_file():
            raise InputError(
                f"output_dir: expected a run directory, found none in {self.run_dir}. "
                "Name that of the run you mean."
            )
        self._cases = self._load()
        known = None if any_data else self.cases.fingerprint
        changes_since(self.run_dir, self._portable_source(), known)
        self._plan = stored_plan(self.run_dir)
        require_same_classes(self.source, self.cases, self._plan)

    def _load(self) -> Cases:
        """Read the dataset, or take the cases that a client has put in its place."""
        given = given_data(self.source)
        adopted = None
        if is_clients(self.source) and (self.bundle_root / "plan.json").is_file():
            # its network is to be that of the bundle, whatever the data are like
            adopted = stored_plan(self.bundle_root)
            self.data_module.use_plan(adopted)
        cases = self.data_module.load(given)
        if adopted is not None:
            require_same_classes(self.source, cases, adopted)
        if given is not None:
            self.dataset_dir = cases.root
            self._step_aside()
        return cases

    def _step_aside(self) -> None:
        """Train beside what there is: a client that lists its cases means a new training."""
        first, resume, number = self.run_dir, self.directory.resume, 2
        while resume == "auto" and (self.run_dir / "summary.json").is_file():
            self.directory = RunDirectory(first.with_name(f"{first.name}_{number}"), resume)
            number += 1

    def leave(self, trainer: MixedPrecisionTrainer) -> None:
        """Write `summary.json`, release the lock and say where everything is."""
        if not self.is_held:
            return
        trainer.finish()
        if distributed.is_main():
            self._write_end(trainer)
        self.release()
        distributed.destroy()

    def _write_end(self, trainer: MixedPrecisionTrainer) -> None:
        summary = summarize(
            trainer,
            self.run_dir,
            dataset_hash=self.cases.fingerprint,
            config_hash=keys.identity_hash(self._portable_source()),
            init_weights=self.start.record,
            process_group=self.process_group and self.process_group.describe(),
            num_cases={part: len(getattr(self.cases, part)) for part in PARTS},
        )
        try:
            write_json(self.run_dir / "summary.json", summary)
        except OSError as error:
            log.error("%s", error)
            raise TrainingStopped(str(error)) from error
        (self.run_dir / "report" / "index.html").unlink(missing_ok=True)  # of an earlier end
        self._tell("docs", write_docs)
        if self.report:
            from pipeline.reporting.report import write_report  # it takes a second to import

            self._tell("report", write_report)
        self.directory.forget_launch()
        log_whereabouts(self.run_dir, summary)

    def _tell(self, what: str, write: Callable[[Path], object]) -> None:
        """A run that something cannot be told of is trained all the same."""
        try:
            write(self.run_dir)
        except Exception as error:
            log.warning("%s: expected to write it, got: %s", what, error)
            log.debug("", exc_info=True)

    @property
    def is_held(self) -> bool:
        """Whether this process is in the run, between `enter` and `leave`."""
        return self.directory.is_held

    def lost(self) -> str | None:
        """Who has the run directory now, if it was taken from this process; see `Hold.lost`."""
        return self.directory.lost()

    def release(self) -> None:
        """Let go of the run directory; for a run that fails as well."""
        self.directory.release()

    def _require_same_run(self) -> None:
        """Refuse another run than the one that has begun; end where that one is finished."""
        require_todays_names(self.run_dir)
        source, changed = self._portable_source(), self._changed_cases()
        known = None if changed else self.cases.fingerprint
        for key in changes_since(self.run_dir, source, known):
            log.info("Continuing with a changed %s", key)
        self._stop_if_finished(changed)
        if changed and not self.accept_changed_data:
            raise InputError(
                f"dataset_dir: expected the data that the run in {self.run_dir} began with, got "
                f"changed files of {some(changed)}. Restore them, choose another output_dir, or go "
                "on with --accept_changed_data."
            )
        if changed:
            require_same_classes(self.source, self.cases, stored_plan(self.run_dir))

    @cached_property
    def _contents(self) -> dict[str, str]:
        """What the files of all cases hold."""
        cases = self.cases
        return contents_of([*cases.train, *cases.validation, *cases.test], self.cache_dir)

    def _changed_cases(self) -> list[str]:
        cases = self.cases
        ids = [case["case_id"] for case in (*cases.train, *cases.validation, *cases.test)]
        return changed_cases(self.run_dir, ids, self._contents)

    def _stop_if_finished(self, changed: list[str]) -> None:
        path = self.run_dir / "summary.json"
        summary = json.loads(path.read_text()) if path.is_file() else None
        if summary and summary["progress"]["epoch"] >= self.max_epochs:
            log.info("This run is finished; nothing to do.")
            if changed:
                log.warning(
                    "Its data changed: files of %s. Weights and scores are of what there was; "
                    "train on the new data with another output_dir.",
                    some(changed),
                )
            log_whereabouts(self.run_dir, summary)
            raise SystemExit(0)

    def _portable_source(self) -> keys.Config:
        """The source as a bundle in the run directory states it: paths relative to that root."""
        return portable(self.source, self.bundle_root, self.dataset_dir, self.run_dir)

    def _log_start(self) -> None:
        cases = self.cases
        log.info(
            "Dataset %s (%s): %d training, %d validation and %d test cases, %d excluded",
            cases.name, cases.kind, len(cases.train), len(cases.validation), len(cases.test),
            len(cases.excluded),
        )  # fmt: skip
        for line in self.plan.lines():
            log.info("  %s", line)
        log.info("Run directory %s", self.run_dir)
        if distributed.size() > 1:
            log.info(
                "Rank %d of %d; batches are divided among them",
                distributed.rank(),
                distributed.size(),
            )
        self.start.tell()
