"""One config out of files and a command line, as MONAI's ConfigParser composes it.

`compose_located` also remembers on which line of which file each value stands. `Parser` evaluates
the result, and `config_of_monai` finds the config where MONAI's own commands evaluate it.
"""

from __future__ import annotations

import inspect
import json
import re
from bisect import bisect
from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ReferenceResolver
from monai.bundle.utils import merge_kv

from pipeline.config import allowed, old_names
from pipeline.config.keys import KEYS, MARKS, Config, read_word
from pipeline.config.keys import Path as Keys
from pipeline.config.parser import Resolver
from pipeline.errors import InputError, nearest

TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+')  # of JSON


@dataclass
class Composed:
    """A merged config, and where each of its values comes from.

    Attributes:
        source: The config, unevaluated.
        places: For paths in it, `file:line` or `--key`.
    """

    source: Config
    places: dict[Keys, str] = field(default_factory=dict)

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
        """Put the values of a command line in the place of those of the files.

        Args:
            values: Value by key; `a#b` names a part.

        Raises:
            InputError: One line for each key that has no place in the config.
        """
        parser = ConfigParser(self.source)
        paths = {key: tuple(ReferenceResolver.split_id(key)) for key in values}
        faults = []
        for key, path in paths.items():
            if fault := _place_fault(self.source, path):
                faults.append(f"--{key}: {fault}")
                continue
            parser[key] = values[key]
            self.put(path, {(): f"--{key}"})
        if faults:
            raise InputError(*faults)


def parse_overrides(words: Sequence[str]) -> Config:
    """`--key value` pairs; see `config.read_word`.

    A top-level key that is true or false may stand alone for true.

    Raises:
        InputError: If a key or value is missing, or a value is an expression or reference.
    """
    overrides: Config = {}
    faults: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise InputError(f"{word}: expected --key value, got a word without key.")
        key, given, value = word[2:].partition("=")
        is_flag = key in KEYS and KEYS[key].types == "bool"
        if is_flag and not given and (not rest or rest[0].startswith("--")):
            value = given = "true"
        text = value if given else rest.pop(0) if rest else None
        if text is None:
            raise InputError(f"--{key}: expected a value after it, got none.")
        overrides[key] = read_word(key, text)
        faults += filter(None, [allowed.override_fault(key, overrides[key])])
    if faults:
        raise InputError(*faults)
    return overrides


def compose(files: Sequence[str], overrides: Config, allow: Collection[str] = ()) -> Config:
    """Return the merged config alone; see `compose_located`.

    Raises:
        InputError: As there, and if the config says what configs may not say.
    """
    merged = compose_located(files, overrides, allow)
    faults = [merged.tell(*fault) for fault in allowed.find_faults(merged.source, allow)]
    if faults:
        raise InputError(*faults)
    return merged.source


def compose_located(
    files: Sequence[str], overrides: Config, allow: Collection[str] = ()
) -> Composed:
    """Merge config files in order, then overrides, as MONAI's ConfigParser does.

    Raises:
        InputError: If a file is missing or is not a JSON object, or a key has no place; see
            `Composed.override`.
    """
    merged = Composed({})
    parser = ConfigParser(merged.source)
    for file, (content, lines) in [(file, _read(file)) for file in files]:
        merged.places.setdefault((), f"{file}:1")
        for key, value in content.items():
            places = {at[1:]: f"{file}:{n}" for at, n in lines.items() if at[:1] == (key,)}
            _merge(merged, parser, key, value, places)
    merged.override(overrides)
    return merged


def _read(file: str) -> tuple[Config, dict[Keys, int]]:
    """Return the content of a file and the line of each value."""
    if not Path(file).is_file():
        known = [str(path) for path in Path(file).parent.glob("*.json")]
        hint = nearest(file, known) if known else "Check the path."
        raise InputError(f"{file}: expected a config file, found none. {hint}")
    if Path(file).suffix.lower() != ".json":  # MONAI goes by the name
        raise InputError(f"{file}: expected a file named *.json. Rename it.")
    try:
        content, lines = parse_json(Path(file).read_text(), file)
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected JSON, got: {error}. Mend the file.") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object, got a {type(content).__name__}.")
    if Path(file).absolute().parents[1].joinpath("run.json").is_file():  # of a stored run
        content = old_names.translate(content)
        lines = {tuple(old_names.TOP_LEVEL.get(key, key) for key in at): lines[at] for at in lines}
    return content, lines


def parse_json(text: str, name: str) -> tuple[Any, dict[Keys, int]]:
    """Return the content of a JSON text, and the line of each value by its path.

    The line of a value in an object is that of its key.

    Raises:
        InputError: If it is not JSON, or an object has a key twice: one line for each.
    """
    try:
        content = json.loads(text)
        found = [*_lines(text)]
    except json.JSONDecodeError as error:
        reason = f"{error.msg} in column {error.colno}"
        raise InputError(
            f"{name}:{error.lineno}: expected JSON, got: {reason}. Mend the file."
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise InputError(f"{name}: expected JSON, got: {error}. Mend the file.") from None
    lines: dict[Keys, int] = {(): 1}
    faults = []
    for path, line in found:
        if path in lines:
            faults.append(
                f"{name}:{line}: {'#'.join(path)}: expected a key once in an object, got it "
                f"on line {lines[path]} too. Remove one."
            )
        lines[path] = line
    if faults:
        raise InputError(*faults)
    return content, lines


def _lines(text: str) -> Iterator[tuple[Keys, int]]:
    """Yield the path and line of each value of a text that is known to be JSON."""
    starts = [match.start() for match in re.finditer("\n", text)]
    tokens = ((match[0], bisect(starts, match.start()) + 1) for match in TOKEN.finditer(text))

    def read(token: str, path: Keys) -> Iterator[tuple[Keys, int]]:
        if token not in ("{", "["):
            return
        number = 0
        for inner, line in tokens:
            if inner in ("}", "]"):
                return
            if inner == ",":
                continue
            below = (*path, json.loads(inner) if token == "{" else str(number))
            number += 1
            yield below, line
            if token == "{":
                next(tokens)  # the colon
                inner, _ = next(tokens)
            yield from read(inner, below)

    yield from read(next(tokens)[0], ())


def _merge(
    merged: Composed, parser: ConfigParser, key: str, value: Any, places: dict[Keys, str]
) -> None:
    """One top-level key of a file: `a#b` is a part, `+a` is added to what is there."""
    adding = key.startswith("+")
    path = tuple(ReferenceResolver.split_id(key[adding:]))
    node: Any = merged.source
    for part in path if adding else path[:-1]:
        valid = _keys(node)
        if part not in valid:
            raise InputError(f"{places[()]}: {key}: {_unknown(part, valid)}")
        node = node[part] if isinstance(node, dict) else node[int(part)]
    if adding and not (isinstance(value, (dict, list)) and type(value) is type(node)):
        kind = "object" if isinstance(node, dict) else "list"
        raise InputError(f"{places[()]}: {key}: expected a {kind}, got {json.dumps(value)[:60]}.")
    if not adding and isinstance(node, list) and path[-1] not in _keys(node):
        raise InputError(f"{places[()]}: {key}: expected 0 to {len(node) - 1}, got '{path[-1]}'.")
    if not adding and not isinstance(node, (dict, list)):
        raise InputError(f"{places[()]}: {key}: expected a key of an object, got {node!r} there.")
    offset = len(node) if adding and isinstance(node, list) else 0
    merge_kv(parser, key, deepcopy(value))
    if not adding:
        return merged.put(path, places)
    for name in {at[0] for at in places if at}:
        below = {at[1:]: place for at, place in places.items() if at[:1] == (name,)}
        merged.put((*path, str(int(name) + offset) if offset else name), below)


def _place_fault(source: Config, path: Keys) -> str | None:
    """Why an override has no place: it neither exists nor may be an argument of its object."""
    node: Any = source
    for depth, part in enumerate(path):
        valid = [*KEYS, *source] if depth == 0 else _keys(node)
        is_argument = isinstance(node, dict) and "_target_" in node  # `validate` knows which
        if part not in valid and not is_argument:
            return _unknown(part, valid)
        missing = isinstance(node, dict) and part not in node
        if missing and depth < len(path) - 1:
            return f"expected '{part}' to be set before its parts."
        node = None if missing else node[part] if isinstance(node, dict) else node[int(part)]
    return None


def _unknown(part: str, valid: list[str]) -> str:
    new = old_names.renamed(part)
    hint = nearest(part, valid) if valid else "Set it first."
    return f"{part} was renamed to {new}" if new else f"expected a known key, got '{part}'. {hint}"


def _keys(node: Any) -> list[str]:
    """Keys below `node`."""
    if isinstance(node, list):
        return [str(n) for n in range(len(node))]
    return list(node) if isinstance(node, dict) else []


def config_of_monai() -> Composed:
    """Return the config from which MONAI's own commands and clients are building an object.

    `pipeline.run` does not need this: it hands the config over.

    Raises:
        RuntimeError: If no config is being resolved.
    """
    resolver = _resolver_at_work()
    if resolver is None:
        raise RuntimeError("config: expected to be built from a config, got a direct call.")
    return Composed(deepcopy(resolver.items[""].get_config()))


def require_unaltered() -> None:
    """Refuse paths and patterns in which MONAI's own parser put `::` in the place of `#`.

    Raises:
        InputError: A line for each.
    """
    resolver = _resolver_at_work()
    if resolver is None or isinstance(resolver, Resolver):
        return
    source = resolver.items[""].get_config()
    faults = [
        f"{key}: expected no # under monai.bundle, which puts :: in its place, got {value!r}. "
        "Use python -m pipeline.run."
        for key in ("output_dir", "cache_dir", "group_pattern")
        if "::" in str(value := source.get(key)) and not str(value).startswith(MARKS)
    ]
    if faults:
        raise InputError(*faults)


def _resolver_at_work() -> ReferenceResolver | None:
    """Return the resolver that is building an object or evaluating an expression, if any.

    MONAI hands a component its arguments only, and a reference to the whole config would be
    circular. But the resolver is on the call stack, and its root item is the merged config.
    """
    frame = inspect.currentframe()
    while frame and not isinstance(frame.f_locals.get("self"), ReferenceResolver):
        frame = frame.f_back
    return frame.f_locals["self"] if frame else None
