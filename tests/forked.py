"""Commands in forked processes, which have all imports already: a second instead of ten."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import warnings
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import REPOSITORY

WITHIN_S = 240


class Ended(NamedTuple):
    """As `subprocess.CompletedProcess`; the status of one that hung is `None`."""

    returncode: int | None
    stdout: str
    stderr: str


def python(code: str, within_s: float = WITHIN_S) -> Ended:
    """`python -c code`."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(code)
        file.flush()
        return _ended(file.name, (), REPOSITORY, within_s)


def start(
    module: str, words: tuple[str, ...], cwd: Path, outputs: tuple[str, str], **environment: str
) -> BaseProcess:
    """`python -m module words`, or `python file.py words`; its outputs in files that are there."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_work, args=(module, words, cwd, outputs, environment))
    process.start()
    return process


def monai_bundle(*words: str, cwd: Path = REPOSITORY) -> Ended:
    """`python -m monai.bundle run words` in a directory."""
    return _ended("monai.bundle", ("run", *words), cwd, WITHIN_S)


def _ended(module: str, words: tuple[str, ...], cwd: Path, within_s: float) -> Ended:
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as error:
        process = start(module, words, cwd, (out.name, error.name))
        process.join(within_s)
        status = process.exitcode
        process.kill()
        process.join()
        return Ended(status, out.read(), error.read())


def _work(
    module: str,
    words: tuple[str, ...],
    cwd: Path,
    outputs: tuple[str, str],
    environment: dict[str, str],
) -> None:
    for number, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    warnings.resetwarnings()  # a command does not end by them
    torch.set_num_threads(1)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))
    sys.argv = [module, *words]
    status: Any = 0
    try:
        run = runpy.run_path if module.endswith(".py") else runpy.run_module
        run(module, run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    except BaseException as error:  # as the interpreter ends by it
        status = 1
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as end:
            status = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
