"""One config out of files and a command line, as MONAI's ConfigParser composes it.

Nothing here imports torch or MONAI, so that a mistake on the command line is answered at once.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import old_names
from pipeline.config.keys import (
    CLIENT_KEYS,
    CONFIGS,
    KEYS,
    PREDICTION_KEYS,
    Config,
    find_key_faults,
    walk,
)
from pipeline.config.keys import Path as Keys
from pipeline.errors import InputError, nearest, refuse

OWN = ("networks", "pipeline", "transforms")
LIST_REMEDY = """Put a list into quotes, as one word: --key '["a", "b"]'."""
STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?')  # of JSON; with a colon it is a key


@dataclass
class Composed:
    """A merged config, unevaluated, and where each of its values comes from."""

    source: Config
    places: dict[Keys, str] = field(default_factory=dict)  # of paths: `file:line` or `--key`

    def place(self, path: Keys) -> str:
        """Return where the value at a path comes from, or else what contains it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "")

    def tell(self, path: Keys, fault: str) -> str:
        """Return one line: the place, the id path, and what is expected there."""
        place, name = self.place(path), "#".join(path)
        parts = [place] if place == f"--{name}" else [place, name]
        return ": ".join([*filter(None, parts), fault])

    def put(self, path: Keys, places: dict[Keys, str]) -> None:
        """Replace the places at and below a path."""
        kept = {at: place for at, place in self.places.items() if at[: len(path)] != path}
        self.places = kept | {path + at: place for at, place in places.items()}

    def override(self, values: Config) -> None:
        """Put values in the place of others; raise an `InputError` for keys that have no place."""
        faults = []
        for key, value in values.items():
            path = split_id(key)
            if fault := _place_fault(self.source, path):
                faults.append(f"--{key}: {fault}")
                continue
            _assign(self.source, path, value)
            self.put(path, {(): f"--{key}"})
        refuse(faults)

    def merge(self, key: str, value: Any, places: dict[Keys, str]) -> None:
        """Merge a key of a file, `a#b` or `+a`; raise an `InputError` if it does not fit there."""
        adding = key.startswith("+")
        path = split_id(key[adding:])
        node: Any = self.source
        for part in path if adding else path[:-1]:
            if part not in (valid := _children(node)):
                raise InputError(f"{places[()]}: {key}: {_unknown(part, list(valid))}")
            node = valid[part]
        value, offset = deepcopy(value), len(node) if isinstance(node, list) else 0
        try:
            if adding and isinstance(node, list) and isinstance(value, list):
                node += value
                places = {at and (str(int(at[0]) + offset), *at[1:]): places[at] for at in places}
            elif adding:
                node.update(value)
            else:
                _assign(self.source, path, value)
        except (AttributeError, IndexError, TypeError, ValueError):
            expected = f"{places[()]}: {key}: expected what fits the {type(node).__name__} there"
            raise InputError(f"{expected}, got {json.dumps(value)[:60]}. Correct it.") from None
        if adding:
            self.places |= {path + at: place for at, place in places.items()}
        else:
            self.put(path, places)

    def check_keys(self, training: bool) -> None:
        """Raise an `InputError` if a key at the top is unknown, or has a value of another type."""
        known = {**KEYS, **({} if training else PREDICTION_KEYS)}
        text = json.dumps(self.source)  # keys of a user's own may be referred to in prediction
        own = {k for k in self.source if not training and re.search(rf"@{re.escape(k)}\b", text)}
        valid = {*known, *CLIENT_KEYS, "_meta_", *own}
        unknown = [(key, _unknown(key, [*known])) for key in self.source if key not in valid]
        faults = [*unknown, *find_key_faults(self.source, known)]
        refuse(self.tell((key,), fault) for key, fault in faults)


def compose_located(files: Sequence[str], overrides: Config) -> Composed:
    """Merge config files in order, then overrides; raise an `InputError` for what does not fit."""
    merged = Composed({})
    for file in files:
        content, places = _read(file)
        merged.places.setdefault((), f"{file}:1")
        for key, value in content.items():
            below = {at[1:]: place for at, place in places.items() if at[:1] == (key,)}
            merged.merge(key, value, below)
    merged.override(overrides)
    return merged


def find_config(file: str) -> Path:
    """Return the path of a config: `file`, or the shipped one of that name."""
    shipped = CONFIGS / Path(file).name
    is_shipped = Path(file).parent.name in ("", "configs") and shipped.is_file()
    return shipped if is_shipped and not Path(file).exists() else Path(file)


def _read(file: str) -> tuple[Config, dict[Keys, str]]:
    """The content of a file, and `file:line` of each key of an object by its path."""
    path = find_config(file)
    if not path.is_file():
        known = [str(other) for other in path.parent.glob("*.json")]
        hint = nearest(file, known) if known else "Check the path."
        if path.suffix != ".json":
            raise InputError(f"{file}: expected an option or a .json file, got it. {LIST_REMEDY}")
        raise InputError(f"{file}: expected a config file, found none. {hint}")
    try:
        text = old_names.name_own_classes(path, path.read_text())
        content = json.loads(text, object_pairs_hook=_make_object)
        places = {at: f"{file}:{line}" for at, line in _number_lines(text).items()}
    except (LookupError, TypeError, ValueError, RecursionError) as error:  # deep nesting, too
        raise InputError(f"{file}: expected JSON, got: {error}. Mend the file.") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object, got a {type(content).__name__}.")
    if path.absolute().parents[1].joinpath("run.json").is_file():  # of a stored run
        content, names = old_names.translate(content), old_names.TOP_LEVEL
        places = {tuple(names.get(key, key) for key in at): places[at] for at in places}
    return content, places


def _make_object(pairs: list[tuple[str, Any]]) -> Config:
    made: Config = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {key!r} twice in an object")
        made[key] = value
    return made


def _number_lines(text: str) -> dict[Keys, int]:
    """The line of each key of a text that is known to be JSON, by its path."""

    def number(found: re.Match[str]) -> str:
        line = text.count("\n", 0, found.start()) + 1
        return f'"{line}:{found[1]}"{found[2]}' if found[2] else found[0]

    lines = {}
    for path, _ in walk(json.loads(STRING.sub(number, text))):
        if path and ":" in path[-1]:
            at = tuple(part.partition(":")[2] if ":" in part else part for part in path)
            lines[at] = int(path[-1].partition(":")[0])
    return lines


def split_id(key: str) -> Keys:
    """Split the id `a#b` or `a::b`."""
    return tuple(key.replace("#", "::").split("::"))


def _assign(node: Any, path: Keys, value: Any) -> None:
    for part in path[:-1]:
        node = node[int(part) if isinstance(node, list) else part]
    node[int(path[-1]) if isinstance(node, list) else path[-1]] = value


def _place_fault(source: Config, path: Keys) -> str | None:
    """Say why an override has no place: no such value, and no argument of its object."""
    node: Any = source
    for depth, part in enumerate(path):
        known = _children(node)
        target = known.get("_target_") if depth else None
        may_be_new = target or (not depth and part in KEYS)
        if part not in known and not (may_be_new and depth == len(path) - 1):
            return _unknown(part, [*known, *(() if depth else KEYS)])
        arguments = _read_arguments(str(target)) if target else None
        if arguments is not None and part not in (*known, *arguments):
            owner = str(target).rpartition(".")[2]
            near = nearest(part, arguments)
            return f"expected an argument of {owner}, got '{part}'. {near}"
        node = known.get(part)
    return None


def _read_arguments(target: str) -> list[str] | None:
    """Read which arguments a class or function of ours takes from its source; `None`: unknown."""
    module, _, name = target.rpartition(".")
    file = Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py")
    if module.split(".")[0] not in OWN or not file.is_file():
        return None
    body = ast.parse(file.read_text()).body
    found: Any = next((node for node in body if getattr(node, "name", "") == name), None)
    if isinstance(found, ast.ClassDef):
        methods = [node for node in found.body if isinstance(node, ast.FunctionDef)]
        found = next((node for node in methods if node.name == "__init__"), None)
    if not isinstance(found, ast.FunctionDef) or found.args.kwarg:
        return None
    return [one.arg for one in (*found.args.args, *found.args.kwonlyargs) if one.arg != "self"]


def _unknown(part: str, valid: list[str]) -> str:
    new = old_names.RENAMED.get(part)
    hint = nearest(part, valid) if valid else "Set it first."
    return f"{part} was renamed to {new}" if new else f"expected a known key, got '{part}'. {hint}"


def _children(node: Any) -> dict[str, Any]:
    """Return the values directly below `node`, by key."""
    if isinstance(node, list):
        return {str(n): child for n, child in enumerate(node)}
    return node if isinstance(node, dict) else {}
