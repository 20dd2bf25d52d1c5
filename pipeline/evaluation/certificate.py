"""A certificate: whether mixed precision costs accuracy, for a dataset and a config.

The config is trained with the same seeds in each precision, in processes of their own, and the
scores of the validation cases are compared.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import keys, validate
from pipeline.config.compose import Composed
from pipeline.config.keys import PRECISIONS
from pipeline.errors import STOPS, InputError, refuse, require
from pipeline.evaluation.comparison import read_arms
from pipeline.evaluation.scores import format_table
from pipeline.evaluation.statistics import EQUIVALENT, WORSE, compare_arms
from pipeline.files import write_durably, write_json
from pipeline.precision import resolve_device
from pipeline.signals import signal_handlers

OWN_KEYS = ("amp", "amp_dtype", "tf32", "val_interval", "resume")
CONTROL = "float32, other seeds"
UNDECIDED = "not enough evidence"

Run = tuple[str, int]  # precision and seed


@dataclass(frozen=True)
class PrecisionSweep:
    """Trainings of one config that differ in precision and seed, `jobs` of them at a time.

    `command` trains, without precision, seed and run directory; `dtypes` are compared with float32
    over `seeds`, float32 itself over as many `control_seeds`; `margin` is a difference of Dice.
    """

    dataset: str
    out: str
    command: list[str]
    dtypes: list[str]
    seeds: list[int]
    control_seeds: list[int]
    margin: float
    jobs: int = 1

    @property
    def runs(self) -> list[Run]:
        """List all runs, the control last."""
        pairs = [(dtype, seed) for seed in self.seeds for dtype in ("float32", *self.dtypes)]
        return pairs + [("float32", seed) for seed in self.control_seeds]

    def run_dir(self, run: Run) -> Path:
        """Return the run directory of a run."""
        return Path(self.out, "{}_seed{}".format(*run))


def certify(sweep: PrecisionSweep, command: str) -> int:
    """Train, compare and write the certificate; return the exit status of `ampseg certify`."""
    try:
        with signal_handlers({signal.SIGTERM: signal.default_int_handler}):
            certificate = make_certificate(sweep, train(sweep))
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        return 130
    certificate["command"] = command
    write_json(Path(sweep.out, "certificate.json"), certificate)
    page = format_page(certificate)
    write_durably(Path(sweep.out, "certificate.md"), page.encode())
    print(f"\n{page}\n  {sweep.out}/certificate.json\n  {sweep.out}/certificate.md")
    judged = [certificate["classes"].get(name, {}) for name in sweep.dtypes]
    verdicts = [entry["verdict"] for by_class in judged for entry in by_class.values()]
    return int(WORSE in verdicts or bool(certificate["stopped"]))


def plan_sweep(
    composed: Composed, files: Sequence[str], overrides: keys.Config, allow: Sequence[str],
    dtypes: Sequence[str], num_seeds: int, margin: float, jobs: int,
) -> PrecisionSweep:  # fmt: skip
    """Plan the runs of a config; raise an `InputError` for a mistake in options or config."""
    validate.check_config(composed, allow)
    source = composed.source
    expected = "expected no value, since a certificate sets it itself. Leave it out."
    faults = [f"--{key}: {expected}" for key in OWN_KEYS if key in overrides]
    if source["fold"] == "all":
        faults.append("fold: expected one of the folds, to compare on, got 'all'. Change it.")
    compared = [name for name in dict.fromkeys(dtypes) if name != "float32"]
    if resolve_device(source["device"]).type != "cuda":
        compared = [name for name in compared if name != "tf32"]
    if not compared:
        faults.append("--dtypes: expected one to compare with float32 here, got none. Add it.")
    refuse(faults)
    values = overrides | {"final_scores": True, "report": False, "resume": "auto"}
    epochs = source["max_epochs"]  # without a validation in between, the last network is the model
    values["val_interval"] = epochs if isinstance(epochs, int) else 10**6
    command = [sys.executable, "-m", "pipeline.run", *files, *_options(values)]
    command += [word for name in allow for word in ("--allow", name)]
    dataset = Path(source["bundle_root"], source["dataset_dir"]).resolve().name
    out = Path(source["bundle_root"], source["output_dir"] or f"runs/{dataset}_certificate")
    seeds = [source["seed"] + n for n in range(2 * num_seeds)]
    sweep = PrecisionSweep(
        dataset, str(out.resolve()), command, compared, seeds[:num_seeds], seeds[num_seeds:],
        margin, jobs,
    )  # fmt: skip
    _require_same_settings(sweep, source)
    return sweep


def _require_same_settings(sweep: PrecisionSweep, source: keys.Config) -> None:
    """Refuse finished runs of other settings, which would not be trained again."""
    plain = {key for key, spec in keys.KEYS.items() if "object" not in spec.types} - {*OWN_KEYS}
    for folder in map(sweep.run_dir, sweep.runs):
        if (folder / "summary.json").is_file():
            stored = json.loads((folder / "configs/train.json").read_text())
            changed = plain & {*keys.changes(stored, source)[keys.CONTINUABLE]}
            got = f"other values of {', '.join(sorted(changed))}"
            require(not changed, folder, "a run of this config", got, "Choose another output_dir.")


def _options(values: keys.Config) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", json.dumps(value))]


def train(sweep: PrecisionSweep) -> dict[str, str]:
    """Train every run to its end; raise an `InputError` or, if one failed, a `SystemExit`.

    Returns:
        For each precision in which training stopped before damage, but float32, the reason.
    """
    children: list[subprocess.Popen] = []
    stopping = threading.Event()

    def train_one(run: Run) -> str | None:
        values = {**PRECISIONS[run[0]], "seed": run[1], "output_dir": str(sweep.run_dir(run))}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        child = subprocess.Popen([*sweep.command, *_options(values)], text=True, **pipes)
        children.append(child)
        if stopping.is_set():
            child.terminate()
        output, errors = child.communicate()
        if child.returncode == 2:
            raise InputError(errors.strip())
        reason = next((line for line in output.splitlines() if STOPS in line), None)
        if child.returncode == 1 and reason and run[0] != "float32":
            return reason.strip()
        if child.returncode:
            tail = "\n".join((output + errors).splitlines()[-8:])
            got = f"exit status {child.returncode}. The same command goes on.\n{tail}"
            raise SystemExit(f"{run[0]} seed {run[1]}: expected the run to end, got {got}")
        return None

    stopped: dict[str, str] = {}

    with ThreadPoolExecutor(sweep.jobs) as pool:
        try:
            for run, reason in zip(sweep.runs, pool.map(train_one, sweep.runs), strict=True):
                print("{} seed {}: {}".format(*run, reason or "trained"), flush=True)
                if reason:
                    stopped.setdefault(run[0], reason)
        except BaseException:  # runs that are terminated save, and go on with the next command
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()
            raise
    return stopped


def make_certificate(sweep: PrecisionSweep, stopped: Mapping[str, str]) -> dict[str, Any]:
    """Compare the precisions that did not stop with float32; returns plain values for JSON."""
    dtypes = [dtype for dtype in sweep.dtypes if dtype not in stopped]
    compared = {dtype: [(dtype, seed) for seed in sweep.seeds] for dtype in dtypes}
    compared[CONTROL] = [("float32", seed) for seed in sweep.control_seeds]
    kept = ("effective", "skipped_steps", "wall_time_s", "peak_memory_bytes")
    records: dict[str, dict[str, Any]] = {}
    for dtype, seed in (run for run in sweep.runs if run[0] not in stopped):
        summary = json.loads((sweep.run_dir((dtype, seed)) / "summary.json").read_text())
        records.setdefault(dtype, {})[str(seed)] = {key: summary[key] for key in kept}
    shared = {key: summary[key] for key in ("device_name", "versions", "steps", "num_cases")}
    classes = {name: _compare(sweep, runs) for name, runs in compared.items()}
    return vars(sweep) | shared | {"classes": classes, "runs": records, "stopped": stopped}


def _compare(sweep: PrecisionSweep, runs: Sequence[Run]) -> dict[str, Any]:
    """Compare runs with those in float32, each class by itself."""
    arms = {"a": runs, "b": [("float32", seed) for seed in sweep.seeds]}
    table = "scores/validation_last/metrics.csv"
    files = {arm: [str(sweep.run_dir(run) / table) for run in of] for arm, of in arms.items()}
    scores = read_arms(files, "dice")
    found = {}
    for k, name in enumerate(scores.class_names):
        a, b = (arm[..., [k]] for arm in scores.arms)
        entry = compare_arms(a, b, scores.persons, [name], margin=sweep.margin)["classes"][name]
        high = entry["interval"][1]
        if high is not None and high < -entry["margin"]:
            entry["verdict"] = WORSE
        elif entry["verdict"] != EQUIVALENT or entry["mean_b"] < 10 * sweep.margin:
            entry["verdict"] = UNDECIDED
        found[name] = entry
    return found


VERDICTS = "precision, class, float32:.4f, difference:+.4f, 95 % from:+.4f, to:+.4f, verdict"
RUNS = "precision, seed, in force, training s:.0f, peak GB:.2f, skipped steps"
PAGE = """\
# Precision certificate: {dataset}

{device_name}, torch {versions[torch]}, MONAI {versions[monai]}; {steps} steps per run, seeds \
{seeds}, {num_cases[validation]} validation cases, last weights.

    {command}

Difference of Dice to float32 with the same seeds on the same batches, with a 95 % interval over \
seeds and persons, as `ampseg compare` computes it. Equivalent: the interval lies \
within ±{margin:g}; worse: below -{margin:g}, or training stopped; a class with less than \
{learnt:g} Dice in float32 is not called equivalent. The last rows compare float32 with itself, \
seeds {control_seeds} with {seeds}: the noise that any comparison stands in.

{verdicts}

{runs}
"""


def format_page(certificate: dict[str, Any]) -> str:
    """Format a certificate, as `make_certificate` returns it, with the `command`, in Markdown."""
    verdicts, runs = [], []
    for precision, classes in certificate["classes"].items():
        for name, of in classes.items():
            cells = [of["mean_b"], of["difference"], *of["interval"]]
            verdict = of["verdict"] + " (of ranks)" * (of["scale"] == "rank")
            verdicts.append([precision, name, *cells, verdict])
    for precision, reason in certificate["stopped"].items():
        verdicts.append([precision, "all", *[None] * 4, f"{WORSE}: {reason}"])
    for precision, by_seed in certificate["runs"].items():
        for seed, run in by_seed.items():
            dtype = run["effective"]["dtype"] + ", tf32" * run["effective"]["tf32"]
            peak = run["peak_memory_bytes"] and run["peak_memory_bytes"] / 1e9
            runs.append([precision, seed, dtype, run["wall_time_s"], peak, run["skipped_steps"]])
    shown = {key: ", ".join(map(str, certificate[key])) for key in ("seeds", "control_seeds")}
    shown["verdicts"] = "\n".join(format_table(VERDICTS, verdicts))
    shown["runs"] = "\n".join(format_table(RUNS, runs))
    return PAGE.format(**certificate | shown, learnt=10 * certificate["margin"])
