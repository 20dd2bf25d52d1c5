"""What works where Linux's modules, signals and calls are missing: they are hidden here."""

from __future__ import annotations

import json

import forked
import pytest
from conftest import finished_run, tiny_words

HIDDEN = """
import importlib, os, pkgutil, shutil, signal, sys
for name in [*sys.modules]:
    if name.partition(".")[0] in ("pipeline", "networks", "transforms"):
        del sys.modules[name]
sys.modules["fcntl"] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGALRM", "SIGKILL", "SIGHUP", "setitimer", "ITIMER_REAL"):
    delattr(signal, name)
del os.O_DIRECTORY, os.sched_getaffinity, os.fork
shutil._use_fd_functions = False
system_open = os.open

def open_file(path, *rest, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return system_open(path, *rest, **more)

os.open = open_file
"""


def run_hidden(code: str) -> forked.Ended:
    return forked.python(HIDDEN + code)


def run_command(name: str, *words: object) -> forked.Ended:
    call = f"importlib.import_module({name!r}).main({[*map(str, words)]})"
    return run_hidden(f"sys.exit({call})")


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    return finished_run(dataset, tmp_path_factory.mktemp("platforms") / "r", max_epochs=1)


def test_every_module_is_imported():
    ended = run_hidden("""
import networks, pipeline, transforms
for package in (networks, pipeline, transforms):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
from pipeline.distributed import own_cores
from pipeline.signals import SIGNALS
print(own_cores() >= 1, len(SIGNALS))
""")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True 2\n", "")


def test_dataset_is_checked(dataset, tmp_path):
    ended = run_command("pipeline.commands.check", dataset, "--plan", "--cache_dir", tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "roi_size" in ended.stdout


def test_run_predicts_and_is_evaluated(dataset, finished, tmp_path):
    ended = run_command("pipeline.commands.predict", finished, dataset / "imagesTr", tmp_path / "p")
    assert ended.returncode == 0, ended.stderr
    table = tmp_path / "scores"
    words = tmp_path / "p", dataset / "labelsTr", "--output_dir", table
    ended = run_command("pipeline.commands.evaluate", *words)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((table / "summary.json").read_text())["num_cases"] == 6


def test_report_and_bundle_are_written(finished, tmp_path):
    ended = run_command("pipeline.commands.report", finished)
    assert ended.returncode == 0, ended.stderr
    assert (finished / "report/index.html").is_file()
    words = "--output", tmp_path / "b", "--formats", "torchscript"
    ended = run_command("pipeline.commands.export", finished, *words)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "b/export.json").is_file()


def test_training_is_refused_in_a_line(dataset, tmp_path):
    words = "configs/amp.json", *tiny_words(dataset, tmp_path / "r")
    ended = run_hidden(
        'import platform; platform.system = lambda: "Windows"\n'
        f"sys.exit(importlib.import_module('pipeline.run').main({[*words]}))"
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        "platform: expected Linux to train on, got Windows. Predict, evaluate and check work here; "
        "train on Linux or in WSL2."
    )
    assert not (tmp_path / "r").exists()
