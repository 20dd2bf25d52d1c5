"""What decides how a case is preprocessed, read off a config without running it.

Two runs share their preprocessed cases if their recipes are equal. So a recipe has the values that
the config refers to, not their names, and of the code that is this project's or the user's the
hash of its file. What a file imports in its turn is not followed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import pydoc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monai.bundle import ReferenceResolver

from pipeline.config.keys import Config
from pipeline.data.plan import Plan

PARTS = ("preprocessing", "train#preprocessing", "validate#preprocessing")
LIBRARIES = ("monai", "torch")  # whose versions the cache's keys have
# what the run is, not what it does to a volume: its directories, its split
OPAQUE = ("lifecycle", "data_module", "cases")


def preprocessing_recipe(source: Config, plan: Plan) -> dict[str, Any]:
    """The preprocessing of a config, references replaced, and hashes of the code it names.

    Args:
        source: The config, unevaluated.
        plan: Whose values expressions may refer to.
    """
    facts = json.loads(json.dumps(plan.as_dict()))
    del facts["reasons"]
    recipe = {part: _resolved(f"@{part}", source, facts) for part in PARTS}
    code = {target: _code_hash(target) for target in _targets(recipe)}
    return {**recipe, "code": {target: found for target, found in code.items() if found}}


def _resolved(value: Any, source: Config, facts: dict[str, Any]) -> Any:
    """The value with what it refers to put in its place; an expression beside what it uses."""
    if isinstance(value, dict):
        return {key: _resolved(child, source, facts) for key, child in value.items()}
    if isinstance(value, list):
        return [_resolved(child, source, facts) for child in value]
    if not isinstance(value, str) or value[:1] not in ("@", "$"):
        return value
    fact = re.fullmatch(r"\$@plan\.(\w+)", value)
    if fact and fact[1] in facts:
        return facts[fact[1]]
    uses: dict[str, Any] = {}
    for name in sorted(ReferenceResolver.match_refs_pattern(value)):
        if name == "plan":
            uses[name] = facts
        elif ReferenceResolver.split_id(name)[0] not in OPAQUE:
            uses[name] = _resolved(_find(name, source), source, facts)
    reference = ReferenceResolver.normalize_id(value[1:])
    return uses.get(reference, {"expression": value, "uses": uses})


def _find(name: str, source: Config) -> Any:
    node: Any = source
    for part in ReferenceResolver.split_id(name):
        try:
            node = node[int(part)] if isinstance(node, list) else node[part]
        except (LookupError, TypeError, ValueError):
            return None  # MONAI says so when it needs it
    return node


def _targets(value: Any) -> Iterator[str]:
    """Every `_target_` in a config."""
    if isinstance(value, dict) and isinstance(value.get("_target_"), str):
        yield value["_target_"]
    for child in value.values() if isinstance(value, dict) else value:
        if isinstance(child, (dict, list)):
            yield from _targets(child)


def _code_hash(target: str) -> str | None:
    """SHA-256 of the file that a class or function comes from; `None` if from a library."""
    try:
        found = pydoc.locate(target)
        file = inspect.getsourcefile(found)  # type: ignore[arg-type]
    except (TypeError, pydoc.ErrorDuringImport):  # a bare name is MONAI's
        return None
    module = getattr(found, "__module__", "").split(".")[0]
    if file is None or module in LIBRARIES:
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
