"""Draws slices of a case with label and prediction outlined, and has the colours of classes.

The planes are those of the voxel grid that are nearest to axial, coronal and sagittal, in the
radiological convention: the patient's right is on the left of the picture, and anterior is on the
left of a sagittal picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import nibabel as nib
import numpy as np
from contourpy import contour_generator
from nibabel.orientations import apply_orientation
from PIL import Image, ImageColor, ImageDraw

from transforms.volumes import read_header, read_label, read_voxels

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # index of the axis through the plane, of RAS
DIRECTIONS = (("R", "L"), ("A", "P"), ("S", "I"))  # at the high and the low end of each axis
# of the first classes: bright on grey, and the first five distinct with red-green colour blindness
COLORS = (
    "#ffb000", "#4db2ff", "#ff4d6d", "#fff34d", "#c77dff",
    "#35d07f", "#00e0e0", "#ff8ad8", "#b5e61d", "#d08a4a",
)  # fmt: skip
GOLDEN_ANGLE = 137.5  # degrees of hue between later classes: any few of them in a row differ
LABEL_WIDTH, PREDICTION_WIDTH, DASH = 2, 3, 7  # pixels
NEAR_MM = 0.1  # files of one grid may state it with fewer digits
WINDOW_VOXELS = 2**21  # about as many are enough to choose the grey values to show
MARGIN_MM = 20.0  # around label and prediction
LONG_SIDE = 480  # pixels


def class_color(value: int) -> tuple[int, int, int]:
    """Return the colour of the class with a label value from 1 on, as 8-bit red, green, blue."""
    if value <= len(COLORS):
        color = COLORS[value - 1]
    else:
        hue, light = value * GOLDEN_ANGLE % 360, (70, 55, 80)[value % 3]
        color = f"hsl({hue}, 90%, {light}%)"
    red, green, blue = ImageColor.getrgb(color)[:3]
    return red, green, blue


@dataclass(frozen=True)
class CaseVolumes:
    """It holds a case on the grid of its image, `(H, W, D)` along the axes R, A, S."""

    image: np.ndarray  # grey values of the first channel
    label: np.ndarray  # integers; 0 where it is ignored
    pred: np.ndarray  # integers; 0 where the label is ignored or there is no prediction
    spacing_mm: np.ndarray  # voxel size along the axes

    @cached_property
    def counts(self) -> list[np.ndarray]:
        """Count labelled or predicted voxels in each slice across each axis."""
        found = (self.label > 0) | (self.pred > 0)
        return [np.count_nonzero(found, axis=others) for others in ((1, 2), (0, 2), (0, 1))]

    @cached_property
    def box(self) -> tuple[slice, ...]:
        """Return the region to show: label and prediction with a margin, or all without them."""
        box = []
        for counts, mm in zip(self.counts, self.spacing_mm, strict=True):
            places = np.flatnonzero(counts if counts.any() else counts + 1)
            margin = int(np.ceil(MARGIN_MM / mm))
            box.append(slice(max(places[0] - margin, 0), min(places[-1] + 1 + margin, len(counts))))
        return tuple(box)

    def place(self, axis: int) -> int:
        """Return the index of the slice across an axis with most of label and prediction."""
        counts = self.counts[axis]
        return int(counts.argmax()) if counts.any() else len(counts) // 2

    @cached_property
    def window(self) -> tuple[float, float]:
        """Return the grey values that are drawn black and white."""
        shown = self.image[self.box]
        step = max(round((shown.size / WINDOW_VOXELS) ** (1 / 3)), 1)
        low, high = np.percentile(shown[::step, ::step, ::step], [0.2, 99.8]).tolist()
        return low, max(high, low + 1e-6)


def read_case(paths: Mapping[str, Any], ignore_value: int | None = None) -> CaseVolumes:
    """Read a case from its files `image` (one, or one per channel), `label` and, if any, `pred`.

    Voxels whose label is `ignore_value` are neither drawn nor compared.

    Raises:
        ValueError: If a file cannot be read, or label or prediction have another grid.
    """
    path = str(np.atleast_1d(paths["image"])[0])
    header = read_header(path)
    to_ras = nib.io_orientation(header.affine)

    def read(key: str) -> np.ndarray:
        if paths.get(key) is None:
            return np.zeros(image.shape, np.int16)
        voxels = read_label(str(paths[key]), header, tolerance_mm=NEAR_MM)
        return apply_orientation(voxels, to_ras).astype(np.int16)

    voxels = read_voxels(path, header).reshape(*header.shape[:3], -1)[..., 0]
    image = apply_orientation(voxels, to_ras)
    label, pred = read("label"), read("pred")
    if ignore_value is not None:
        label, pred = label * (label != ignore_value), pred * (label != ignore_value)
    sizes = nib.affines.voxel_sizes(header.affine)
    return CaseVolumes(image, label, pred, sizes[np.argsort(to_ras[:, 0])])


def draw_plane(case: CaseVolumes, name: str, long_side: int = LONG_SIDE) -> Image.Image:
    """Draw a plane of `PLANES`: grey values, outlines in class colours, directions and a scale.

    The label is outlined with solid lines, the prediction with dashed ones.

    Returns:
        RGB picture; the three planes of a case have one scale, its longest side `long_side` pixels.
    """
    axis = PLANES[name]
    across, up = (n for n in range(3) if n != axis)
    sides = [(s.stop - s.start) * mm for s, mm in zip(case.box, case.spacing_mm, strict=True)]
    scale = long_side / max(sides)  # pixels per mm
    voxels: list[Any] = [[case.place(axis)]] * 3
    for n in (across, up):  # the nearest voxels, the high ends at the upper left
        pixels = max(round(sides[n] * scale), 30)  # a slab of a few mm needs a width to be seen
        ends = case.box[n].stop, case.box[n].start
        voxels[n] = np.linspace(*ends, 2 * pixels + 1)[1::2].astype(int)
    planes = (volume[np.ix_(*voxels)] for volume in (case.image, case.label, case.pred))
    image, label, pred = (plane.squeeze(axis).T for plane in planes)
    grey = np.interp(image, case.window, (0, 255)).astype(np.uint8)
    picture = Image.fromarray(grey).convert("RGB")
    _draw_outlines(picture, label, LABEL_WIDTH)
    _draw_outlines(picture, pred, PREDICTION_WIDTH, DASH)
    _draw_marks(picture, DIRECTIONS[across] + DIRECTIONS[up], scale)
    return picture


def _draw_outlines(picture: Image.Image, labels: np.ndarray, width: int, dash: int = 0) -> None:
    """Draw the outline of each class, in dashes of some pixels if `dash` is given."""
    draw = ImageDraw.Draw(picture)
    for value in np.unique(labels[labels > 0]).tolist():
        mask = np.pad(labels == value, 1).astype(float)  # so that outlines are closed at the rim
        for line in contour_generator(z=mask).lines(0.5):
            points = np.asarray(line) - 1
            steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
            part = np.insert(steps.cumsum(), 0, 0.0) // (dash or np.inf)
            for number in np.unique(part)[:: 2 if dash else 1]:
                piece = points[part == number].ravel().tolist()
                draw.line(piece, fill=class_color(value), width=width)


def _draw_marks(picture: Image.Image, sides: tuple[str, ...], scale: float) -> None:
    """Draw the directions left, right, above and below, and a length in mm at the foot."""
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    look: Any = {"fill": "white", "stroke_width": 2, "stroke_fill": "black"}
    ends = ((6, height / 2), (width - 6, height / 2), (width / 2, 6), (width / 2, height - 6))
    for end, letter, anchor in zip(ends, sides, ("lm", "rm", "mt", "mb"), strict=True):
        draw.text(end, letter, font_size=24, anchor=anchor, **look)
    length = max(mm for mm in (1, 2, 5, 10, 20, 50, 100) if mm <= max(width / scale / 3, 1))
    start, foot = 0.03 * width, 0.97 * height
    draw.line((start, foot, start + length * scale, foot), fill="white", width=3)
    draw.text((width - 8, height - 8), f"{length} mm", font_size=18, anchor="rb", **look)
