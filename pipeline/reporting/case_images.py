"""Pictures of a case: the three planes, with label and prediction outlined, to scale in mm.

The planes are those of the voxel grid that are nearest to axial, coronal and sagittal, in the
radiological convention: the patient's right is on the left of the picture, and anterior is on the
left of a sagittal picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageColor, ImageDraw, ImageFont

from pipeline.drawing import outline
from pipeline.reporting.figures import with_style
from pipeline.reporting.run_files import SplitScores
from transforms.grid import align
from transforms.load import VolumeReader

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # index of the axis through the plane, of RAS
DIRECTIONS = (("R", "L"), ("A", "P"), ("S", "I"))  # at the high and the low end of each axis
# readable on grey, and distinguishable with red-green colour blindness
LABEL, PREDICTION, DIFFERENCE = "#4db2ff", "#ffb000", "#ff3b5c"
LABEL_WIDTH, PREDICTION_WIDTH = 4, 2  # pixels
OPACITY = 0.38  # of DIFFERENCE
NEAR_MM = 0.1  # files of one grid may state it with fewer digits
MARGIN_MM = 20.0  # around label and prediction
LONG_SIDE = 480  # pixels


@dataclass(frozen=True)
class CaseVolumes:
    """A case on the grid of its image, with axes R, A, S.

    Attributes:
        case_id: Name of the case.
        image: `(H, W, D)` grey values of the first channel.
        label: `(H, W, D)` integers.
        pred: `(H, W, D)` integers; zeros if there is no prediction.
        counted: `(H, W, D)` bool; false where the label has the value to ignore.
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
        """For each axis, the number of labelled or predicted voxels in each slice across it."""
        found = (self.label > 0) | (self.pred > 0)
        return [np.count_nonzero(found, axis=others) for others in ((1, 2), (0, 2), (0, 1))]

    @cached_property
    def box(self) -> tuple[slice, ...]:
        """Region that is shown: label and prediction with a margin, or everything without them."""
        box = []
        for counts, mm in zip(self.counts, self.spacing_mm, strict=True):
            places, margin = np.flatnonzero(counts), int(np.ceil(MARGIN_MM / mm))
            first, last = (places[0], places[-1]) if len(places) else (0, len(counts))
            box.append(slice(max(int(first) - margin, 0), min(int(last) + 1 + margin, len(counts))))
        return tuple(box)

    def place(self, axis: int) -> int:
        """Index of the slice across an axis that holds most of label and prediction."""
        counts = self.counts[axis]
        return int(counts.argmax()) if counts.any() else len(counts) // 2

    @cached_property
    def window(self) -> tuple[float, float]:
        """Grey values that are drawn black and white."""
        values = self.image[self.box].ravel()
        few = values[:: len(values) // 1_000_000 + 1]  # a percentile of a million is good enough
        low, high = np.percentile(few, [0.2, 99.8]).tolist()
        return low, max(high, low + 1e-6)


def read_case(
    case_id: str, paths: Mapping[str, Any], ignore_value: int | None = None
) -> CaseVolumes:
    """Read a case from its files.

    Args:
        case_id: Name of the case.
        paths: `image` (one, or one per channel), `label` and, if there is one, `pred`.
        ignore_value: Label of voxels that are neither drawn nor compared.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If a file is no volume, or label or prediction have another grid.
    """
    first = paths["image"][0] if isinstance(paths["image"], list) else paths["image"]
    image, affine = _read_ras(first)
    label, pred = np.zeros((2, *image.shape), np.int16)
    for key, volume in (("label", label), ("pred", pred)):
        if paths.get(key) is not None:
            voxels, other = _read_ras(paths[key])
            if not align(voxels.shape, other, image.shape, affine).distance_mm <= NEAR_MM:
                raise ValueError(f"expected {key} and image on one grid, got others. Resample it.")
            volume[:] = voxels
    counted = label != (-1 if ignore_value is None else ignore_value)
    spacing = nib.affines.voxel_sizes(affine)
    return CaseVolumes(case_id, image, label * counted, pred * counted, counted, spacing)


def _read_ras(path: Any) -> tuple[np.ndarray, np.ndarray]:
    """First channel `(H, W, D)` of a file along the axes R, A, S, and its affine."""
    image = nib.as_closest_canonical(VolumeReader().read(path))
    return np.asanyarray(image.dataobj).reshape(*image.shape[:3], -1)[..., 0], image.affine


def draw_plane(case: CaseVolumes, name: str) -> np.ndarray:
    """Draw grey values, voxels that differ tinted, outlines, directions and a scale.

    Args:
        case: Case to draw.
        name: Key of `PLANES`.

    Returns:
        `(rows, columns, 3)` uint8; the three planes of a case have one scale.
    """
    axis = PLANES[name]
    across, up = (n for n in range(3) if n != axis)
    index: list[Any] = list(case.box)
    index[axis] = case.place(axis)
    sides = [(s.stop - s.start) * mm for s, mm in zip(case.box, case.spacing_mm, strict=True)]
    scale = LONG_SIDE / max(sides)  # pixels per mm
    # a slab of a few mm still needs a width that can be seen
    size = tuple(max(round(sides[n] * scale), 30) for n in (across, up))
    image, label, pred, counted = (
        _resize(volume[tuple(index)], size)
        for volume in (case.image, case.label, case.pred, case.counted)
    )
    low, high = case.window
    grey = np.clip((image - low) / (high - low), 0, 1) * 255
    rgb = np.repeat(grey[..., None], 3, axis=2)
    if case.pred.any():
        differs = (label != pred) & counted
        rgb[differs] += OPACITY * (np.array(ImageColor.getrgb(DIFFERENCE)) - rgb[differs])
    rgb[outline(label, LABEL_WIDTH)] = ImageColor.getrgb(LABEL)
    rgb[outline(pred, PREDICTION_WIDTH)] = ImageColor.getrgb(PREDICTION)
    picture = Image.fromarray(rgb.astype(np.uint8))
    _draw_marks(picture, DIRECTIONS[across], DIRECTIONS[up], scale)
    return np.asarray(picture)


def _resize(plane: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Nearest neighbours of an `(across, up)` plane, with its high ends at the upper left."""
    across, up = (
        ((np.arange(pixels) + 0.5) * voxels / pixels).astype(int)[::-1]
        for voxels, pixels in zip(plane.shape, size, strict=True)
    )
    return plane[np.ix_(across, up)].T


def _draw_marks(
    picture: Image.Image, across: tuple[str, str], up: tuple[str, str], scale: float
) -> None:
    """Draw the directions at the four sides, and a length in mm at the foot."""
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    look: dict[str, Any] = {"fill": "white", "stroke_width": 2, "stroke_fill": "black"}
    letters, font = ImageFont.load_default(24), ImageFont.load_default(18)
    for x, y, letter, anchor in (
        (6, height / 2, across[0], "lm"),
        (width - 6, height / 2, across[1], "rm"),
        (width / 2, 6, up[0], "mt"),
        (width / 2, height - 6, up[1], "mb"),
    ):
        draw.text((x, y), letter, font=letters, anchor=anchor, **look)
    length = max(mm for mm in (1, 2, 5, 10, 20, 50, 100) if mm <= max(width / scale / 3, 1))
    start, foot = 0.03 * width, 0.97 * height
    for colour, line in (("black", 6), ("white", 3)):
        draw.line((start, foot, start + length * scale, foot), fill=colour, width=line)
    draw.text((width - 8, height - 8), f"{length} mm", font=font, anchor="rb", **look)


@with_style
def draw_gallery(cases: Sequence[CaseVolumes], titles: Sequence[str]) -> Figure:
    """Draw cases below one another, each in three planes and with its title."""
    figure = Figure(figsize=(9, 3.3 * len(cases)), layout="constrained")
    parts = figure.subfigures(len(cases), 1, squeeze=False)
    for part, case, title in zip(parts[:, 0], cases, titles, strict=True):
        part.suptitle(title, x=0.01, ha="left", fontsize=11)
        for ax, name in zip(part.subplots(1, len(PLANES)), PLANES, strict=True):
            ax.imshow(draw_plane(case, name))
            ax.set_axis_off()
            ax.set_title(name, fontsize=9)
    return figure


def draw_worst_cases(
    scores: SplitScores, limit: int = 6, ignore_value: int | None = None
) -> Figure:
    """Draw cases below one another, the worst first.

    Args:
        scores: Scores of a split, with the predictions beside them.
        limit: Largest number of cases.
        ignore_value: As for `read_case`.

    Raises:
        OSError, ValueError: As `read_case`.
    """
    means, ids = scores.means("dice"), scores.ranked()[:limit]
    cases = [read_case(case, scores.paths[case], ignore_value) for case in ids]
    return draw_gallery(cases, [f"{case}, mean Dice {means[case]:.3f}" for case in ids])
