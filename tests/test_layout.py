"""The direction of imports, as CONTRIBUTING states it."""

from __future__ import annotations

import ast

import pytest
from conftest import REPOSITORY

OWN = ("pipeline", "transforms", "networks", "configs", "tests", "notebooks", "benchmarks")
SHARED = {"pipeline.precision", "pipeline.errors", "pipeline.distributed", "pipeline.rendezvous"}
ROOMS = ("pipeline.data", "pipeline.training", "pipeline.prediction", "pipeline.bundle")


def allowed(importer: str, imported: str) -> bool:
    """Whether module `importer` may import module `imported` of this repository."""
    room = next((r for r in ROOMS if importer.startswith(r)), None)
    if importer.split(".")[0] in ("networks", "transforms"):
        return imported.split(".")[0] == importer.split(".")[0]
    if imported.split(".")[0] in ("tests", "notebooks"):
        return False
    if room is not None:
        own_room = imported.startswith(room)
        return own_room or imported in SHARED or imported.split(".")[0] == "transforms"
    if importer in SHARED:
        return imported in SHARED
    return True


def imports(path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: expected absolute imports"
            names.append(node.module or "")
            # `from pipeline import config` imports the module pipeline.config.keys
            names += [f"{node.module}.{a.name}" for a in node.names if node.module == "pipeline"]
    return [name for name in names if name.split(".")[0] in OWN and name != "pipeline"]


FILES = [
    path
    for folder in ("pipeline", "transforms", "networks")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_module_imports_only_what_it_may(path):
    importer = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    assert [name for name in imports(path) if not allowed(importer, name)] == []


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("networks.dense_unet", "pipeline.errors"),
        ("transforms.augment", "networks.dense_unet"),
        ("pipeline.training.trainer", "pipeline.data.sampling"),
        ("pipeline.errors", "pipeline.precision.x"),
        ("pipeline.run", "tests.conftest"),
    ],
)
def test_rule_forbids(importer, imported):
    assert not allowed(importer, imported)
