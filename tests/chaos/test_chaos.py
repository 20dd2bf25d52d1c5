"""Hundreds of deaths; `python -m pytest -m chaos`."""

from __future__ import annotations

import random
import subprocess
import time
from typing import Any

import pytest
from harness import EVERY, Run, kill_until_done

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("at_the_root")]

MODES = {"float32": {"amp": False}, "float16": {"amp_dtype": "float16"}}
KILLS = 80  # for each of four kinds of run


def orphans() -> list[str]:
    """Loader workers that outlived their run; they look for it every five seconds."""
    time.sleep(8)
    command = ["ps", "-eo", "ppid=,args="]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if line.split()[0] == "1" and "multiprocessing" in line]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", list(MODES))
def test_killed_runs_lose_nothing_and_end_the_same(dataset, tmp_path, mode, workers):
    settings: dict[str, Any] = {**MODES[mode], "final_scores": True, "report": True}
    settings["num_workers"] = workers
    whole = Run(tmp_path / "whole", dataset, **settings)
    started = time.monotonic()
    assert whole.finish() == 0, whole.output
    duration = time.monotonic() - started

    rng, kills = random.Random(f"{mode}{workers}"), 0
    while kills < KILLS:
        run = Run(tmp_path / f"run{kills}", dataset, **settings)
        found = kill_until_done(run, rng, KILLS - kills, within=duration)
        kills += found["kills"]
        assert found["lost"] == 0
        assert found["most_steps_lost"] <= EVERY
        assert run.digest() == whole.digest()
    assert not orphans()
