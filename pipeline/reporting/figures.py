"""Plots the curves of a run and its scores.

Each `plot_` function returns a matplotlib `Figure` without pyplot, so that it needs no window and
leaves no state behind. A notebook that shows one takes `STYLE` into `matplotlib.rcParams`.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.rcsetup import cycler
from scipy.ndimage import gaussian_filter1d

from pipeline import drawing
from pipeline.errors import printable

Curves = Mapping[str, np.ndarray]
Values = Mapping[str, np.ndarray]  # of all cases, by class name in the order of label values

MOST_MARKERS = 500  # more marks or dots cannot be seen
WIDE = 30  # a range of volumes, largest over smallest, that needs logarithms
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a class may be called "$"
    "axes.prop_cycle": cycler(linestyle=["solid", "dashed", "dotted"])
    * matplotlib.rcParamsDefault["axes.prop_cycle"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dde1e6",
    "legend.frameon": False,
}


def to_svg(figure: Figure, alt: str) -> str:
    """Return a figure as an SVG element with real text; `alt` says what it shows."""
    content = io.StringIO()
    # simplified by up to a pixel, long curves are small files
    style = STYLE | {"svg.fonttype": "none", "path.simplify_threshold": 1.0}
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(style):
        figure.savefig(content, format="svg", dpi=200, transparent=True, metadata=no_metadata)
    _, tag, svg = content.getvalue().partition("<svg")
    return f'{tag} role="img" aria-label="{escape(printable(alt))}"{svg}'


@matplotlib.rc_context(STYLE)
def plot_loss(curves: Curves, skipped: Collection[int] = ()) -> Figure:
    """Plot the training loss over steps, logged and smoothed; skipped steps are ticks."""
    figure, ax = _axes_over_steps("Training loss", curves)
    steps, values = _finite_points(curves, "train/loss").T
    ax.plot(steps, values, color="C0", alpha=0.35, label="as logged")
    smooth = gaussian_filter1d(values, max(len(values) / 40, 1), mode="nearest")
    ax.plot(steps, smooth, color="C0", label="smoothed")
    ax.legend()
    _mark_skipped(ax, skipped)
    return figure


@matplotlib.rc_context(STYLE)
def plot_dice(curves: Curves, class_names: Sequence[str], shown: Collection[str] = ()) -> Figure:
    """Plot the validation Dice of each class, or of those in `shown`, and the mean over steps."""
    colors = _choose_colors(class_names, shown)
    names = [_shorten(name) for name in (*colors, "mean")]
    figure, ax = _axes_over_steps("Validation Dice", curves, 3 + 0.17 * (len(names) // 2))
    rim = [withStroke(linewidth=2.4, foreground="0.3")]
    for name, color in colors.items():
        points = _finite_points(curves, f"val/mean_dice_{name}")
        ax.plot(*points.T, marker=".", color=color, path_effects=rim)
    mean = _finite_points(curves, "val/mean_dice")
    ax.plot(*mean.T, marker=".", color="black", linestyle="solid", linewidth=2.2)
    ax.set_ylim(-0.03, 1.03)
    figure.legend(ax.lines, names, loc="outside lower center", ncols=2)
    return figure


@matplotlib.rc_context(STYLE)
def plot_loss_scale(curves: Curves, skipped: Collection[int] = ()) -> Figure:
    """Plot the loss scale over steps on an axis of powers of two, with the skipped steps."""
    figure, ax = _axes_over_steps("Loss scale", curves)
    ax.plot(*_finite_points(curves, "weight_update/loss_scale").T, drawstyle="steps-post")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:,.15g}")
    _mark_skipped(ax, skipped)
    return figure


@matplotlib.rc_context(STYLE)
def plot_learning_rate(curves: Curves) -> Figure:
    """Plot the learning rate over steps."""
    figure, ax = _axes_over_steps("Learning rate", curves)
    ax.plot(*_finite_points(curves, "weight_update/lr").T)
    ax.set_ylim(bottom=0)
    return figure


@matplotlib.rc_context(STYLE)
def plot_boxes(
    values: Values, label: str, limit: float | None = None, shown: Collection[str] = ()
) -> Figure:
    """Plot a box for each class: quartiles, whiskers to 1.5 times their distance, and cases.

    `label` names the values with their unit, `limit` is the largest possible one, `shown` names the
    classes to plot, by default all. Values that are `nan` are left out.
    """
    colors = _choose_colors(values, shown)
    figure, ax = _axes(label, "", height=0.9 + 0.34 * max(len(colors), 1))
    defined = [values[name][~np.isnan(values[name])] for name in colors]
    look: Any = {"orientation": "horizontal", "showfliers": False, "patch_artist": True}
    look |= {"tick_labels": [*map(_shorten, colors)], "medianprops": {"color": "black"}}
    boxes = ax.boxplot(defined, positions=range(len(colors)), widths=0.55, **look)["boxes"]
    jitter = np.random.default_rng(0)
    for place, (each, color) in enumerate(zip(defined, colors.values(), strict=True)):
        boxes[place].set(facecolor=color, alpha=0.5)
        dots = each[:: len(each) // MOST_MARKERS + 1]
        offsets = place + jitter.uniform(-0.16, 0.16, len(dots))
        ax.scatter(dots, offsets, s=13, color=color, edgecolors="0.3", linewidths=0.4, zorder=3)
    ax.invert_yaxis()
    ax.set_xlim(right=limit + 0.01) if limit else ax.set_xlim(left=0)
    return figure


@matplotlib.rc_context(STYLE)
def plot_volumes(label: Values, pred: Values) -> Figure:
    """Plot predicted against true volumes in ml, with the line where both are equal.

    Axes are logarithmic above the smallest volume where others are more than `WIDE` times that.
    """
    figure, ax = _axes("Volume of the label, ml", "Volume of the prediction, ml", height=4.2)
    x, y = (np.concatenate([*of.values()]) for of in (label, pred))
    colors = np.repeat([*_choose_colors(label).values()], len(x) // len(label), axis=0)
    present = np.maximum(x, y) > 0
    sizes = [size for size in (*x, *y) if size > 0] or [1.0]
    look: Any = {"s": 18, "edgecolors": "0.3", "linewidths": 0.4, "zorder": 3, "clip_on": False}
    look["rasterized"] = len(x) > MOST_MARKERS  # so that the file stays small
    ax.scatter(x[present], y[present], c=colors[present], **look)
    ends = 0, 1.1 * max(sizes)
    ax.plot(ends, ends, color="0.4", linewidth=1)
    if max(sizes) > WIDE * min(sizes):
        for set_scale, axis in ((ax.set_xscale, ax.xaxis), (ax.set_yscale, ax.yaxis)):
            set_scale("symlog", linthresh=min(sizes))
            axis.set_major_formatter("{x:.4g}")
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    return figure


def _choose_colors(names: Iterable[str], shown: Collection[str] = ()) -> dict[str, Any]:
    """Return colours of the classes shown, or of all; `names` are all, by label value."""
    colors = {n: tuple(np.divide(drawing.class_color(v), 255)) for v, n in enumerate(names, 1)}
    return {name: colors[name] for name in shown or colors}


def _shorten(name: str, most: int = 24) -> str:
    text = printable(name)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _axes(x: str, y: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, height), layout="constrained")
    ax = figure.subplots()
    ax.set(xlabel=x, ylabel=y)
    ax.locator_params(axis="x", nbins=6)
    return figure, ax


def _axes_over_steps(y: str, curves: Curves, height: float = 2.9) -> tuple[Figure, Axes]:
    figure, ax = _axes("Optimizer step", y, height)  # the same range of steps for all curves
    ax.set_xlim(0, max((points[:, 0].max() for points in curves.values()), default=1) * 1.02)
    return figure, ax


def _finite_points(curves: Curves, tag: str) -> np.ndarray:
    """Return `(N, 2)` steps and values of a curve; the loss of a skipped step may be `nan`."""
    points = curves.get(tag, np.empty((0, 2)))
    return points[np.isfinite(points).all(axis=1)]


def _mark_skipped(ax: Axes, skipped: Collection[int]) -> None:
    if skipped:
        steps = np.array([*skipped][:: len(skipped) // MOST_MARKERS + 1])
        foot: Any = {"transform": ax.get_xaxis_transform(), "label": "skipped step"}
        ax.plot(steps, 0 * steps + 0.03, "|", color="C3", **foot)
        ax.legend()
