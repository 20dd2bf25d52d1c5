"""What a class or function takes, and whether a value of a config is of the annotated type."""

from __future__ import annotations

import collections.abc as abc
import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path as FilePath
from typing import Any, Literal, Union

import numpy as np
import torch
from monai.transforms import MapTransform

from pipeline.config.wording import describe

Path = tuple[str, ...]
OWN = ("ignite", "monai", "networks", "pipeline", "torch", "transforms")
PLAIN = (torch.device, torch.dtype, torch.Tensor)  # of torch, and given as plain values


@dataclass(frozen=True)
class Signature:
    """Parameters by name with their types, and whether any other name is taken too."""

    hints: dict[str, Any]
    required: tuple[str, ...]
    is_open: bool


@cache
def signature_of(target: Any) -> Signature:
    """Signature of a class or function; `**kwargs` that go to the base class are followed."""
    hints: dict[str, Any] = {}
    required: tuple[str, ...] = ()
    for level, function in enumerate(_functions(target)):
        types_ = _hints(function)
        parameters = inspect.signature(function).parameters.values()
        rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
        for p in parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self":
                hints.setdefault(p.name, types_.get(p.name, Any))
                if level == 0 and p.default is p.empty:
                    required += (p.name,)
        if rest is None or not _passes_on(function, rest):
            break
    if inspect.isclass(target) and issubclass(target, MapTransform) and "keys" in hints:
        hints["keys"] = str | abc.Sequence[str]  # MONAI says Hashable
    root = target.__module__.split(".")[0]
    if root in ("networks", "pipeline", "transforms"):  # `bool | str` is what `as_bool` takes
        words = [name for name, hint in hints.items() if typing.get_args(hint) == (bool, str)]
        hints |= dict.fromkeys(words, bool)
    if root == "monai":  # which takes several where it says one
        hints |= {name: str | abc.Sequence[str] for name, hint in hints.items() if hint is str}
    return Signature(hints, required, rest is not None)


def _functions(target: Any) -> Iterator[Any]:
    """The functions that a call runs: of a class, the `__init__` of it and its bases."""
    if not inspect.isclass(target):
        yield target
        return
    found = [vars(base).get("__init__") for base in target.__mro__]
    functions: list[Any] = [each for each in found if inspect.isfunction(each)]
    yield from functions or [_nothing]


def _nothing() -> None:
    """The `__init__` of a class that has none."""


def _passes_on(function: Any, rest: str) -> bool:
    """Whether an `__init__` gives its `**rest` to that of the base class."""
    call = rf"super\([^)]*\)\.__init__\((?:[^()]|\([^()]*\))*\*\*{rest}\b"
    return re.search(call, _code(function)) is not None


@cache
def _code(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # written in C
        return ""


def _hints(thing: Any, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Type hints; those that cannot be told (imported for type checkers only) are left out."""
    found: dict[str, Any] = {}
    if names is None:
        thing = inspect.unwrap(thing)
        names = getattr(thing, "__globals__", {})
    for name, hint in getattr(thing, "__annotations__", {}).items():
        holder: Any = types.SimpleNamespace(__annotations__={name: hint})
        try:
            found |= typing.get_type_hints(holder, names)
        except (NameError, TypeError, AttributeError, SyntaxError):
            continue
    return found


def returned(target: Any) -> Any:
    """The type of what a call gives: a class itself, a function's annotation, else `Any`."""
    return target if inspect.isclass(target) else _hints(target).get("return", Any)


@cache
def attributes(cls: type) -> dict[str, Any] | None:
    """Public attributes of a class's instances with their types; `None` if it may have others."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__[:-1]):
        if "__getattr__" in vars(base):
            return None
        found |= dict.fromkeys(re.findall(r"\bself\.([A-Za-z]\w*)", _code(base)), Any)
        found |= {name: Any for name in vars(base) if not name.startswith("_")}
        found |= dict.fromkeys(vars(base).get("__annotations__", ()), Any)
        if "__annotations__" in vars(base):
            found |= _hints(base, vars(inspect.getmodule(base) or types))
        for name, member in vars(base).items():
            if isinstance(member, property) and member.fget:
                found[name] = _hints(member.fget).get("return", Any)
    return found


def mismatch(value: Any, hint: Any) -> tuple[Path, str] | None:
    """Where below `value`, and what is expected there, if it is not of the type `hint`.

    Args:
        value: Of a config. A class stands for an object of it, and fits where it may; what is
            not known is `Any`.
        hint: A type; one of a kind not known here takes everything.
    """
    if value is Any or hint is Any or isinstance(hint, (str, typing.TypeVar, typing.ForwardRef)):
        return None
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        found = [mismatch(value, option) for option in arguments]
        if None in found:
            return None
        deeper = [fault for fault in found if fault and fault[0]]
        return deeper[0] if deeper else ((), describe(hint))
    if origin is typing.Annotated:
        return mismatch(value, arguments[0])
    if origin is Literal:
        fits = _is_object(value) or value in arguments
        return None if fits else ((), describe(hint))
    plain = hint if origin is None else origin
    if not inspect.isclass(plain):
        return None
    if _is_object(value):
        return None if _object_fits(value, plain) else ((), describe(hint))
    if isinstance(value, (list, dict)) and plain is not dict and issubclass(plain, abc.Iterable):
        fault = _element_mismatch(value, plain, arguments)
        if fault:
            return fault
    elif plain is dict and isinstance(value, dict):
        return _element_mismatch(value, plain, arguments)
    return None if _literal_fits(value, plain) else ((), describe(hint))


def _element_mismatch(value: Any, plain: type, arguments: tuple) -> tuple[Path, str] | None:
    """The first element of a list, or value of an object, that is of another type."""
    if isinstance(value, dict):
        inner = arguments[1] if len(arguments) == 2 and issubclass(plain, abc.Mapping) else Any
        pairs = list(value.items())
    else:
        one = len(arguments) == 1 or (len(arguments) == 2 and arguments[1] is ...)
        inner = arguments[0] if one else Any
        pairs = [(str(n), element) for n, element in enumerate(value)]
    for key, element in pairs:
        fault = mismatch(element, inner)
        if fault:
            return (key, *fault[0]), fault[1]
    return None


def _is_object(value: Any) -> bool:
    """Whether a value stands for an object that is yet to be made; those are given as types."""
    return isinstance(value, type) or typing.get_origin(value) is not None


def _object_fits(given: Any, plain: type) -> bool:
    """Whether an object of type `given` may stand where `plain` is annotated."""
    given = typing.get_origin(given) or given
    if not inspect.isclass(given) or plain in (object, typing.Generic):
        return True
    if (given, plain) in ((int, float), (FilePath, str)):
        return True
    if plain is abc.Callable:
        return any("__call__" in vars(base) for base in given.__mro__)
    if plain in (int, float, str, bool, list, dict, tuple, type(None)):
        return issubclass(given, plain)
    if given in (int, float, str, bool, list, dict, tuple):
        if plain in PLAIN:
            return (given, plain) in ((int, torch.Tensor), (float, torch.Tensor))
        return issubclass(given, plain) or not (_is_own(plain) or plain.__module__ == abc.__name__)
    if plain.__name__.startswith("_"):  # torch's _LRScheduler, which its own do not inherit from
        plain = plain.__mro__[1]
    # protocols, duck types and bases of one's own are not for us to judge
    apart = not (issubclass(given, plain) or issubclass(plain, given))
    return not (apart and (_is_own(plain) or plain in PLAIN) and _is_own(given))


def _literal_fits(value: Any, plain: type) -> bool:
    """Whether a plain value may stand where the class `plain` is annotated."""
    if plain is bool:
        return isinstance(value, bool) or str(value).lower() in ("true", "false")
    if plain in (int, float):
        return not isinstance(value, bool) and isinstance(value, (int, plain))
    if plain in (str, dict, type(None)):
        return isinstance(value, plain)
    if plain is abc.Callable or plain is type:
        return False
    if issubclass(plain, abc.Mapping):
        return isinstance(value, dict)
    if issubclass(plain, (list, tuple, set)) or plain in (abc.Sequence, abc.Iterable):
        return isinstance(value, list)
    if plain is abc.Collection:
        return isinstance(value, (list, dict))
    named = plain in (torch.dtype, np.dtype) or plain.__name__ in ("Path", "PathLike")
    if named or issubclass(plain, Enum):
        return isinstance(value, str)
    if plain in PLAIN:
        kinds = (str, int) if plain is torch.device else (int, float, list)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return not _is_own(plain)


def _is_own(cls: type) -> bool:
    return cls.__module__.split(".")[0] in OWN and cls not in PLAIN and not issubclass(cls, Enum)
