"""Objects of a config: their arguments, and the names that handlers go by."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Literal

from ignite.engine import Engine

from pipeline.config.allowed import SPECIAL, Path
from pipeline.config.chart import Chart, shown
from pipeline.config.graph import find_references
from pipeline.config.keys import KEYS
from pipeline.config.signatures import Signature, attributes, mismatch, signature_of
from pipeline.data.data_module import DataModule
from pipeline.data.dataset import load_cases
from pipeline.data.plan import SETTINGS, Plan
from pipeline.errors import nearest
from transforms.augment import Augment, setting_faults

DEFINING = ("key_val_metric", "key_train_metric", "additional_metrics")
NAMING = ("metrics", "metric_details", "key_metric_name")
HANDLERS = ("train_handlers", "val_handlers")


def check_arguments(chart: Chart) -> None:
    """Each object's class is there, and takes the arguments that are given."""
    for path, target in list(_objects(chart)):
        node = chart.graph.nodes[path]
        if target is None:
            if not chart.is_broken((*path, "_target_")):
                fault = f"expected a class or function that is there, got '{node['_target_']}'. "
                chart.note((*path, "_target_"), fault + "Check the name.", path)
            continue
        partial = node.get("_mode_") == "callable" or str(node.get("_disabled_")).lower() == "true"
        given = [key for key in node if not key.startswith("_")]
        _check_names(chart, path, given, signature_of(target), target.__name__, partial)
        _check_types(chart, path, given, signature_of(target))
        if inspect.isclass(target):
            _check_inside(chart, path, target)


def _objects(chart: Chart) -> Iterator[tuple[Path, Any]]:
    """Paths of objects, with their class or function; `None` where there is none."""
    for path, node in chart.graph.nodes.items():
        name = node.get("_target_") if isinstance(node, dict) else None
        if isinstance(name, str) and name[:1] not in ("@", "$") and not chart.is_broken(path):
            yield path, chart.graph.target_of(path)


def _check_names(
    chart: Chart, path: Path, given: list[str], known: Signature, name: str, partial: bool
) -> None:
    """Arguments are known, and those that are needed are there."""
    missing = [each for each in known.required if each not in given and not partial]
    unused = [each for each in known.hints if each not in given]
    unknown = [] if known.is_open else [key for key in given if key not in known.hints]
    if len(unknown) > 2 and 2 * len(unknown) > len(given):  # the class is what is wrong
        takes = ", ".join(known.hints) or "nothing"
        fault = (
            f"expected a class that takes {', '.join(unknown)}, got {name}, which takes {takes}."
        )
        chart.note((*path, "_target_"), f"{fault} Name another.", path)
        return
    for key in unknown:
        hint = nearest(key, missing)
        hint = hint if hint.startswith("Did") else nearest(key, known.hints)
        meant = [(*path, each) for each in unused if f"'{each}'" in hint and "Did" in hint]
        fault = f"expected an argument of {name}, got '{key}'. {hint}"
        chart.note((*path, key), fault, *meant)
        missing = [each for each in missing if (*path, each) not in meant]
    if missing:
        absent = [(*path, each) for each in missing]
        needed = f"expected {', '.join(missing)} for {name}, got none. Add it."
        chart.note(absent[0], needed, *absent)


def _check_types(chart: Chart, path: Path, given: list[str], known: Signature) -> None:
    """Arguments are of the annotated types, as far as that can be told."""
    for key in given:
        at = (*path, key)
        found = None
        if key in known.hints and not chart.is_broken(at):
            found = mismatch(chart.graph.value(at), known.hints[key])
        if found:
            _note_mismatch(chart, at, *found)


def _note_mismatch(chart: Chart, path: Path, below: Path, expected: str) -> None:
    """Blame the value, or the reference to it where the value is right in itself."""
    graph = chart.graph
    place, via = graph.follow(path)
    for key in below:
        place, further = graph.follow((*place, key))
        via = further or via
    node = graph.nodes[place]
    value = graph.value(place)
    right = (len(place) == 1 and place[0] in KEYS) or isinstance(value, type)
    if via and (right or "_target_" in str(node)):
        kind = shown(value) if isinstance(value, type) or value is not Any else "another type"
        fault = f"expected {expected}, got {shown(graph.nodes[via])}, which is {kind}."
        chart.note(via, f"{fault} Refer to something else.")
        return
    use = f" for {'#'.join(path)}" if via else ""
    text = node if isinstance(node, str) else ""
    forgotten = tuple(text.replace("#", "::").split("::")) in graph.nodes
    hint = f"Did you mean '@{text}'?" if forgotten else "Correct it."
    hint = f"Did you mean '${text}'?" if text.startswith("@") else hint
    chart.note(place, f"expected {expected}{use}, got {shown(node)}. {hint}")


def _check_inside(chart: Chart, path: Path, target: type) -> None:
    """Arguments that are objects with names of their own."""
    if issubclass(target, Augment):
        for key in ("spatial", "intensity"):
            place, _ = chart.graph.follow((*path, key))
            settings = _plain(chart.graph.value(place))
            for fault in setting_faults(key, settings) if isinstance(settings, dict) else ():
                where, _, text = fault.partition(": ")
                inner = tuple(where.split("#")[2:])
                chart.note((*place, *inner), text)
    if issubclass(target, DataModule):
        split = dict(signature_of(load_cases).hints)
        del split["dataset_dir"]
        _check_object(chart, (*path, "split"), split)
        planned = signature_of(Plan).hints
        settings = {name: Literal["auto"] | planned[name] for name in SETTINGS}
        _check_object(chart, (*path, "settings"), settings, required=True)


def _check_object(
    chart: Chart, path: Path, hints: dict[str, Any], *, required: bool = False
) -> None:
    """An argument that is an object with these names, of these types."""
    place, _ = chart.graph.follow(path)
    node = chart.graph.nodes.get(place)
    if isinstance(node, dict) and not chart.is_broken(place):
        known = Signature(hints, tuple(hints) if required else (), is_open=False)
        _check_names(chart, place, list(node), known, path[-1], partial=False)
        _check_types(chart, place, list(node), known)


def _plain(value: Any) -> Any:
    """A value without the parts that are known when they are made only."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if _is_plain(inner)}
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is not Any and not isinstance(value, type)


def check_metrics_and_handlers(chart: Chart) -> None:
    """Metrics that are named are defined, which MONAI does not ask; handlers can be attached."""
    graph = chart.graph
    objects = [(path, target) for path, target in _objects(chart) if inspect.isclass(target)]
    defined: set[str] = set()
    for path, _ in objects:
        for key in DEFINING:
            node = graph.nodes.get(graph.follow((*path, key))[0])
            defined |= set(node) - set(SPECIAL) if isinstance(node, dict) else set()
    for path, target in objects:
        if issubclass(target, Engine):
            for key in HANDLERS:
                _check_handlers(chart, graph.follow((*path, key))[0])
        elif hasattr(target, "attach"):
            for key in NAMING:
                _check_metric_names(chart, graph.follow((*path, key))[0], defined)


def _check_handlers(chart: Chart, path: Path) -> None:
    node = chart.graph.nodes.get(path)
    for n in range(len(node)) if isinstance(node, list) else ():
        place, _ = chart.graph.follow((*path, str(n)))
        value = chart.graph.value(place)
        if value is Any or value is None:
            continue
        known = attributes(value) or {} if isinstance(value, type) else {}
        if "attach" not in known and not hasattr(value, "attach"):
            got = shown(value if isinstance(value, type) else chart.graph.nodes[place])
            chart.note(place, f"expected a handler (with a method attach), got {got}. Remove it.")


def _check_metric_names(chart: Chart, path: Path, defined: set[str]) -> None:
    node = chart.graph.nodes.get(path)
    names = {(*path, str(n)): name for n, name in enumerate(node)} if isinstance(node, list) else {}
    for place, name in (names or {path: node}).items():
        if not isinstance(name, str) or name == "*" or any(find_references(place, name)):
            continue
        if name not in defined and not chart.is_broken(place):
            hint = nearest(name, sorted(defined)) if defined else "Add it as key_val_metric."
            fault = f"expected a metric that an evaluator or trainer defines, got '{name}'. {hint}"
            chart.note(place, fault)
