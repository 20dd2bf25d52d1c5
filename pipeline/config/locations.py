"""JSON that remembers on which line each value stands."""

from __future__ import annotations

import json
import re
from typing import Any

from pipeline.errors import InputError

Path = tuple[str, ...]
NEXT = re.compile(r"[^ \t\n\r]")


def read_json(text: str, name: str) -> tuple[Any, dict[Path, int]]:
    """Content of a JSON text, and the line of each value by its path (of its key, in an object).

    Args:
        text: The file's.
        name: Of the file, for messages.

    Raises:
        InputError: If it is not JSON, or an object has a key twice: one line for each.
    """
    try:
        content = json.loads(text)
        reader = _Reader(text)
        reader.value(0, ())
    except json.JSONDecodeError as error:
        reason = f"{error.msg} in column {error.colno}"
        raise InputError(
            f"{name}:{error.lineno}: expected JSON, got: {reason}. Mend the file."
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise InputError(f"{name}: expected JSON, got: {error}. Mend the file.") from None
    if reader.twice:
        raise InputError(
            *(
                f"{name}:{again}: {'#'.join(path)}: expected a key once in an object, got it "
                f"on line {first} too. Remove one."
                for path, first, again in reader.twice
            )
        )
    return content, reader.lines


class _Reader:
    """Walks over a text that is known to be JSON."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines: dict[Path, int] = {(): 1}
        self.twice: list[tuple[Path, int, int]] = []
        self._scalar = json.JSONDecoder().raw_decode
        self._line, self._counted = 1, 0

    def value(self, at: int, path: Path) -> int:
        """Read the value at `at`; returns where it ends."""
        at = self._skip(at)
        opening = self.text[at]
        if opening not in "{[":
            return self._scalar(self.text, at)[1]
        at, number = self._skip(at + 1), 0
        while self.text[at] not in "}]":
            key, line = str(number), self._line_of(at)
            if opening == "{":
                key, at = self._scalar(self.text, at)
                at = self._skip(at) + 1  # the colon
            below = (*path, key)
            if below in self.lines:
                self.twice.append((below, self.lines[below], line))
            self.lines[below] = line
            at, number = self._skip(self.value(at, below)), number + 1
            if self.text[at] == ",":
                at = self._skip(at + 1)
        return at + 1

    def _skip(self, at: int) -> int:
        found = NEXT.search(self.text, at)
        return found.start() if found else len(self.text)

    def _line_of(self, at: int) -> int:
        """Line of a position, which never comes before the last one asked for."""
        self._line += self.text.count("\n", self._counted, at)
        self._counted = at
        return self._line
