"""The report of a run: `report/index.html` in its directory, one file without scripts.

The page is `templates/report.html`; this module draws its figures and pictures and formats numbers.
All of it comes from the run directory alone, and the page says what is missing there.
"""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from PIL import Image

from pipeline.files import write_durably
from pipeline.reporting import case_images, figures
from pipeline.reporting.run_files import SPLITS, Run, SplitScores, mean_of, read_run

# measure: name with unit, decimals
SHOWN_MEASURES = {"dice": ("Dice", 3), "hd95_mm": ("HD95, mm", 1), "nsd": ("NSD", 3)}
NONE = "\N{EN DASH}"  # in place of an unknown value


def write_report(run_dir: str | Path) -> Path:
    """Write the report of a run, completely or not at all.

    Args:
        run_dir: Run directory; the run may be unfinished.

    Returns:
        Path of the page.

    Raises:
        InputError: If it is no run directory.
        OSError: If the page cannot be written; an earlier page is unchanged then.
    """
    run = read_run(run_dir)
    page = _environment().get_template("report.html").render(run=run, SPLITS=SPLITS)
    path = run.directory / "report" / "index.html"
    path.parent.mkdir(exist_ok=True)
    write_durably(path, page.encode())
    return path


def render_section(run: Run, name: str) -> str:
    """Return the HTML of one section, for notebooks.

    Args:
        run: Run to show.
        name: Macro of `templates/sections.html`: `overview` (of scores), `precision`, `skipped`, …
    """
    sections: Any = _environment().get_template("sections.html").module
    return str(getattr(sections, name)(run))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline.reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "basename": lambda path: Path(str(path)).name,
        "duration": lambda seconds: str(timedelta(seconds=round(seconds))) if seconds else NONE,
        "json": _round,
        "mean": lambda values: mean_of(np.array([*values])),
        "number": lambda value, form: (
            format(value, form) if isinstance(value, int | float) else NONE
        ),
        "score": _format_score,
        "word": lambda value: {True: "yes", False: "no"}.get(value, value or NONE),
    }
    environment.globals |= {
        "MEASURES": SHOWN_MEASURES,
        "NAN": math.nan,
        "NONE": NONE,
        "case_images": case_images,
        "choose_cases": choose_cases,
        "draw_boxes": _draw_boxes,
        "draw_curves": _draw_curves,
        "draw_planes": _draw_planes,
        "join_words": shlex.join,
        "quote": lambda path: shlex.quote(str(path)),
    }
    return environment


def choose_cases(ranked: list[str]) -> dict[str, str]:
    """Name the worst, the median and the best of ranked cases, as many as there are."""
    places = {"Worst": 0, "Best": len(ranked) - 1, "Median": (len(ranked) - 1) // 2}
    found: dict[str, str] = {}
    for word, place in places.items() if ranked else ():
        found.setdefault(ranked[place], word)
    return {case: found[case] for case in ranked if case in found}


def _draw_curves(run: Run) -> dict[str, str]:
    """Captions and curves over optimizer steps."""
    curves, skipped = run.curves, run.skipped_steps
    drawn = {"Training loss, as logged and smoothed.": figures.plot_loss(curves, skipped)}
    if "val/mean_dice" in curves:
        title = "Dice at each validation during training, by class."
        drawn[title] = figures.plot_dice(curves, run.class_names)
    if run.has_loss_scale:
        title = "Loss scale, which is halved at each skipped step."
        drawn[title] = figures.plot_loss_scale(curves, skipped)
    drawn["Learning rate."] = figures.plot_learning_rate(curves)
    return {title: figures.to_svg(figure, title) for title, figure in drawn.items()}


def _draw_boxes(scores: SplitScores) -> dict[str, str]:
    """Captions and box plots of the scores by class."""
    drawn = {}
    for measure, limit in (("dice", 1.0), ("hd95_mm", None)):
        values, label = scores.by_class(measure), SHOWN_MEASURES[measure][0]
        undefined = {name: int(np.isnan(v).sum()) for name, v in values.items()}
        left_out = ", ".join(f"{name} in {n}" for name, n in undefined.items() if n)
        caption = f"{label.split(',')[0]} of every case, by class. Box: quartiles; line: median."
        caption += f" Undefined and left out: {left_out}." if left_out else ""
        alt = f"Box plots of {label} by class, {scores.split} cases"
        drawn[caption] = figures.to_svg(figures.plot_boxes(values, label, limit), alt)
    return drawn


def _draw_planes(run: Run, scores: SplitScores, case_id: str) -> dict[str, Any] | None:
    """The planes of a case as PNG, and the window of grey values; `None` if files are missing."""
    try:
        case = case_images.read_case(case_id, scores.paths[case_id], run.plan.get("ignore_value"))
    except (OSError, ValueError, KeyError):
        return None
    planes = []
    for name, axis in case_images.PLANES.items():
        picture = Image.fromarray(case_images.draw_plane(case, name))
        content = io.BytesIO()
        picture.save(content, format="png", optimize=True)
        png = base64.b64encode(content.getvalue()).decode()
        where = f"{name} slice {case.place(axis) + 1} of {case.image.shape[axis]}"
        planes.append(
            {"where": where, "png": png, "width": picture.width, "height": picture.height}
        )
    return {"planes": planes, "window": [f"{value:.4g}" for value in case.window]}


def _format_score(value: float, measure: str) -> str:
    return NONE if math.isnan(value) else f"{value:.{SHOWN_MEASURES[measure][1]}f}"


def _round(value: Any) -> str:
    """JSON with at most five digits of each number with a fraction."""
    text = json.dumps(value)
    rounded = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.5g}"))
    return json.dumps(rounded, ensure_ascii=False)
