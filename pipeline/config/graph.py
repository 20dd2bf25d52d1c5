"""A config as a graph: its values by path, the references between them, what they stand for."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Union

from monai.bundle import ConfigComponent, ReferenceResolver

from pipeline.config import targets
from pipeline.config.allowed import Path, walk
from pipeline.config.parser import Parser
from pipeline.config.signatures import attributes, returned

CHAIN = re.compile(rf"({ReferenceResolver.id_matcher.pattern})((?:\.\w+)*)(\()?")


@dataclass(frozen=True)
class Reference:
    """`@target`, or `@target.attribute` and `@target.method()` in an expression."""

    at: Path
    target: Path
    attributes: tuple[str, ...] = ()
    is_call: bool = False

    def __str__(self) -> str:
        return f"@{'#'.join(self.target)}"


class Graph:
    """The values of a config and what they refer to.

    Args:
        source: A merged config.
        allow: Names that `_target_` may hold beside the list; `None`: every name is looked up.
        is_broken: Tells of a path whether something is known to be wrong there, so that nothing
            is concluded from it.
    """

    def __init__(
        self, source: Any, allow: Collection[str] | None, is_broken: Callable[[Path], bool]
    ) -> None:
        plain = {key: value for key, value in source.items() if key != "_meta_"}
        self.nodes = dict(walk(plain))
        self.allow = allow
        self.is_broken = is_broken
        self.references = [
            reference
            for path, value in self.nodes.items()
            if isinstance(value, str) and path[-1:] != ("_desc_",)
            for reference in find_references(path, value)
        ]
        self.targets = {reference.target for reference in self.references}

    def target_of(self, path: Path) -> Any:
        """The class or function of the object at a path; `None` if there is none, or no telling."""
        node = self.nodes.get(path)
        name = node.get("_target_") if isinstance(node, dict) else None
        if not isinstance(name, str) or name[:1] in ("@", "$", "%"):
            return None
        if self.allow is not None and not targets.is_allowed(name, self.allow):
            return None
        return targets.find(name)

    def follow(self, path: Path) -> tuple[Path, Path | None]:
        """Where a chain of plain references ends, and the place of the last of them."""
        last, seen = None, {path}
        while isinstance(self.nodes.get(path), str) and self.nodes[path].startswith("@"):
            found = next(iter(find_references(path, self.nodes[path])), None)
            if found is None or found.target in seen or found.target not in self.nodes:
                break
            last, path = path, found.target
            seen.add(path)
        return path, last

    def value(self, path: Path, seen: frozenset[Path] = frozenset()) -> Any:
        """What stands at a path when it is resolved: plain values, types for objects, or `Any`."""
        if path not in self.nodes or path in seen or self.is_broken(path):
            return Any
        node, seen = self.nodes[path], seen | {path}
        if ConfigComponent.is_instantiable(node):
            if str(node.get("_disabled_", False)).lower() == "true":
                return Any
            if node.get("_mode_") == "callable":
                return types.FunctionType
            target = self.target_of(path)
            return Any if target is None else _certain(returned(target))
        if isinstance(node, dict):
            return {key: self.value((*path, key), seen) for key in node}
        if isinstance(node, list):
            return [self.value((*path, str(n)), seen) for n in range(len(node))]
        if not isinstance(node, str) or node[:1] not in ("@", "$"):
            return node
        found = next(find_references(path, node), None)
        if found is None:
            return Any if node.startswith("$") else node
        value = self.value(found.target, seen)
        if value == "auto":  # a stand-in for a value that is found out later
            return Any
        for attribute in found.attributes:
            value = self.attribute(value, attribute, found)[1]
        return value

    def attribute(self, value: Any, name: str, found: Reference) -> tuple[list[str] | None, Any]:
        """Valid names beside an attribute that is not there (else `None`), and its value's type."""
        if value is Any:
            return None, Any
        value = typing.get_origin(value) or value
        cls = value if isinstance(value, type) else type(value)
        known = attributes(cls)
        called = found.is_call and name == found.attributes[-1]
        names = sorted(known) if known is not None else sorted(dir(cls))
        if name not in names and (known is not None or called):
            return [each for each in names if not each.startswith("_")], Any
        if called:
            return None, _certain(returned(getattr(cls, name, None)))
        return None, _certain((known or {}).get(name, Any))

    def circles(self) -> Iterator[list[Path]]:
        """Ids that need each other before they can be made, once each."""
        done: set[Path] = set()
        for start in sorted(self.targets & self.nodes.keys()):
            yield from self._circles_from(start, [], done)

    def _circles_from(self, path: Path, stack: list[Path], done: set[Path]) -> Iterator[list[Path]]:
        if path in stack:
            yield [*stack[stack.index(path) :], path]
            return
        if path in done:
            return
        done.add(path)
        for reference in self.references:
            if reference.at[: len(path)] == path and reference.target in self.nodes:
                yield from self._circles_from(reference.target, [*stack, path], done)


def find_references(path: Path, text: str) -> Iterator[Reference]:
    """The references in a string of a config: the whole of it, or those of an expression."""
    try:
        text = Parser.resolve_relative_ids("::".join(path), text)
    except ValueError:
        return
    if not text.startswith("$"):
        if ReferenceResolver.id_matcher.fullmatch(text):
            yield Reference(path, tuple(text[1:].split("::")))
        return
    for name, chain, opening in CHAIN.findall(text):
        yield Reference(
            path, tuple(name[1:].split("::")), tuple(chain.split(".")[1:]), bool(opening)
        )


def _certain(hint: Any) -> Any:
    """A type that leaves no choice, else `Any`."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType, typing.Annotated, typing.Literal):
        return Any
    return hint if isinstance(hint, type) or origin is not None else Any
