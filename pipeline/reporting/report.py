"""Writes the report of a run: `report/index.html` in its directory, one file without scripts.

The page is `templates/report.html`; this module draws its figures and pictures and formats numbers.
All of it comes from the run directory alone, and the page says what is missing there.
"""

from __future__ import annotations

import base64
import io
import math
import os
import shlex
import urllib.parse
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from pipeline import drawing
from pipeline.errors import printable
from pipeline.evaluation.metrics import mean_of_defined
from pipeline.files import write_durably
from pipeline.prediction.results import make_environment
from pipeline.reporting import figures
from pipeline.reporting.run_files import Run, SplitScores, read_run

# measure: name with unit, format
SHOWN_MEASURES = {"dice": ("Dice", ".3f"), "hd95_mm": ("HD95, mm", ".1f"), "nsd": ("NSD", ".3f")}
MOST_CLASSES = 20  # in a figure and at the top of the page; of more, the worst and the best
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
    path = Path(output_dir or run.directory / "report", "index.html")
    values = {"run": run, "links": find_links(run, path.parent)}
    page = _environment().get_template("report.html").render(values)
    path.parent.mkdir(parents=output_dir is not None, exist_ok=True)
    write_durably(path, page.encode())
    return path


def render_section(run: Run | SplitScores, name: str) -> str:
    """Return the HTML of a macro of `templates/sections.html` (`verdict`, …), for notebooks."""
    sections: Any = _environment().get_template("sections.html").module
    return str(getattr(sections, name)(run))


def find_links(run: Run, folder: Path) -> dict[str, str]:
    """Return titles and addresses, from the page's folder, of the results that exist."""
    paths = [run.directory / place for place in ("models/model.pt", "docs/README.md")]
    paths += [s.directory / name for s in (run.main_scores,) if s for name in ("", "metrics.csv")]
    titles = ("Model", "Model card", "Predictions", "Scores of each case (CSV)")
    relative = [Path(os.path.relpath(path, folder)).as_posix() for path in paths]
    found = zip(titles, relative, paths, strict=False)
    return {title: urllib.parse.quote(address) for title, address, path in found if path.exists()}


def choose_classes(scores: SplitScores) -> list[str]:
    """Name all classes, or those of lowest and then of highest mean Dice if there are many."""
    if len(scores.class_names) <= MOST_CLASSES:
        return scores.class_names
    means = {name: mean_of_defined(dice) for name, dice in scores.by_class("dice").items()}
    ranked = sorted((name for name in means if not math.isnan(means[name])), key=means.__getitem__)
    return ranked[: MOST_CLASSES // 2] + ranked[MOST_CLASSES // 2 :][-MOST_CLASSES // 2 :]


def choose_cases(ranked: list[str]) -> dict[str, str]:
    """Name the worst, the median and the best of ranked cases; the median if there is one."""
    places = {0: "Worst", len(ranked) - 1: "Best", (len(ranked) - 1) // 2: "Median"}
    return {ranked[place]: places[place] for place in sorted(places) if ranked}


def _environment() -> Environment:
    environment = make_environment("pipeline.reporting")
    environment.filters |= {
        "duration": lambda seconds: str(timedelta(seconds=round(seconds))) if seconds else NONE,
        "number": _format_number,
        "interval": _format_interval,
        "word": lambda value: WORDS.get(str(value), value),
    }
    functions: list[Any] = [choose_cases, choose_classes, make_case_table, make_class_table]
    functions += draw_curves, draw_planes, draw_scores, shlex.quote
    environment.globals |= {function.__name__: function for function in functions}
    return environment


def make_class_table(scores: SplitScores, names: list[str]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows, which are the named classes, of a table of mean scores."""
    columns: dict[str, list[str]] = {"Class": [_mark(scores, name) for name in names]}
    classes = [scores.summary["classes"][name] for name in names]
    for measure, (label, form) in SHOWN_MEASURES.items():
        columns[label] = [_format_number(of[measure]["mean"], form) for of in classes]
        if measure == "dice":
            columns["95 % interval"] = [_format_interval(of["dice"]["interval"]) for of in classes]
    missed = [(of["status"]["missed"], of["status"]["spurious"]) for of in classes]
    columns |= {"Missed, spurious": [f"{a}, {b}" for a, b in missed]} if np.any(missed) else {}
    return [*columns], [list(row) for row in zip(*columns.values(), strict=True)]


def make_case_table(scores: SplitScores) -> tuple[list[str], list[list[str]]]:
    """Return head and rows, which are the cases and their mean, of a table of their scores."""
    columns = {"Case": [*scores.rows, "Mean"]}
    for measure, (label, form) in SHOWN_MEASURES.items():
        means = np.array([*scores.means(measure).values()])
        columns[f"Mean {label}"] = _format_column(means, form)
    for name, values in scores.by_class("dice").items():
        columns[f"Dice {name}"] = cells = _format_column(values, ".3f")
        for place, case in enumerate(scores.rows.values()):
            if (status := case.get(name, {}).get("status", "scored")) != "scored":
                cells[place] = f"{status} {cells[place].strip(NONE)}"
    return [*columns], [list(row) for row in zip(*columns.values(), strict=True)]


def draw_curves(run: Run) -> dict[str, str]:
    """Return captions and curves over optimizer steps, as SVG."""
    drawn = {"Training loss, as logged and smoothed.": figures.plot_loss(run.curves, run.skipped)}
    varied = {tag for tag, points in run.curves.items() if np.ptp(points[:, 1])}
    if "val/mean_dice" in run.curves:
        names = run.class_names
        shown = choose_classes(run.main_scores) if run.main_scores else names
        title = f"Dice at each validation during training, {_describe(shown, names)}."
        drawn[title] = figures.plot_dice(run.curves, names, shown)
    if "weight_update/loss_scale" in varied:
        title = "Loss scale, which is halved at each skipped step."
        drawn[title] = figures.plot_loss_scale(run.curves, run.skipped)
    if "weight_update/lr" in varied:
        drawn["Learning rate."] = figures.plot_learning_rate(run.curves)
    return {title: figures.to_svg(figure, title) for title, figure in drawn.items()}


def draw_scores(scores: SplitScores) -> dict[str, str]:
    """Return captions and figures of volumes and scores by class, as SVG."""
    caption = "Predicted against true volume of each class and case; on the line both are equal."
    volumes = (scores.by_class(f"{which}_volume_ml") for which in ("label", "pred"))
    drawn = {caption: figures.to_svg(figures.plot_volumes(*volumes), caption)}
    shown = choose_classes(scores)
    for measure, limit in (("dice", 1.0), ("hd95_mm", None)):
        values, label = scores.by_class(measure), SHOWN_MEASURES[measure][0]
        undefined = [f"{name} in {n}" for name in shown if (n := np.isnan(values[name]).sum())]
        caption = f"{label.split(',')[0]} of every case, {_describe(shown, scores.class_names)}."
        caption += " Box: quartiles; line: median."
        caption += f" Undefined and left out: {', '.join(undefined)}." if undefined else ""
        drawn[caption] = figures.to_svg(figures.plot_boxes(values, label, limit, shown), caption)
    return drawn


def draw_planes(run: Run, scores: SplitScores, case_id: str) -> tuple[list[Any], list[Markup]]:
    """Return planes of a case and the classes in them; none if its files moved.

    A plane is its caption, PNG in base64, width and height.
    """
    try:
        case = drawing.read_case(scores.find_files(case_id), run.plan.get("ignore_value"))
    except (OSError, ValueError, KeyError):
        return [], []
    planes, present = [], set()
    for name, axis in drawing.PLANES.items():
        picture, content = drawing.draw_plane(case, name), io.BytesIO()
        picture.save(content, format="png", optimize=True)
        png = base64.b64encode(content.getvalue()).decode()
        where = f"{name} slice {case.place(axis) + 1} of {case.image.shape[axis]}"
        window = "{:.4g} to {:.4g}".format(*case.window)
        planes.append((f"{where}, grey values {window}", png, *picture.size))
        across = (labels.take(case.place(axis), axis) for labels in (case.label, case.pred))
        present |= {*np.union1d(*across)}
    return planes, [_mark(scores, n) for v, n in enumerate(scores.class_names, 1) if v in present]


def _format_number(value: Any, form: str) -> str:
    known = isinstance(value, int | float) and not math.isnan(value)
    return format(value, form) if known else NONE


def _format_interval(ends: list[float] | None) -> str:
    return "{:.3f}\N{EN DASH}{:.3f}".format(*ends) if ends else NONE


def _mark(scores: SplitScores, name: str) -> Markup:
    color = drawing.class_color(scores.class_names.index(name) + 1)
    return Markup('<i style="background: rgb{}"></i>{}').format(color, printable(name))


def _describe(shown: list[str], names: list[str]) -> str:
    few = f"of {len(shown)} of {len(names)} classes, those of lowest and of highest Dice"
    return few if len(shown) < len(names) else "by class"


def _format_column(values: np.ndarray, form: str) -> list[str]:
    return [_format_number(value, form) for value in (*values, mean_of_defined(values))]
