"""Label maps: whole numbers from 0 to 255, whatever number type a file stores them as."""

from __future__ import annotations

import logging
from typing import ClassVar

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type, convert_to_numpy

log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # scaling of stored values may move labels off whole numbers
MAX_VALUE = 255  # label maps are kept in a byte


def round_labels(voxels: np.ndarray) -> np.ndarray:
    """Round values within `TOLERANCE` of a whole number.

    Returns:
        An array of the same shape and dtype; other values, NaN among them, stay as they are.
    """
    if voxels.dtype.kind != "f":
        return voxels
    whole = np.rint(voxels) + 0  # of -0 and 0 one value
    with np.errstate(invalid="ignore"):  # of an infinite value
        return np.where(np.abs(voxels - whole) <= TOLERANCE, whole, voxels)


class WholeLabelsd(MapTransform):
    """Converts label maps to uint8, and refuses values that a byte cannot hold.

    Values within `TOLERANCE` of a whole number are rounded; the log names the first such file of
    each folder.

    Raises:
        ValueError: If a value is not a whole number from 0 to 255.
    """

    reported: ClassVar[set[str]] = set()  # folders, in this process

    def __call__(self, data: dict) -> dict:
        """Convert the label maps of one case."""
        return {**data, **{key: self._whole(data[key], key) for key in self.key_iterator(data)}}

    def _whole(self, volume: MetaTensor, key: str) -> MetaTensor:
        given = convert_to_numpy(volume)
        voxels = round_labels(given)
        is_label = (voxels == np.rint(voxels)) & (voxels >= 0) & (voxels <= MAX_VALUE)
        if not is_label.all():  # NaN among them
            raise ValueError(
                f"{key}: expected whole numbers from 0 to {MAX_VALUE}, got "
                f"{voxels[~is_label][0]:g} and the like in {np.sum(~is_label)} voxels. Correct the "
                "label or exclude the case."
            )
        meta = getattr(volume, "meta", {})
        folder, _, name = str(meta.get("filename_or_obj", key)).rpartition("/")
        if folder not in self.reported and (off := float(np.abs(voxels - given).max(initial=0))):
            self.reported.add(folder)
            log.warning("%s: label values up to %.1g off whole numbers are rounded", name, off)
        return convert_to_dst_type(voxels, volume, dtype=torch.uint8)[0]
