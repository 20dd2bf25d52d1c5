"""The one exception for a user's mistake."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A mistake in the input or the config: commands print it and exit with status 2.

    Args:
        faults: One line per fault, in the form `{where}: expected {X}, got {Y}. {what to do}`.
    """

    def __init__(self, *faults: str) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


def nearest(word: str, valid: Iterable[str]) -> str:
    """`Did you mean ...?` with the valid name nearest to `word`, else the list of valid names."""
    valid = list(valid)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Valid are: {', '.join(valid)}."


def as_bool(value: object, where: str) -> bool:
    """A JSON boolean, or the words 'true' and 'false' as `monai.bundle` passes them.

    Args:
        value: What the config holds.
        where: The config key, for the message.

    Raises:
        InputError: If `value` is neither.
    """
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise InputError(f"{where}: expected true or false, got {value!r}. Use one of the two.")
    return value
