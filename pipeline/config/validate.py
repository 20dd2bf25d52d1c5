"""Find the mistakes in a config before data are read or an object is made.

A mistake is one line: where it was written (`file:line` or `--key`), the id, what was expected, and
the nearest valid name. Only root causes are reported: nothing is concluded from a wrong value.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections import abc
from contextlib import suppress
from difflib import get_close_matches
from functools import cache, partial
from typing import Any, Literal, Union

import torch

from pipeline.config import allowed, keys, old_names
from pipeline.config.compose import Composed
from pipeline.config.keys import MARKS, Path
from pipeline.errors import nearest, refuse

Hints = dict[str, Any]
Names = abc.Collection[str]
_closest = partial(get_close_matches, n=1, cutoff=0.5)


class Handler:
    """Stands for every class with a method `attach`."""


FITTING: dict[type, tuple[Any, ...]] = {  # the types that a value of JSON may stand for
    bool: (bool,),
    int: (int, float, torch.Tensor, torch.device),
    float: (float, torch.Tensor),
    str: (str, torch.device, torch.dtype),
    list: (list, tuple, abc.Sequence, abc.Iterable, abc.Collection, str),  # or several strings
    dict: (dict, abc.Mapping, abc.Collection),
    type(None): (type(None),),
}
METHODS = {abc.Callable: "__call__", Handler: "attach"}
KNOWN = {*METHODS, *(known for fitting in FITTING.values() for known in fitting)}
LATER = {"_mode_", "_disabled_"}  # keys of objects that are not made, or not yet
PACKAGES = ("ignite", "monai", "networks", "pipeline", "torch", "transforms")


def check_config(composed: Composed, allow: Names | None = (), *, training: bool = True) -> None:
    """Raise an `InputError` with a line for each mistake in a config.

    `allow` are the names that `--allow` gives; `None` admits any, as `monai.bundle` does. A config
    for training must have every key of `keys.KEYS`.
    """
    checker = _Checker(composed, allow)
    checker.check_keys(training)
    checker.check_strings()
    checker.check_objects()
    refuse(composed.tell(*fault) for fault in checker.faults.items())


class _Checker:
    """The values of a config, the references between them, and the faults found so far."""

    def __init__(self, composed: Composed, allow: Names | None) -> None:
        self.composed = composed
        source = {key: value for key, value in composed.source.items() if key != "_meta_"}
        self.nodes = dict(keys.walk(source))
        self.references = {  # of each string: the ids in it, and what is used of each
            path: [(tuple(name.split("::")), used) for name, used in allowed.read_uses(path, value)]
            for path, value in self.nodes.items()
            if isinstance(value, str)
        }
        self.faults: dict[Path, str] = {}
        self.broken: set[Path] = set()
        if allow is not None:
            for path, fault in allowed.find_faults(composed.source, allow).items():
                self.note(path, fault, path[:-1] if "".join(path[-1:]).startswith("_") else path)

    def note(self, path: Path, fault: str, *broken: Path) -> None:
        """Note a fault; `broken` are other paths that are wrong or missing because of it."""
        self.faults.setdefault(path, fault)
        self.broken |= {path, *broken}

    def note_unknown(self, path: Path, owner: str, valid: Names, missing: Names) -> None:
        """Note a key with its new name, or with the nearest, of those that are missing first."""
        *above, key = path
        near = _closest(key, missing) or _closest(key, valid)
        what = f"an argument of {owner}" if owner else "a known key"
        fault = f"expected {what}, got '{key}'. {nearest(key, near or valid)}"
        if new := old_names.RENAMED.get(key):
            near, fault = [new], f"{key} was renamed to {new}"
        self.note(path, fault, *{(*above, one) for one in near} - self.nodes.keys())

    def is_broken(self, path: Path) -> bool:
        return any(path[:n] in self.broken for n in range(len(path) + 1))

    def check_keys(self, training: bool) -> None:
        known = keys.KEYS if training else {**keys.KEYS, **keys.PREDICTION_KEYS}
        needed = [key for key, spec in known.items() if training and not spec.is_optional]
        used = {target[0] for found in self.references.values() for target, _ in found}
        valid = [*known, *keys.CLIENT_KEYS, *(() if training else used)]
        self.check_arguments((), "", dict.fromkeys(valid, Any), needed)
        for key, fault in keys.find_key_faults(self.composed.source, known):
            self.note((key,), fault)

    def check_strings(self) -> None:
        """Ids are there (the first reference to a missing one is told); no mark was forgotten."""
        ids = ["#".join(path) for path in self.nodes if path]
        for path, found in self.references.items():
            for target, _ in found:
                key = target[0]
                is_planned = len(target) == 1 and key in allowed.MEMBERS["Plan"]
                if is_planned and self.nodes.get(target) == "auto" and path[0] != "data_module":
                    self.note(path, f"expected a value, got '@{key}', which the dataset decides. "
                              f"Write '$@plan.{key}'.")  # fmt: skip
                if target in self.nodes or self.is_broken(path) or self.is_broken(target):
                    continue
                near = "".join(_closest("#".join(target), ids))
                place = self.composed.place(tuple(near.split("#"))) if near else ""
                hint = f"Did you mean '@{near}' ({place})?" if place else "Name one."
                fault = f"expected an id that is there, got '@{'#'.join(target)}'. {hint}"
                self.note(path, fault, target)
            value = self.nodes[path]
            target = tuple(value.split("#"))
            is_meant = len(path) > 1 and (path[-1] == value or len(target) > 1)
            if value.startswith("@") and not found:
                self.note(path, f"expected @id, got \"{value}\". With attributes: '${value}'.")
            elif is_meant and target in self.nodes:  # a folder may be named as an id is
                fault = f'expected a reference, got the string "{value}".'
                self.note(path, f"{fault} Did you mean '@{value}'?")

    def check_objects(self) -> None:
        """The class of each object is there, and takes the arguments that are given."""
        for path, node in self.nodes.items():
            name = str(node.get("_target_", "@")) if isinstance(node, dict) else "@"
            if name.startswith(MARKS) or node.keys() & LATER or self.is_broken(path):
                continue
            if (target := allowed.find(name)) is None:
                fault = f"expected a class or function that is there, got '{name}'. Check the name."
                self.note((*path, "_target_"), fault, path)
                continue
            hints, required = _signature_of(target)
            self.check_arguments(path, target.__name__, hints, required)
            if not self.is_broken(path) and hasattr(target, "find_setting_faults"):
                given = {key: self.value((*path, key)) for key in node if key in hints}
                for below, fault in target.find_setting_faults(**given):
                    if self.value(place := self.follow((*path, *below))) is not Any:
                        self.note(place, fault)

    def check_arguments(self, path: Path, name: str, hints: Hints, required: Names) -> None:
        given = [key for key in self.nodes[path] if not key.startswith("_")]
        missing = [key for key in required if key not in given]
        unknown = [key for key in given if key not in hints and "**" not in hints]
        if len(unknown) > 2 and 2 * len(unknown) > len(given):
            fault = f"expected a class that takes {', '.join(unknown)}, got {name}, which takes "
            self.note((*path, "_target_"), f"{fault}{', '.join(hints)}. Name another.", path)
            return
        for key in unknown:
            self.note_unknown((*path, key), name, hints, missing)
        if missing := [key for key in missing if not self.is_broken((*path, key))]:
            fault = f"expected {', '.join(missing)} for {name or 'the config'}, got none. Add it."
            self.note((*path, missing[0]), fault, *((*path, key) for key in missing))
        for key in given:
            at, hint = (*path, key), hints.get(key, Any)
            if typing.is_typeddict(hint) and isinstance(self.nodes.get(self.follow(at)), dict):
                self.check_arguments(self.follow(at), key, _hints_of(hint), hint.__required_keys__)
            elif not self.is_broken(at) and (found := _find_mismatch(self.value(at), hint)):
                self.note_mismatch((*at, *found[0]), found[1])

    def note_mismatch(self, path: Path, expected: str) -> None:
        """Blame a reference for the class of its object, else the value that it leads to."""
        where = self.follow(path)
        value, what = self.value(where), ""
        if isinstance(value, type):
            where = path if path in self.nodes else where
            what = f", which is a {value.__name__}"
        use = "" if where == path else f" for {'#'.join(path)}"
        got = json.dumps(self.nodes[where], default=str)[:60]
        self.note(where, f"expected {expected}{use}, got {got}{what}. Correct it.")

    def follow(self, path: Path) -> Path:
        """Follow the references that stand on a path, and return where it leads."""
        at: Path = ()
        for part in path:
            at = (*at, part)
            if str(self.nodes.get(at)).startswith("@") and self.references[at]:
                at = self.references[at][0][0]
        return at

    def value(self, path: Path, seen: tuple[Path, ...] = ()) -> Any:
        """Resolve a path: plain values, a class for an object of it, or `Any` if unknown."""
        if path not in self.nodes or path in seen or self.is_broken(path):
            return Any
        node, seen = self.nodes[path], (*seen, path)
        if isinstance(node, dict) and "_target_" in node:
            return Any if node.keys() & LATER else _class_of(allowed.find(str(node["_target_"])))
        if isinstance(node, dict):
            return {key: self.value((*path, key), seen) for key in node}
        if isinstance(node, list):
            return [self.value((*path, str(n)), seen) for n in range(len(node))]
        if not self.references.get(path):
            return Any if str(node).startswith(MARKS) else node
        target, member = self.references[path][0]
        value = self.value(target, seen)
        value = _class_of_member(value, member) if member else value
        return Any if value == "auto" else value  # which stands for a value that is chosen later


@cache
def _signature_of(target: Any) -> tuple[dict[str, Any], list[str]]:
    """Types of the arguments, those of base classes and `**` for others too, and required names."""
    hints: dict[str, Any] = {}
    bases = target.__mro__ if inspect.isclass(target) else ()
    functions = [vars(base)["__init__"] for base in bases if "__init__" in vars(base)] or [target]
    for function in filter(inspect.isfunction, functions):
        names = inspect.getfullargspec(function)
        for name in names.args + names.kwonlyargs:
            hints.setdefault(name, _hints_of(function).get(name, Any))
        call = rf"__init__\([^$]*\*\*{names.varkw}\b"
        if not names.varkw or not re.search(call, inspect.getsource(function)):
            hints |= {"**": Any} if names.varkw else {}
            break
    hints.pop("self", None)
    for name in hints.keys() & {"train_handlers", "val_handlers"}:
        hints[name] = abc.Sequence[Handler] | None
    arguments = inspect.signature(target).parameters.values()
    return hints, [one.name for one in arguments if one.default is one.empty and one.name in hints]


@cache
def _hints_of(thing: Any) -> dict[str, Any]:
    with suppress(NameError, TypeError, AttributeError, SyntaxError):
        return typing.get_type_hints(thing)
    return {}


def _class_of(thing: Any) -> Any:
    """The class that a class, an annotation or the result of a function has; `Any` if unknown."""
    hint = _hints_of(thing).get("return") if inspect.isfunction(thing) else thing
    plain = typing.get_origin(hint) or hint
    return plain if inspect.isclass(plain) and plain is not types.UnionType else Any


def _class_of_member(cls: Any, name: str) -> Any:
    member = inspect.getattr_static(cls, name.removesuffix("()"), None)
    member = getattr(member, "fget", member)
    return _class_of(member if inspect.isfunction(member) else _hints_of(cls).get(name))


def _find_mismatch(value: Any, hint: Any) -> tuple[Path, str] | None:
    """Find a value of another type, below or here, and the type expected; classes are objects."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    plain, is_object = origin or hint, isinstance(value, type)
    if inner == (bool, str):  # see errors.as_bool
        return _find_mismatch(value, bool)
    if origin in (Union, types.UnionType):
        found = [_find_mismatch(value, option) for option in inner]
        deeper = [fault for fault in found if fault and fault[0]]
        return None if None in found else next(iter(deeper), ((), _describe(hint)))
    children: abc.Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict) and len(inner) == 2:
        children = value.items()
    elif isinstance(value, list) and (len(inner) == 1 or inner[1:] == (...,)):
        children, inner = enumerate(value), (None, inner[0])
    for key, child in children:
        if fault := _find_mismatch(child, inner[1]):
            return (str(key), *fault[0]), fault[1]
    fits = is_object or value in inner if origin is Literal else _fits(value, plain)
    return None if fits or value is Any else ((), _describe(hint))


def _fits(value: Any, plain: Any) -> bool:
    """Return whether a value, or an object of a class, is one of `plain`; yes where unknown."""
    if Any in (value, plain) or not inspect.isclass(plain):
        return True
    if isinstance(value, str) and plain is bool:
        return value.lower() in ("true", "false")
    cls = value if isinstance(value, type) else type(value)
    if plain in METHODS:
        return any(METHODS[plain] in vars(base) for base in cls.__mro__)
    known = KNOWN if cls in FITTING else FITTING.keys()
    are_known = all(
        one in known or one.__module__.split(".")[0] in PACKAGES for one in (cls, plain)
    )
    related = cls not in FITTING and {*cls.__mro__} & {*plain.__mro__} - {object, typing.Generic}
    return bool(related) or plain in FITTING.get(cls, ()) or not are_known


def _describe(hint: Any) -> str:
    name = hint.__name__ if inspect.isclass(hint) else re.sub(r"\b[a-z_]+\.", "", str(hint))
    return keys.describe_types(name.split(" | "))
