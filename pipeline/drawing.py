"""A picture of one slice of a case, label and prediction outlined."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage


def outline_slice(image: np.ndarray, label: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Draw the axial slice with most foreground, label and prediction outlined.

    Args:
        image: `(H, W, D)` intensities; all three in RAS orientation.
        label: `(H, W, D)` integer reference, outlined in green.
        pred: `(H, W, D)` integer prediction, outlined in red; yellow where both run together.

    Returns:
        `(4 W, 4 H, 3)` uint8, as radiologists see it: anterior at the top, the patient's left on
        the right, with the letters R and L where there is room.
    """
    k = int((label > 0).sum(axis=(0, 1)).argmax())
    plane, *labels = (
        np.kron(volume[::-1, ::-1, k].T, np.ones((4, 4), volume.dtype))
        for volume in (image.astype(np.float32), label, pred)
    )
    low, high = np.percentile(plane, [1, 99])
    grey = np.clip((plane - low) / max(float(high - low), 1e-6), 0, 1) * 255
    picture = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if min(picture.size) >= 24:
        for letter, x, anchor in (("R", 2, "la"), ("L", picture.width - 2, "ra")):
            ImageDraw.Draw(picture).text((x, 0), letter, "white", anchor=anchor, font_size=14)
    rgb = np.array(picture)
    green, red = map(outline, labels)
    rgb[green | red] = 0
    rgb[green, 1] = 255
    rgb[red, 0] = 255
    return rgb


def outline(labels: np.ndarray, width: int = 1) -> np.ndarray:
    """Return a mask of the foreground pixels within `width` pixels of another label."""
    size = 2 * width + 1
    inner = ndimage.minimum_filter(labels, size) == ndimage.maximum_filter(labels, size)
    return (labels > 0) & ~inner
