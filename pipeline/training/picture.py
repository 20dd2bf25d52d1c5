"""A picture of one slice of a case, label and prediction outlined."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def outline_slice(image: np.ndarray, label: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Picture of the axial slice with most foreground, label and prediction outlined.

    Args:
        image: `(H, W, D)` intensities; all three in RAS orientation.
        label: `(H, W, D)` integer reference, outlined in green.
        pred: `(H, W, D)` integer prediction, outlined in red; yellow where both run together.

    Returns:
        `(4 W, 4 H, 3)` uint8, anterior at the top, the patient's left on the left.
    """
    k = int((label > 0).sum(axis=(0, 1)).argmax())
    plane = image[:, :, k].astype(np.float32)
    low, high = np.percentile(plane, [1, 99])
    grey = np.clip((plane - low) / max(float(high - low), 1e-6), 0, 1) * 255
    rgb = np.repeat(_enlarge(grey)[..., None], 3, axis=2)
    outlines = [_outline(_enlarge(labels[:, :, k])) for labels in (label, pred)]
    rgb[outlines[0] | outlines[1]] = 0
    rgb[outlines[0], 1] = 255
    rgb[outlines[1], 0] = 255
    # the second voxel axis runs to the patient's anterior, which is drawn upwards
    return np.rot90(rgb).astype(np.uint8).copy()


def _enlarge(plane: np.ndarray, factor: int = 4) -> np.ndarray:
    return plane.repeat(factor, axis=0).repeat(factor, axis=1)


def _outline(labels: np.ndarray) -> np.ndarray:
    """Voxels whose neighbourhood holds another label and that are foreground themselves."""
    inner = ndimage.minimum_filter(labels, size=3) == ndimage.maximum_filter(labels, size=3)
    return (labels > 0) & ~inner
