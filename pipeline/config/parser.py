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
    """Evaluates a config.

    Args:
        source: The config, which is changed.
    """

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
