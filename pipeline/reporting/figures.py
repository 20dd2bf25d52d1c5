"""Figures of a run, of its scores and of its dataset.

Each `plot_` function returns a matplotlib `Figure` without pyplot, so that it needs no window and
leaves no state behind.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from scipy.ndimage import gaussian_filter1d

Curves = Mapping[str, np.ndarray]

INK, MUTED, RULE, SKIP = "#1c2126", "#59626c", "#dde1e6", "#b3261e"
CLASS_COLOURS = (
    "#1f6fb5", "#b85c00", "#247d41", "#7a4fb1", "#c0392f",
    "#12808d", "#8b5b3d", "#b63a90", "#77770f", "#5a6b7c",
)  # fmt: skip
LINE = CLASS_COLOURS[0]
DASHES = ("solid", "dashed", "dotted")  # for more classes than colours
MOST_MARKERS = 500  # more marks or dots cannot be seen
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a class may be called "$"
    "font.size": 10, "legend.frameon": False, "legend.fontsize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.linewidth": 0.7, "text.color": INK, "grid.color": RULE,
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), RULE),
}  # fmt: skip


def with_style(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Wrap `draw` so that it uses this module's style and leaves the caller's unchanged."""

    @wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()  # ticks take the style of the first drawing
        return figure

    return styled


def class_style(number: int) -> dict[str, Any]:
    """Colour and dash of a foreground class, by its index from 0."""
    turn, place = divmod(number, len(CLASS_COLOURS))
    return {"color": CLASS_COLOURS[place], "linestyle": DASHES[turn % len(DASHES)]}


def to_svg(figure: Figure, alt: str) -> str:
    """Return a figure as an SVG element with real text and ids of its own.

    Args:
        figure: Figure to convert.
        alt: What it shows, for screen readers; figures of one page need different ones.
    """
    content = io.StringIO()
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": alt,  # ids are hashes of it and of the content
        "path.simplify_threshold": 1.0,  # of a pixel, so that long curves are small files
    }
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(style):
        figure.savefig(content, format="svg", transparent=True, metadata=no_metadata)
    svg = content.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'<g id="[^"]+"', "<g", svg).strip()  # every figure has the same ones
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


@with_style
def plot_loss(curves: Curves, skipped: Sequence[int] = ()) -> Figure:
    """Plot the training loss over steps, logged and smoothed; skipped steps are ticks."""
    figure, ax = _axes_over_steps("Training loss", curves)
    points = _finite_points(curves, "train/loss")
    ax.plot(*points.T, color=LINE, alpha=0.35, linewidth=1, label="as logged")
    smooth = gaussian_filter1d(points[:, 1], max(len(points) / 40, 1), mode="nearest")
    ax.plot(points[:, 0], smooth, color=LINE, linewidth=1.8, label="smoothed")
    _mark_skipped(ax, skipped)
    ax.legend(loc="upper right")
    return figure


@with_style
def plot_dice(curves: Curves, class_names: Sequence[str]) -> Figure:
    """Plot the validation Dice of each class and the mean over steps."""
    names = [_shorten(name) for name in (*class_names, "mean")]
    ncols = min(3, 60 // (max(map(len, names)) + 6))  # as many as fit
    figure, ax = _axes_over_steps("Validation Dice", curves, 2.9 + 0.17 * -(-len(names) // ncols))
    for number, name in enumerate(class_names):
        points = _finite_points(curves, f"val/dice_{name}")
        ax.plot(*points.T, linewidth=1.3, **class_style(number))
    mean = _finite_points(curves, "val/mean_dice")
    ax.plot(*mean.T, color=INK, linewidth=2.2)
    for line in ax.lines if len(mean) <= MOST_MARKERS / 10 else ():
        line.set(marker="o", markersize=3)
    ax.set_ylim(-0.03, 1.03)
    figure.legend(ax.lines, names, loc="outside lower center", ncols=ncols)
    return figure


@with_style
def plot_loss_scale(curves: Curves, skipped: Sequence[int] = ()) -> Figure:
    """Plot the loss scale over steps on an axis of powers of two, with the skipped steps."""
    figure, ax = _axes_over_steps("Loss scale", curves)
    points = _finite_points(curves, "AMP/loss_scale")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_locator(LogLocator(base=2, numticks=8))
    ax.yaxis.set_major_formatter("{x:,.15g}")
    if len(points):
        ax.plot(*points.T, color=LINE, linewidth=1.8, drawstyle="steps-post")
        ax.set_ylim(points[:, 1].min() / 2, points[:, 1].max() * 2)
    _mark_skipped(ax, skipped, points)
    return figure


@with_style
def plot_learning_rate(curves: Curves) -> Figure:
    """Plot the learning rate over steps."""
    figure, ax = _axes_over_steps("Learning rate", curves)
    ax.plot(*_finite_points(curves, "LR").T, color=LINE, linewidth=1.8)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter("{x:g}")
    return figure


@with_style
def plot_boxes(values: Mapping[str, np.ndarray], label: str, limit: float | None = None) -> Figure:
    """Plot a box for each class: quartiles, whiskers to 1.5 times their distance, and cases.

    Args:
        values: Class name to the values of its cases; `nan` is left out.
        label: Name of the values, with their unit.
        limit: End of the axis, if it is known.
    """
    figure, ax = _axes(label, "", height=0.9 + 0.34 * max(len(values), 1))
    jitter = np.random.default_rng(0)
    for place, each in enumerate(values.values()):
        defined, colour = each[~np.isnan(each)], class_style(place)["color"]
        ax.boxplot([defined], positions=[place], manage_ticks=False, **_box_style(colour))
        dots = defined[:: len(defined) // MOST_MARKERS + 1]
        offsets = place + jitter.uniform(-0.16, 0.16, len(dots))
        ax.scatter(dots, offsets, s=11, color=colour, alpha=0.55, linewidths=0)
    ax.set_yticks(range(len(values)), [*map(_shorten, values)], color=INK)
    ax.set_ylim(len(values) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.set_xlim(right=limit + 0.01) if limit else ax.set_xlim(left=0)
    return figure


@with_style
def plot_geometry(fingerprint: Mapping[str, Any]) -> Figure:
    """Plot voxel size and number of voxels of all cases, along the axes R-L, A-P and S-I."""
    figure = Figure(figsize=(7.6, 2.9), layout="constrained")
    keys = {"spacings_mm": "Voxel size, mm", "shapes": "Voxels"}
    for ax, (key, label) in zip(figure.subplots(1, 2), keys.items(), strict=True):
        cases, median = fingerprint[key]["cases"], fingerprint[key]["median"]
        jitter = np.random.default_rng(0).uniform(-0.14, 0.14, np.shape(cases))
        ax.scatter(jitter + range(3), cases, s=14, color=LINE, alpha=0.5)
        ax.scatter(range(3), median, s=500, marker="_", color=INK)
        ax.set_xticks(range(3), ["R-L", "A-P", "S-I"])
        ax.set(ylabel=label, xlim=(-0.5, 2.5), ylim=(0, None))
    return figure


@with_style
def plot_intensities(fingerprint: Mapping[str, Any]) -> Figure:
    """Plot percentiles of the foreground's grey values, a box for each channel."""
    channels = [c for c in fingerprint["channels"] if c["foreground_mean"] is not None]
    figure, ax = _axes("Grey value in the foreground", "", height=1 + 0.45 * len(channels))
    names = ("whislo", "q1", "med", "q3", "whishi")
    levels = [channel["foreground_percentiles"].values() for channel in channels]
    ax.bxp([dict(zip(names, each, strict=True)) for each in levels], **_box_style(LINE))
    ax.set_yticks(range(1, len(channels) + 1), [_shorten(c["name"]) for c in channels])
    ax.set_title("Line 0.5 to 99.5 %, box 5 to 95 %, middle 50 %", fontsize=9, loc="left")
    return figure


@with_style
def plot_labels(fingerprint: Mapping[str, Any]) -> Figure:
    """Plot the median volume and the number of cases of each foreground class."""
    classes = fingerprint["classes"][1:]
    colours = [class_style(place)["color"] for place in range(len(classes))]
    figure = Figure(figsize=(7.6, 0.9 + 0.34 * len(classes)), layout="constrained")
    keys = {"median_volume_ml": "Median volume, ml", "num_cases": "Cases that have it"}
    for ax, (key, label) in zip(figure.subplots(1, 2, sharey=True), keys.items(), strict=True):
        ax.barh(range(len(classes)), [c[key] or 0 for c in classes], color=colours, height=0.6)
        ax.set_yticks(range(len(classes)), [_shorten(c["name"]) for c in classes])
        ax.set_xlabel(label)
        ax.grid(visible=False, axis="y")
    ax.invert_yaxis()
    return figure


def _shorten(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _axes(x: str, y: str, height: float = 2.9) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, height), layout="constrained")
    ax = figure.subplots()
    ax.set(xlabel=x, ylabel=y)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    return figure, ax


def _box_style(colour: str) -> dict[str, Any]:
    line = {"color": colour, "linewidth": 1.3}
    look: dict[str, Any] = {f"{part}props": line for part in ("box", "whisker", "cap")}
    median = {"color": colour, "linewidth": 2.4}
    return look | {
        "medianprops": median, "widths": 0.55, "orientation": "horizontal", "showfliers": False
    }  # fmt: skip


def _axes_over_steps(y: str, curves: Curves, height: float = 2.9) -> tuple[Figure, Axes]:
    """Axes whose range of steps is the same for all curves of a run."""
    figure, ax = _axes("Optimizer step", y, height)
    ax.set_xlim(0, max((points[:, 0].max() for points in curves.values()), default=1) * 1.02)
    return figure, ax


def _finite_points(curves: Curves, tag: str) -> np.ndarray:
    """`(N, 2)` steps and values of a curve; the loss of a skipped step may be `nan`."""
    points = curves.get(tag, np.empty((0, 2)))
    return points[np.isfinite(points).all(axis=1)]


def _mark_skipped(ax: Axes, skipped: Sequence[int], curve: np.ndarray | None = None) -> None:
    """Mark skipped steps at the foot, or on a curve of `(N, 2)` points."""
    if not skipped:
        return
    steps = np.array(skipped[:: -(-len(skipped) // MOST_MARKERS)])
    look: Any = {"linestyle": "", "color": SKIP, "label": "skipped step"}
    if curve is None or not len(curve):
        foot = ax.get_xaxis_transform()
        ax.plot(steps, 0 * steps + 0.03, marker="|", markersize=8, transform=foot, **look)
    else:
        ax.plot(steps, np.interp(steps, *curve.T), marker="x", markersize=6, **look)
    ax.legend(loc="best")
