"""MONAI's ConfigParser, which leaves text in a config as it was written.

MONAI's own puts `::` in the place of every `#`. `config_of_monai` finds the config where MONAI's
own commands evaluate it.
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any

from monai.bundle import ConfigParser, ReferenceResolver

from pipeline.config.keys import MARKS, Config
from pipeline.errors import refuse


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


def config_of_monai() -> Config:
    """Return the config from which MONAI is building an object; a RuntimeError if there is none."""
    resolver = _resolver_at_work()
    if resolver is None:
        raise RuntimeError("config: expected to be built from a config, got a direct call.")
    return deepcopy(resolver.items[""].get_config())


def require_unaltered() -> None:
    """Raise an `InputError` where MONAI's own parser put `::` in the place of `#`."""
    resolver = _resolver_at_work()
    if resolver is None or isinstance(resolver, Resolver):
        return
    source = resolver.items[""].get_config()
    values = {key: str(source.get(key)) for key in ("output_dir", "cache_dir", "group_pattern")}
    refuse(
        f"{key}: expected no # under monai.bundle, which puts :: in its place, got {value!r}. "
        "Use python -m pipeline.run."
        for key, value in values.items()
        if "::" in value and not value.startswith(MARKS)
    )


def _resolver_at_work() -> ReferenceResolver | None:
    """The resolver that is at work, which MONAI hands to nobody, from the call stack."""
    frame = inspect.currentframe()
    while frame and not isinstance(frame.f_locals.get("self"), ReferenceResolver):
        frame = frame.f_back
    return frame.f_locals["self"] if frame else None
