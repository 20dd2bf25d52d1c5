"""One config out of files and a command line, as MONAI's ConfigParser composes it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from monai.bundle import ConfigComponent, ConfigParser, ReferenceResolver

from pipeline.config import KEYS, Config
from pipeline.errors import InputError, nearest


def parse_overrides(words: Sequence[str]) -> Config:
    """`--key value` pairs; values are JSON and, failing that, plain strings.

    Raises:
        InputError: If a key or value is missing, or a value is an expression or reference.
    """
    overrides: Config = {}
    pairs = iter(words)
    for word in pairs:
        if not word.startswith("--"):
            raise InputError(f"{word}: expected --key value, got a word without key.")
        key, given, value = word[2:].partition("=")
        text = value if given else next(pairs, None)
        if text is None:
            raise InputError(f"--{key}: expected a value after it, got none.")
        if text[:1] in ("$", "@", "%") or "_target_" in text:
            raise InputError(
                f"--{key}: expected a JSON value or a plain string, got {text!r}. "
                "Expressions and references belong into a file."
            )
        try:
            overrides[key] = json.loads(text)
        except ValueError:
            overrides[key] = text
    return overrides


def compose(files: Sequence[str], overrides: Config) -> Config:
    """Merge config files in order, then overrides, as MONAI's ConfigParser does.

    Raises:
        InputError: If a file is missing or is not a JSON object, or a key has no place.
    """
    for file in files:
        if not Path(file).is_file():
            known = [str(path) for path in Path(file).parent.glob("*.json")]
            hint = nearest(file, known) if known else "Check the path."
            raise InputError(f"{file}: expected a config file, found none. {hint}")
        try:
            content = ConfigParser.load_config_file(file)
        except ValueError as error:
            raise InputError(f"{file}: expected JSON, got: {error}. Mend the file.") from None
        if not isinstance(content, dict):
            raise InputError(f"{file}: expected a JSON object, got a {type(content).__name__}.")
    parser = ConfigParser(ConfigParser.load_config_files(list(files)))
    for key, value in overrides.items():
        _check_place(parser, key)
        parser[key] = value
    return parser.get()


def _check_place(parser: ConfigParser, key: str) -> None:
    """Refuse an override whose key neither exists nor is an argument of its component."""
    parts = ReferenceResolver.split_id(key)
    node: Any = parser.get()
    for depth, part in enumerate(parts):
        valid = list(KEYS) if depth == 0 else _children(node)
        if part not in valid:
            raise InputError(f"--{key}: expected a known key, got '{part}'. {nearest(part, valid)}")
        missing = isinstance(node, dict) and part not in node
        if missing and depth < len(parts) - 1:
            raise InputError(f"--{key}: expected '{part}' to be set before its parts.")
        node = None if missing else node[part] if isinstance(node, dict) else node[int(part)]


def _children(node: Any) -> list[str]:
    """Keys that may stand below `node`: those there, and the arguments of its `_target_`."""
    if isinstance(node, list):
        return [str(n) for n in range(len(node))]
    if not isinstance(node, dict):
        return []
    keys = list(node)
    if isinstance(node.get("_target_"), str):
        component = ConfigComponent({"_target_": node["_target_"], "_mode_": "callable"})
        target: Any = component.instantiate()
        parameters = inspect.signature(target).parameters.values()
        keys += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return keys


def source_being_resolved() -> Config:
    """The config that a component is being built from, merged with its overrides, unevaluated.

    MONAI hands a component its arguments only, and a reference to everything would be circular.
    The resolver that builds the component is on the call stack, whichever entry (`pipeline.run`,
    `monai.bundle run`, a federated client) made it; its root item is the source.

    Raises:
        RuntimeError: If no config is being resolved.
    """
    frame = inspect.currentframe()
    while frame is not None:
        resolver = frame.f_locals.get("self")
        if isinstance(resolver, ReferenceResolver):
            return deepcopy(resolver.items[""].get_config())
        frame = frame.f_back
    raise RuntimeError("lifecycle: expected to be built from a config, got a direct call.")
