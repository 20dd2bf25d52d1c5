"""Trainings of one config that differ in precision and seed: where they are, how they are made."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import keys
from pipeline.errors import STOPS, InputError, interrupted_status

PRECISIONS: dict[str, keys.Config] = {
    "float32": {"amp": False, "tf32": False},
    "tf32": {"amp": False, "tf32": True},
    "float16": {"amp": True, "amp_dtype": "float16", "tf32": False},
    "bfloat16": {"amp": True, "amp_dtype": "bfloat16", "tf32": False},
}
OWN_KEYS = ("amp", "amp_dtype", "tf32", "val_interval", "resume")


@dataclass(frozen=True)
class Plan:
    """What is compared, and where.

    Attributes:
        files: Config files.
        overrides: Config values over them, `output_dir` left out.
        out: Folder of all runs and of the certificate.
        dtypes: Precisions beside float32, the reference.
        seeds: Of the comparison.
        control_seeds: Of float32 as a control, as many again.
        margin: Difference of Dice that does not matter.
        jobs: Runs that train at the same time.
        allow: Names that `_target_` may hold beside the list.
        children: Their processes.
    """

    files: list[str]
    overrides: keys.Config
    out: Path
    dtypes: list[str]
    seeds: list[int]
    control_seeds: list[int]
    margin: float
    jobs: int
    allow: list[str] = field(default_factory=list)
    children: Children = field(default_factory=lambda: Children(), compare=False)

    def run_overrides(self, dtype: str, seed: int) -> keys.Config:
        """Config values of one run."""
        own = {"output_dir": str(self.run_dir(dtype, seed)), "seed": seed, "resume": "auto"}
        own |= {"final_scores": False, "report": False}  # a certificate is of validation.json
        return {**self.overrides, **PRECISIONS[dtype], **own}

    def run_dir(self, dtype: str, seed: int) -> Path:
        """Its run directory."""
        return self.out / f"{dtype}_seed{seed}"

    def read(self, dtype: str, seed: int, name: str) -> Any:
        """Content of a JSON file of a run; `None` if it is not there."""
        path = self.run_dir(dtype, seed) / name
        return json.loads(path.read_text()) if path.is_file() else None

    def runs(self) -> list[tuple[str, int]]:
        """Precision and seed of every run, the control last."""
        pairs = [(dtype, seed) for seed in self.seeds for dtype in ("float32", *self.dtypes)]
        return pairs + [("float32", seed) for seed in self.control_seeds]


def train(plan: Plan) -> None:
    """Bring every run to its end, or to its stop; what was done before is not done again.

    A run that stopped before damage leaves the reason in `stopped.json`; in float32, without which
    there is nothing to compare with, it ends everything.

    Raises:
        InputError: If a run refuses its input, or was not in the precision that it stands for.
        RunFailed: If a run failed.
    """
    runs = plan.runs()
    with ThreadPoolExecutor(plan.jobs) as pool:
        started = {pool.submit(_train_one, plan, *run): run for run in runs}
        try:
            for number, done in enumerate(as_completed(started), start=1):
                done.result()
                told = _outcome(plan, *started[done])
                print(f"[{number}/{len(runs)}] {told}", flush=True)
        except BaseException:
            plan.children.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class RunFailed(Exception):  # noqa: N818 - the name says it
    """A run that did not come to its end, with what it said last."""


class Children:
    """Processes that run at the same time, and are told to end together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen] = []
        self._stopped = False

    def run(self, command: list[str]) -> tuple[int, str, str]:
        """Run a command to its end: its exit status, output and errors.

        Raises:
            RunFailed: If `stop` was called before.
        """
        with self._lock:
            if self._stopped:
                raise RunFailed("not begun")
            child = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            self._running.append(child)
        output, errors = child.communicate()
        with self._lock:
            self._running.remove(child)
        return child.returncode, output, errors

    def stop(self) -> None:
        """Let no further process begin; those that run save, and go on with the next command."""
        with self._lock:
            self._stopped = True
            for child in self._running:
                child.terminate()


def _train_one(plan: Plan, dtype: str, seed: int) -> None:
    """Train in a process of its own, unless that was done before."""
    if plan.read(dtype, seed, "summary.json") or plan.read(dtype, seed, "stopped.json"):
        return
    values = plan.run_overrides(dtype, seed).items()
    words = [word for key, value in values for word in (f"--{key}", json.dumps(value))]
    words += [word for name in plan.allow for word in ("--allow", name)]
    command = [sys.executable, "-m", "pipeline.run", *plan.files, *words]
    status, output, errors = plan.children.run(command)
    if status == 0:
        return
    if status == 2:
        raise InputError(errors.strip())
    where = plan.run_dir(dtype, seed)
    stop = output.find(STOPS)
    if status == 1 and stop >= 0 and dtype != "float32":
        reason = output[output.rfind("\n", 0, stop) + 1 :].strip()
        (where / "stopped.json").write_text(json.dumps({"reason": reason}) + "\n")
        return
    what = "was interrupted" if status == interrupted_status() else "failed"
    tail = "\n".join((output + errors).splitlines()[-8:])
    raise RunFailed(
        f"{dtype} seed {seed}: expected the run to end, it {what} (exit status "
        f"{status}). See {where}/log.txt; the same command goes on.\n{tail}"
    )


def _outcome(plan: Plan, dtype: str, seed: int) -> str:
    """One line about a run; checks that it was in the precision it stands for."""
    summary = plan.read(dtype, seed, "summary.json")
    if summary is None:
        return f"{dtype} seed {seed}: training stopped, see stopped.json"
    effective = (summary["effective"]["dtype"], summary["effective"]["tf32"])
    asked = PRECISIONS[dtype]
    if effective != (asked.get("amp_dtype", "float32"), asked["tf32"]):
        raise InputError(
            f"{plan.run_dir(dtype, seed)}: expected a run in {dtype}, got dtype {effective[0]}, "
            f"tf32 {effective[1]}. Leave the precision to the certificate."
        )
    dice, seconds = summary["last_mean_dice"], summary["wall_time_s"]
    shown = "none" if dice is None else f"{dice:.4f}"
    return f"{dtype} seed {seed}: mean Dice {shown}, {seconds:.0f} s"
