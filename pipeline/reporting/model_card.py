"""The model card of a run, `docs/README.md`, from `templates/model_card.md`.

It is made from the run's own files. It states counts, ranges and means, but nothing of a single
case, no path and no command line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

NORMALIZATION_TEXTS = {
    "zscore": "mean 0 and deviation 1 in each volume",
    "percentile_zscore": "clipped to the 0.5th and 99.5th percentile, then mean 0 and deviation 1 "
    "in each volume",
}


def render_model_card(run_dir: Path, package: str = "") -> str:
    """Return Markdown about the run in a directory.

    Args:
        run_dir: Run directory with `configs/metadata.json` and `configs/inference.json`; its
            `summary.json` and `scores` are used if they exist.
        package: Name of the code packed with an exported bundle; empty for a run directory.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is no JSON object.
    """
    metadata = _read(run_dir / "configs" / "metadata.json")
    summary = run_dir / "summary.json"
    data_format = metadata["network_data_format"]
    environment = Environment(
        loader=PackageLoader("pipeline.reporting"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it is Markdown; `plain` escapes what a dataset says
    )
    environment.filters |= {
        "interval": _format_interval,
        "normalization": _format_normalizations,
        "plain": _escape,
        "range": _format_range,
        "sizes": lambda values: " x ".join(f"{value:.4g}" for value in values),
    }
    return environment.get_template("model_card.md").render(
        metadata=metadata,
        image=data_format["inputs"]["image"],
        pred=data_format["outputs"]["pred"],
        inference=_read(run_dir / "configs" / "inference.json"),
        summary=_read(summary) if summary.is_file() else {},
        scores=_read_scores(run_dir / "scores"),
        package=package,
    )


def _read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content


def _read_scores(folder: Path) -> dict[str, dict[str, Any]]:
    """Summaries by split, of the best weights or, without these, of the last."""
    found: dict[str, dict[str, Any]] = {}
    for split in ("test", "validation"):
        for weights in ("best", "last"):
            path = folder / f"{split}_{weights}" / "summary.json"
            if split not in found and path.is_file():
                found[split] = {**_read(path), "split": split, "weights": weights}
    return found


def _format_normalizations(given: Any) -> str:
    channels = given if isinstance(given, list) else [given]
    return "; ".join(dict.fromkeys(map(_format_normalization, channels)))


def _format_normalization(one: Any) -> str:
    if not isinstance(one, Mapping):
        return NORMALIZATION_TEXTS.get(one, str(one))
    clip = _format_range(one["clip"])
    return f"clipped to {clip}, minus {one['mean']:.4g}, over {one['std']:.4g}"


def _format_interval(figure: Mapping[str, Any], decimals: int) -> str:
    if figure["mean"] is None:
        return "undefined"
    shown = f"{figure['mean']:.{decimals}f}"
    if figure["interval"] is None:
        return shown
    low, high = figure["interval"]
    return f"{shown} ({low:.{decimals}f} to {high:.{decimals}f})"


def _format_range(ends: Sequence[float]) -> str:
    low, high = (f"{end:.4g}" for end in ends)
    return low if low == high else f"{low} to {high}"


def _escape(value: Any) -> str:
    """Put text of a dataset on one line, without effect on the Markdown around it."""
    words = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "|<>*`[]\\" else c for c in words)
