"""The config doctor: what is wrong with a config, before data are read or an object is made.

A mistake is one line: where it was written (`file:line` or `--key`), the id path, what was expected
and the nearest that is valid. What only follows from a mistake is not told: nothing is concluded
from a place that something is wrong with.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

from pipeline.config import allowed, keys, objects, references
from pipeline.config.chart import Chart
from pipeline.config.compose import Composed
from pipeline.errors import InputError, nearest

# ids that MONAI's commands know, beside those of `keys.KEYS`
KNOWN = {
    *(path[0] for path in references.KNOWN),
    "imports", "dataloader", "evaluate", "initialize", "run", "finalize",
}  # fmt: skip


def check(
    composed: Composed, allow: Collection[str] | None = (), *, training: bool | None = None
) -> None:
    """Look for mistakes in a config.

    Args:
        composed: The config, and where its values come from.
        allow: Names that `_target_` may hold beside the list; `None`: any, and expressions too.
        training: Whether it must have every key of `keys.KEYS`; by default if it has a
            `train` or `lifecycle`.

    Raises:
        InputError: A line for each mistake.
    """
    if faults := diagnose(composed, allow, training):
        raise InputError(*faults)


def diagnose(
    composed: Composed, allow: Collection[str] | None = (), training: bool | None = None
) -> list[str]:
    """The mistakes in a config, a line for each; see `check`.

    Args:
        composed: The config, and where its values come from.
        allow: Names that `_target_` may hold beside the list; `None`: any, and expressions too.
        training: As for `check`.
    """
    source = composed.source
    chart = Chart(composed, allow)
    if allow is not None:
        for path, fault in allowed.faults(source, allow):
            special = path[-1:] and path[-1].startswith("_")
            chart.note(path, fault, *([path[:-1]] if special else []))
    if training is None:
        training = "train" in source or "lifecycle" in source
    _check_keys(chart, training)
    objects.check_arguments(chart)
    objects.check_metrics_and_handlers(chart)
    references.check_references(chart)
    references.check_strings(chart)
    references.check_circles(chart)
    return chart.lines()


def _check_keys(chart: Chart, training: bool) -> None:
    """Top-level keys: unknown, missing, or not of the type that the table gives them."""
    source = chart.composed.source
    known = keys.KEYS if training else {**keys.KEYS, **keys.PREDICTION_KEYS}
    needed = [key for key, spec in known.items() if training and not spec.is_optional]
    missing = [key for key in needed if key not in source]
    used = {target[0] for target in chart.graph.targets}
    wanted = [*missing, *sorted(used - source.keys())]
    for key in source:
        if (
            key in known
            or key in ("_meta_", *keys.CLIENT_KEYS)
            or (not training and key in used | KNOWN)
        ):
            continue
        near = difflib.get_close_matches(key, wanted, n=1, cutoff=0.5)
        if near and near[0] not in KNOWN.union(known):
            continue  # it, or the reference to it: `check_references` tells
        hint = nearest(key, near or (known if training else sorted(KNOWN.union(known))))
        chart.note((key,), f"expected a known key, got '{key}'. {hint}", *((k,) for k in near))
        missing = [other for other in missing if other not in near]
    for key in missing:
        chart.note((key,), f"expected a value ({known[key].meaning}), got none. Add it.")
    try:
        keys.check({key: value for key, value in source.items() if key in known}, known)
    except InputError as error:
        for fault in error.faults:
            key, _, text = fault.partition(": ")
            if key in source:
                chart.note((key,), text)
