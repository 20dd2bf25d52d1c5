"""The trust boundary: what a config may say, and what would make it a way in.

A config names classes and ties them together; it runs no code of its own. `_target_` holds a name
of the list in `targets` or one that the command line allows. An expression starts from an
`@id` and reads one attribute of its object, or calls one method with such values and literals as
arguments: one that `targets.MEMBERS` has for the object's class, or any of a class that is there
since the command line allows it. Macros (`%`) and MONAI's debugging mode do not exist.

What is judged is not what was written but what MONAI would evaluate: relative ids resolved and
references replaced by MONAI's own functions. `python -m monai.bundle` executes what a config says
without asking here; it is outside of this boundary.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from monai.bundle import ConfigComponent, ReferenceResolver

from pipeline.config.keys import MARKS
from pipeline.config.parser import Parser
from pipeline.config.targets import ANY, FORBIDDEN, MEMBERS, OTHERS, is_allowed, names
from pipeline.errors import InputError, nearest

Path = tuple[str, ...]  # keys from the root of the config; "#".join of it is the id

ID = re.compile(r"\w+(::\w+)*")  # not empty, which would be the whole config
OBJECT = re.compile(r"_target_[\"']?\s*[:=]")  # in what was meant to be JSON, too
MODES = ("default", "callable")  # not "debug", which stops in pdb
SPECIAL = sorted(ConfigComponent.non_arg_keys)
REFERENCES = ReferenceResolver._vars  # the name that holds them when MONAI evaluates
GRAMMAR = "Write @id, $@id.attribute or $@id.method(@id, 1)."


def walk(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value of a config with its path, the containers before what they contain."""
    yield path, node
    if isinstance(node, (dict, list)):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from walk(child, (*path, str(key)))


def check(source: Any, allow: Collection[str] = ()) -> None:
    """Refuse a config that says what configs may not say.

    Args:
        source: A merged config.
        allow: Dotted names that `_target_` may hold beside the list.

    Raises:
        InputError: One line for each place.
    """
    found = [f"{'#'.join(path)}: {fault}" for path, fault in faults(source, allow)]
    if found:
        raise InputError(*found)


def faults(source: Any, allow: Collection[str] = ()) -> Iterator[tuple[Path, str]]:
    """What a config may not say: the place, and what is expected there."""
    objects = Objects(source, allow)
    for path, value in walk(source):
        if isinstance(value, str) and path[-1:] != ("_target_",):
            fault = _string_fault(path, value, objects)
            if fault:
                yield path, fault
        elif isinstance(value, dict):
            yield from ((path + at, fault) for at, fault in _object_faults(path, value, objects))
    for name, asked in objects.lacking.items():
        got = repr(objects.nodes[name])[:60]
        yield tuple(name.split("::")), f"expected an object with {asked!r}, got {got}. Correct it."


class Objects:
    """What is known of the objects of a config before they are made.

    Args:
        source: A merged config.
        allow: Dotted names that `_target_` may hold beside the list.
    """

    def __init__(self, source: Any, allow: Collection[str]) -> None:
        self.allow = allow
        self.nodes: dict[str, Any] = {}
        self.lacking: dict[str, str] = {}  # plain values, and what expressions asked of them
        for path, node in walk(source):
            name = "::".join(path)
            self.nodes[name] = {} if name in self.nodes else node  # of two MONAI takes either
        self.uses: dict[str, list[tuple[str, str]]] = {}  # of expressions; none of a faulty one
        for name, node in self.nodes.items():
            if isinstance(node, str) and node.startswith("$"):
                with contextlib.suppress(ValueError):
                    self.uses[name] = []
                    self.uses[name] = _uses(_resolved(name, node) or "")

    def follow(self, name: str) -> str:
        """The id where plain references end, beginning with that of an id."""
        seen = set()
        while name not in seen and isinstance(node := self.nodes.get(name), str):
            seen.add(name)
            text = _resolved(name, node) or ""
            name = text[1:] if ReferenceResolver.id_matcher.fullmatch(text) else name
        return name

    def kind(self, name: str) -> str | None:
        """The class of an id's object, as `MEMBERS` names it.

        Empty if there is no telling; `None` if nothing comes of it: there is no such id, its
        references go in a circle, or what it is made from is refused in its place.
        """
        trail: list[str] = []
        while (name := self.follow(name)) in self.uses:
            if not self.uses[name] or len(trail) > len(self.uses):
                return None
            name, asked = self.uses[name][0]
            trail.append(asked)
        node = self.nodes.get(name)
        kind = "" if name in self.nodes else None
        if isinstance(node, dict) and "_target_" in node:
            kind = self._class(node)
        for asked in filter(None, reversed(trail)):
            kind = MEMBERS.get(kind or "", {}).get(asked, "" if kind == ANY else None)
        return kind

    def _class(self, node: dict[str, Any]) -> str | None:
        target = node["_target_"]
        if not isinstance(target, str) or not is_allowed(target, self.allow):
            return None
        module, _, name = target.rpartition(".")
        if module in OTHERS or node.get("_mode_", "default") != "default":
            return ""
        return name if is_allowed(target) else ANY

    def reason(self, text: str) -> str:
        """What an expression has that is not of the grammar; empty if nothing.

        Args:
            text: With its `$`, relative ids resolved.
        """
        try:
            for name, asked in _uses(text):
                kind = self.kind(name)
                known = MEMBERS.get(kind or "", {})
                if not asked or kind in (None, ANY) or asked in known:
                    continue
                at = self.follow(name)
                if at in self.uses or ConfigComponent.is_instantiable(self.nodes[at]):
                    what = f"a {kind}" if known else "of which nothing may be asked"
                    hint = f" {nearest(asked, known)}" if known else ""
                    return f"asks for {asked!r} of @{name.replace('::', '#')}, {what}.{hint}"
                self.lacking.setdefault(at, asked)
        except ValueError as error:
            return f"{error}."
        return ""

    def is_harmless(self, name: str, pattern: str) -> bool:
        """Whether what stands at an id is nothing, a path of a run, or text of a pattern."""
        node = self.nodes.get(self.follow(name))
        plain = isinstance(node, str) and re.fullmatch(rf"(?!\$){pattern}", node) is not None
        return node in (None, False) or plain or self.kind(name) == "Path"


def _resolved(name: str, written: str) -> str | None:
    """A string with its relative ids resolved; `None` where they lead out of the config."""
    try:
        return Parser.resolve_relative_ids(name, written)
    except ValueError:
        return None


def _string_fault(path: Path, written: str, objects: Objects) -> str | None:
    """Why a string may not stand in a config, or `None`."""
    text = _resolved("::".join(path), written)
    if text is None:
        return f"expected a relative id within the config, got {written!r}. Use fewer #."
    if text.startswith("%"):
        return f"expected no macro, got {written!r}. Write the value itself, or refer to it by @."
    reason = objects.reason(text) if text.startswith("$") else ""
    if not reason:
        return None
    return f"expected an expression on an id, got {written!r}, which {reason} {GRAMMAR}"


def _uses(text: str) -> list[tuple[str, str]]:
    """The ids of an expression, each with the `attribute` or `method()` that is asked of it.

    The first is what the expression is of; those after it are arguments.

    Args:
        text: With its `$`, relative ids resolved.

    Raises:
        ValueError: If it is not of the grammar.
    """
    if not text.startswith("$@"):
        raise ValueError("starts from no @id")
    matches = ReferenceResolver.id_matcher.findall(ReferenceResolver.normalize_id(text))
    try:
        code = ReferenceResolver.update_refs_pattern(text, {match[1:]: None for match in matches})
        body = ast.parse(code[1:], mode="eval").body
        count = sum(map(_is_reference, ast.walk(body)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("cannot be read") from None
    if isinstance(body, ast.Call):
        if not (isinstance(body.func, ast.Attribute) and _is_reference(body.func.value)):
            raise ValueError("calls something else than a method of an @id")
        if any(keyword.arg is None or keyword.arg.startswith("_") for keyword in body.keywords):
            raise ValueError("has an argument without a plain name")
        arguments = [*body.args, *(keyword.value for keyword in body.keywords)]
        arguments = [argument for argument in arguments if not _is_literal(argument)]
        uses = [_use(body.func, "()"), *map(_use, arguments)]
    else:
        uses = [_use(body)]
    if count != len(matches):  # one in a literal, or one written by hand
        raise ValueError("has a reference in the wrong place")
    return uses


def _use(node: ast.expr, call: str = "") -> tuple[str, str]:
    """An id, and the one thing at most that is asked of it."""
    chain: list[str] = []
    while isinstance(node, ast.Attribute):
        chain.insert(0, node.attr)
        node = node.value
    asked = ".".join(chain) + call
    if not isinstance(node, ast.Subscript) or not _is_reference(node):
        raise ValueError(f"holds a {type(node).__name__}")
    if any(name.startswith("_") for name in chain) or (chain[1:] and asked not in MEMBERS[ANY]):
        raise ValueError(f"reaches for {asked!r}")
    return ast.literal_eval(node.slice), asked


def _is_literal(node: ast.expr) -> bool:
    """Whether an argument is a plain value."""
    plain = isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None)
    if isinstance(node, ast.Constant) and (not plain or REFERENCES in str(node.value)):
        raise ValueError("has an unusual literal")
    return plain


def _is_reference(node: ast.AST) -> bool:
    """Whether this is what MONAI puts in the place of an `@id`."""
    return (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == REFERENCES
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
        and ID.fullmatch(node.slice.value) is not None
    )


def _object_faults(
    path: Path, node: dict[str, Any], objects: Objects
) -> Iterator[tuple[Path, str]]:
    """What is wrong with the keys of an object that MONAI reads itself."""
    for key in node:
        if key.startswith("_") and key not in SPECIAL and key != "_meta_":
            near = nearest(key, SPECIAL)
            if "_target_" in node or near.startswith("Did"):
                yield (key,), f"expected one of {', '.join(SPECIAL)}, got '{key}'. {near}"
    if "_target_" not in node:
        return
    target, mode = node["_target_"], node.get("_mode_", "default")
    forbidden: dict[str, tuple[str, str]] = {}
    if not isinstance(target, str) or not is_allowed(target, objects.allow):
        yield ("_target_",), _target_fault(target, objects.allow)
    elif is_allowed(target):  # the user's own may take what they want
        forbidden = FORBIDDEN.get(target.rpartition(".")[2], {})
    for key in forbidden.keys() & node.keys():
        pattern, reason = forbidden[key]
        if not objects.is_harmless("::".join((*path, key)), pattern):
            yield (
                (key,),
                f"expected no such {key}, since {reason}, got {node[key]!r}. Leave it out.",
            )
    if mode not in MODES or (mode != "default" and forbidden):  # by position it could be given them
        modes = MODES[:1] if forbidden else MODES
        yield ("_mode_",), f"expected one of {', '.join(modes)}, got {mode!r}. Leave it out."
    if str(node.get("_disabled_", False)).lower() not in ("true", "false"):
        yield ("_disabled_",), f"expected true or false, got {node['_disabled_']!r}."


def _target_fault(target: Any, allow: Collection[str]) -> str:
    if not isinstance(target, str):
        return f"expected the name of a class, got {target!r}. Write it as a string."
    near = nearest(target, names(allow))
    hint = f"{near} " if near.startswith("Did") else ""
    remedy = f"If you trust it: --allow {target}"
    return f"expected a class or function of the list, got '{target}'. {hint}{remedy}"


def override_fault(key: str, value: Any) -> str | None:
    """Why `--key value` is no plain value, or `None`.

    Args:
        key: Of the config, with `#` before parts.
        value: As JSON, or a string.
    """
    for path, inner in walk(value, tuple(ReferenceResolver.split_id(key))):
        special = [part for part in path if part in SPECIAL]
        evaluated = isinstance(inner, str) and inner.lstrip().startswith(MARKS)
        if special or evaluated or (isinstance(inner, str) and OBJECT.search(inner)):
            return (
                f"--{key}: expected a JSON value or a plain string, got "
                f"{special[0] if special else inner!r}. "
                "Expressions and references belong into a file, `_target_` likewise."
            )
    return None


def split_allow(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names that `--allow` gives, separated by commas or by repetition, and the other words.

    Raises:
        InputError: If a name is not a dotted name.
    """
    allowed: list[str] = []
    rest: list[str] = []
    words = list(words)
    while words:
        key, given, value = words.pop(0).partition("=")
        if key != "--allow":
            rest.append(key + given + value)
            continue
        value = value if given else words.pop(0) if words else ""
        allowed += [name.strip() for name in value.split(",")]
    wrong = [name for name in allowed if not all(part.isidentifier() for part in name.split("."))]
    if wrong:
        raise InputError(
            *(f"--allow: expected a name such as package.Class, got {name!r}." for name in wrong)
        )
    return allowed, rest
