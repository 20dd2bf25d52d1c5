"""The direction of imports and the size of the rooms, as CONTRIBUTING states them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from conftest import REPOSITORY

# a room may import what stands in an earlier line, or in its own; the last ones may import all
ORDER = (
    {"errors"},
    {"files", "progress_bar", "drawing"},
    {"distributed"},
    {"precision", "signals"},
    {"config"},
    {"data"},
    {"training"},
    {"prediction"},
    {"evaluation"},
    {"reporting", "bundle"},
    {"lifecycle"},
    {"run"},
    {"commands"},
    {"__main__"},
)
RANK = {room: number for number, rooms in enumerate(ORDER) for room in rooms}
APART = {("prediction", "training"), ("bundle", "reporting"), ("reporting", "bundle")}
USES = {"drawing": {"transforms"}, "data": {"transforms"}, "training": {"transforms", "networks"},
        "prediction": {"transforms", "networks"}, "evaluation": {"transforms"},
        "reporting": {"transforms"}, "bundle": {"transforms", "networks"}}  # fmt: skip
OWN = ("pipeline", "transforms", "networks", "configs", "tests", "notebooks", "benchmarks")


def is_allowed(importer: str, imported: str) -> bool:
    """Whether module `importer` may import module `imported` of this repository."""
    top, other = importer.split(".")[0], imported.split(".")[0]
    if top in ("networks", "transforms"):
        return other == top
    room = importer.split(".")[1] if "." in importer else "__init__"
    if other in ("networks", "transforms"):
        return other in USES.get(room, ())
    if other != "pipeline":
        return False
    wanted = imported.split(".")[1] if "." in imported else "__init__"
    if wanted in (room, "__init__"):
        return room != "commands"
    return RANK.get(wanted, 99) < RANK.get(room, -1) and (room, wanted) not in APART


def imports(path: Path) -> list[str]:
    """Modules of this repository that a file imports, at its top or inside a function."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: expected absolute imports"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if is_module(name) else str(node.module) for name in found]
    return [name for name in names if name.split(".")[0] in OWN]


def is_module(name: str) -> bool:
    place = REPOSITORY / name.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").is_file()


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


FILES = [
    path
    for folder in ("pipeline", "transforms", "networks")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
]


def test_modules_import_only_what_they_may():
    wrong = [
        f"{name_of(path)} imports {name}"
        for path in FILES
        for name in imports(path)
        if not is_allowed(name_of(path), name)
    ]
    assert wrong == []


def test_imports_form_no_circle():
    graph = {name_of(path): set(imports(path)) for path in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> Iterator[str]:
        if name in trail:
            yield " -> ".join([*trail[trail.index(name) :], name])
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                yield from visit(other, (*trail, name))
            done.add(name)

    assert [circle for name in graph for circle in visit(name, ())] == []


def test_rooms_are_few_and_the_whole_is_small():
    assert len(list((REPOSITORY / "pipeline").glob("*.py"))) <= 10
    files = [path for path in FILES if path.stat().st_size]
    others = [
        path
        for folder in ("pipeline", "transforms", "networks")
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in (".html", ".json", ".md", ".j2")
    ]
    lines = sum(len(path.read_text().splitlines()) for path in [*files, *others])
    assert (len(files) <= 100, lines <= 18_480) == (True, True), (len(files), lines)


def test_public_names_stand_once():
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name_of(path))
    exempt = {"main", "add_arguments"}
    assert {n: p for n, p in places.items() if len(p) > 1 and n not in exempt} == {}
