"""One config out of files and a command line, as MONAI's ConfigParser composes it.

`compose_located` also remembers on which line of which file each value stands. `Parser` evaluates
the result and leaves text as it was written, where MONAI's own puts `::` in the place of every `#`.
`config_of_monai` finds the config where MONAI's own commands evaluate it.
"""

from __future__ import annotations

import inspect
import json
import re
from bisect import bisect
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ReferenceResolver
from monai.bundle.utils import merge_kv

from pipeline.config import allowed, old_names
from pipeline.config.keys import KEYS, MARKS, Config, read_word
from pipeline.config.keys import Path as Keys
from pipeline.errors import InputError, nearest

TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+')  # of JSON


class Resolver(ReferenceResolver):
    """Resolves references and expressions, and touches nothing else."""

    @classmethod
    def update_refs_pattern(cls, value: str, refs: dict) -> Any:
        """Return what a string stands for; text stands for itself."""
        return super().update_refs_pattern(value, refs) if value.startswith(MARKS) else value

    def _resolve_one_item(self, id: str, *args: Any, **kwargs: Any) -> Any:
        """Note at an exception, as `config_id`, which item of the config raised it."""
        try:
            return super()._resolve_one_item(id, *args, **kwargs)
        except Exception as error:
            if not hasattr(error, "config_id"):
                error.config_id = id.replace("::", "#")  # type: ignore[attr-defined]
            raise


class Parser(ConfigParser):
    """Evaluates a config, and changes it."""

    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.ref_resolver = Resolver()

    @classmethod
    def resolve_relative_ids(cls, id: str, value: str) -> str:
        """Return a string with absolute ids; text has none."""
        return super().resolve_relative_ids(id, value) if value.startswith(MARKS) else value

    def evaluate(self, name: str) -> None:
        """Evaluate an expression or each one of a list, as MONAI's ConfigWorkflow does."""
        steps = self.get(name) or []
        for n in range(len(steps)) if isinstance(steps, list) else [None]:
            self.get_parsed_content(name if n is None else f"{name}::{n}")


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
        """Put values in the place of those of the files; the key `a#b` names a part.

        Raises:
            InputError: One line for each key that has no place in the config.
        """
        parser = ConfigParser(self.source)
        faults = []
        for key, value in values.items():
            path = tuple(ReferenceResolver.split_id(key))
            if fault := _place_fault(self.source, path):
                faults.append(f"--{key}: {fault}")
                continue
            parser[key] = value
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


def compose_located(files: Sequence[str], overrides: Config) -> Composed:
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
    """The content of a file, and the line of each value by its path (of the key in an object)."""
    path = Path(file)
    if not path.is_file():
        known = [str(other) for other in path.parent.glob("*.json")]
        hint = nearest(file, known) if known else "Check the path."
        raise InputError(f"{file}: expected a config file, found none. {hint}")
    if path.suffix.lower() != ".json":  # MONAI goes by the name
        raise InputError(f"{file}: expected a file named *.json. Rename it.")
    lines: dict[Keys, int] = {(): 1}
    faults = []
    try:
        text = path.read_text()
        content = json.loads(text)
        for at, line in _lines(text):
            if at in lines:
                faults.append(
                    f"{file}:{line}: {'#'.join(at)}: expected a key once in an object, got it "
                    f"on line {lines[at]} too. Remove one."
                )
            lines[at] = line
    except (ValueError, RecursionError) as error:  # of huge numbers and deep nesting, too
        place, reason = file, str(error)
        if isinstance(error, json.JSONDecodeError):
            place, reason = f"{file}:{error.lineno}", f"{error.msg} in column {error.colno}"
        raise InputError(f"{place}: expected JSON, got: {reason}. Mend the file.") from None
    if not isinstance(content, dict):
        faults = [f"{file}: expected a JSON object, got a {type(content).__name__}."]
    if faults:
        raise InputError(*faults)
    if path.absolute().parents[1].joinpath("run.json").is_file():  # of a stored run
        content = old_names.translate(content)
        lines = {tuple(old_names.TOP_LEVEL.get(key, key) for key in at): lines[at] for at in lines}
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
    fault = ""
    for part in path if adding else path[:-1]:
        if part not in (valid := _children(node)):
            raise InputError(f"{places[()]}: {key}: {_unknown(part, list(valid))}")
        node = valid[part]
    if adding and not (isinstance(value, (dict, list)) and type(value) is type(node)):
        kind = "object" if isinstance(node, dict) else "list"
        fault = f"expected a {kind}, got {json.dumps(value)[:60]}."
    elif not adding and isinstance(node, list) and path[-1] not in _children(node):
        fault = f"expected 0 to {len(node) - 1}, got '{path[-1]}'."
    elif not adding and not isinstance(node, (dict, list)):
        fault = f"expected a key of an object, got {node!r} there."
    if fault:
        raise InputError(f"{places[()]}: {key}: {fault}")
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
        known = _children(node)
        valid = known if depth else {**KEYS, **known}
        is_argument = isinstance(node, dict) and "_target_" in node  # `validate` knows which
        if part not in valid and not is_argument:
            return _unknown(part, list(valid))
        if part not in known and depth < len(path) - 1:
            return f"expected '{part}' to be set before its parts."
        node = known.get(part)
    return None


def _unknown(part: str, valid: list[str]) -> str:
    new = old_names.RENAMED.get(part)
    hint = nearest(part, valid) if valid else "Set it first."
    return f"{part} was renamed to {new}" if new else f"expected a known key, got '{part}'. {hint}"


def _children(node: Any) -> dict[str, Any]:
    """What is directly below `node`, by key."""
    if isinstance(node, list):
        return {str(n): child for n, child in enumerate(node)}
    return node if isinstance(node, dict) else {}


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
    """The resolver that is building an object or evaluating an expression, if any.

    MONAI hands a component its arguments only; but the resolver, which has the merged config, is on
    the call stack.
    """
    frame = inspect.currentframe()
    while frame and not isinstance(frame.f_locals.get("self"), ReferenceResolver):
        frame = frame.f_back
    return frame.f_locals["self"] if frame else None
