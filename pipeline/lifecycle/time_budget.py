"""The time budget of a run: the number of steps with which the whole command ends within it.

What steps, validations and scores take is measured once, before step 1 of a new run, on objects
that are made for this alone. The decision is stored in the run's plan.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine

from pipeline import distributed
from pipeline.config.parser import Parser
from pipeline.data.cases import Case, files_of, paths_of
from pipeline.data.plan import STEPS_PER_EPOCH, Plan
from pipeline.errors import require
from pipeline.evaluation.final_scores import Scoring
from pipeline.evaluation.scores import score_files
from pipeline.files import save
from pipeline.prediction.nifti_output import save_like
from pipeline.training.allocator import keep_freed_memory
from pipeline.training.checkpoint import non_finite
from pipeline.training.evaluator import MixedPrecisionEvaluator
from pipeline.training.graph import WARM_UP
from pipeline.training.trainer import MixedPrecisionTrainer, StepEvents
from pipeline.training.trial import TrialStep, random_states_kept

DECIDED = ("steps_per_epoch", "max_epochs", "warmup_steps")
DURATION = re.compile("".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in "hms"))
LEAST_STEPS = 10
MEASURED_STEPS, MEASURED_SHARE, MEASURED_S = 3, 0.03, 10.0  # at least, and at most of the budget
MEASURED_CASES = 2
OVERHEAD_SHARE = 0.2  # of training, that validations and checkpoints may take
LEAST_VALIDATIONS = 3  # where they fit into this share
SCORED = 1.5  # times, since the last network may be the best one, which is then scored once
REPORT_S = 2.0  # to import what draws, and to draw


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a run take."""

    start: float  # from the decision to step 1
    step: float
    epoch: float  # checkpoints at its end
    validation: float  # of all cases
    scores: float  # of one network


def read_duration(text: str) -> float:
    """Return the seconds of a text such as `1h30m`; raise an `InputError` for another one."""
    found = DURATION.fullmatch(text)
    hours, minutes, seconds = (float(n or 0) for n in (found.groups() if found else (0, 0, 0)))
    total_s = 3600 * hours + 60 * minutes + seconds
    expected = "a time with its units, such as 90s, 30m, 2h or 1h30m"
    require(total_s > 0, "time_budget", expected, repr(text), "Correct it.")
    return total_s


def fit_time_budget(
    plan: Plan, budget: str, gone_s: float, costs: Costs, val_interval: int
) -> Plan:
    """Decide the steps of a plan by a time budget, of which `gone_s` are over.

    Raises:
        InputError: If it is too short.
    """
    left_s = read_duration(budget) - gone_s - costs.start - costs.scores
    is_validated = val_interval * costs.step <= left_s
    val_interval = val_interval if is_validated else 1
    round_s = is_validated * costs.validation + val_interval * costs.epoch  # beside its steps
    least_s = round_s + max(LEAST_STEPS, val_interval) * costs.step
    expected = f"{math.ceil(least_s - left_s + read_duration(budget))}s or more here, for "
    remedy = "Raise it, or turn final_scores or report off."
    require(left_s >= least_s, "time_budget", f"{expected}{LEAST_STEPS} steps", budget, remedy)
    wanted = math.ceil(left_s / costs.step / STEPS_PER_EPOCH / val_interval)
    most = int(OVERHEAD_SHARE * left_s / max(round_s, 1e-9))
    rounds = max(1, min(max(wanted, LEAST_VALIDATIONS), most))
    if is_validated and rounds > 1:  # the only network that was validated is the last one
        left_s -= (SCORED - 1) * costs.scores
    epochs = rounds * val_interval
    length = max(1, int((left_s - rounds * round_s) / costs.step / epochs))
    steps = epochs * length
    reason = f"{budget}: {steps:,} steps of {costs.step:.3g} s, "
    reason += f"{rounds * is_validated} validations of {costs.validation:.2g} s, "
    reason += f"scores of a network {costs.scores:.2g} s"
    warmup = min(plan.warmup_steps, steps // 10)
    reasons = {**plan.reasons, **dict.fromkeys(DECIDED, reason)}
    decided = replace(plan, steps_per_epoch=length, max_epochs=epochs, reasons=reasons)
    return replace(decided, warmup_steps=warmup)


def process_age_s() -> float:
    """Return the age of this process if it is a command's alone; else 0, as in a notebook."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name if spec else Path(sys.argv[0]).stem
    try:
        if name.split(".")[0] not in ("ampseg", "monai", "pipeline"):
            return 0.0
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        return now - int(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # where there is no such file, or clock
        return 0.0


def measure_costs(make_parser: Callable[[], Parser], run_dir: Path, budget: str) -> Costs:
    """Measure what a run takes, on all ranks; only the cache is not afterwards what it was."""
    names = ("train#trainer", "validate#evaluator", "scoring")
    with _unnoticed():
        for _ in range(2):  # the first time, the cache is filled
            began, parser = time.monotonic(), make_parser()
            trainer, evaluator, scoring = map(parser.get_parsed_content, names)
            TrialStep(parser.get_parsed_content("validate#key_metric")).run(trainer)
            start = time.monotonic() - began
        if trainer.precision.device.type == "cpu":
            keep_freed_memory()
        limit_s = min(MEASURED_S, MEASURED_SHARE * read_duration(budget))
        parts = (
            start,
            _time_steps(trainer, limit_s),
            2 * _time_checkpoint(trainer, run_dir),
            _time_validation(evaluator),
            _time_scores(scoring) if scoring.enabled else 0.0,
        )
    return Costs(*map(max, zip(*distributed.all_gather_object(parts), strict=True)))


@contextmanager
def _unnoticed() -> Iterator[None]:
    """Leave random states, the log and the card's memory inside as they were."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with random_states_kept(device):
            yield
    finally:
        logging.disable(level)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _time_steps(trainer: MixedPrecisionTrainer, limit_s: float) -> float:
    """Return the mean time of steps, without those before which a CUDA graph is captured."""
    ends, first = list[float](), WARM_UP + 2 if trainer._graph else 1

    def note(trainer: MixedPrecisionTrainer) -> None:
        ends.append(time.monotonic())  # the host has waited for the device
        enough = len(ends) > first + MEASURED_STEPS and ends[-1] - ends[first] >= limit_s
        if distributed.broadcast_object(enough):
            trainer.terminate()

    trainer.add_event_handler(StepEvents.STEP_COMPLETED, note)
    Engine.run(trainer, trainer._batches, trainer.state.max_epochs)
    if trainer._graph:
        trainer._graph.end()
    return (ends[-1] - ends[first]) / (len(ends) - 1 - first)


def _time_checkpoint(trainer: MixedPrecisionTrainer, run_dir: Path) -> float:
    began = time.monotonic()
    if distributed.is_main():
        content = [part.state_dict() for part in (trainer.network, trainer.optimizer)]
        non_finite(content)
        save(content, file := run_dir / "measured.tmp")
        file.unlink()
    return time.monotonic() - began


def _time_validation(evaluator: MixedPrecisionEvaluator) -> float:
    loader: Any = evaluator.data_loader
    numbers = list(loader.sampler)
    batches = list(islice(loader, MEASURED_CASES))
    evaluator.data_loader, evaluator.state.epoch_length = batches, len(batches)
    began = time.monotonic()
    evaluator.run()
    seconds = time.monotonic() - began
    return seconds * _share(loader.dataset.data, numbers, MEASURED_CASES)


def _time_scores(scoring: Scoring) -> float:
    seconds, many = 0.0, max(MEASURED_CASES, distributed.own_cores())
    for cases, load in scoring.splits.values():
        mine = distributed.shard(range(len(cases)))
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            for number in mine[:MEASURED_CASES]:
                labels = scoring.segmenter(load(number)).labels
                save_like(labels, paths_of(cases[number])[0], Path(folder, f"{number}.nii.gz"))
            predicted = time.monotonic()
            # in the place of predictions: those of an untrained network have larger surfaces
            truth = [(cases[n]["case_id"], Path(cases[n]["label"])) for n in mine[:many]]
            pairs = [(case_id, path, path) for case_id, path in truth]
            score_files(pairs, ignore_value=scoring.ignore_value, **scoring.how)
        seconds += (predicted - began) * _share(cases, mine, MEASURED_CASES)
        seconds += (time.monotonic() - predicted) * _share(cases, mine, many)
    return seconds


def _share(cases: Sequence[Case], numbers: Sequence[int], measured: int) -> float:
    """Return how much larger the files of cases are than those of the first ones."""
    paths = [[p for of_key in files_of(cases[n]).values() for p in of_key] for n in numbers]
    sizes = [sum(map(os.path.getsize, of_case)) for of_case in paths]
    return sum(sizes) / max(1, sum(sizes[:measured]))
