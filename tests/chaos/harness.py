"""Real processes that train, and the ways in which they are made to die.

Processes come from a fork server that has imported everything, so that a run takes a second and
hundreds of deaths take minutes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from pipeline.lifecycle import run_directory
from pipeline.training.checkpoint import load_checkpoint, newest_checkpoint
from pipeline.training.trainer import MixedPrecisionTrainer

EVERY = 2  # steps between checkpoints
SETTINGS = {
    "spacing": [1, 1, 1], "roi_size": [16, 16, 8], "base_channels": 2, "num_folds": 3,
    "network_def#num_dense_layers": 1, "network_def#growth_rate": 4, "network_def#dropout": 0.2,
    "network_def#strides": [[2, 2, 1], [2, 2, 2]], "steps_per_epoch": 5, "max_epochs": 4,
    "val_interval": 1, "warmup_steps": 1, "log_every": 1, "checkpoint_every": EVERY,
    "learning_rate": 0.005,
    "final_scores": False, "report": False,  # half of the time of such a run
}  # fmt: skip

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch.utils.tensorboard", "monai.bundle", "monai.engines", "monai.inferers",
     "pipeline.lifecycle.lifecycle", "pipeline.training.flight_recorder",
     "pipeline.training.logging_handlers",
     "pipeline.training.loss", "pipeline.training.checkpoint", "pipeline.evaluation.final_scores",
     "pipeline.run", "networks.dense_unet", "transforms.augment", "transforms.preprocess"]
)  # fmt: skip


def train(words: list[str], folder: Path, fault: str | None, environment: dict[str, str]) -> None:
    """Body of a process: `pipeline.run`, its output and steps in files, a fault arranged before."""
    os.environ.update(environment)
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.path[:0] = [str(Path(__file__).parent)]  # for the classes in faults.py
    run_directory.HEARTBEAT_S, run_directory.WATCH_S = 0.2, 1.5
    kind, _, number = (fault or "").partition(" ")
    pause = (int(number), folder / "go") if kind == "pause" else None
    log_steps(open(folder / "steps.txt", "a", buffering=1), pause)  # noqa: SIM115 - until the end
    if fault and pause is None:
        arrange(kind, int(number))
    from pipeline.run import main

    status = main(words)
    sys.stdout.flush()
    os._exit(status)


def log_steps(file: TextIO, pause: tuple[int, Path] | None) -> None:
    """Write each step when everything that belongs to it is done; at one, wait for a file."""
    iteration = MixedPrecisionTrainer._iteration

    def logged(self: MixedPrecisionTrainer, engine: Any, batch: Any) -> Any:
        output = iteration(self, engine, batch)  # a step each: nothing is accumulated
        file.write(f"{self.progress.step}\n")
        while pause and self.progress.step == pause[0] and not pause[1].exists():
            time.sleep(0.02)
        return output

    MixedPrecisionTrainer._iteration = logged  # type: ignore[method-assign]


def arrange(kind: str, number: int) -> None:
    """What is to happen, and when.

    `die N`: SIGKILL at the N-th call that writes durably, a write done by half. `die_saving N`:
    likewise, counting only the calls of checkpoints.
    """
    left, saving = [number], set()
    opened = os.open

    def note(path: Any, *args: Any, **kwargs: Any) -> int:
        file = opened(path, *args, **kwargs)
        (saving.add if "checkpoints" in str(path) else saving.discard)(file)
        return file

    def dying(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            of_checkpoint = args[0] in saving or "checkpoints" in str(args[0])
            left[0] -= kind == "die" or of_checkpoint
            if left[0] == 0:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    os.open = note
    for name in ("write", "fsync", "replace"):  # as pipeline.files makes them
        setattr(os, name, dying(name))


class Run:
    """One run directory, and the processes that work on it one after the other."""

    def __init__(self, folder: Path, dataset: Path, **changes: Any) -> None:
        self.folder, self.dir = folder, folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        values = {**SETTINGS, "dataset_dir": str(dataset), "output_dir": str(self.dir),
                  "cache_dir": str(folder.parent / "cache"), **changes}  # fmt: skip
        self.words = ["configs/amp.json"]
        for key, value in values.items():
            self.words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]

    def start(self, fault: str | None = None, **environment: str) -> Any:
        """A process at work."""
        process = CONTEXT.Process(target=train, args=(self.words, self.folder, fault, environment))
        process.start()
        return process

    def start_and_pause(self, step: int, **environment: str) -> Any:
        """A process that waits after `step`, until `go_on` or its death."""
        (self.folder / "go").unlink(missing_ok=True)
        process = self.start(f"pause {step}", **environment)
        wait_for(lambda: self.last_step() == step)
        return process

    def go_on(self) -> None:
        """Let the process that waits go on."""
        (self.folder / "go").touch()

    def finish(self, fault: str | None = None) -> int:
        """Its exit status."""
        process = self.start(fault)
        process.join(120)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode

    def kill_after(self, seconds: float) -> bool:
        """SIGKILL at a moment; whether it was still at work."""
        process = self.start()
        process.join(seconds)
        working = process.exitcode is None
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        return working

    @property
    def output(self) -> str:
        path = self.folder / "output.txt"
        return path.read_text() if path.exists() else ""

    def last_step(self) -> int:
        """The step that the latest process came to; 0 if it took none."""
        path = self.folder / "steps.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return int(lines[-1]) if lines else 0

    def acknowledged_step(self) -> int:
        """Step of the newest checkpoint; it must load."""
        path = newest_checkpoint(self.dir / "checkpoints")
        return load_checkpoint(path)["progress"]["step"] if path else 0

    def digest(self) -> str:
        """Of everything a checkpoint holds but the time it took."""
        content = load_checkpoint(newest_checkpoint(self.dir / "checkpoints"))
        content["progress"].pop("wall_time_s")
        return digest_of(content)


def digest_of(content: Any) -> str:
    value = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, dict):
            for key in sorted(item, key=str):
                value.update(str(key).encode())
                add(item[key])
        elif isinstance(item, list | tuple):
            for part in item:
                add(part)
        elif isinstance(item, torch.Tensor):
            value.update(item.contiguous().numpy().tobytes())
        else:
            value.update(repr(item).encode())

    add(content)
    return value.hexdigest()


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def kill_until_done(run: Run, rng: random.Random, deaths: int, within: float) -> dict[str, int]:
    """Kill a run again and again, often inside a checkpoint's write, then let it end.

    Returns:
        `kills`, of which `in_write`; `lost`: deaths after which the newest checkpoint did not load
        or more than one interval of steps was gone; `most_steps_lost`.
    """
    found = {"kills": 0, "in_write": 0, "lost": 0, "most_steps_lost": 0}
    while found["kills"] < deaths:
        if rng.random() < 0.6:
            died = run.finish(f"die_saving {rng.randint(1, 30)}") == -signal.SIGKILL
            found["in_write"] += died
        else:
            died = run.kill_after(rng.uniform(0.1, within))
        if not died:
            break  # it came to its end before
        found["kills"] += 1
        try:
            step = run.acknowledged_step()
        except Exception:
            found["lost"] += 1
            continue
        lost = max(0, run.last_step() - step)
        found["most_steps_lost"] = max(found["most_steps_lost"], lost)
        found["lost"] += lost > EVERY
    assert run.finish() == 0, run.output[-2000:]
    return found
