"""Draws the three planes of a case to scale in mm, with label and prediction outlined.

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
from PIL import Image, ImageColor, ImageDraw

from pipeline.drawing import outline
from transforms.grid import align
from transforms.load import open_volume

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # index of the axis through the plane, of RAS
DIRECTIONS = (("R", "L"), ("A", "P"), ("S", "I"))  # at the high and the low end of each axis
# These are readable on grey, and distinguishable with red-green colour blindness.
LABEL, PREDICTION, DIFFERENCE = "#4db2ff", "#ffb000", "#ff3b5c"
LABEL_WIDTH, PREDICTION_WIDTH = 4, 2  # pixels
OPACITY = 0.38  # of DIFFERENCE
NEAR_MM = 0.1  # files of one grid may state it with fewer digits
MARGIN_MM = 20.0  # around label and prediction
LONG_SIDE = 480  # pixels


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
        low, high = np.percentile(self.image[self.box], [0.2, 99.8]).tolist()
        return low, max(high, low + 1e-6)


def read_case(paths: Mapping[str, Any], ignore_value: int | None = None) -> CaseVolumes:
    """Read a case from its files `image` (one, or one per channel), `label` and, if any, `pred`.

    Voxels whose label is `ignore_value` are neither drawn nor compared.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If a file is no volume, or label or prediction have another grid.
    """
    image, affine = _read_ras(np.atleast_1d(paths["image"])[0])
    label, pred = np.zeros((2, *image.shape), np.int16)
    for key, volume in (("label", label), ("pred", pred)):
        if paths.get(key) is not None:
            voxels, other = _read_ras(paths[key])
            if not align(voxels.shape, other, image.shape, affine).distance_mm <= NEAR_MM:
                raise ValueError(f"expected {key} and image on one grid, got others. Resample it.")
            volume[:] = voxels
    if ignore_value is not None:
        label, pred = label * (label != ignore_value), pred * (label != ignore_value)
    return CaseVolumes(image, label, pred, nib.affines.voxel_sizes(affine))


def _read_ras(path: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the first channel `(H, W, D)` of a file along the axes R, A, S, and its affine."""
    image = nib.as_closest_canonical(open_volume(path))
    return np.asanyarray(image.dataobj).reshape(*image.shape[:3], -1)[..., 0], image.affine


def draw_plane(case: CaseVolumes, name: str) -> Image.Image:
    """Draw a plane of `PLANES`: grey values, tint, outlines, directions and a scale.

    Returns:
        RGB picture; the three planes of a case have one scale.
    """
    axis = PLANES[name]
    across, up = (n for n in range(3) if n != axis)
    sides = [(s.stop - s.start) * mm for s, mm in zip(case.box, case.spacing_mm, strict=True)]
    scale = LONG_SIDE / max(sides)  # pixels per mm
    voxels: list[Any] = [[case.place(axis)]] * 3
    for n in (across, up):  # the nearest voxels, the high ends at the upper left
        pixels = max(round(sides[n] * scale), 30)  # a slab of a few mm needs a width to be seen
        ends = case.box[n].stop, case.box[n].start
        voxels[n] = np.linspace(*ends, 2 * pixels + 1)[1::2].astype(int)
    planes = (volume[np.ix_(*voxels)] for volume in (case.image, case.label, case.pred))
    image, label, pred = (plane.squeeze(axis).T for plane in planes)
    rgb = np.repeat(np.interp(image, case.window, (0, 255))[..., None], 3, axis=2)
    if case.pred.any():
        differs = label != pred
        rgb[differs] += OPACITY * (np.array(ImageColor.getrgb(DIFFERENCE)) - rgb[differs])
    rgb[outline(label, LABEL_WIDTH)] = ImageColor.getrgb(LABEL)
    rgb[outline(pred, PREDICTION_WIDTH)] = ImageColor.getrgb(PREDICTION)
    picture = Image.fromarray(rgb.astype(np.uint8))
    _draw_marks(picture, DIRECTIONS[across] + DIRECTIONS[up], scale)
    return picture


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
