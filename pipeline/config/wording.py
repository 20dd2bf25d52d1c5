"""Types in words, for messages."""

from __future__ import annotations

import collections.abc as abc
import inspect
import types
import typing
from typing import Any, Literal, Union

NAMES = {
    str: "a string", int: "an integer", float: "a number", bool: "true or false",
    type(None): "null",
}  # fmt: skip


def describe(hint: Any) -> str:
    """A type in words, for a message."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(describe, arguments)))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    plain = origin or hint
    if plain is abc.Callable:
        return "something to call"
    if not inspect.isclass(plain):
        return "another type"
    if issubclass(plain, (abc.Mapping, dict)):
        return "an object"
    if plain is not str and issubclass(plain, abc.Iterable) and plain.__module__ in (
        "builtins", "collections.abc", "typing",
    ):  # fmt: skip
        inner = describe(arguments[0]) if arguments and arguments[0] is not ... else ""
        return f"a list ({inner} each)" if inner else "a list"
    return NAMES.get(plain, plain.__name__)
