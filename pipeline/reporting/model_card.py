"""Makes the model card of a run, `docs/README.md`, from `templates/model_card.md`.

It reads the run's own files. It states counts, ranges and means, but nothing of a single
case, no path and no command line.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from pipeline.errors import printable


def render_model_card(run_dir: Path, package: str = "") -> str:
    """Return Markdown about the run in a directory.

    Args:
        run_dir: Run directory with `configs/metadata.json` and `configs/inference.json`; its
            `summary.json` and `scores` are used if they exist.
        package: Name of the code packed with an exported bundle; empty for a run directory.

    Raises:
        OSError, ValueError: If a file cannot be read or is no JSON.
    """
    scores = {}  # by split, of the best weights or, without these, of the last
    for split, weights in itertools.product(("test", "validation"), ("last", "best")):
        if found := _read(run_dir / "scores" / f"{split}_{weights}" / "summary.json", {}):
            scores[split] = {**found, "weights": weights}
    environment = Environment(  # without autoescape: the filter `plain` escapes what a dataset says
        loader=PackageLoader("pipeline.reporting"), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "normalization": _format_normalization,
        "plain": _escape,
        "range": _format_range,
        "sizes": lambda values: " x ".join(f"{value:.4g}" for value in values),
    }
    return environment.get_template("model_card.md").render(
        metadata=_read(run_dir / "configs" / "metadata.json"),
        inference=_read(run_dir / "configs" / "inference.json"),
        summary=_read(run_dir / "summary.json", {}),
        scores=scores,
        package=package,
    )


def _read(path: Path, default: Any = None) -> Any:
    return json.loads(path.read_text()) if default is None or path.is_file() else default


def _format_normalization(given: Any) -> str:
    if isinstance(given, str):
        return given
    if isinstance(given, list):
        return "; ".join(dict.fromkeys(map(_format_normalization, given)))
    clip = _format_range(given["clip"])
    return f"clipped to {clip}, minus {given['mean']:.4g}, over {given['std']:.4g}"


def _format_range(ends: Sequence[float]) -> str:
    low, high = (f"{end:.4g}" for end in ends)
    return low if low == high else f"{low} to {high}"


def _escape(value: Any) -> str:
    """Put text of a dataset on one line, without effect on the Markdown around it."""
    words = " ".join(printable(value).split())
    return "".join(f"\\{c}" if c in "|<>*`[]\\" else c for c in words)
