"""Deterministic preprocessing: from files to a regular, normalised volume.

Orientation is made RAS, so that axis 0 runs from the patient's left to the right in every case;
voxels are made `spacing` mm; intensities are normalised by the volume's own statistics, or by
numbers that stand in the config and travel with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    MapTransform,
    Orientationd,
    Spacingd,
    SpatialCrop,
    Transform,
)
from monai.transforms.traits import RandomizableTrait
from monai.utils import convert_to_dst_type, convert_to_numpy

from transforms.grid import TOLERANCE_MM, OnImageGridd, compare, on_grid
from transforms.load import LoadVolumesd
from transforms.normalize import Normalization, NormalizeChannelsd

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


class Preprocessing(Compose):
    """Two parts that are called one after the other, or by themselves.

    Args:
        load: Transforms after which `image` is `(C, H, W, D)` as in its file.
        regularize: All that follow.
    """

    def __init__(self, load: Sequence[Callable], regularize: Sequence[Callable]) -> None:
        self.load, self.regularize = Compose(load), Compose(regularize)
        super().__init__([*load, *regularize])


def preprocessing(
    spacing: Sequence[float],
    normalization: Normalization | Sequence[Normalization] = "zscore",
    *,
    crop_empty_borders: bool = False,
    keys: Sequence[str] = ("image", "label"),
    before: Sequence[Callable] = (),
    after: Sequence[Callable] = (),
) -> Preprocessing:
    """Load and make regular the volumes of one case.

    A case is a dictionary with paths under `image` (one, or a list with one per channel) and
    `label`: NIfTI files, or folders that hold a DICOM series each. Afterwards `image` is
    `(C, H, W, D)` float32 and `label` is `(1, H, W, D)` uint8, both MetaTensors in RAS
    orientation.

    Args:
        spacing: Voxel size in mm along R, A, S.
        normalization: Of the intensities; see `NormalizeChannelsd`.
        crop_empty_borders: Whether to cut off what is zero around the image first.
        keys: What to load. A key that a case lacks is left out.
        before: The user's own dictionary transforms, after loading and before orientation; see
            `UserTransform`.
        after: The user's own dictionary transforms, after everything else.

    Raises:
        ValueError: If `normalization` is unknown, `spacing` is not three positive numbers, or a
            transform of the user's is random.
    """
    if len(spacing) != 3 or min(spacing) <= 0:
        raise ValueError(f"spacing: expected three positive numbers in mm, got {spacing!r}.")
    optional: dict[str, Any] = {"allow_missing_keys": True}
    labels = [key for key in keys if key == "label"]
    modes = ["nearest" if key == "label" else "bilinear" for key in keys]
    crop = [CropEmptyBordersd(keys, **optional)] if crop_empty_borders else []
    return Preprocessing(
        [LoadVolumesd(keys, **optional), EnsureChannelFirstd(keys, **optional)],
        [
            *(OnImageGridd(key, **optional) for key in labels),
            *(UserTransform(one, "transforms_before") for one in before),
            *crop,
            Orientationd(keys, axcodes="RAS", labels=None, **optional),
            SpacingOfKeysd(keys, pixdim=spacing, mode=modes, padding_mode="border", **optional),
            NormalizeChannelsd(normalization),
            EnsureTyped(keys, dtype=torch.float32, **optional),
            *(WholeLabelsd(key, **optional) for key in labels),
            *(UserTransform(one, "transforms_after") for one in after),
            *(WholeLabelsd(key, **optional) for key in labels),
        ],
    )


class UserTransform(Transform):
    """A user's own dictionary transform, which has to keep image and label together.

    Args:
        transform: Takes and returns the dictionary of a case.
        where: The config key that it stands in, for messages.

    Raises:
        ValueError: If it is random: preprocessing is done once, and its result is kept. When it is
            called, if image and label are on one grid before it and not after it.
    """

    def __init__(self, transform: Callable[[dict], dict], where: str) -> None:
        self.transform, self.where = transform, where
        if (random := _random_part(transform)) is not None:
            raise ValueError(
                f"{where}: expected a transform that is not random, got {type(random).__name__}. "
                "Preprocessing is done once and kept; take it out, and set augmentation instead."
            )

    def __call__(self, data: dict) -> dict:
        """Apply it to one case."""
        were_together = _are_together(data)
        data = self.transform(data)
        if were_together and not _are_together(data):
            shapes = [tuple(data[key].shape[1:]) for key in ("image", "label") if key in data]
            raise ValueError(
                f"{self.where}: expected image and label on one grid after "
                f"{type(self.transform).__name__}, got shapes {' and '.join(map(str, shapes))} "
                'or affines that differ. Give it "keys": ["image", "label"] and '
                '"allow_missing_keys": true, or take it out.'
            )
        return data


def _random_part(transform: Any) -> Any:
    """The transform, or one inside it, that draws random numbers; None if there is none."""
    if type(transform) is Compose:
        return next(filter(None, map(_random_part, transform.transforms)), None)
    return transform if isinstance(transform, RandomizableTrait) else None


def _are_together(data: dict) -> bool:
    """Whether there are an image and a label, on one grid."""
    if not isinstance(data, dict) or not {"image", "label"} <= data.keys():
        return False
    grids = [
        (data[key].shape[1:], np.asarray(getattr(data[key], "affine", np.eye(4))))
        for key in ("label", "image")
    ]
    return compare(*grids[0], *grids[1]).distance_mm <= TOLERANCE_MM


class SpacingOfKeysd(Spacingd):
    """MONAI's Spacingd, which is shown nothing but the volumes.

    It takes what is under `image_…` for metadata and updates it. A client may have a string there:
    MONAI Label keeps the file's name as `image_path`.
    """

    def __call__(self, data: Any, lazy: bool | None = None) -> dict:
        """Resample the volumes of one case."""
        volumes = {key: data[key] for key in self.keys if key in data}
        return {**data, **super().__call__(volumes, lazy)}


class ValidationPreprocessing(Transform):
    """Preprocessing that leaves the label as it is, for scoring on the grid of the image's file.

    Args:
        image: Preprocessing of the image; its other keys are skipped for lack of them.

    Called with a case, returns `image` as `image` makes it and `label` `(1, H, W, D)` uint8 on
    the grid of the image's file.
    """

    def __init__(self, image: Callable[[dict], dict]) -> None:
        self.image = image
        self.label = Compose(
            [
                LoadVolumesd("label"),
                EnsureChannelFirstd("label"),
                WholeLabelsd("label"),
            ]
        )

    def __call__(self, case: dict) -> dict:
        """Load one case."""
        processed = self.image({key: value for key, value in case.items() if key != "label"})
        label = self.label({"label": case["label"]})["label"]
        meta = processed["image"].meta
        affine = np.asarray(meta["original_affine"])
        shape = [int(n) for n in meta["spatial_shape"]]
        return {**processed, "label": on_grid(label, affine, shape)}
