"""Figures of a run, its scores and its dataset; those of volumes are in `slices`.

Each function returns a matplotlib `Figure` that belongs to nobody: no pyplot, no window, no state.
`COLOURS` names the colours, so that a page may exchange them for others in the dark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from scipy.ndimage import gaussian_filter1d

Curves = Mapping[str, np.ndarray]

COLOURS = {
    "ink": "#1c2126", "muted": "#59626c", "rule": "#dde1e6", "skip": "#b3261e",
    "c0": "#1f6fb5", "c1": "#b85c00", "c2": "#247d41", "c3": "#7a4fb1", "c4": "#c0392f",
    "c5": "#12808d", "c6": "#8b5b3d", "c7": "#b63a90", "c8": "#77770f", "c9": "#5a6b7c",
}  # fmt: skip
CLASS_COLOURS = [colour for name, colour in COLOURS.items() if name[0] == "c"]
DASHES = ("solid", "dashed", "dotted")  # for more classes than colours
MOST_POINTS, MOST_DOTS = 500, 60  # of a curve, of a class; more cannot be seen
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a class may be called "$"
    "font.size": 10, "legend.frameon": False, "legend.fontsize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.linewidth": 0.7,
    "text.color": COLOURS["ink"], "grid.color": COLOURS["rule"],
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), COLOURS["muted"]),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), COLOURS["rule"]),
}  # fmt: skip


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """`draw`, in this module's style; the caller's own is as before afterwards."""

    @wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()  # ticks are made at the first drawing, in its style
        return figure

    return drawn


def class_style(number: int) -> dict[str, Any]:
    """Colour and dash of a foreground class, by its place from 0."""
    turn, place = divmod(number, len(CLASS_COLOURS))
    return {"color": CLASS_COLOURS[place], "linestyle": DASHES[turn % len(DASHES)]}


@styled
def loss(curves: Curves, skipped: Sequence[int] = ()) -> Figure:
    """Training loss over steps, and a smoothed line; skipped steps are ticks at the foot."""
    figure, ax = _over_steps("Training loss", curves)
    points = _finite(curves, "train/loss")
    ax.plot(*_thinned(points).T, color=COLOURS["c0"], alpha=0.35, linewidth=1, label="as logged")
    width = max(len(points) / 40, 1)
    smooth = np.column_stack([points[:, 0], gaussian_filter1d(points[:, 1], width, mode="nearest")])
    ax.plot(*_thinned(smooth).T, color=COLOURS["c0"], linewidth=1.8, label="smoothed")
    _mark_skipped(ax, skipped)
    ax.legend(loc="upper right")
    return figure


@styled
def dice(curves: Curves, class_names: Sequence[str]) -> Figure:
    """Validation Dice over steps: each class in its colour, and the mean."""
    names = [_short(name) for name in (*class_names, "mean")]
    ncols = min(3, 60 // (max(map(len, names)) + 6))  # as many as fit
    figure, ax = _over_steps("Validation Dice", curves, 2.9 + 0.17 * -(-len(names) // ncols))
    for number, name in enumerate(class_names):
        points = _thinned(_finite(curves, f"val/dice_{name}"))
        ax.plot(*points.T, linewidth=1.3, **class_style(number))
    mean = _thinned(_finite(curves, "val/mean_dice"))
    ax.plot(*mean.T, color=COLOURS["ink"], linewidth=2.2)
    for line in ax.lines if len(mean) <= MOST_DOTS else ():
        line.set(marker="o", markersize=3)
    ax.set_ylim(-0.03, 1.03)
    figure.legend(ax.lines, names, loc="outside lower center", ncols=ncols)
    return figure


@styled
def loss_scale(curves: Curves, skipped: Sequence[int] = ()) -> Figure:
    """Loss scale over steps on an axis of powers of two; skipped steps are marked on it."""
    figure, ax = _over_steps("Loss scale", curves)
    points = _finite(curves, "AMP/loss_scale")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_locator(LogLocator(base=2, numticks=8))
    ax.yaxis.set_major_formatter(lambda value, _: shown_scale(value))
    if len(points):
        changes = np.diff(points[:, 1], prepend=np.nan, append=np.nan) != 0
        kept = np.flatnonzero(changes[:-1] | changes[1:])  # between them it stays as it is
        shown = points[kept[:: len(kept) // MOST_POINTS + 1]]
        ax.plot(*shown.T, color=COLOURS["c0"], linewidth=1.8, drawstyle="steps-post")
        ax.set_ylim(points[:, 1].min() / 2, points[:, 1].max() * 2)
    _mark_skipped(ax, skipped, points)
    return figure


@styled
def learning_rate(curves: Curves) -> Figure:
    """Learning rate over steps."""
    figure, ax = _over_steps("Learning rate", curves)
    ax.plot(*_thinned(_finite(curves, "LR")).T, color=COLOURS["c0"], linewidth=1.8)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter("{x:g}")
    return figure


@styled
def boxes(values: Mapping[str, np.ndarray], label: str, limit: float | None = None) -> Figure:
    """A box plot for each class: quartiles, whiskers to 1.5 times their distance, and cases.

    Args:
        values: Class name to the values of its cases; `nan` is left out. Of many cases only those
            beyond the whiskers are dots.
        label: What they are, with the unit.
        limit: Where the axis ends, if that is known.
    """
    figure, ax = _axes(label, "", height=0.9 + 0.34 * max(len(values), 1))
    jitter = np.random.default_rng(0)
    for place, each in enumerate(values.values()):
        defined, colour = each[~np.isnan(each)], class_style(place)["color"]
        many = len(defined) > MOST_DOTS
        ax.boxplot([defined], positions=[place], manage_ticks=False, **_box_look(colour, many))
        if not many:
            offsets = place + jitter.uniform(-0.16, 0.16, len(defined))
            ax.scatter(defined, offsets, s=11, color=colour, alpha=0.55, linewidths=0)
    ax.set_yticks(range(len(values)), [*map(_short, values)], color=COLOURS["ink"])
    ax.set_ylim(len(values) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.set_xlim(right=limit + 0.01) if limit else ax.set_xlim(left=0)
    return figure


@styled
def geometry(fingerprint: Mapping[str, Any]) -> Figure:
    """Voxel size and number of voxels of every case, along left–right, back–front, feet–head."""
    figure = Figure(figsize=(7.6, 2.9), layout="constrained")
    keys = {"spacings_mm": "Voxel size, mm", "shapes": "Voxels"}
    for ax, (key, label) in zip(figure.subplots(1, 2), keys.items(), strict=True):
        cases, median = fingerprint[key]["cases"], fingerprint[key]["median"]
        jitter = np.random.default_rng(0).uniform(-0.14, 0.14, np.shape(cases))
        ax.scatter(jitter + range(3), cases, s=14, color=COLOURS["c0"], alpha=0.5)
        ax.scatter(range(3), median, s=500, marker="_", color=COLOURS["ink"])
        ax.set_xticks(range(3), ["R-L", "A-P", "S-I"])
        ax.set(ylabel=label, xlim=(-0.5, 2.5), ylim=(0, None))
    return figure


@styled
def intensities(fingerprint: Mapping[str, Any]) -> Figure:
    """Percentiles of the foreground's grey values: a box for each channel."""
    channels = [c for c in fingerprint["channels"] if c["foreground_mean"] is not None]
    figure, ax = _axes("Grey value in the foreground", "", height=1 + 0.45 * len(channels))
    names = ("whislo", "q1", "med", "q3", "whishi")
    levels = [channel["foreground_percentiles"].values() for channel in channels]
    ax.bxp([dict(zip(names, each, strict=True)) for each in levels], **_box_look(COLOURS["c0"]))
    ax.set_yticks(range(1, len(channels) + 1), [_short(c["name"]) for c in channels])
    ax.set_title("Line 0.5 to 99.5 %, box 5 to 95 %, middle 50 %", fontsize=9, loc="left")
    return figure


@styled
def labels(fingerprint: Mapping[str, Any]) -> Figure:
    """Median volume and number of cases of each foreground class."""
    classes = fingerprint["classes"][1:]
    colours = [class_style(place)["color"] for place in range(len(classes))]
    figure = Figure(figsize=(7.6, 0.9 + 0.34 * len(classes)), layout="constrained")
    keys = {"median_volume_ml": "Median volume, ml", "num_cases": "Cases that have it"}
    for ax, (key, label) in zip(figure.subplots(1, 2, sharey=True), keys.items(), strict=True):
        ax.barh(range(len(classes)), [c[key] or 0 for c in classes], color=colours, height=0.6)
        ax.set_yticks(range(len(classes)), [_short(c["name"]) for c in classes])
        ax.set_xlabel(label)
        ax.grid(visible=False, axis="y")
    ax.invert_yaxis()
    return figure


def shown_scale(value: float) -> str:
    """A loss scale, all of its digits."""
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _axes(x: str, y: str, height: float = 2.9) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, height), layout="constrained")
    ax = figure.subplots()
    ax.set(xlabel=x, ylabel=y)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    return figure, ax


def _box_look(colour: str, outliers: bool = False) -> dict[str, Any]:
    line = {"color": colour, "linewidth": 1.3}
    look: dict[str, Any] = {f"{part}props": line for part in ("box", "whisker", "cap")}
    look["medianprops"] = {"color": colour, "linewidth": 2.4}
    look["flierprops"] = {"marker": ".", "markersize": 4, "markeredgecolor": colour}
    return look | {"widths": 0.55, "orientation": "horizontal", "showfliers": outliers}


def _over_steps(y: str, curves: Curves, height: float = 2.9) -> tuple[Figure, Axes]:
    """All curves of a run have one axis of steps."""
    figure, ax = _axes("Optimizer step", y, height)
    ax.set_xlim(0, max((points[:, 0].max() for points in curves.values()), default=1) * 1.02)
    return figure, ax


def _finite(curves: Curves, tag: str) -> np.ndarray:
    """`(N, 2)` steps and values; a skipped step's loss may be no number."""
    points = curves.get(tag, np.empty((0, 2)))
    return points[np.isfinite(points).all(axis=1)]


def _thinned(points: np.ndarray) -> np.ndarray:
    """At most some `MOST_POINTS` of them; each the mean of neighbours."""
    if len(points) <= MOST_POINTS:
        return points
    return np.array([part.mean(axis=0) for part in np.array_split(points, MOST_POINTS)])


def _mark_skipped(ax: Axes, skipped: Sequence[int], on: np.ndarray | None = None) -> None:
    """Mark skipped steps at the foot, or on a curve of `(N, 2)` points."""
    if not skipped:
        return
    steps = np.array(skipped[:: -(-len(skipped) // MOST_POINTS)])
    look: Any = {"linestyle": "", "color": COLOURS["skip"], "label": "skipped step"}
    if on is None or not len(on):
        foot = ax.get_xaxis_transform()
        ax.plot(steps, 0 * steps + 0.03, marker="|", markersize=8, transform=foot, **look)
    else:
        ax.plot(steps, np.interp(steps, *on.T), marker="x", markersize=6, **look)
    ax.legend(loc="best")
