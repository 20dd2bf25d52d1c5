"""References of a config: that they lead somewhere, and do not lead in a circle."""

from __future__ import annotations

import difflib

from monai.bundle import ConfigComponent, ReferenceResolver
from monai.bundle.properties import InferProperties, TrainProperties
from monai.utils import BundlePropertyConfig

from pipeline.config.allowed import Path
from pipeline.config.chart import Chart, shown
from pipeline.config.graph import Reference
from pipeline.config.keys import KEYS
from pipeline.errors import nearest

# ids with a meaning, which a slip of the hand is not likely to make
KNOWN: set[Path] = {(key,) for key in KEYS}
KNOWN |= {
    tuple(str(meant[BundlePropertyConfig.ID]).split("::"))
    for meant in (*TrainProperties.values(), *InferProperties.values())
}


def check_references(chart: Chart) -> None:
    """The id and the attributes of each reference are there."""
    missing: dict[Path, list[Reference]] = {}
    for reference in chart.graph.references:
        if chart.is_broken(reference.at) or chart.is_broken(reference.target):
            continue
        if reference.target in chart.graph.nodes:
            _check_attributes(chart, reference)
        else:
            missing.setdefault(reference.target, []).append(reference)
    for target, references in missing.items():
        _note_missing(chart, target, references)


def _check_attributes(chart: Chart, reference: Reference) -> None:
    """What is asked of a referenced object is there, as far as its class is known."""
    value = chart.graph.value(reference.target)
    for name in reference.attributes:
        valid, inner = chart.graph.attribute(value, name, reference)
        if valid is not None and not isinstance(value, type):
            place, _ = chart.graph.follow(reference.target)
            asked = f"(for {reference}.{name} in {'#'.join(reference.at)})"
            fault = f"expected an object with '{name}' {asked}, got {shown(value)}. Correct it."
            chart.note(place, fault)
            return
        if valid is not None:
            fault = f"expected an attribute of {reference} ({shown(value)}), got '{name}'."
            chart.note(reference.at, f"{fault} {nearest(name, valid)}")
            return
        value = inner


def _note_missing(chart: Chart, target: Path, references: list[Reference]) -> None:
    """An id that is not there: renamed, or misspelt where it is referred to."""
    nodes, composed = chart.graph.nodes, chart.composed
    parent = next(target[:n] for n in range(len(target) - 1, -1, -1) if target[:n] in nodes)
    if chart.is_broken(target) or (parent and chart.is_broken(parent)):
        return
    first = references[0]
    asked = f"({first} in {composed.place(first.at) or '#'.join(first.at)})"
    renamed = _unused_sibling(chart, parent, target[len(parent)])
    if renamed and (target in KNOWN or len(references) > 1):
        fault = (
            f"expected '{target[len(parent)]}' {asked}, got '{renamed[-1]}'. Rename one of both."
        )
        chart.note(renamed, fault, target)
    elif isinstance(nodes[parent], dict) and len(references) > 1:
        fault = f"expected a value {asked}, got none. Add it, or refer to something else."
        chart.note(target, fault)
    else:
        ids = ["#".join(path) for path in nodes if path]
        near = "#".join(renamed) if renamed else _nearest_id("#".join(target), ids)
        place = composed.place(tuple(near.split("#"))) if near else ""
        hint = f"Did you mean '@{near}'" + (f" ({place})?" if place else "?") if near else ""
        fault = f"expected an id that is there, got '{first}'. {hint or 'Name one.'}"
        chart.note(first.at, fault, *([renamed] if renamed else []))


def _nearest_id(name: str, ids: list[str]) -> str:
    return next(iter(difflib.get_close_matches(name, ids, n=1, cutoff=0.5)), "")


def _unused_sibling(chart: Chart, parent: Path, key: str) -> Path | None:
    """A neighbour with a similar name that nothing else asks for."""
    node = chart.graph.nodes[parent]
    if not isinstance(node, dict) or "_target_" in node:
        return None
    used = {target[: len(parent) + 1] for target in chart.graph.targets}
    free = [k for k in node if (*parent, k) not in used and (*parent, k) not in KNOWN]
    near = difflib.get_close_matches(key, free, n=1, cutoff=0.6)
    return (*parent, near[0]) if near else None


def check_strings(chart: Chart) -> None:
    """Strings that look like a reference, but are none: a `$` or an `@` was forgotten."""
    for path, value in chart.graph.nodes.items():
        special = path[-1:] and path[-1] in ConfigComponent.non_arg_keys
        if not isinstance(value, str) or special or chart.is_broken(path):
            continue
        if value.startswith("@") and not any(r.at == path for r in chart.graph.references):
            fault = f"expected @id, got {shown(value)}. With attributes: '${value}'."
            chart.note(path, fault)
        elif value[:1] not in ("@", "$", "%") and _is_forgotten(chart, path, value):
            fault = f"expected a reference, got the string {shown(value)}."
            chart.note(path, f"{fault} Did you mean '@{value}'?")


def _is_forgotten(chart: Chart, path: Path, value: str) -> bool:
    """Whether a string is an id that was most likely to be referred to."""
    graph = chart.graph
    target = tuple(ReferenceResolver.split_id(value))
    if not path or target not in graph.nodes or not value:
        return False
    if len(path) == 1 and path[0] in KEYS and "object" not in KEYS[path[0]].types:
        return False  # a word of its own: a folder may be named as an id is
    used = {each[: len(target)] for each in graph.targets}
    node, holder = graph.nodes[target], graph.nodes[path[:-1]]
    made = ConfigComponent.is_instantiable(node) or str(node).startswith("$")
    # of an argument the type is known, and a list may be one of names
    untyped = isinstance(holder, dict) and "_target_" not in holder
    return len(target) > 1 or path[-1] == value or target not in used or (made and untyped)


def check_circles(chart: Chart) -> None:
    """No id needs itself to be made."""
    for circle in chart.graph.circles():
        shown_ids = " → ".join("@" + "#".join(path) for path in circle)
        closing = next(
            r
            for r in chart.graph.references
            if r.target == circle[-1] and r.at[: len(circle[-2])] == circle[-2]
        )
        if not chart.is_broken(closing.at):
            fault = f"expected no circle of references, got {shown_ids}. Break it."
            chart.note(closing.at, fault)
