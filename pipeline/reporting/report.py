"""Writes the report of a run: `report/index.html` in its directory, one file without scripts.

The page is `templates/report.html`; this module draws its figures and pictures and formats numbers.
All of it comes from the run directory alone, and the page says what is missing there.
"""

from __future__ import annotations

import base64
import io
import math
import shlex
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

from pipeline import drawing
from pipeline.evaluation.metrics import mean_of_defined
from pipeline.files import write_durably
from pipeline.reporting import figures
from pipeline.reporting.run_files import Run, SplitScores, read_run

# measure: name with unit, format
SHOWN_MEASURES = {"dice": ("Dice", ".3f"), "hd95_mm": ("HD95, mm", ".1f"), "nsd": ("NSD", ".3f")}
NONE = "\N{EN DASH}"  # in place of an unknown value
WORDS = {"True": "yes", "False": "no", "None": NONE, "": NONE}


def write_report(run_dir: str | Path, output_dir: str | Path | None = None) -> Path:
    """Write the report of a run, completely or not at all, and return the path of the page.

    Args:
        run_dir: Run directory; the run may be unfinished.
        output_dir: Folder of the page; by default `report` in the run directory.

    Raises:
        InputError: If it is no run directory.
        OSError: If the page cannot be written; an earlier page is unchanged then.
    """
    run = read_run(run_dir)
    page = _environment().get_template("report.html").render(run=run)
    path = Path(output_dir or run.directory / "report", "index.html")
    path.parent.mkdir(parents=output_dir is not None, exist_ok=True)
    write_durably(path, page.encode())
    return path


def render_section(run: Run, name: str) -> str:
    """Return the HTML of a macro of `templates/sections.html` (`overview`, …), for notebooks."""
    sections: Any = _environment().get_template("sections.html").module
    return str(getattr(sections, name)(run))


def choose_cases(ranked: list[str]) -> dict[str, str]:
    """Name the worst, the median and the best of ranked cases, as many as there are."""
    places = {(len(ranked) - 1) // 2: "Median", len(ranked) - 1: "Best", 0: "Worst"}
    return {ranked[place]: places[place] for place in sorted(places) if ranked}


def _environment() -> Environment:
    loader = PackageLoader("pipeline.reporting")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "duration": lambda seconds: str(timedelta(seconds=round(seconds))) if seconds else NONE,
        "mean": lambda values: mean_of_defined(np.array([*values])),
        "number": _format_number,
        "word": lambda value: WORDS.get(str(value), value),
    }
    functions = (choose_cases, make_case_table, draw_boxes, draw_curves, draw_planes, shlex.quote)
    environment.globals |= {function.__name__: function for function in functions}
    environment.globals |= {"MEASURES": SHOWN_MEASURES, "drawing": drawing}
    return environment


def make_case_table(scores: SplitScores) -> tuple[list[str], list[list[str]]]:
    """Return head and rows, which are the cases and their mean, of a table of all scores."""
    columns = {"Case": [*scores.rows, "Mean"]}
    for measure, (label, form) in SHOWN_MEASURES.items():
        means = np.array([*scores.means(measure).values()])
        columns[f"Mean {label}"] = _format_column(means, form)
        for name, values in scores.by_class(measure).items():
            cells = _format_column(values, form)
            for place, case in enumerate(scores.rows.values()):
                if (status := case.get(name, {}).get("status", "scored")) != "scored":
                    cells[place] = f"{status} {cells[place].strip(NONE)}"
            columns[f"{label.partition(',')[0]} {name}"] = cells
    return [*columns], [list(row) for row in zip(*columns.values(), strict=True)]


def draw_curves(run: Run) -> dict[str, str]:
    """Return captions and curves over optimizer steps, as SVG."""
    drawn = {"Training loss, as logged and smoothed.": figures.plot_loss(run.curves, run.skipped)}
    if "val/mean_dice" in run.curves:
        title = "Dice at each validation during training, by class."
        drawn[title] = figures.plot_dice(run.curves, run.class_names)
    if (run.curves.get("weight_update/loss_scale", np.ones((1, 2)))[:, 1] != 1).any():
        title = "Loss scale, which is halved at each skipped step."
        drawn[title] = figures.plot_loss_scale(run.curves, run.skipped)
    drawn["Learning rate."] = figures.plot_learning_rate(run.curves)
    return {title: figures.to_svg(figure, title) for title, figure in drawn.items()}


def draw_boxes(scores: SplitScores) -> dict[str, str]:
    """Return captions and box plots of the scores by class, as SVG."""
    drawn = {}
    for measure, limit in (("dice", 1.0), ("hd95_mm", None)):
        values, label = scores.by_class(measure), SHOWN_MEASURES[measure][0]
        undefined = [f"{name} in {n}" for name, v in values.items() if (n := np.isnan(v).sum())]
        caption = f"{label.split(',')[0]} of every case, by class. Box: quartiles; line: median."
        caption += f" Undefined and left out: {', '.join(undefined)}." if undefined else ""
        drawn[caption] = figures.to_svg(figures.plot_boxes(values, label, limit), caption)
    return drawn


def draw_planes(run: Run, scores: SplitScores, case_id: str) -> list[tuple[str, str, int, int]]:
    """Return caption, PNG in base64, width and height of each plane of a case; none if it moved."""
    try:
        case = drawing.read_case(scores.find_files(case_id), run.plan.get("ignore_value"))
    except (OSError, ValueError, KeyError):
        return []
    planes = []
    for name, axis in drawing.PLANES.items():
        picture, content = drawing.draw_plane(case, name), io.BytesIO()
        picture.save(content, format="png", optimize=True)
        png = base64.b64encode(content.getvalue()).decode()
        where = f"{name} slice {case.place(axis) + 1} of {case.image.shape[axis]}"
        window = "{:.4g} to {:.4g}".format(*case.window)
        planes.append((f"{where}, grey values {window}", png, *picture.size))
    return planes


def _format_number(value: Any, form: str) -> str:
    known = isinstance(value, int | float) and not math.isnan(value)
    return format(value, form) if known else NONE


def _format_column(values: np.ndarray, form: str) -> list[str]:
    return [_format_number(value, form) for value in (*values, mean_of_defined(values))]
