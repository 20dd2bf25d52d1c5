"""Triton's kernels on a CPU, by its interpreter, or on the card.

Triton reads TRITON_INTERPRET when kernels are imported, and while one runs its interpreter replaces
parts of `triton.language`: a process of its own has it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import traceback
from types import SimpleNamespace

import pytest
import torch

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory):
    """Runs a function of a test module in a process whose kernels are interpreted."""
    command = [sys.executable, "-W", "ignore", "-c", f"import {__name__} as it; it.serve()"]
    more = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    more["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=os.environ | more, **pipes) as process:

        def run(*work):
            pickle.dump(work, process.stdin)
            process.stdin.flush()
            result, error = pickle.load(process.stdout)
            assert error is None, error
            return result

        yield run
        process.stdin.close()


def serve():
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            function, *arguments = pickle.load(sys.stdin.buffer)
            try:
                answer = function(*arguments), None
            except Exception:
                answer = None, traceback.format_exc()
            pickle.dump(answer, sys.stdout.buffer)
            sys.stdout.buffer.flush()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def place(request):
    """Device, how to run a function for it, and a size of volumes: with all remainders of tiles."""
    if request.param == "cuda":
        return SimpleNamespace(device="cuda", size=(33, 47, 29), run=lambda f, *rest: f(*rest))
    run = request.getfixturevalue("interpreter")
    return SimpleNamespace(device="cpu", size=(5, 6, 7), run=run)
