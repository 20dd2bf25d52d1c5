"""Figures of a run and of its scores.

Each `plot_` function returns a matplotlib `Figure` without pyplot, so that it needs no window and
leaves no state behind. A notebook that shows one takes `STYLE` into `matplotlib.rcParams`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator
from scipy.ndimage import gaussian_filter1d

Curves = Mapping[str, np.ndarray]

INK, MUTED, RULE, SKIP = "#1c2126", "#59626c", "#dde1e6", "#b3261e"
CLASS_COLOURS = cycler(color=[
    "#1f6fb5", "#b85c00", "#247d41", "#7a4fb1", "#c0392f",
    "#12808d", "#8b5b3d", "#b63a90", "#77770f", "#5a6b7c",
])  # fmt: skip
MOST_MARKERS = 500  # more marks or dots cannot be seen
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a class may be called "$"
    "axes.prop_cycle": cycler(linestyle=["solid", "dashed", "dotted"]) * CLASS_COLOURS,
    "font.size": 10, "legend.frameon": False, "legend.fontsize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "text.color": INK, "grid.color": RULE,
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), RULE),
    **{f"boxplot.{part}props.color": MUTED for part in ("box", "whisker", "cap")},
    "boxplot.medianprops.color": INK, "boxplot.medianprops.linewidth": 2.4,
}  # fmt: skip


def to_svg(figure: Figure, alt: str) -> str:
    """Return a figure as an SVG element with real text and ids of its own.

    What it shows, `alt`, is for screen readers; figures of one page need different ones.
    """
    content = io.StringIO()
    style = STYLE | {
        "svg.fonttype": "none",
        "svg.hashsalt": alt,  # ids are hashes of it and of the content
        "path.simplify_threshold": 1.0,  # of a pixel, so that long curves are small files
    }
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(style):
        figure.savefig(content, format="svg", transparent=True, metadata=no_metadata)
    svg = content.getvalue()
    superfluous = r'<metadata>.*?</metadata>|<!--.*?-->|(?<=<g) id="[^"]+"'  # ids stand in all
    svg = re.sub(superfluous, "", svg[svg.index("<svg") :], flags=re.S).strip()
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


@matplotlib.rc_context(STYLE)
def plot_loss(curves: Curves, skipped: Collection[int] = ()) -> Figure:
    """Plot the training loss over steps, logged and smoothed; skipped steps are ticks."""
    figure, ax = _axes_over_steps("Training loss", curves)
    steps, values = _finite_points(curves, "train/loss").T
    ax.plot(steps, values, color="C0", alpha=0.35, linewidth=1, label="as logged")
    smooth = gaussian_filter1d(values, max(len(values) / 40, 1), mode="nearest")
    ax.plot(steps, smooth, color="C0", linewidth=1.8, label="smoothed")
    ax.legend(loc="best")
    _mark_skipped(ax, skipped)
    return figure


@matplotlib.rc_context(STYLE)
def plot_dice(curves: Curves, class_names: Sequence[str]) -> Figure:
    """Plot the validation Dice of each class and the mean over steps."""
    names = [_shorten(name) for name in (*class_names, "mean")]
    figure, ax = _axes_over_steps("Validation Dice", curves, 3 + 0.17 * (len(names) // 2))
    for name in class_names:
        ax.plot(*_finite_points(curves, f"val/dice_{name}").T, marker=".", linewidth=1.3)
    mean = _finite_points(curves, "val/mean_dice")
    ax.plot(*mean.T, marker=".", color=INK, linestyle="solid", linewidth=2.2)
    ax.set_ylim(-0.03, 1.03)
    figure.legend(ax.lines, names, loc="outside lower center", ncols=2)
    return figure


@matplotlib.rc_context(STYLE)
def plot_loss_scale(curves: Curves, skipped: Collection[int] = ()) -> Figure:
    """Plot the loss scale over steps on an axis of powers of two, with the skipped steps."""
    figure, ax = _axes_over_steps("Loss scale", curves)
    ax.plot(*_finite_points(curves, "AMP/loss_scale").T, drawstyle="steps-post")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:,.15g}")
    _mark_skipped(ax, skipped)
    return figure


@matplotlib.rc_context(STYLE)
def plot_learning_rate(curves: Curves) -> Figure:
    """Plot the learning rate over steps."""
    figure, ax = _axes_over_steps("Learning rate", curves)
    ax.plot(*_finite_points(curves, "LR").T)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter("{x:g}")
    return figure


@matplotlib.rc_context(STYLE)
def plot_boxes(values: Mapping[str, np.ndarray], label: str, limit: float | None = None) -> Figure:
    """Plot a box for each class: quartiles, whiskers to 1.5 times their distance, and cases.

    Args:
        values: Class name to the values of its cases; `nan` is left out.
        label: Name of the values, with their unit.
        limit: Largest possible value, if there is one.
    """
    figure, ax = _axes(label, "", height=0.9 + 0.34 * max(len(values), 1))
    defined = [each[~np.isnan(each)] for each in values.values()]
    places, names = range(len(values)), [*map(_shorten, values)]
    ax.boxplot(defined, positions=places, tick_labels=names, orientation="horizontal",
               widths=0.55, showfliers=False)  # fmt: skip
    jitter = np.random.default_rng(0)
    for place, each in enumerate(defined):
        dots = each[:: len(each) // MOST_MARKERS + 1]
        offsets = place + jitter.uniform(-0.16, 0.16, len(dots))
        ax.scatter(dots, offsets, s=11, color=f"C{place}", alpha=0.55, linewidths=0)
    ax.set_ylim(len(values) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.grid(visible=False, axis="y")
    ax.set_xlim(right=limit + 0.01) if limit else ax.set_xlim(left=0)
    return figure


def _shorten(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _axes(x: str, y: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, height), layout="constrained")
    ax = figure.subplots()
    ax.set(xlabel=x, ylabel=y)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    return figure, ax


def _axes_over_steps(y: str, curves: Curves, height: float = 2.9) -> tuple[Figure, Axes]:
    figure, ax = _axes("Optimizer step", y, height)  # the same range of steps for all curves
    ax.set_xlim(0, max((points[:, 0].max() for points in curves.values()), default=1) * 1.02)
    return figure, ax


def _finite_points(curves: Curves, tag: str) -> np.ndarray:
    """`(N, 2)` steps and values of a curve; the loss of a skipped step may be `nan`."""
    points = curves.get(tag, np.empty((0, 2)))
    return points[np.isfinite(points).all(axis=1)]


def _mark_skipped(ax: Axes, skipped: Collection[int]) -> None:
    if skipped:
        steps = np.array([*skipped][:: len(skipped) // MOST_MARKERS + 1])
        foot: Any = {"transform": ax.get_xaxis_transform(), "label": "skipped step"}
        ax.plot(steps, 0 * steps + 0.03, "|", markersize=8, color=SKIP, **foot)
        ax.legend(loc="best")
