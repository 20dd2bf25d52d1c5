"""The report's part about one split: box plots, a table of cases, and three of them in pictures."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from pipeline.reporting import case_images, figures, page
from pipeline.reporting.run_files import Run, Scores, mean_of

# measure -> name with unit, decimals
MEASURES = {"dice": ("Dice", 3), "hd95_mm": ("HD95, mm", 1), "nsd": ("NSD", 3)}
WORDS = (
    "A heading sorts by its column, pressed again the other way round. A class is missed (in the "
    "label, not predicted), spurious (predicted, not in the label) or absent (in neither, and in "
    "no mean); HD95 is defined where it is in both."
)


def split_section(run: Run, scores: Scores) -> str:
    """All about one split.

    Args:
        run: That the scores are of.
        scores: Of one split, with one set of weights.
    """
    title = {"validation": "Validation cases", "test": "Test cases"}[scores.split]
    count = f"{len(scores.rows)} case{'' if len(scores.rows) == 1 else 's'}"
    return page.section(
        scores.split,
        title,
        page.text(f"{count}, predicted with the {scores.weights} weights."),
        _boxes(scores),
        _case_table(scores),
        *_pictures(run, scores),
    )


def overview(run: Run) -> str:
    """Means of every split and every set of weights."""
    rows = []
    for (split, weights), scores in run.scores.items():
        means = [
            _shown(mean_of(np.array(list(scores.means(measure).values()))), measure)
            for measure in MEASURES
        ]
        rows.append([split, weights, len(scores.rows), *means])
    head = ["Cases", "Weights", "Number", *(f"Mean {name}" for name, _ in MEASURES.values())]
    return page.table(head, rows, numbers=range(2, 6))


def _boxes(scores: Scores) -> str:
    drawn = []
    for measure, limit in (("dice", 1.0), ("hd95_mm", None)):
        values = scores.by_class(measure)
        label = MEASURES[measure][0]
        undefined = {n: int(np.isnan(v).sum()) for n, v in values.items()}
        left_out = ", ".join(f"{name} in {n}" for name, n in undefined.items() if n)
        caption = f"{label.split(',')[0]} of every case, by class. Box: quartiles; line: median."
        caption += f" Undefined and left out: {left_out}." if left_out else ""
        alt = f"Box plots of {label} by class, {scores.split} cases"
        drawn.append(page.drawing(figures.boxes(values, label, limit), alt, caption))
    return f'<div class="figures">{"".join(drawn)}</div>'


def _case_table(scores: Scores) -> str:
    """Cases, the worst first; one measure of the classes is seen at a time."""
    radios = "".join(
        f'<label><input type="radio" name="measure-{scores.split}" value="{measure}"'
        f"{' checked' if measure == 'dice' else ''}> {label}</label>"
        for measure, (label, _) in MEASURES.items()
    )
    tolerance = scores.tolerance_mm
    nsd = "" if tolerance is None else f" NSD allows for {escape(str(tolerance))} mm."
    means = {measure: scores.means(measure) for measure in MEASURES}
    rest = [case for case in scores.rows if math.isnan(means["dice"][case])]
    rows = [_row(scores, case, means) for case in [*scores.ranked(), *rest]]
    return (
        f'<div class="scores">\n<h3>Every case</h3>\n<p class="muted">{WORDS}{nsd}</p>\n'
        f"<fieldset><legend>Of each class</legend>{radios}</fieldset>\n"
        f'<div class="scroll" role="region" tabindex="0" aria-label="Scores, {scores.split} cases">'
        f'<table class="cases">\n<thead>\n{_heads(scores)}\n</thead>\n<tbody>\n'
        + "\n".join(rows)
        + f"\n</tbody>\n<tfoot>{_foot(scores, means)}</tfoot>\n</table></div>\n</div>"
    )


def _heads(scores: Scores) -> str:
    """Two rows: what is measured, and of which class; the second has buttons that sort."""
    groups = "".join(
        f'<th colspan="{len(scores.class_names)}" scope="colgroup" class="first {measure}">'
        f"{label}</th>"
        for measure, (label, _) in MEASURES.items()
    )
    heads = [_head("Case", 0, "", "text")]
    heads += [_head(f"Mean {label}", n) for n, (label, _) in enumerate(MEASURES.values(), 1)]
    heads[1] = heads[1].replace("<th", '<th aria-sort="ascending"', 1)
    for measure in MEASURES:
        for place, name in enumerate(scores.class_names):
            look = f"{measure}{' first' * (place == 0)}"
            heads.append(_head(escape(name), len(heads), look))
    means = f'<th></th><th colspan="{len(MEASURES)}"></th>'
    return f"<tr>{means}{groups}</tr>\n<tr>{''.join(heads)}</tr>"


def _head(name: str, column: int, look: str = "", kind: str = "number") -> str:
    button = f'<button type="button" data-column="{column}" data-kind="{kind}">{name}</button>'
    return f'<th scope="col" class="{kind} {look}">{button}</th>'


def _row(scores: Scores, case: str, means: dict[str, dict[str, float]]) -> str:
    cells = [_cell(means[measure][case], measure, "", "") for measure in MEASURES]
    for measure in MEASURES:
        for place, name in enumerate(scores.class_names):
            row = scores.rows[case].get(name, {})
            status = row.get("status", "")
            word = "" if status == "scored" else status
            value = row.get(measure, math.nan)
            cells.append(_cell(value, measure, word, f"{measure}{' first' * (place == 0)}"))
    head = f'<th scope="row" data-sort="{escape(case)}">{escape(case)}</th>'
    return f"<tr>{head}{''.join(cells)}</tr>"


def _cell(value: float, measure: str, word: str, look: str) -> str:
    key = "" if math.isnan(value) else repr(float(value))
    number = "" if word and not key else _shown(value, measure)
    word = f'<span class="word">{escape(word)}</span> ' if word else ""
    return f'<td class="number {look}" data-sort="{key}">{word}{number}</td>'


def _foot(scores: Scores, means: dict[str, dict[str, float]]) -> str:
    columns = [(m, "", np.array(list(means[m].values()))) for m in MEASURES]
    for measure in MEASURES:
        for place, name in enumerate(scores.class_names):
            look = f"{measure}{' first' * (place == 0)}"
            columns.append((measure, look, scores.values(name, measure)))
    cells = [_cell(mean_of(values), measure, "", look) for measure, look, values in columns]
    return f'<tr><th scope="row">Mean</th>{"".join(cells)}</tr>'


def _shown(value: float, measure: str) -> str:
    return "\N{EN DASH}" if math.isnan(value) else f"{value:.{MEASURES[measure][1]}f}"


def chosen(ranked: list[str]) -> dict[str, str]:
    """Case id to what it is: the worst, the median and the best of some, as many as there are."""
    places = {"Worst": 0, "Best": len(ranked) - 1, "Median": (len(ranked) - 1) // 2}
    found: dict[str, str] = {}
    for word in ("Worst", "Best", "Median") if ranked else ():
        found.setdefault(ranked[places[word]], word)
    return {case: found[case] for case in ranked if case in found}


def _pictures(run: Run, scores: Scores) -> list[str]:
    """Three cases in three planes, with the legend."""
    parts = [
        "<h3>The worst, the median and the best case in pictures</h3>",
        page.text(
            "Slices with most of label and prediction, to scale in mm, seen as radiologists do: "
            "the patient's right (R) is on the left. Cases are chosen by their mean Dice."
        ),
        LEGEND,
    ]
    for case, word in chosen(scores.ranked()).items():
        dice = scores.means("dice")[case]
        parts.append(f'<div class="case">\n<h3>{word}: {escape(case)}, mean Dice {dice:.3f}</h3>')
        try:
            volumes = case_images.read_case(case, scores.paths[case], run.plan.get("ignore_value"))
        except (OSError, ValueError, KeyError):
            parts.append(
                page.missing(
                    "No picture: image, label or prediction of this case is not where it was when "
                    "the run ended, or is another."
                )
            )
        else:
            parts.append(_planes(volumes))
        parts.append("</div>")
    return parts


def _planes(volumes: case_images.CaseVolumes) -> str:
    drawn = []
    for name, axis in case_images.PLANES.items():
        where = f"slice {volumes.place(axis) + 1} of {volumes.image.shape[axis]}"
        alt = f"{volumes.case_id}, {name} {where}, label and prediction outlined"
        drawn.append(
            page.picture(case_images.plane(volumes, name), alt, f"{name.capitalize()}, {where}")
        )
    low, high = volumes.window
    grey = f"Grey values {low:.4g} (black) to {high:.4g} (white)."
    return f'<div class="planes">{"".join(drawn)}</div>\n<p class="muted">{grey}</p>'


LEGEND = (
    '<ul class="swatches">'
    f'<li><span style="border: 4px solid {case_images.LABEL}"></span>Label</li>'
    f'<li><span style="border: 2px solid {case_images.PREDICTION}"></span>Prediction</li>'
    f'<li><span style="border: 4px solid {case_images.LABEL}; '
    f"outline: 1px solid {case_images.PREDICTION}; "
    'outline-offset: -3px"></span>Both run together</li>'
    f'<li><span style="background: linear-gradient({case_images.DIFFERENCE}61, '
    f"{case_images.DIFFERENCE}61), "
    '#8a8f96"></span>Voxels where the two differ, also in the class</li></ul>'
)
