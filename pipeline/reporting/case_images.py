"""Pictures of a case: the three planes, label and prediction outlined, in mm and marked.

Planes are those of the voxel grid that are nearest to axial, coronal and sagittal, seen as
radiologists see them: the patient's right is on the left of the picture, anterior on the left of a
sagittal one. A voxel is as large as it is in mm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from nibabel.orientations import apply_orientation, io_orientation

from pipeline.reporting.figures import styled
from pipeline.reporting.run_files import Scores
from transforms.grid import align
from transforms.load import VolumeReader

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # the axis that each is square to, of R, A, S
ENDS = (("R", "L"), ("A", "P"), ("S", "I"))  # where each axis leads to, and comes from
# readable on grey, and told apart by people who see red and green as one
LABEL, PREDICTION, DIFFERENCE = "#4db2ff", "#ffb000", "#ff3b5c"
NEAR_MM = 0.1  # files of one grid may name it with fewer digits
MARGIN_MM = 20.0  # around what is outlined
LONG_SIDE_IN = 4.2


@dataclass(frozen=True)
class CaseVolumes:
    """A case on its image's grid, axes R, A, S.

    Attributes:
        case_id: Of the case.
        image: `(H, W, D)` grey values of its first channel.
        label: `(H, W, D)` integers.
        pred: `(H, W, D)` integers; zeros where there is no prediction.
        counted: `(H, W, D)` bool; false at voxels that the label says to ignore.
        spacing_mm: Voxel size along the axes.
    """

    case_id: str
    image: np.ndarray
    label: np.ndarray
    pred: np.ndarray
    counted: np.ndarray
    spacing_mm: np.ndarray

    @cached_property
    def counts(self) -> list[np.ndarray]:
        """For each axis how much of label and prediction is in each slice across it."""
        found = (self.label > 0) | (self.pred > 0)
        return [np.count_nonzero(found, axis=others) for others in ((1, 2), (0, 2), (0, 1))]

    @cached_property
    def box(self) -> tuple[slice, ...]:
        """What is shown: label and prediction with a margin, or all where there are none."""
        box = []
        for counts, mm in zip(self.counts, self.spacing_mm, strict=True):
            places, margin = np.flatnonzero(counts), int(np.ceil(MARGIN_MM / mm))
            first, last = (places[0], places[-1]) if len(places) else (0, len(counts))
            box.append(slice(max(int(first) - margin, 0), min(int(last) + 1 + margin, len(counts))))
        return tuple(box)

    def place(self, axis: int) -> int:
        """The slice across an axis that has most of label and prediction."""
        counts = self.counts[axis]
        return int(counts.argmax()) if counts.any() else len(counts) // 2

    @cached_property
    def window(self) -> tuple[float, float]:
        """Grey values that are drawn black and white."""
        values = self.image[self.box].ravel()
        few = values[:: len(values) // 1_000_000 + 1]  # are as good, and quicker
        low, high = np.percentile(few, [0.2, 99.8]).tolist()
        return low, max(high, low + 1e-6)


def read_case(
    case_id: str, paths: Mapping[str, Any], ignore_value: int | None = None
) -> CaseVolumes:
    """Read a case from its files.

    Args:
        case_id: Of the case.
        paths: `image` (one, or one per channel), `label` and, if there is one, `pred`.
        ignore_value: Label of voxels that count nowhere.

    Raises:
        OSError: If a file is not there or cannot be read.
        ValueError: If one is no volume, or label or prediction are on another grid.
    """
    reader = VolumeReader()
    first = paths["image"][0] if isinstance(paths["image"], list) else paths["image"]
    image = reader.read(first)
    shape, affine = image.shape[:3], image.affine
    to_ras = io_orientation(affine)
    volumes = {"image": np.asanyarray(image.dataobj).reshape(*shape, -1)[..., 0]}
    for key in ("label", "pred"):
        if paths.get(key) is None:
            volumes[key] = np.zeros(shape, np.uint8)
            continue
        other = reader.read(paths[key])
        found = align(other.shape[:3], other.affine, shape, affine)
        if not found.distance_mm <= NEAR_MM:
            raise ValueError(f"expected {key} and image on one grid, got others. Resample it.")
        voxels = np.asanyarray(other.dataobj)
        volumes[key] = apply_orientation(voxels.astype(np.int16), found.change)
    ras = {key: apply_orientation(voxels, to_ras) for key, voxels in volumes.items()}
    spacing = nib.affines.voxel_sizes(affine)[np.argsort(to_ras[:, 0])]
    counted = ras["label"] != (-1 if ignore_value is None else ignore_value)
    return CaseVolumes(
        case_id, ras["image"], ras["label"] * counted, ras["pred"] * counted, counted, spacing
    )


@styled
def plane(case: CaseVolumes, name: str) -> Figure:
    """One plane of a case, without a frame; planes of a case have one scale.

    Args:
        case: To draw.
        name: Of `PLANES`.
    """
    sides = [(s.stop - s.start) * mm for s, mm in zip(case.box, case.spacing_mm, strict=True)]
    scale = LONG_SIDE_IN / max(sides)
    across, up = (n for n in range(3) if n != PLANES[name])
    # a slab of a few mm is still a picture that can be pointed at
    figure = Figure(figsize=(max(sides[across] * scale, 0.3), max(sides[up] * scale, 0.3)))
    draw_plane(figure.add_axes((0, 0, 1, 1)), case, name)
    return figure


@styled
def gallery(cases: Sequence[CaseVolumes], titles: Sequence[str]) -> Figure:
    """Cases below one another, each in three planes.

    Args:
        cases: To draw.
        titles: One for each.
    """
    figure = Figure(figsize=(9, 3.3 * len(cases)), layout="constrained")
    parts = figure.subfigures(len(cases), 1, squeeze=False)
    for part, case, title in zip(parts[:, 0], cases, titles, strict=True):
        part.suptitle(title, x=0.01, ha="left", fontsize=11)
        for ax, name in zip(part.subplots(1, len(PLANES)), PLANES, strict=True):
            draw_plane(ax, case, name)
            ax.set_title(name, fontsize=9)
    return figure


def worst_cases(scores: Scores, limit: int = 6, ignore_value: int | None = None) -> Figure:
    """Cases below one another, the worst first.

    Args:
        scores: Of a split, with the predictions beside them.
        limit: Most cases.
        ignore_value: As for `read_case`.

    Raises:
        OSError, ValueError: As `read_case`.
    """
    means, ids = scores.means("dice"), scores.ranked()[:limit]
    cases = [read_case(case, scores.paths[case], ignore_value) for case in ids]
    return gallery(cases, [f"{case}, mean Dice {means[case]:.3f}" for case in ids])


def draw_plane(ax: Axes, case: CaseVolumes, name: str) -> None:
    """Draw a plane: grey values, voxels that differ tinted, outlines, directions and a scale."""
    axis = PLANES[name]
    index: list[Any] = list(case.box)
    index[axis] = case.place(axis)
    image, label, pred, counted = (
        volume[tuple(index)].T for volume in (case.image, case.label, case.pred, case.counted)
    )  # (up, across)
    across, up = (n for n in range(3) if n != axis)
    spacing = case.spacing_mm[across], case.spacing_mm[up]
    width, height = image.shape[1] * spacing[0], image.shape[0] * spacing[1]
    low, high = case.window
    frame: dict[str, Any] = {"origin": "lower", "extent": (0, width, 0, height)}
    ax.imshow(image, cmap="gray", vmin=low, vmax=high, **frame)
    differs = (label != pred) & counted & (case.pred.any() or case.label.any())
    tint = np.zeros((*differs.shape, 4))
    tint[differs] = [*_rgb(DIFFERENCE), 0.38]
    if case.pred.any():
        ax.imshow(tint, interpolation="nearest", **frame)
    # the prediction runs within the label's line where both agree
    for labels, colour, line in ((label, LABEL, 3.0), (pred, PREDICTION, 1.45)):
        for value in np.unique(labels[labels > 0]):
            _outline(ax, labels == value, spacing, colour, line)
    ax.set(xlim=(width, 0), ylim=(0, height), aspect="equal", xticks=[], yticks=[])
    ax.set_axis_off()
    _mark(ax, ENDS[across], ENDS[up], width, height)


def _outline(
    ax: Axes, mask: np.ndarray, spacing: tuple[float, float], colour: str, line: float
) -> None:
    """The border of a mask `(up, across)`, closed also at the edge of the picture."""
    # contours cut corners; of parts of voxels they cut no more than can be seen
    parts = 4 if max(mask.shape) <= 200 else 1
    fine = np.kron(np.pad(mask, 1), np.ones((parts, parts)))
    up, across = (
        mm * ((np.arange(n) + 0.5) / parts - 1)
        for n, mm in zip(fine.shape, spacing[::-1], strict=True)
    )
    ax.contour(across, up, fine, levels=[0.5], colors=[colour], linewidths=[line])


def _mark(
    ax: Axes, across: tuple[str, str], up: tuple[str, str], width: float, height: float
) -> None:
    """Directions at the four sides, and a length."""
    look: dict[str, Any] = {
        "color": "white", "fontsize": 11, "transform": ax.transAxes,
        "path_effects": [withStroke(linewidth=2.5, foreground="black")],
    }  # fmt: skip
    for x, y, text, ha, va in (
        (0.015, 0.5, across[0], "left", "center"),
        (0.985, 0.5, across[1], "right", "center"),
        (0.5, 0.985, up[0], "center", "top"),
        (0.5, 0.015, up[1], "center", "bottom"),
    ):
        ax.text(x, y, text, ha=ha, va=va, weight="bold", **look)
    length = max(mm for mm in (1, 2, 5, 10, 20, 50, 100) if mm <= max(width / 3, 1))
    end, foot = 0.03 * width, 0.03 * height
    ax.plot([end, end + length], [foot, foot], color="black", linewidth=4.5)
    ax.plot([end, end + length], [foot, foot], color="white", linewidth=2.5)
    ax.text(0.97, 0.05, f"{length} mm", ha="right", va="bottom", **{**look, "fontsize": 9})


def _rgb(colour: str) -> list[float]:
    return [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
