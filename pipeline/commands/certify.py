"""Certify that mixed precision costs no accuracy, for a dataset and a config of your own.

    python -m pipeline certify CONFIG.json [MORE.json ...] [options] [--key value ...]

Trains the config with the same seeds, hence on the same batches, in each precision, and in float32
with as many other seeds, as a control, and compares the scores of the validation cases as `compare`
does. `output_dir` (`runs/<name of dataset_dir>_certificate`) gets the runs, `certificate.json` and
`certificate.md`. The same command goes on; further dtypes and another margin cost what is new.

Exit status: 0 if no class is worse, 1 if one is (a precision in which training stops is worse) or a
run failed, 2 a mistake in input or config, 130 interrupted.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.commands.command import CommandParser, number_in
from pipeline.config import allowed, keys, validate
from pipeline.config.compose import compose_located, parse_overrides
from pipeline.errors import STOPS, InputError, interrupted_status
from pipeline.evaluation.comparison import read_arms
from pipeline.evaluation.scores import format_number as form
from pipeline.evaluation.statistics import EQUIVALENT, WORSE, Arm, compare_arms
from pipeline.files import write_json
from pipeline.precision import resolve_device
from pipeline.run import split_words

PRECISIONS: dict[str, keys.Config] = {
    "float32": {"amp": False, "tf32": False},
    "tf32": {"amp": False, "tf32": True},
    "float16": {"amp": True, "amp_dtype": "float16", "tf32": False},
    "bfloat16": {"amp": True, "amp_dtype": "bfloat16", "tf32": False},
}
OWN_KEYS = ("amp", "amp_dtype", "tf32", "val_interval", "resume")
CONTROL = "float32, other seeds"
UNDECIDED = "not enough evidence"

Run = tuple[str, int]  # precision and seed


class RunFailed(Exception):  # noqa: N818
    """A run did not come to its end; the message has its last lines."""


@dataclass(frozen=True)
class PrecisionSweep:
    """Trainings of one config that differ in precision and seed.

    `command` trains, without precision, seed and run directory; `dtypes` are compared with float32
    over `seeds`, float32 itself over as many `control_seeds`; `margin` is a difference of Dice.
    """

    dataset: str
    out: Path
    command: list[str]
    dtypes: list[str]
    seeds: list[int]
    control_seeds: list[int]
    margin: float

    @property
    def runs(self) -> list[Run]:
        """All runs, the control last."""
        pairs = [(dtype, seed) for seed in self.seeds for dtype in ("float32", *self.dtypes)]
        return pairs + [("float32", seed) for seed in self.control_seeds]

    def run_dir(self, run: Run) -> Path:
        """Return the run directory of a run."""
        return self.out / "{}_seed{}".format(*run)


def main(words: Sequence[str] | None = None) -> int:
    """Certify; returns the exit status.

    Args:
        words: The command line after the command, by default this process's.
    """
    words = list(sys.argv[1:] if words is None else words)
    try:
        sweep, jobs = read_command(words)
        certificate = make_certificate(sweep, train(sweep, jobs))
    except InputError as error:
        error.tell()
        return 2
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        return 130
    certificate["command"] = shlex.join(["python", "-m", "pipeline", "certify", *words])
    write_json(sweep.out / "certificate.json", certificate)
    page = format_page(certificate)
    (sweep.out / "certificate.md").write_text(page)
    print(f"\n{page}\n  {sweep.out}/certificate.json\n  {sweep.out}/certificate.md")
    entries = [of for name in sweep.dtypes for of in certificate["classes"][name].values()]
    return int(WORSE in [entry["verdict"] for entry in entries])


def read_command(words: list[str]) -> tuple[PrecisionSweep, int]:
    """Read the command line; also return the number of runs that train at the same time.

    Raises:
        InputError: For a mistake in options or config.
    """
    parser = CommandParser("certify", __doc__)
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=PRECISIONS, default=[*PRECISIONS])
    add("--seeds", type=number_in(2, kind=int), default=3, help="in each precision (3)")
    add("--margin", type=number_in(1e-6, 1), default=0.005, help="of Dice, that does not matter")
    add("--jobs", type=number_in(1, kind=int), default=1, help="runs at the same time (1)")
    files, rest = split_words(words)
    allow, rest = allowed.split_allow(rest)
    given, rest = parser.parse_known_args(rest)
    overrides = parse_overrides(rest)
    faults = [
        f"--{key}: expected no value, since a certificate sets it itself. Leave it out."
        for key in OWN_KEYS
        if key in overrides
    ]
    if not files:
        faults.append("command line: expected a config file first, got none. See --help.")
    if faults:
        raise InputError(*faults)
    composed = compose_located(files, overrides)
    validate.check_config(composed, allow)
    source = composed.source
    if source["fold"] == "all":
        raise InputError("fold: expected one of the folds, to compare on, got 'all'. Change it.")
    dataset = Path(source["bundle_root"], source["dataset_dir"]).resolve().name
    out = source["output_dir"] or f"runs/{dataset}_certificate"
    epochs = source["train"]["trainer"]["max_epochs"]
    epochs = source["max_epochs"] if epochs == "@max_epochs" else epochs
    fixed = {"val_interval": epochs, "final_scores": True, "report": False, "resume": "auto"}
    for key in ("seed", "output_dir"):  # each run has its own
        overrides.pop(key, None)
    command = [sys.executable, "-m", "pipeline.run", *files, *_options(overrides | fixed)]
    command += [word for name in allow for word in ("--allow", name)]
    first, middle, end = (source["seed"] + n * given.seeds for n in range(3))
    sweep = PrecisionSweep(
        dataset,
        Path(source["bundle_root"], out).resolve(),
        command,
        _choose_dtypes(given.dtypes, source["device"]),
        list(range(first, middle)),
        list(range(middle, end)),
        given.margin,
    )
    _require_same_settings(sweep, source | fixed)
    return sweep, given.jobs


def _require_same_settings(sweep: PrecisionSweep, source: keys.Config) -> None:
    """Refuse finished runs of other settings, which would not be trained again."""
    skipped = {*OWN_KEYS, "seed"}
    skipped |= {k for k, spec in keys.KEYS.items() if {"object", "path"} & {*spec.types.split()}}
    for folder in (sweep.run_dir(run) for run in sweep.runs):
        if (folder / "summary.json").is_file():
            stored = json.loads((folder / "configs/train.json").read_text())
            changed = keys.changes(stored, source)
            known = keys.KEYS.keys() - skipped
            names = [k for kind in (keys.IDENTITY, keys.CONTINUABLE) for k in changed[kind]]
            if names := [name for name in names if name in known]:
                expected = f"{folder}: expected a run of this config, got other values of "
                raise InputError(f"{expected}{', '.join(names)}. Choose another output_dir.")


def _options(values: keys.Config) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", json.dumps(value))]


def _choose_dtypes(dtypes: Sequence[str], device: str) -> list[str]:
    """Return precisions to compare with float32; TF32 exists on CUDA only."""
    compared = [name for name in dict.fromkeys(dtypes) if name != "float32"]
    if "tf32" in compared and resolve_device(device).type != "cuda":
        print("tf32 is left out: it exists on CUDA only.")
        compared.remove("tf32")
    if not compared:
        raise InputError("--dtypes: expected one to compare with float32, got none.")
    return compared


def train(sweep: PrecisionSweep, jobs: int) -> dict[Run, str]:
    """Train every run to its end; a finished run says so and ends at once.

    Returns:
        The reason for each run that stopped before damage; in float32 that is a failure.

    Raises:
        InputError: If a run refuses its input.
        RunFailed: If a run failed.
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
        return _check_end(run, child.returncode, output, errors)

    stopped = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for run, reason in zip(sweep.runs, pool.map(train_one, sweep.runs), strict=True):
                print("{} seed {}: {}".format(*run, reason or "trained"), flush=True)
                if reason:
                    stopped[run] = reason
        except BaseException:  # runs that are terminated save, and go on with the next command
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()
            raise
    return stopped


def _check_end(run: Run, status: int, output: str, errors: str) -> str | None:
    if status == 0:
        return None
    if status == 2:
        raise InputError(errors.strip())
    stop = output.find(STOPS)
    if status == 1 and stop >= 0 and run[0] != "float32":
        return output[output.rfind("\n", 0, stop) + 1 :].strip()
    what = "was interrupted" if status == interrupted_status() else "failed"
    tail = "\n".join((output + errors).splitlines()[-8:])
    raise RunFailed(
        f"{run[0]} seed {run[1]}: expected the run to end, it {what} (exit status {status}). The "
        f"same command goes on.\n{tail}"
    )


def make_certificate(sweep: PrecisionSweep, stopped: Mapping[Run, str]) -> dict[str, Any]:
    """Compare runs that are all trained, but for those that `stopped`; plain values for JSON."""
    compared = {dtype: [(dtype, seed) for seed in sweep.seeds] for dtype in sweep.dtypes}
    compared[CONTROL] = [("float32", seed) for seed in sweep.control_seeds]
    classes = {
        name: _compare(sweep, runs, bool(stopped.keys() & runs)) for name, runs in compared.items()
    }
    kept = ("effective", "last_mean_dice", "skipped_steps", "wall_time_s", "peak_memory_bytes")
    records: dict[str, dict[str, Any]] = {}
    for run in sweep.runs:
        if run in stopped:
            record = {"stopped": stopped[run]}
        else:
            summary = json.loads((sweep.run_dir(run) / "summary.json").read_text())
            record = {key: summary[key] for key in kept}
        records.setdefault(run[0], {})[str(run[1])] = record
    return {
        "dataset": sweep.dataset,
        **{key: summary[key] for key in ("device_name", "versions", "steps", "num_cases")},
        "margin": sweep.margin,
        "seeds": sweep.seeds,
        "control_seeds": sweep.control_seeds,
        "classes": classes,
        "runs": records,
    }


def _compare(sweep: PrecisionSweep, runs: Sequence[Run], is_stopped: bool) -> dict[str, Any]:
    """Compare runs with those in float32, each class by itself."""
    reference = [("float32", seed) for seed in sweep.seeds]
    files = {
        arm: [str(sweep.run_dir(run) / "scores/validation_last/metrics.csv") for run in of_arm]
        for arm, of_arm in (("a", reference if is_stopped else runs), ("b", reference))
    }
    scores = read_arms(files, "dice")
    found = {}
    for k, name in enumerate(scores.class_names):
        a, b = (Arm(arm.values[..., [k]], arm.best[..., [k]]) for arm in scores.arms)
        entry = compare_arms(a, b, scores.persons, [name], margin=sweep.margin)["classes"][name]
        high = entry["interval"][1]
        if is_stopped:
            entry |= {"verdict": WORSE, "difference": None, "interval": [None, None]}
        elif high is not None and high < -entry["margin"]:
            entry["verdict"] = WORSE
        elif entry["verdict"] != EQUIVALENT or entry["mean_b"] < 10 * sweep.margin:
            entry["verdict"] = UNDECIDED
        found[name] = entry
    return found


PAGE = """\
# Precision certificate: {dataset}

{device_name}, torch {versions[torch]}, MONAI {versions[monai]}; {steps} steps per run, seeds \
{seeds}, {num_cases[validation]} validation cases, last weights.

    {command}

Difference of Dice to float32 with the same seeds on the same batches, with a 95 % interval over \
seeds and persons, as `python -m pipeline compare` computes it. Equivalent: the interval lies \
within ±{margin:g}; worse: below -{margin:g}, or training stopped; a class with less than \
{learnt:g} Dice in float32 is not called equivalent. The last rows compare float32 with itself, \
seeds {control_seeds} with {seeds}: the noise that any comparison stands in.

| precision | class | Dice in float32 | difference | 95 % interval | verdict |
|---|---|---|---|---|---|
{verdicts}

| precision | seed | in force | training | peak memory | skipped steps |
|---|---|---|---|---|---|
{runs}
"""


def format_page(certificate: Mapping[str, Any]) -> str:
    """Format a certificate, as `make_certificate` returns it, with the `command`, in Markdown."""
    verdicts, runs = [], []
    for precision, classes in certificate["classes"].items():
        for name, of in classes.items():
            interval = " to ".join(form(end, "+.4f") for end in of["interval"])
            interval += " (of ranks, as scores are undefined)" * (of["scale"] == "rank")
            cells = form(of["mean_b"]), form(of["difference"], "+.4f"), interval, of["verdict"]
            verdicts.append(f"| {' | '.join([precision, name, *cells])} |")
    for precision, by_seed in certificate["runs"].items():
        for seed, run in by_seed.items():
            if "stopped" in run:
                said = f"stopped: {run['stopped']} | | |"
            else:
                dtype, peak = run["effective"]["dtype"], run["peak_memory_bytes"]
                said = f"{dtype}{', tf32' * run['effective']['tf32']} | {run['wall_time_s']:.0f} s"
                said += f" | {form(peak and peak / 1e9, '.2f')} GB | {run['skipped_steps']}"
            runs.append(f"| {precision} | {seed} | {said} |")
    certificate = {**certificate, "verdicts": "\n".join(verdicts), "runs": "\n".join(runs)}
    for key in ("seeds", "control_seeds"):
        certificate[key] = ", ".join(map(str, certificate[key]))
    return PAGE.format(**certificate, learnt=10 * certificate["margin"])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no run is left behind
    sys.exit(main())
