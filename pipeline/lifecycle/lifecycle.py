"""Controls one training run: lock, preflight, plan, resume, scores, report, summary.

Every entry point uses it: `pipeline.run`, `monai.bundle run` and MONAI's clients. The config calls
`enter` in `initialize` and `leave` in `finalize`; other objects of the config take the run
directory, the cases and the plan from it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.config import keys, validate
from pipeline.config.compose import Composed
from pipeline.config.old_names import require_todays_names
from pipeline.config.parser import Parser, config_of_monai, require_unaltered
from pipeline.data.cache import preprocessing_key
from pipeline.data.content import contents_of
from pipeline.data.data_module import DataModule
from pipeline.data.dataset import Cases
from pipeline.data.plan import AUTO, Plan
from pipeline.data.preflight import Preflight
from pipeline.distributed import DistributedSettings
from pipeline.errors import InputError, TrainingStopped, as_bool, print_failure, require, some
from pipeline.files import write_json
from pipeline.lifecycle.run_directory import RunDirectory
from pipeline.lifecycle.stored_configs import (
    CARD,
    changed_cases,
    changes_since,
    given_data,
    is_clients,
    portable,
    require_same_classes,
    stored_plan,
    stored_record,
    write_configs,
    write_docs,
)
from pipeline.lifecycle.summary import log_beginning, log_whereabouts, summarize_run
from pipeline.lifecycle.time_budget import (
    DECIDED,
    REPORT_S,
    fit_time_budget,
    measure_costs,
    process_age_s,
    read_duration,
)
from pipeline.precision import resolve_device
from pipeline.progress_bar import details
from pipeline.training.early_end import STOP_FILE, read_early_end
from pipeline.training.pretrained import read_pretrained
from pipeline.training.progress import DONE
from pipeline.training.trainer import MixedPrecisionTrainer
from pipeline.training.trial import fit_batch_size

log = logging.getLogger(__name__)

REPORT = Path("report", "index.html")


class Lifecycle:
    """One run: its directory, its data, its beginning and its end.

    Args:
        bundle_root: Folder that relative paths start from.
        output_dir: The run directory; `None` stands for `runs/<name of dataset_dir>`.
        resume: `auto` (continue what is there), `true` (there must be something) or `false`
            (there must be nothing).
        init_weights, reinit_head: Weights that a new run begins with; see `read_pretrained`.
        process_group: Settings for several ranks, of which the first one holds the run directory.
        time_budget: Time in which the whole command is to end, such as `30m`; it decides the steps.
        accept_changed_data: Whether a run continues although files of its cases were changed.
        config: The whole config, checked, as `pipeline.run` hands it over; where MONAI's own
            commands build this object, it is found by `config_of_monai`.

    Attributes:
        cache_dir: Absolute path of the folder where preprocessed cases are kept.
        cases, plan: The dataset's, after `enter`.
        checkpoint: File that the run continues from, or None, after `enter`.
        initial_weights: Weights that a new run begins with, or None, after `enter`.
    """

    cases: Cases
    plan: Plan

    def __init__(
        self,
        bundle_root: str,
        output_dir: str | None,
        resume: str | bool,
        data_module: DataModule,
        report: bool | str = True,
        init_weights: str | None = None,
        reinit_head: bool | str = False,
        process_group: DistributedSettings | None = None,
        accept_changed_data: bool | str = False,
        time_budget: str | None = None,
        config: Composed | None = None,
    ) -> None:
        self.is_checked = config is not None
        self.source = config.source if config else config_of_monai()
        self.bundle_root = Path(bundle_root).resolve()
        self.dataset_dir, self.cache_dir = data_module.dataset_dir, data_module.cache_dir
        run_dir = (self.bundle_root / (output_dir or f"runs/{self.dataset_dir.name}")).resolve()
        self.directory = RunDirectory(run_dir, str(resume).lower())
        self.data_module, self.process_group = data_module, process_group
        self.time_budget, self._began = time_budget, time.monotonic() - process_age_s()
        epochs = Parser(self.source).get("train#trainer#max_epochs")
        if isinstance(epochs, int):  # where MONAI's clients set it
            data_module.settings = {**data_module.settings, "max_epochs": epochs}
        self.report = as_bool(report, "report")
        self.accept_changed_data = as_bool(accept_changed_data, "accept_changed_data")
        self.init_weights, self.reinit_head = init_weights, as_bool(reinit_head, "reinit_head")
        self.initial_weights: dict[str, torch.Tensor] | None = None
        self.checkpoint: Path | None = None
        self._start: dict[str, Any] | None = None  # the record of the weights it began with

    @property
    def run_dir(self) -> Path:
        """Absolute path of the run directory."""
        return self.directory.path

    @property
    def is_held(self) -> bool:
        """Return whether this process is between `enter` and `leave`."""
        return self.directory.is_held

    @property
    def preprocessing_key(self) -> dict[str, Any]:
        """Settings of the run's preprocessing, for the keys of the cache."""
        return preprocessing_key(self.source, self.plan)

    @property
    def lost(self) -> Callable[[], str | None]:
        """Function that tells who took the directory from this process; see `RunLock.lost`."""
        return self.directory.lost

    # --- the beginning

    def enter(self) -> None:
        """Check config and data, then take the run directory; a second call does nothing.

        Nothing is written into an existing run before everything has been found right.

        Raises:
            SystemExit: With status 2 and a line per fault for a user's mistake, with status 0
                if the run is finished.
        """
        if hasattr(self, "plan"):
            return
        try:
            with distributed.sync_errors():
                if self.process_group is not None:
                    self.process_group.enter()
                elif distributed.size() > 1:
                    raise InputError(
                        f"process_group: expected one for {distributed.size()} ranks, got none. "
                        "Add configs/multi_gpu.json to the config files."
                    )
                self._open()
        except InputError as error:
            self.release()
            error.tell()
            raise SystemExit(2) from None
        if not self.is_checked:
            self._shorten_failures()
        self._log_start()

    def _open(self) -> None:
        """Take cases, plan and run directory, on all ranks."""
        self.directory.require_locks()
        self.cases = self._load_cases()
        with distributed.sync_errors():  # before the first one begins
            self._require_same_on_all_ranks()
            ranks, found = distributed.size(), len(self.cases.train)
            expected = f"{ranks} or more, one for each rank"
            require(found >= ranks, "training cases", expected, found, "Start fewer ranks.")
        try:
            self.plan, self.checkpoint = distributed.run_on_main(self._begin)
            if not distributed.is_main():
                if self.checkpoint is None:
                    self._read_pretrained(self.plan)
                self.directory.follow()
            if self.time_budget and self.checkpoint is None:
                self._fit_time_budget(self.time_budget)
        except OSError as error:
            raise InputError(
                f"output_dir: expected a directory that can be written, got: {error}."
            ) from error

    def open_stored_run(self, *, any_data: bool = False) -> None:
        """Take the plan of the run that is there and its data, or with `any_data` others.

        Raises:
            InputError: If there is no run, or the config is another run's.
        """
        if not (self.run_dir / "configs" / "train.json").is_file():
            raise InputError(
                f"output_dir: expected a run directory, found none in {self.run_dir}. "
                "Name that of the run you mean."
            )
        self.cases = self._load_cases()
        changes_since(self.run_dir, self._portable, None if any_data else self.cases.fingerprint)
        self.plan = stored_plan(self.run_dir)
        require_same_classes(self.source, self.cases, self.plan)

    def _load_cases(self) -> Cases:
        """Check the config and read the dataset, or the cases that a client has put there."""
        if not self.is_checked:  # what a config of MONAI's commands may name is their business
            require_unaltered()
            validate.check_config(Composed(self.source), None)
        if self.time_budget is not None:
            read_duration(self.time_budget)
        given, plan = given_data(self.source), None
        if is_clients(self.source) and (self.bundle_root / "plan.json").is_file():
            # its network has to be that of the bundle, whatever the data are like
            plan = stored_plan(self.bundle_root)
            self.data_module.use_plan(plan)
        cases = self.data_module.load(given)
        if plan is not None:
            require_same_classes(self.source, cases, plan)
        if given is not None:
            self.dataset_dir = cases.root
            # a client that lists its cases means a new training, beside a finished one
            first, number = self.directory, 2
            while first.resume == "auto" and (self.run_dir / "summary.json").is_file():
                self.directory = RunDirectory(Path(f"{first.path}_{number}"), "auto")
                number += 1
        return cases

    def _require_same_on_all_ranks(self) -> None:
        mine = self.source | {"cache_dir": None, "data_roots": None}  # each host has its own places
        mine |= {"output_dir": str(self.run_dir), "dataset_dir": self.cases.fingerprint}
        changed = keys.changes(distributed.broadcast_object(mine), mine).values()
        differing, expected = [*chain.from_iterable(changed)], "the config and dataset of rank 0"
        got, remedy = f"other values of {', '.join(differing)}", "Start all ranks with the same."
        require(not differing, "ranks", expected, got, remedy)

    def _begin(self) -> tuple[Plan, Path | None]:
        """Take the run directory, for all ranks; return the plan and the checkpoint."""
        if self.run_dir.exists():
            self._take_directory()
        continues = self.directory.continues()
        found = self.data_module.run_preflight(self.cases)
        found.require_sound()
        # the plan of a run that has begun stays: another card must not change it
        plan = self._continued_plan() if continues else self._make_plan(found)
        ranks, size = distributed.size(), plan.batch_size
        expected = f"{ranks} or more, a patch for each rank"
        remedy = f"Start fewer ranks{'' if continues else ', or raise it'}."
        require(size >= ranks, "batch_size", expected, size, remedy)
        if not continues:
            self._read_pretrained(plan)
        self._take_directory()
        for line in (*found.notes, *(issue.line for issue in found.warnings)):
            log.warning("%s", line)  # now that there is a log.txt
        checkpoint = None
        if continues:
            checkpoint = self.directory.checkpoint()
            self._start = stored_record(self.run_dir).get("init_weights")
            if read_early_end(self.run_dir) and not read_early_end(self.run_dir, plan.max_epochs):
                (self.run_dir / STOP_FILE).unlink()  # more epochs are wanted than were planned then
        where = self.run_dir, self._portable, self.cases
        facts: dict[str, Any] = {"init_weights": self._start, "contents": self._contents}
        self._write = partial(write_configs, *where, fingerprint=found.fingerprint, **facts)
        self._write(plan=plan)
        return plan, checkpoint

    def _take_directory(self) -> None:
        """Lock the directory; refuse that of another run, and end where this one is finished."""
        if self.is_held:
            return
        self.directory.require_usable()
        self.directory.lock()
        self.directory.require_usable()  # another process may have come and gone in between
        if not self.directory.has_begun():
            return
        require_todays_names(self.run_dir)
        changed = changed_cases(self.run_dir, self.cases, self._contents)
        known = None if changed else self.cases.fingerprint
        news = [f"a changed {key}" for key in changes_since(self.run_dir, self._portable, known)]
        self._end_if_finished(changed)
        if changed:
            news.append(f"changed files of {some(changed)}")
            if not self.accept_changed_data:
                raise InputError(
                    f"dataset_dir: expected the data that the run in {self.run_dir} began with, "
                    f"got {news[-1]}. Restore them, choose another output_dir, or go on with "
                    "--accept_changed_data."
                )
            require_same_classes(self.source, self.cases, stored_plan(self.run_dir))
        for change in news:
            log.info("Continuing with %s", change)
        reason = stored_plan(self.run_dir).reasons.get("max_epochs", "")
        if self.time_budget and not reason.startswith(f"{self.time_budget}: "):
            log.info("time_budget %s is not used: steps are decided once", self.time_budget)

    def _continued_plan(self) -> Plan:
        """Return the stored plan; what may change while a run goes on is as given now."""
        plan, settings = stored_plan(self.run_dir), self.data_module.settings
        given = {
            key: value
            for key, value in settings.items()
            if keys.KEYS[key].kind == keys.CONTINUABLE and value not in (AUTO, getattr(plan, key))
        }
        return replace(plan, **given, reasons={**plan.reasons, **dict.fromkeys(given, "given")})

    def _end_if_finished(self, changed: list[str]) -> None:
        path = self.run_dir / "summary.json"
        summary = json.loads(path.read_text()) if path.is_file() else None
        epochs = self._continued_plan().max_epochs
        if end := read_early_end(self.run_dir, epochs):
            epochs = min(end.epoch, epochs)
        if summary is None or summary["progress"]["epoch"] < epochs:
            return
        missing = self._find_missing_pages()
        to_do = f"writing {' and '.join(map(str, missing))}" if missing else "nothing to do"
        log.info("This run is finished; %s.", to_do)
        if changed:
            text = "Its data changed: files of %s. Train on the new data with another output_dir."
            log.warning(text, some(changed))
        self._write_pages(missing)
        log_whereabouts(self.run_dir, summary)
        self.release()
        raise SystemExit(0)

    def _parser(self, plan: Plan) -> Parser:
        return Parser(deepcopy({**self.source, "plan": plan}))

    def _read_pretrained(self, plan: Plan) -> None:
        if self.init_weights is None and self.reinit_head:
            raise InputError("reinit_head: expected init_weights beside it, got null. Name a file.")
        if self.init_weights is None:
            return
        network = self._parser(plan).get_parsed_content("network_def")
        path = self.bundle_root / self.init_weights
        self.initial_weights, self._start = read_pretrained(path, network, self.reinit_head)

    def _make_plan(self, found: Preflight) -> Plan:
        """Decide the plan; a batch size that is `auto` is also limited by a trial on the card."""
        given = [key for key in DECIDED if self.data_module.settings.get(key, AUTO) != AUTO]
        expected = f"auto for {', '.join(given)}, which it decides"
        remedy = "Leave them out, or time_budget."
        require(not (self.time_budget and given), "time_budget", expected, "values", remedy)
        plan = self.data_module.plan(found)
        device = resolve_device(self.data_module.device)
        if self.source.get("batch_size") != AUTO or device.type != "cuda":
            return plan
        names = ("network", "loss_function", "optimizer", "precision")
        with torch.random.fork_rng(devices=[device]):
            parser = self._parser(plan)
            fitted = fit_batch_size({name: parser.get_parsed_content(name) for name in names}, plan)
        if fitted is plan:
            return plan
        again = self.data_module.plan(found, batch_size=fitted.batch_size)  # others follow from it
        return replace(again, reasons={**again.reasons, "batch_size": fitted.reasons["batch_size"]})

    def _fit_time_budget(self, budget: str) -> None:
        """Measure on all ranks what a run takes; the first one decides the steps."""

        def make_parser() -> Parser:
            made = {"plan": self.plan, "lifecycle": self, "process_group": self.process_group}
            parser = Parser({**deepcopy(self.source), **made})
            parser["train#handlers"] = parser["validate#handlers"] = []
            return parser

        def decide() -> Plan:
            gone_s, interval = time.monotonic() - self._began, self.source["val_interval"]
            gone_s += REPORT_S if self.report else 0
            plan = fit_time_budget(self.plan, budget, gone_s, costs, interval)
            self._write(plan=plan)
            return plan

        costs = measure_costs(make_parser, self.run_dir, budget)
        self.plan = distributed.run_on_main(decide)

    def _log_start(self) -> None:
        log_beginning(self.cases, self.plan, self.source)
        if distributed.size() > 1:
            rank, size = distributed.rank(), distributed.size()
            details.info("Rank %d of %d; batches are divided among them", rank, size)
        if self.initial_weights is not None:
            log.info("Weights of %s", self.init_weights)
            details.info("%s", self._start)
        log.info("Run directory %s; details: %s", self.run_dir, self.directory.log_file.name)

    # --- the end

    def leave(self, trainer: MixedPrecisionTrainer) -> None:
        """Write `summary.json`, release the lock and say where everything is."""
        if not self.is_held:
            return
        trainer.progress.phase = DONE
        if distributed.is_main():
            self._write_end(trainer)
        self.release()
        distributed.destroy()

    def release(self) -> None:
        """Let go of the run directory, also where the run failed."""
        self.directory.release()
        if getattr(sys.excepthook, "__module__", None) == __name__:
            sys.excepthook = sys.__excepthook__

    def _write_end(self, trainer: MixedPrecisionTrainer) -> None:
        cases = self.cases
        summary = summarize_run(
            trainer,
            self.run_dir,
            dataset=cases.name,
            dataset_hash=cases.fingerprint,
            config_hash=keys.identity_hash(self._portable),
            init_weights=self._start,
            process_group=self.process_group and self.process_group.describe(),
            num_cases={part: len(getattr(cases, part)) for part in ("train", "validation", "test")},
        )
        # With the summary a run is finished: the same command then writes only the pages that are
        # missing, so that those of an earlier end go before, and the new ones come after it.
        try:
            for page in (CARD, REPORT):
                (self.run_dir / page).unlink(missing_ok=True)
            write_json(self.run_dir / "summary.json", summary)
        except OSError as error:
            log.error("%s", error)
            raise TrainingStopped(str(error)) from error
        if read_early_end(self.run_dir) is None:  # it was asked for, too late
            (self.run_dir / STOP_FILE).unlink(missing_ok=True)
        self._write_pages(self._find_missing_pages())
        log_whereabouts(self.run_dir, summary)

    def _find_missing_pages(self) -> list[Path]:
        pages = (CARD, REPORT) if self.report else (CARD,)
        return [page for page in pages if not (self.run_dir / page).is_file()]

    def _write_pages(self, pages: list[Path]) -> None:
        """Write model card and report; a failure is logged, since the run itself has succeeded."""
        for page in pages:
            try:
                if page == CARD:
                    write_docs(self.run_dir)
                else:
                    from pipeline.reporting.report import write_report  # it takes a second

                    write_report(self.run_dir)
            except Exception as error:
                log.warning("%s: expected to write it, got: %s", page, error)

    def _shorten_failures(self) -> None:
        """Print one line about an exception that ends MONAI's own command, as `pipeline.run`."""

        def tell(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            if not isinstance(error, Exception):
                return sys.__excepthook__(kind, error, trace)
            sys.exit(print_failure(error, self.directory.log_file if self.is_held else None))

        if getattr(sys.excepthook, "__module__", None) in ("sys", __name__):  # nobody else's
            sys.excepthook = tell

    @cached_property
    def _contents(self) -> dict[str, str]:
        return contents_of(self.cases.all, self.cache_dir)

    @property
    def _portable(self) -> keys.Config:
        return portable(self.source, self.bundle_root, self.dataset_dir, self.run_dir)
