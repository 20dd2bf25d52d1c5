"""Commands in two Gloo ranks: under torchrun, or in forked processes that are told what it tells.

Those have all imports already: two ranks that train take a second, under torchrun half a minute.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import forked
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


class Ranks(NamedTuple):
    """What forked ranks came to: the exit status of each, and what they said together."""

    statuses: list[int | None]
    said: str


def in_forks(module: str, *words: str, num_ranks: int = 2) -> Ranks:
    """`python -m module words` as each of the ranks that torchrun would start."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks), "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    with tempfile.NamedTemporaryFile("r") as output:
        processes = [
            forked.start(
                module, words, REPOSITORY, (output.name,) * 2, RANK=rank, LOCAL_RANK=rank, **shared
            )
            for rank in map(str, range(num_ranks))
        ]
        for process in processes:
            process.join(WITHIN_S)
        statuses = [process.exitcode for process in processes]
        for process in processes:
            process.kill()  # where it hangs; its status is then None
            process.join()
        return Ranks(statuses, output.read())
