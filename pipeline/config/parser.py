"""MONAI's config parser, which here leaves text as it was written.

MONAI's own puts `::` in the place of every `#`, in paths and names as well as in ids.
"""

from __future__ import annotations

from typing import Any

from monai.bundle import ConfigParser, ReferenceResolver

from pipeline.config.keys import MARKS


class Resolver(ReferenceResolver):
    """Resolves references and expressions, and touches nothing else."""

    @classmethod
    def update_refs_pattern(cls, value: str, refs: dict) -> Any:
        """What a string stands for; text stands for itself."""
        return super().update_refs_pattern(value, refs) if value.startswith(MARKS) else value


class Parser(ConfigParser):
    """Evaluates a config.

    Args:
        source: The config, which is changed.
    """

    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.ref_resolver = Resolver()

    @classmethod
    def resolve_relative_ids(cls, id: str, value: str) -> str:
        """A string with absolute ids; text has none."""
        return super().resolve_relative_ids(id, value) if value.startswith(MARKS) else value
