"""What a diagnosis has found so far."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from pipeline.config.allowed import Path
from pipeline.config.compose import Composed
from pipeline.config.graph import Graph


class Chart:
    """The faults of a config by place, one for each, and what cannot be concluded from any more.

    Args:
        composed: The config and where its values come from.
        allow: Names that `_target_` may hold beside the list; `None`: any.
    """

    def __init__(self, composed: Composed, allow: Collection[str] | None) -> None:
        self.composed = composed
        self.faults: dict[Path, str] = {}
        self.broken: set[Path] = set()
        self.graph = Graph(composed.source, allow, self.is_broken)

    def note(self, path: Path, fault: str, *broken: Path) -> None:
        """Note a fault; of several at one place the first counts.

        Args:
            path: Where.
            fault: What was expected, what was got, and what to do.
            broken: Other paths that are what they are, or are not there, because of it.
        """
        self.faults.setdefault(path, fault)
        self.broken |= {path, *broken}

    def is_broken(self, path: Path) -> bool:
        """Whether something is wrong at a path, or with what contains it."""
        return any(path[:n] in self.broken for n in range(len(path) + 1))

    def lines(self) -> list[str]:
        """The faults, a line each, in the order of the config."""
        order = {path: n for n, path in enumerate(self.composed.places)}
        paths = sorted(self.faults, key=lambda path: order.get(path, -1))
        return [self.composed.tell(path, self.faults[path]) for path in paths]


def shown(value: Any) -> str:
    """A value in a message, not too long."""
    if isinstance(value, type):
        return f"a {value.__name__}"
    try:
        text = json.dumps(value)
    except TypeError:
        return str(value)
    return text if len(text) <= 60 else text[:57] + "..."
