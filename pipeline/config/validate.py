"""Find the mistakes in a config before data are read or an object is made.

A mistake is one line: where it was written (`file:line` or `--key`), the id, what was expected, and
the nearest valid name. Only root causes are reported: nothing is concluded from a wrong value.
"""

from __future__ import annotations

import graphlib
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
from ignite.engine import Engine

from pipeline.config import allowed, keys, old_names
from pipeline.config.compose import Composed
from pipeline.config.keys import MARKS, Path
from pipeline.errors import InputError, nearest

_closest = partial(get_close_matches, n=1, cutoff=0.5)
FITTING: dict[type, tuple[Any, ...]] = {  # the types that a value of JSON may stand for
    bool: (bool,),
    int: (int, float, torch.Tensor, torch.device),
    float: (float, torch.Tensor),
    str: (str, torch.device, torch.dtype),
    list: (list, tuple, abc.Sequence, abc.Iterable, abc.Collection),
    dict: (dict, abc.Mapping, abc.Collection),
    type(None): (type(None),),
}
PACKAGES = ("ignite", "monai", "networks", "pipeline", "torch", "transforms")
KNOWN = {abc.Callable, *(known for fitting in FITTING.values() for known in fitting)}
WORDS = {
    str: "a string", int: "an integer", float: "a number", bool: "true or false", dict: "an object",
    type(None): "null", abc.Mapping: "an object", abc.Callable: "something to call",
    Engine: "a handler (with a method attach)", **dict.fromkeys(FITTING[list], "a list"),
}  # fmt: skip


def check_config(
    composed: Composed, allow: abc.Collection[str] | None = (), *, training: bool | None = None
) -> None:
    """Look for mistakes in a config.

    Args:
        composed: The config, and where its values come from.
        allow: Names that `--allow` gives; `None`: any, as under `monai.bundle`.
        training: Whether the config must have every key of `keys.KEYS`; by default if it has a
            `train` or a `lifecycle`.

    Raises:
        InputError: A line for each mistake.
    """
    checker = _Checker(composed, allow)
    checker.check_names()
    checker.check_keys(training)
    checker.check_objects()
    checker.check_strings()
    checker.check_circles()
    order = {path: n for n, path in enumerate(composed.places)}
    if faults := sorted(checker.faults.items(), key=lambda fault: order.get(fault[0], -1)):
        raise InputError(*(composed.tell(*fault) for fault in faults))


class _Checker:
    """The values of a config, the references between them, and the faults found so far."""

    def __init__(self, composed: Composed, allow: abc.Collection[str] | None) -> None:
        self.composed, self.allow = composed, allow
        source = {key: value for key, value in composed.source.items() if key != "_meta_"}
        self.nodes = dict(keys.walk(source))
        strings = {path: value for path, value in self.nodes.items() if isinstance(value, str)}
        self.references = {  # of each string: the ids in it, and what is used of each
            path: [(tuple(name.split("::")), used) for name, used in allowed.read_uses(path, value)]
            for path, value in strings.items()
        }
        self.faults: dict[Path, str] = {}
        self.broken: set[Path] = set()

    def note(self, path: Path, fault: str, *broken: Path) -> None:
        """Note a fault; `broken` are other paths that are wrong or missing because of it."""
        self.faults.setdefault(path, fault)
        self.broken |= {path, *broken}

    def is_broken(self, path: Path) -> bool:
        return any(path[:n] in self.broken for n in range(len(path) + 1))

    def check_names(self) -> None:
        for path, node in self.nodes.items():
            keys_ = node if isinstance(node, dict) else {}
            owner = str(keys_.get("_target_", "".join(path[-1:]))).rpartition(".")[2]
            for key in keys_:
                if new := old_names.renamed(key, owner):
                    self.note((*path, key), f"{key} was renamed to {new}", (*path, new))
        if self.allow is not None:
            for path, fault in allowed.find_faults(self.composed.source, self.allow):
                self.note(path, fault, path[:-1] if "".join(path[-1:]).startswith("_") else path)

    def check_keys(self, training: bool | None) -> None:
        source = self.composed.source
        if training is None:
            training = "train" in source or "lifecycle" in source
        known = keys.KEYS if training else {**keys.KEYS, **keys.PREDICTION_KEYS}
        needed = [key for key, spec in known.items() if training and not spec.is_optional]
        used = {target[0] for found in self.references.values() for target, _ in found}
        missing = used.union(needed) - source.keys()
        for key in source:
            is_known = key in (*known, "_meta_", *keys.CLIENT_KEYS)
            if not (is_known or self.is_broken((key,))) and (training or key not in used):
                near = _closest(key, missing)
                fault = f"expected a known key, got '{key}'. {nearest(key, near or known)}"
                self.note((key,), fault, *((one,) for one in near))
        for key in needed:
            if key in missing and not self.is_broken((key,)):
                self.note((key,), f"expected a value ({known[key].meaning}), got none. Add it.")
        for key, fault in keys.find_key_faults(source, known):
            self.note((key,), fault)

    def check_objects(self) -> None:
        """The class of each object is there, and takes the arguments that are given."""
        for path, node in self.nodes.items():
            name = str(node.get("_target_", "@")) if isinstance(node, dict) else "@"
            if name.startswith(MARKS) or self.is_broken(path):
                continue
            if (target := self.target(node)) is None:
                fault = f"expected a class or function that is there, got '{name}'. Check the name."
                self.note((*path, "_target_"), fault, path)
                continue
            hints, required = _signature_of(target)
            is_made = not node.keys() & {"_mode_", "_disabled_"}
            self.check_arguments(path, target.__name__, hints, required if is_made else [])
            if not self.is_broken(path) and hasattr(target, "find_setting_faults"):
                given = {key: self.value((*path, key)) for key in node if key in hints}
                for below, fault in target.find_setting_faults(**given):
                    if self.value(place := self.follow(path, *below)[0]) is not Any:
                        self.note(place, fault)

    def target(self, node: dict[str, Any]) -> Any:
        """The class or function of an object; `None` if there is none, or it is not allowed."""
        name = str(node["_target_"])
        is_allowed = self.allow is None or allowed.is_allowed(name, self.allow)
        return allowed.find(name) if is_allowed and not name.startswith(MARKS) else None

    def check_arguments(
        self, path: Path, name: str, hints: dict[str, Any], required: abc.Collection[str]
    ) -> None:
        given = [key for key in self.nodes[path] if not key.startswith("_")]
        missing = [key for key in required if key not in given]
        unknown = [key for key in given if key not in hints and "**" not in hints]
        if len(unknown) > 2 and 2 * len(unknown) > len(given):
            fault = f"expected a class that takes {', '.join(unknown)}, got {name}, which takes "
            self.note((*path, "_target_"), f"{fault}{', '.join(hints)}. Name another.", path)
            return
        for key in unknown:
            near = _closest(key, missing) or _closest(key, hints)
            fault = f"expected an argument of {name}, got '{key}'. {nearest(key, near or hints)}"
            self.note((*path, key), fault, *((*path, one) for one in near if one not in given))
        if missing := [key for key in missing if not self.is_broken((*path, key))]:
            fault = f"expected {', '.join(missing)} for {name}, got none. Add it."
            self.note((*path, missing[0]), fault, *((*path, key) for key in missing))
        for key in given:
            at, hint = (*path, key), hints.get(key, Any)
            place, _ = self.follow(at)
            if typing.is_typeddict(hint) and isinstance(self.nodes.get(place), dict):
                self.check_arguments(place, key, _hints_of(hint), hint.__required_keys__)
            elif not self.is_broken(at) and (found := _find_mismatch(self.value(at), hint)):
                self.note_mismatch(at, *found)

    def note_mismatch(self, path: Path, below: Path, expected: str) -> None:
        place, via = self.follow(path, *below)
        node, value = self.nodes[place], self.value(place)
        is_made, is_key = isinstance(value, type), len(place) == 1 and place[0] in keys.KEYS
        if (via and (is_made or is_key)) or (is_made and isinstance(node, str)):
            via = via or place
            got = f"{_show(self.nodes[via])}, which is {_show(value)}. Refer to something else."
            self.note(via, f"expected {expected}, got {got}")
            return
        use = "" if place == (*path, *below) else f" for {'#'.join(path)}"
        is_id = isinstance(node, str) and tuple(node.split("#")) in self.nodes
        hint = f"Did you mean '@{node}'?" if is_id else "Correct it."
        got = _show(value if is_made else node)
        self.note(place, f"expected {expected}{use}, got {got}. {hint}")

    def follow(self, path: Path, *below: str) -> tuple[Path, Path | None]:
        """Where a chain of plain references ends, and the place of the last of them."""
        if below:
            return self.follow((*self.follow(path, *below[:-1])[0], below[-1]))
        seen: list[Path] = []
        while str(self.nodes.get(path)).startswith("@") and self.references[path]:
            target, _ = self.references[path][0]
            if target in (*seen, path) or target not in self.nodes:
                break
            seen.append(path)
            path = target
        return path, seen[-1] if seen else None

    def value(self, path: Path, seen: tuple[Path, ...] = ()) -> Any:
        """What a path holds once it is resolved: plain values, classes for objects, or `Any`."""
        if path not in self.nodes or path in seen or self.is_broken(path):
            return Any
        node, seen = self.nodes[path], (*seen, path)
        if isinstance(node, dict) and "_target_" in node:
            return Any if node.keys() & {"_mode_", "_disabled_"} else _returned(self.target(node))
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

    def check_strings(self) -> None:
        """Ids are there (the first reference to a missing one is told); no mark was forgotten."""
        ids = ["#".join(path) for path in self.nodes if path]
        for path, found in self.references.items():
            for target, _ in found:
                if target in self.nodes or self.is_broken(path) or self.is_broken(target):
                    continue
                near = _closest("#".join(target), ids)
                place = self.composed.place(tuple(near[0].split("#"))) if near else ""
                hint = f"Did you mean '@{near[0]}' ({place})?" if place else "Name one."
                fault = f"expected an id that is there, got '@{'#'.join(target)}'. {hint}"
                self.note(path, fault, target)
            value = self.nodes[path]
            if path[-1] in allowed.SPECIAL or self.is_broken(path):
                continue
            if value.startswith("@") and not found:
                fault = f"expected @id, got {_show(value)}. With attributes: '${value}'."
                self.note(path, fault)
            target = tuple(value.split("#"))
            is_meant = len(path) > 1 and (path[-1] == value or len(target) > 1)
            if is_meant and target in self.nodes:  # a folder may be named as an id is
                fault = f"expected a reference, got the string {_show(value)}."
                self.note(path, f"{fault} Did you mean '@{value}'?")

    def check_circles(self) -> None:
        graph = {path: {target for target, _ in found} for path, found in self.references.items()}
        for path in self.nodes.keys() - {()}:
            graph.setdefault(path[:-1], set()).add(path)
        try:
            graphlib.TopologicalSorter({**graph, (): set()}).prepare()
        except graphlib.CycleError as error:
            uses = [path for path in error.args[1] if self.references.get(path)]
            shown = " → ".join(f"@{'#'.join(path)}" for path in uses)
            self.note(uses[-1], f"expected no circle of references, got {shown}. Break it.")


@cache
def _signature_of(target: Any) -> tuple[dict[str, Any], list[str]]:
    """Types of the arguments of a class or function, and the names of those that are required.

    `**kwargs` that go to the base class are followed; `**` stands for others.
    """
    hints: dict[str, Any] = {}
    required: list[str] = []
    bases = target.__mro__ if inspect.isclass(target) else ()
    functions = [vars(base)["__init__"] for base in bases if "__init__" in vars(base)] or [target]
    for function in filter(inspect.isfunction, functions):
        hints.pop("**", None)
        for name, one in inspect.signature(function).parameters.items():
            if one.kind is one.VAR_KEYWORD:
                hints["**"] = name
            elif one.kind is not one.VAR_POSITIONAL and name != "self":
                hints.setdefault(name, _hints_of(function).get(name, Any))
                if function is functions[0] and one.default is one.empty:
                    required.append(name)
        call = rf"__init__\([^$]*\*\*{hints.get('**')}\b"
        if "**" not in hints or not re.search(call, inspect.getsource(function)):
            break
    for name in hints.keys() & {"train_handlers", "val_handlers"}:
        hints[name] = abc.Sequence[Engine] | None  # an engine stands for what has a method `attach`
    return hints, required


@cache
def _hints_of(thing: Any) -> dict[str, Any]:
    with suppress(NameError, TypeError, AttributeError, SyntaxError):
        return typing.get_type_hints(thing)
    return {}


def _returned(target: Any) -> Any:
    return target if inspect.isclass(target) else _class_of(_hints_of(target).get("return"))


def _class_of_member(cls: Any, name: str) -> Any:
    member = inspect.getattr_static(cls, name.removesuffix("()"), None)
    if isinstance(member, property) or name.endswith("()"):
        return _returned(getattr(member, "fget", member))
    return _class_of(_hints_of(cls).get(name))


def _class_of(hint: Any) -> Any:
    plain = typing.get_origin(hint) or hint
    return plain if inspect.isclass(plain) and plain is not types.UnionType else Any


def _find_mismatch(value: Any, hint: Any) -> tuple[Path, str] | None:
    """Where below a value, and what is expected there; a class stands for an object of it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    plain, is_object, fits = origin or hint, isinstance(value, type), True
    if inner == (bool, str):  # see errors.as_bool
        return _find_mismatch(value, bool)
    if origin in (Union, types.UnionType):
        found = [_find_mismatch(value, option) for option in inner]
        fits = None in found
        if deeper := [fault for fault in found if fault and fault[0] and not fits]:
            return deeper[0]
    elif origin is Literal:
        fits = is_object or value in inner or value is Any
    elif Any not in (value, plain) and inspect.isclass(plain):
        elements: dict[str, Any] = value if isinstance(value, dict) and len(inner) == 2 else {}
        if isinstance(value, list) and (len(inner) == 1 or inner[1:] == (...,)):
            elements, inner = {str(n): one for n, one in enumerate(value)}, (None, inner[0])
        for key, element in elements.items():
            if fault := _find_mismatch(element, inner[1]):
                return (key, *fault[0]), fault[1]
        fits = _fits_object(value, plain) if is_object else _fits_value(value, plain)
    return None if fits else ((), _describe(hint))


def _fits_value(value: Any, plain: Any) -> bool:
    if plain is bool and isinstance(value, str):
        return value.lower() in ("true", "false")
    if plain is str and isinstance(value, list):  # MONAI often takes several
        return all(isinstance(one, str) for one in value)
    return plain in FITTING[type(value)] if plain in KNOWN else not _is_own(plain)


def _fits_object(given: type, plain: Any) -> bool:
    if plain in (abc.Callable, Engine):
        name = "attach" if plain is Engine else "__call__"
        return any(name in vars(base) for base in given.__mro__)
    if given in FITTING or plain in FITTING:
        is_other = not (given in FITTING or _is_own(given))  # such as a path for a string
        return issubclass(given, plain) or plain in FITTING.get(given, ()) or is_other
    bases = {*given.__mro__} & {*plain.__mro__} - {object, typing.Generic}
    return bool(bases) or not (_is_own(plain) and _is_own(given))


def _is_own(cls: type) -> bool:
    return cls.__module__.split(".")[0] in PACKAGES


def _describe(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_describe, inner)))
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    return str(WORDS.get(origin or hint) or getattr(hint, "__name__", "another type"))


def _show(value: Any) -> str:
    text = f"a {value.__name__}" if isinstance(value, type) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
