"""Cuts off what is empty around a volume, and remembers where it was."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, SpatialCrop


class CropEmptyBordersd(MapTransform):
    """Crops to the smallest box that holds all voxels that are not zero in every image channel.

    The box, `crop_start` and `crop_size` in voxels of the file, is written into the image's
    metadata, so that `transforms.postprocess` can put a prediction back to its place. An image
    that is zero everywhere stays as it is. Runs before the grid is changed.

    Args:
        keys: Volumes `(C, H, W, D)` on the image's grid that are cropped with it.
        allow_missing_keys: Whether one may be absent.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: dict) -> dict:
        """Crop the volumes of one case."""
        start, end = occupied_box(data["image"])
        crop = SpatialCrop(roi_start=start, roi_end=end)
        cropped = {**data, **{key: crop(data[key]) for key in self.key_iterator(data)}}
        meta = cropped["image"].meta
        meta["crop_start"] = start
        meta["crop_size"] = [b - a for a, b in zip(start, end, strict=True)]
        return cropped


def occupied_box(image: torch.Tensor) -> tuple[list[int], list[int]]:
    """First voxel, and last + 1, of `(C, H, W, D)` along each axis that holds something."""
    occupied = (image != 0).any(dim=0)
    start, end = [], []
    for axis in range(3):
        others: Sequence[int] = [other for other in range(3) if other != axis]
        places = torch.nonzero(torch.as_tensor(occupied.any(dim=others[1]).any(dim=others[0])))
        whole = not len(places)
        start.append(0 if whole else int(places[0]))
        end.append(occupied.shape[axis] if whole else int(places[-1]) + 1)
    return start, end
