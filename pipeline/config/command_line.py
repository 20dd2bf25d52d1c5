"""The words of a command line: options, keys of a config, `--help`, and one line for a mistake.

Nothing here imports torch or MONAI; `loading` is around the imports that do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline.config import old_names
from pipeline.config.compose import LIST_REMEDY, split_id
from pipeline.config.keys import (
    CONFIGS,
    KEYS,
    MARKS,
    PREDICTION_KEYS,
    SPECIAL,
    Key,
    read_word,
    walk,
)
from pipeline.errors import InputError, describe_import_failure, escaping, nearest, refuse, require

HELP = ("-h", "--help")
MISSING = object()  # the value of an option that was typed without one


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "VALUE" if isinstance(action, _Override) else super()._format_args(action, "")


class CommandParser(argparse.ArgumentParser):
    """A parser of `ampseg COMMAND`: words in any order; a mistake is an `InputError`.

    Args:
        command: Name of the command.
        description: What `--help` says first.
        words: The words without `--`, and the most important options, as usage shows them.
        keys: Keys of a config that are options as well; what is typed is in `overrides`.
        common: Those that the short help lists.
        config: Name of the shipped config whose values the help shows.
    """

    def __init__(
        self,
        command: str,
        description: str | None,
        words: str = "",
        keys: Mapping[str, Key] | None = None,
        common: Sequence[str] = (),
        config: str = "",
    ) -> None:
        super().__init__(
            f"ampseg {command}",
            f"ampseg {command} {words}" if words else None,
            description,
            formatter_class=_Formatter,
            conflict_handler="resolve",
            allow_abbrev=False,
            add_help=False,
        )
        self.keys, self.common = keys or {}, common
        self._rest = self.add_argument_group("all keys of the config")
        values = json.loads((CONFIGS / config).read_text()) if config else {}
        for key in (*common, *(key for key in self.keys if key not in common)):
            text, shown = self.keys[key].meaning, json.dumps(values.get(key))
            is_setting = key in values and not re.search(r'"[$@]|_target_', shown)
            self._add_key(key, f"{text} ({shown})" if is_setting else text)
        if keys:
            self.epilog = "Parts of objects are named with #: --train#trainer#max_epochs 3"
            trusted = "class or package that the config may name although it is not on the list"
            self.add_argument("--allow", action="append", default=[], metavar="NAME", help=trusted)
        more = "this text; `--help all` lists every key" if keys else "this text"
        self.add_argument(*HELP, action="store_true", help=more)

    def _add_key(self, key: str, meaning: str | None = None) -> None:
        group = self if key in self.common else self._rest
        text = meaning.replace("%", "%%") if meaning else argparse.SUPPRESS
        form: dict[str, Any] = {"nargs": "?", "const": MISSING, "help": text, "metavar": "VALUE"}
        group.add_argument(f"--{key}", action=_Override, dest=argparse.SUPPRESS, **form)

    def parse(self, words: Sequence[str] | None) -> argparse.Namespace:
        """Parse words, by default this process's; prints the help and ends where it is asked for.

        Returns:
            The options, with `overrides`, a value for each key that was typed, and `allow`.
        """
        words = list(sys.argv[1:] if words is None else words)
        if asked := [n for n, word in enumerate(words) if word in HELP]:
            if words[asked[0] + 1 : asked[0] + 2] != ["all"]:
                self._action_groups.remove(self._rest)
            self.print_help()
            raise SystemExit(0)
        self._require_known(words)
        given, extra = self.parse_known_intermixed_args(words, argparse.Namespace(overrides={}))
        if extra:
            raise InputError(f"{extra[0]}: expected an option or no more, got it. {LIST_REMEDY}")
        given.allow = read_allowed(getattr(given, "allow", []))
        faults = (_find_value_fault(key, value) for key, value in given.overrides.items())
        refuse(filter(None, faults))
        return given

    def _require_known(self, words: Sequence[str]) -> None:
        """Refuse options that neither the command nor a config file among the words has."""
        known = self._option_string_actions
        named = [word.partition("=")[0] for word in words if re.match("--.", word)]
        for name in filter(lambda name: name not in known, named):
            if self.keys and ("#" in name or "::" in name or name[2:] in _keys_of_files(words)):
                self._add_key(name[2:])
                continue
            valid = [option for option in known if option.startswith("--")]
            near = nearest(name, valid)
            near = near if near.startswith("Did") or not self.keys else "See --help all."
            if new := old_names.RENAMED.get(name[2:]):
                raise InputError(f"{name}: {name[2:]} was renamed to {new}")
            raise InputError(f"{name}: expected a known option, got '{name}'. {near}")

    def error(self, message: str) -> NoReturn:
        """Refuse the words that were typed."""
        usage = " ".join(self.format_usage().split())
        raise InputError(f"command line: {message}. {usage}")


class _Override(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, value: Any, option: Any = None) -> None:
        key = str(option)[2:]
        if value is MISSING:
            is_flag = key in parser.keys and parser.keys[key].types == "bool"
            require(is_flag, f"--{key}", "a value after it", "none", "Add it.")
            value = "true"
        namespace.overrides[key] = read_word(key, value)


def _keys_of_files(words: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for word in words:
        with contextlib.suppress(OSError, ValueError, TypeError):
            found |= {*json.loads(Path(word).read_text())} if word.endswith(".json") else set()
    return found


def _find_value_fault(key: str, value: Any) -> str | None:
    """Say why `--key value` is no plain value; `None` if it is one."""
    spec = {**PREDICTION_KEYS, **KEYS}.get(key)
    takes_list = spec and re.search(r"\b(list(?!\[path)|triple|strides)", spec.types)
    if takes_list and str(value).startswith("[") and isinstance(value, str):
        return f"--{key}: expected JSON, got '{value}'. {LIST_REMEDY}"
    for path, inner in walk(value, split_id(key)):
        special = next((part for part in path if part in SPECIAL), None)
        if special or str(inner).lstrip().startswith(MARKS):
            got = f"--{key}: expected a JSON value or a plain string, got {special or inner!r}."
            return f"{got} Expressions and references belong into a file, `_target_` likewise."
    return None


def read_allowed(words: Sequence[str]) -> list[str]:
    """Return the names in the values of `--allow`, which may be separated by commas."""
    names = [name.strip() for word in words for name in word.split(",")]
    if wrong := [name for name in names if not re.fullmatch(r"\w+(\.\w+)*", name)]:
        raise InputError(f"--allow: expected a name such as package.Class, got {', '.join(wrong)}.")
    return names


def number_in(
    low: float, high: float = math.inf, kind: Callable[[str], float] = float
) -> Callable[[str], float]:
    """Return a type of options: a finite number from `low` to `high`, both included."""

    def parse(word: str) -> float:
        try:
            value = kind(word)
        except ValueError:
            value = math.nan
        if low <= value <= high and math.isfinite(value):
            return value
        limits = f"{low} to {high}" if high < math.inf else f"{low} or more"
        raise argparse.ArgumentTypeError(f"expected {limits}, got {word}")

    return parse


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Inside, torch and MONAI are imported, which takes seconds; the terminal says so first."""
    if "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
        print("Loading PyTorch and MONAI ...", file=sys.stderr, flush=True)
    try:
        yield
    except (KeyError, OSError) as error:
        if fault := describe_import_failure(error):
            raise InputError(fault) from None
        raise


@escaping()
def run_parsed(
    parser: CommandParser, words: Sequence[str] | None, work: Callable[[argparse.Namespace], int]
) -> int:
    """Do the work of a command; returns its exit status, 2 for a user's mistake."""
    try:
        return work(parser.parse(words))
    except InputError as error:
        error.tell()
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
