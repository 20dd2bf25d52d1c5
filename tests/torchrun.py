"""Commands under torchrun, with two Gloo ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import REPOSITORY, TINY

WITHIN_S = 240
CONFIGS = ("configs/amp.json", "configs/multi_gpu.json")


def torchrun(
    *words: str, num_ranks: int = 2, launcher: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess:
    """`torchrun ... -m words`; one node, unless the launcher's own words say otherwise."""
    launcher = launcher or ("--standalone", f"--nproc_per_node={num_ranks}")
    paths = [str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", *words],
        cwd=REPOSITORY,
        env={**os.environ, **ours, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )


def settings(dataset: Path, output_dir: Path, **changes: Any) -> list[str]:
    """The tiny settings as words of a command line."""
    folders = {"dataset_dir": str(dataset), "output_dir": str(output_dir)}
    values = {**folders, "device": "cpu", **TINY, **changes}
    return [
        word
        for key, value in values.items()
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]
