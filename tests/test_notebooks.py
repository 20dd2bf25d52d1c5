"""The notebooks run from top to bottom on a tiny run, and are stored without output."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
import pytest
from conftest import REPOSITORY
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from test_report import finished_run

FOLDER = REPOSITORY / "notebooks"
NAMES = {"dataset": 4, "run": 4, "predictions": 3}  # and how many figures they show
__all__ = ["finished_run"]  # a fixture


class ThisPython(AsyncKernelManager):
    """Starts this interpreter, whatever kernels are registered on the machine."""

    @property
    def kernel_spec(self):
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="this Python", language="python")


def code(name: str) -> list:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", [path.stem for path in FOLDER.glob("*.ipynb")])
def test_notebook_is_stored_without_output(name):
    assert name in NAMES
    assert [cell.outputs for cell in code(name)] == [[] for _ in code(name)]
    assert {cell.execution_count for cell in code(name)} == {None}
    assert "parameters" in code(name)[0].metadata["tags"]
    assert str(REPOSITORY) not in (FOLDER / f"{name}.ipynb").read_text()


def test_notebooks_run_and_show_every_figure(
    finished_run: Path, dataset: Path, tmp_path, monkeypatch
):
    """One after the other in one kernel, since most of their time goes by with imports."""
    places = {"RUN_DIR": finished_run, "DATASET_DIR": dataset, "PYTHONPATH": REPOSITORY}
    for key in ("CACHE_DIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        places[key] = tmp_path / key
    for key, value in places.items():
        monkeypatch.setenv(key, str(value))
    together, cells_of = nbformat.v4.new_notebook(), {}
    for name in NAMES:
        cells_of[name] = code(name)
        forget = nbformat.v4.new_code_cell("%reset -f")  # each knows no name of another
        together.cells += [forget, *cells_of[name]]
    place = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(together, kernel_manager_class=ThisPython, resources=place).execute()
    for name, cells in cells_of.items():
        shown = [
            sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in cells
        ]
        assert max(shown) == 1, name
        assert sum(shown) == NAMES[name], name
