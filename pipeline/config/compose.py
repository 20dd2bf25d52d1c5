"""One config out of files and a command line, as MONAI's ConfigParser composes it.

`Parser` evaluates it and leaves text as it was written, where MONAI's own puts `::` in the place of
every `#`. `config_of_monai` finds the config where MONAI's own commands evaluate it.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ReferenceResolver
from monai.bundle.utils import merge_kv

from pipeline.config import allowed, old_names
from pipeline.config.keys import KEYS, MARKS, Config, read_word, walk
from pipeline.config.keys import Path as Keys
from pipeline.errors import InputError, nearest

STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?')  # of JSON; with a colon it is a key


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
            path = tuple(ReferenceResolver.split_id(key))
            if fault := _place_fault(self.source, path):
                faults.append(f"--{key}: {fault}")
                continue
            ConfigParser(self.source)[key] = value
            self.put(path, {(): f"--{key}"})
        if faults:
            raise InputError(*faults)

    def merge(self, key: str, value: Any, places: dict[Keys, str]) -> None:
        """Merge a key of a file, `a#b` or `+a`; raise an `InputError` if it does not fit there."""
        adding = key.startswith("+")
        path = tuple(ReferenceResolver.split_id(key[adding:]))
        node: Any = self.source
        for part in path if adding else path[:-1]:
            if part not in (valid := _children(node)):
                raise InputError(f"{places[()]}: {key}: {_unknown(part, list(valid))}")
            node = valid[part]
        offset = len(node) if adding and isinstance(node, list) else 0
        try:
            merge_kv(ConfigParser(self.source), key, deepcopy(value))
        except (ValueError, IndexError, TypeError):
            expected = f"{places[()]}: {key}: expected what fits the {type(node).__name__} there"
            raise InputError(f"{expected}, got {json.dumps(value)[:60]}. Correct it.") from None
        if adding and isinstance(node, list):
            places = {at and (str(int(at[0]) + offset), *at[1:]): places[at] for at in places}
        if adding:
            self.places |= {path + at: place for at, place in places.items()}
        else:
            self.put(path, places)


def parse_overrides(words: Sequence[str]) -> Config:
    """Read `--key value` pairs, or raise an `InputError`; `--key` may stand for a true one."""
    overrides: Config = {}
    faults: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise InputError(f"{word}: expected --key value, got a word without key.")
        key, given, value = word[2:].partition("=")
        is_flag = key in KEYS and KEYS[key].types == "bool"
        if not given and is_flag and (not rest or rest[0].startswith("--")):
            value = "true"
        elif not given and not rest:
            raise InputError(f"--{key}: expected a value after it, got none.")
        overrides[key] = read_word(key, value if given or value else rest.pop(0))
        faults += filter(None, [allowed.override_fault(key, overrides[key])])
    if faults:
        raise InputError(*faults)
    return overrides


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


def _read(file: str) -> tuple[Config, dict[Keys, str]]:
    """The content of a file, and `file:line` of each key of an object by its path."""
    path = Path(file)
    if not path.is_file():
        known = [str(other) for other in path.parent.glob("*.json")]
        hint = nearest(file, known) if known else "Check the path."
        raise InputError(f"{file}: expected a config file, found none. {hint}")
    try:
        text = path.read_text()
        content = json.loads(text, object_pairs_hook=_make_object)
        places = {at: f"{file}:{line}" for at, line in _number_lines(text).items()}
    except (ValueError, RecursionError) as error:  # of huge numbers and deep nesting, too
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


def _place_fault(source: Config, path: Keys) -> str | None:
    """Say why an override has no place: no such value, and no argument of its object."""
    node: Any = source
    for depth, part in enumerate(path):
        known = _children(node)
        may_be_new = "_target_" in known if depth else part in KEYS  # `validate` knows arguments
        if part not in known and not (may_be_new and depth == len(path) - 1):
            return _unknown(part, [*known, *(() if depth else KEYS)])
        node = known.get(part)
    return None


def _unknown(part: str, valid: list[str]) -> str:
    new = old_names.RENAMED.get(part)
    hint = nearest(part, valid) if valid else "Set it first."
    return f"{part} was renamed to {new}" if new else f"expected a known key, got '{part}'. {hint}"


def _children(node: Any) -> dict[str, Any]:
    """Return the values directly below `node`, by key."""
    if isinstance(node, list):
        return {str(n): child for n, child in enumerate(node)}
    return node if isinstance(node, dict) else {}


def config_of_monai() -> Composed:
    """Return the config from which MONAI is building an object; a RuntimeError if there is none."""
    resolver = _resolver_at_work()
    if resolver is None:
        raise RuntimeError("config: expected to be built from a config, got a direct call.")
    return Composed(deepcopy(resolver.items[""].get_config()))


def require_unaltered() -> None:
    """Raise an `InputError` where MONAI's own parser put `::` in the place of `#`."""
    resolver = _resolver_at_work()
    if resolver is None or isinstance(resolver, Resolver):
        return
    source = resolver.items[""].get_config()
    values = {key: str(source.get(key)) for key in ("output_dir", "cache_dir", "group_pattern")}
    faults = [
        f"{key}: expected no # under monai.bundle, which puts :: in its place, got {value!r}. "
        "Use python -m pipeline.run."
        for key, value in values.items()
        if "::" in value and not value.startswith(MARKS)
    ]
    if faults:
        raise InputError(*faults)


def _resolver_at_work() -> ReferenceResolver | None:
    """The resolver that is at work, which MONAI hands to nobody, from the call stack."""
    frame = inspect.currentframe()
    while frame and not isinstance(frame.f_locals.get("self"), ReferenceResolver):
        frame = frame.f_back
    return frame.f_locals["self"] if frame else None
