"""The trust boundary: what a config may say, and what would make it a way in.

A config names classes and ties them together; it runs no code of its own. `_target_` holds a name
of the list in `pipeline.targets` or one that the command line allows. An expression starts from an
`@id` and is a chain of attributes, or one call of a method in `METHODS` on that id with references
and literals as arguments. Macros (`%`) and MONAI's debugging mode do not exist.

What is judged is not what was written but what MONAI would evaluate: relative ids resolved and
references replaced by MONAI's own functions. `python -m monai.bundle` executes what a config says
without asking here; it is outside of this boundary.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any

from monai.bundle import ConfigComponent, ConfigParser, ReferenceResolver

from pipeline.errors import InputError, nearest
from pipeline.targets import FORBIDDEN, is_allowed, names

Path = tuple[str, ...]  # keys from the root of the config; "#".join of it is the id

ID = re.compile(r"\w+(::\w+)*")  # not empty, which would be the whole config
OBJECT = re.compile(r"_target_[\"']?\s*[:=]")  # in what was meant to be JSON, too
METHODS = {
    "enter", "leave", "named_parameters", "parameters", "place", "replica", "run", "state_dict",
}  # fmt: skip
MODES = ("default", "callable")  # not "debug", which stops in pdb
SPECIAL = sorted(ConfigComponent.non_arg_keys)
REFERENCES = ReferenceResolver._vars  # the name that holds them when MONAI evaluates
GRAMMAR = "Write @id, $@id.attribute or $@id.method(@id, 1), a method of " + ", ".join(
    sorted(METHODS)
)

# A chain of attributes may end in a bound method that its receiver calls, so that a Path's are as
# good as called (`"lost": "$@lifecycle.run_dir.rmdir"`), and a module is as good as everything.
MODULES = """
    asyncio builtins code codeop ctypes ftplib functools gc http ignite importlib inspect io
    itertools json logger logging marshal monai mp multiprocessing nib nibabel np numpy operator
    os pathlib pdb pickle posix pprint profile pty runpy sched scipy shelve shutil signal smtplib
    socket sqlite3 ssl subprocess sys tempfile threading timeit torch tqdm traceback types urllib
    warnings weakref webbrowser
"""
UNREACHABLE = {name for name in dir(FilePath) if callable(getattr(FilePath, name))}
UNREACHABLE |= {*MODULES.split()}


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
    for path, value in walk(source):
        if isinstance(value, str) and path[-1:] != ("_target_",):
            fault = string_fault(path, value)
            if fault:
                yield path, fault
        elif isinstance(value, dict):
            yield from ((path + place, fault) for place, fault in _object_faults(value, allow))


def string_fault(path: Path, written: str) -> str | None:
    """Why a string may not stand in a config, or `None`."""
    try:
        text = ConfigParser.resolve_relative_ids("::".join(path), written)
    except ValueError:
        return f"expected a relative id within the config, got {written!r}. Use fewer #."
    if text.startswith("%"):
        return f"expected no macro, got {written!r}. Write the value itself, or refer to it by @."
    reason = expression_fault(text) if text.startswith("$") else ""
    if not reason:
        return None
    return f"expected an expression on an id, got {written!r}, which {reason}. {GRAMMAR}."


def expression_fault(text: str) -> str:
    """What an expression has that is not of the grammar; empty if nothing.

    Args:
        text: With its `$`, relative ids resolved.
    """
    matches = ReferenceResolver.id_matcher.findall(ReferenceResolver.normalize_id(text))
    ids = {match[1:]: None for match in matches}
    reason = "" if text.startswith("$@") else "starts from no @id"
    if not reason:
        try:
            code = ReferenceResolver.update_refs_pattern(text, ids)[1:]
            tree = ast.parse(code, mode="eval")
            seen = sum(_is_reference(node) for node in ast.walk(tree))
            reason = _reason(tree.body)
            if not reason and seen != len(matches):  # one in a literal, or one written by hand
                reason = "has a reference in the wrong place"
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            reason = "cannot be read"
    return reason


def _reason(node: ast.expr) -> str:
    """What is wrong with a whole expression; empty if nothing is."""
    if not isinstance(node, ast.Call):
        return _chain_reason(node)
    method = node.func
    if not (isinstance(method, ast.Attribute) and _is_reference(method.value)):
        return "calls something else than a method of an @id"
    if method.attr not in METHODS:
        return f"calls {method.attr}(). {nearest(method.attr, sorted(METHODS))[:-1]}"
    if any(keyword.arg is None or keyword.arg.startswith("_") for keyword in node.keywords):
        return "has an argument without a plain name"
    arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
    return next(filter(None, map(_argument_reason, arguments)), "")


def _argument_reason(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        plain = node.value is None or isinstance(node.value, (str, int, float))
        return "" if plain and REFERENCES not in str(node.value) else "has an unusual literal"
    return _chain_reason(node)


def _chain_reason(node: ast.expr) -> str:
    """What is wrong with a reference and the attributes after it."""
    while isinstance(node, ast.Attribute):
        if node.attr.startswith("_") or node.attr in UNREACHABLE:
            return f"reaches for {node.attr!r}"
        node = node.value
    return "" if _is_reference(node) else f"holds a {type(node).__name__}"


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


def _object_faults(node: dict[str, Any], allow: Collection[str]) -> Iterator[tuple[Path, str]]:
    """What is wrong with the keys of an object that MONAI reads itself."""
    for key in node:
        if key.startswith("_") and key not in SPECIAL and key != "_meta_":
            near = nearest(key, SPECIAL)
            if "_target_" in node or near.startswith("Did"):
                yield (key,), f"expected one of {', '.join(SPECIAL)}, got '{key}'. {near}"
    if "_target_" not in node:
        return
    target = node["_target_"]
    if not isinstance(target, str) or not is_allowed(target, allow):
        yield ("_target_",), _target_fault(target, allow)
    elif forbidden := FORBIDDEN.get(target.rpartition(".")[2], {}):
        for key in forbidden.keys() & node.keys():
            yield (key,), f"expected no {key}, since {forbidden[key]}. Leave it out."
    if node.get("_mode_", "default") not in MODES:
        yield ("_mode_",), f"expected one of {', '.join(MODES)}, got {node['_mode_']!r}."
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
        evaluated = isinstance(inner, str) and inner.lstrip()[:1] in ("$", "@", "%")
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
