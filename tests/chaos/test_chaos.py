"""Hundreds of deaths; `python -m pytest -m chaos`. CHAOS_REPORT=FILE gets the figures as JSON."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import EVERY, Run, kill_until_done

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("at_the_root")]

MODES = {"float32": {"amp": False}, "float16": {"amp_dtype": "float16"}}
KILLS = 80  # for each of four kinds of run


@pytest.fixture(scope="module")
def report() -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    yield rows
    if path := os.environ.get("CHAOS_REPORT"):
        Path(path).write_text(json.dumps(rows, indent=1) + "\n")


def orphans() -> list[str]:
    """Loader workers that outlived their run; they look for it every five seconds."""
    time.sleep(8)
    command = ["ps", "-eo", "ppid=,args="]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if line.split()[0] == "1" and "multiprocessing" in line]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", list(MODES))
def test_killed_runs_lose_nothing_and_end_the_same(dataset, tmp_path, report, mode, workers):
    to_the_end = {"final_scores": True, "report": True}
    settings = {**MODES[mode], **to_the_end, "num_workers": workers}
    whole = Run(tmp_path / "whole", dataset, **settings)
    assert whole.finish() == 0, whole.output
    started = time.monotonic()
    undisturbed = Run(tmp_path / "undisturbed", dataset, **settings)
    assert undisturbed.finish() == 0
    duration = time.monotonic() - started
    assert undisturbed.digest() == whole.digest()

    rng, total, runs, same = random.Random(f"{mode}{workers}"), {}, 0, 0
    while total.get("kills", 0) < KILLS:
        run = Run(tmp_path / f"run{runs}", dataset, **settings)
        found = kill_until_done(run, rng, KILLS - total.get("kills", 0), within=duration)
        for key, value in found.items():
            former = total.get(key, 0)
            total[key] = max(former, value) if key.startswith("most") else former + value
        runs, same = runs + 1, same + (run.digest() == whole.digest())
    assert not orphans()
    report.append({"mode": mode, "workers": workers, "runs": runs, "same_weights": same, **total})
    assert total["lost"] == 0
    assert total["most_steps_lost"] <= EVERY
    assert same == runs
