"""A picture of one slice of a case, label and prediction outlined."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

# of the patient, as they stand in the picture; pixels of a letter by rows
SIDES = {"R": "1110 1001 1110 1010 1001", "L": "1000 1000 1000 1000 1111"}


def outline_slice(image: np.ndarray, label: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Picture of the axial slice with most foreground, label and prediction outlined.

    Args:
        image: `(H, W, D)` intensities; all three in RAS orientation.
        label: `(H, W, D)` integer reference, outlined in green.
        pred: `(H, W, D)` integer prediction, outlined in red; yellow where both run together.

    Returns:
        `(4 W, 4 H, 3)` uint8, as radiologists see it: anterior at the top, the patient's left on
        the right, with the letters R and L where there is room.
    """
    k = int((label > 0).sum(axis=(0, 1)).argmax())
    plane = image[:, :, k].astype(np.float32)
    low, high = np.percentile(plane, [1, 99])
    grey = np.clip((plane - low) / max(float(high - low), 1e-6), 0, 1) * 255
    rgb = np.repeat(_shown(grey)[..., None], 3, axis=2)
    if min(rgb.shape[:2]) >= 24:
        for letter, columns in zip(SIDES.values(), (slice(2, 10), slice(-10, -2)), strict=True):
            pixels = np.array([[*row] for row in letter.split()]) == "1"
            rgb[2:12, columns][_enlarge(pixels, 2)] = 255
    outlines = [outline(_shown(labels[:, :, k])) for labels in (label, pred)]
    rgb[outlines[0] | outlines[1]] = 0
    rgb[outlines[0], 1] = 255
    rgb[outlines[1], 0] = 255
    return rgb.astype(np.uint8)


def _shown(plane: np.ndarray) -> np.ndarray:
    """A plane whose axes run to the patient's right and anterior, as it is seen."""
    return _enlarge(plane[::-1, ::-1].T, 4)


def _enlarge(plane: np.ndarray, factor: int) -> np.ndarray:
    return plane.repeat(factor, axis=0).repeat(factor, axis=1)


def outline(labels: np.ndarray, width: int = 1) -> np.ndarray:
    """Mask of the foreground pixels within `width` pixels of another label, of the same shape."""
    size = 2 * width + 1
    inner = ndimage.minimum_filter(labels, size) == ndimage.maximum_filter(labels, size)
    return (labels > 0) & ~inner
