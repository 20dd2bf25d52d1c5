"""The modules of ours that a bundle needs, as a package under a name of its own.

Two bundles in one process whose code has the same name would get one another's modules, since
Python keeps one module per name. So the modules that the classes of the configs need, found by
following imports, are copied to `<package>/pipeline/…`, `<package>/transforms/…` and
`<package>/networks/…`, and whatever names one of them gets `<package>.` before it: imports, strings
that name a module or a class of it, and the `_target_`s of configs.

The root of the bundle has to be on `sys.path` for that package to be found. `monai.bundle`
started there has it by itself, and MONAI's `run()` adds it; `initialize()` does not, so that a
client which only initializes says `sys.path.insert(0, bundle_root)` first.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.bundle.renaming import DOTTED, is_target, renamed_config, renamed_source
from pipeline.errors import OWN

ROOT = Path(__file__).resolve().parents[2]
INIT = '''"""The code of this bundle, for which its root must be on `sys.path`.

`python -m monai.bundle run --config_file configs/inference.json`, started in that root, has it
there. A client that initializes the workflow in its own process puts it there first:
`sys.path.insert(0, bundle_root)`. The name is this bundle's alone, so that another one may be used
in the same process. `python -m {package}.pipeline.run configs/train.json --dataset_dir DIR` trains,
and tells mistakes in a line each.
"""
'''


def package_name(name: str, digest: str) -> str:
    """A module's name that no other bundle has.

    Args:
        name: Of the run.
        digest: Hash of its weights.
    """
    slug = re.sub(r"\W+", "_", name.lower(), flags=re.ASCII).strip("_")
    slug = f"bundle_{slug}".strip("_") if not slug or slug[0].isdigit() else slug
    return f"{slug}_{digest[:8]}"


def targets_of(config: Any) -> Iterator[str]:
    """Every `_target_` in a config."""
    if isinstance(config, dict):
        yield from (v for key, v in config.items() if is_target(key) and isinstance(v, str))
    for child in config.values() if isinstance(config, dict) else config:
        if isinstance(child, dict | list):
            yield from targets_of(child)


def needed_modules(names: Iterable[str], root: Path = ROOT) -> dict[str, Path]:
    """The modules that some names need: their own, what these import, and so on.

    Imports inside of functions count, and so do strings that are the name of a module or of
    something in it, such as those of `pipeline.config.allowed`.

    Args:
        names: Dotted, of modules or of what is in them; others than ours are left out.
        root: Folder that the modules are in.

    Returns:
        Name to file, sorted, packages included.
    """
    found: dict[str, Path] = {}
    waiting = list(names)
    while waiting:
        module = _module_of(waiting.pop(), root)
        if module is None or module in found:
            continue
        found[module] = _file_of(module, root)
        waiting += [module.rpartition(".")[0], *_named_in(ast.parse(found[module].read_text()))]
    return dict(sorted(found.items()))


def _file_of(module: str, root: Path) -> Path:
    path = root / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _module_of(dotted: str, root: Path) -> str | None:
    """The longest part of a dotted name that is a module of ours."""
    while dotted.split(".")[0] in OWN:
        if _file_of(dotted, root).is_file():
            return dotted
        dotted = dotted.rpartition(".")[0]
    return None


def _named_in(tree: ast.Module) -> Iterator[str]:
    """What a module imports or names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and DOTTED.fullmatch(str(node.value)):
            yield str(node.value)


def write_package(
    bundle: Path, package: str, modules: Mapping[str, Path], root: Path = ROOT
) -> int:
    """Write modules of ours as a package.

    What they read beside them, such as the configs that they take for templates and the licence
    that they hand on, is put where they look for it: the package is their repository.

    Args:
        bundle: Folder that gets the package.
        package: Its name.
        modules: As `needed_modules` finds them.
        root: Folder that they are in.

    Returns:
        Lines of all modules.

    Raises:
        ValueError: If a module imports in a way that cannot be renamed.
    """
    folder = bundle / package
    folder.mkdir()
    (folder / "__init__.py").write_text(INIT.format(package=package))
    num_lines, strings = 0, set()
    for file in modules.values():
        source = file.read_text()
        num_lines += source.count("\n")
        nodes = ast.walk(ast.parse(source))
        strings |= {n.value for n in nodes if isinstance(n, ast.Constant) and type(n.value) is str}
        target = folder / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(renamed_source(source, package, modules))
    folders = {root / "configs", *(file.parent for file in modules.values())}
    beside = [file for place in folders for file in place.glob("*.*") if file.suffix != ".py"]
    for file in [*sorted(beside), root / "LICENSE"]:
        if {file.name, file.stem} & strings and file.is_file():
            _write_resource(file, folder / file.relative_to(root), package, modules)
    return num_lines


def _write_resource(file: Path, target: Path, package: str, modules: Collection[str]) -> None:
    text = file.read_text()
    if file.suffix == ".json":
        content = json.loads(text)
        if "train" in content:  # of which the bundle has its own
            return
        text = json.dumps(renamed_config(content, package, modules), indent=2) + "\n"
    target.parent.mkdir(exist_ok=True)
    target.write_text(text)
