"""Modules and configs of ours under another package's name."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection
from typing import Any

from pipeline.errors import OWN

TARGET = "_target_"
# a name of ours that is no part of a longer one, as `monai.transforms.Compose` would be
DOTTED = re.compile(rf"(?<![\w./])(?:{'|'.join(OWN)})(?:\.\w+)+")


def is_target(key: str) -> bool:
    """Whether a key of a config holds the name of a class; overlays write `part#_target_`."""
    return re.split("#|::", key)[-1] == TARGET


def renamed_config(config: Any, package: str, modules: Collection[str]) -> Any:
    """A config whose `_target_`s of ours are those of the package."""
    if isinstance(config, dict):
        return {
            key: renamed_text(value, package, modules)
            if is_target(key) and isinstance(value, str)
            else renamed_config(value, package, modules)
            for key, value in config.items()
        }
    if isinstance(config, list):
        return [renamed_config(child, package, modules) for child in config]
    return config


def renamed_text(text: str, package: str, modules: Collection[str]) -> str:
    """Text in which modules of ours, and what is in them, are named as those of the package."""
    return DOTTED.sub(
        lambda match: f"{package}." * _is_in(match[0], modules) + match[0],
        text,
    )


def _is_in(dotted: str, modules: Collection[str]) -> bool:
    """Whether a dotted name is one of modules, not just of a package of theirs, or in one."""
    parts = dotted.split(".")
    return any(".".join(parts[:n]) in modules for n in range(2, len(parts) + 1))


def renamed_source(source: str, package: str, modules: Collection[str]) -> str:
    """A module of ours that imports and names the package's modules.

    Args:
        source: The module.
        package: Name of the package.
        modules: Names of ours that are in it.

    Raises:
        ValueError: If it imports in a way that cannot be renamed.
    """
    names = _Names(source.encode(), package, modules)
    names.visit(ast.parse(source))
    return names.renamed().decode()


class _Names(ast.NodeVisitor):
    """Where in a module modules are named, in bytes, and what is to stand there instead."""

    def __init__(self, source: bytes, package: str, modules: Collection[str]) -> None:
        self.source, self.package, self.modules = source, package, modules
        lines = source.split(b"\n")
        self.starts = [sum(len(line) + 1 for line in lines[:n]) for n in range(len(lines))]
        self.edits: list[tuple[int, int, bytes]] = []

    def renamed(self) -> bytes:
        """The source with all changes made."""
        result = self.source
        for start, end, new in sorted(self.edits, reverse=True):
            result = result[:start] + new + result[end:]
        return result

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] in OWN:
                if alias.asname is None:
                    raise ValueError(
                        f"import {alias.name}: expected 'from … import' or 'import … as', got an "
                        "import that binds another name in a package. Change the module."
                    )
                start, _ = self._span(alias)
                self._put(start, start, f"{self.package}.")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and node.level == 0 and node.module.split(".")[0] in OWN:
            start, end = self._span(node)
            at = self.source.index(node.module.encode(), start + len("from"), end)
            self._put(at, at, f"{self.package}.")

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self._text(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self._text(node)  # its parts have no places of their own before Python 3.12

    def visit_Tuple(self, node: ast.Tuple) -> None:
        """A tuple of our packages' names, to which the first part of a module's is compared."""
        roots = [one for one in node.elts if isinstance(one, ast.Constant) and one.value in OWN]
        for one in roots if len(roots) > 1 else ():
            start, end = self._span(one)
            self._put(start + 1, end - 1, self.package)
        self.generic_visit(node)

    def _text(self, node: ast.expr) -> None:
        start, end = self._span(node)
        text = self.source[start:end].decode()
        new = renamed_text(text, self.package, self.modules)
        if new != text:
            self._put(start, end, new)

    def _span(self, node: Any) -> tuple[int, int]:
        first, last = self.starts[node.lineno - 1], self.starts[node.end_lineno - 1]
        return first + node.col_offset, last + node.end_col_offset

    def _put(self, start: int, end: int, new: str) -> None:
        self.edits.append((start, end, new.encode()))
