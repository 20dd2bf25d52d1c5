"""Deterministic preprocessing: from files to a regular, normalised volume.

Orientation becomes RAS, so that axis 0 runs from the patient's left to the right; voxels become
`spacing` mm; intensities are normalised by the volume's own statistics, or by given numbers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    ClipIntensityPercentiles,
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    MapTransform,
    NormalizeIntensity,
    Orientationd,
    ScaleIntensityRange,
    Spacingd,
    SpatialCrop,
    Transform,
)
from monai.transforms.traits import RandomizableTrait
from monai.transforms.utils import generate_spatial_bounding_box
from monai.utils import convert_to_dst_type, convert_to_numpy

from transforms.grid import TOLERANCE_MM, compare
from transforms.load import LoadVolumesd

log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # scaling of stored values may move labels off whole numbers
MAX_VALUE = 255  # label maps are kept in a byte

Normalization = str | Mapping[str, Any]


def round_labels(voxels: np.ndarray) -> np.ndarray:
    """Round values within `TOLERANCE` of a whole number; others, NaN among them, stay."""
    if voxels.dtype.kind != "f":
        return voxels
    whole = np.rint(voxels) + 0  # of -0 and 0 one value
    with np.errstate(invalid="ignore"):  # of an infinite value
        return np.where(np.abs(voxels - whole) <= TOLERANCE, whole, voxels)


class WholeLabelsd(MapTransform):
    """Converts label maps to uint8; a `ValueError` says that a byte cannot hold a value.

    Values within `TOLERANCE` of a whole number are rounded; the log names the first such file of
    each folder.
    """

    reported: ClassVar[set[str]] = set()  # folders, in this process

    def __call__(self, data: dict) -> dict:
        """Convert the label maps of one case."""
        return {**data, **{key: self._convert(data[key], key) for key in self.key_iterator(data)}}

    def _convert(self, volume: MetaTensor, key: str) -> MetaTensor:
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
    """Crops the volumes of `keys` to the smallest box of voxels that are not zero in the image.

    The box, `crop_start` and `crop_size` in voxels of the file, is written into the image's
    metadata, so that `transforms.postprocess` can put a prediction back to its place. An image
    that is zero everywhere stays as it is. Runs before the grid is changed.
    """

    def __call__(self, data: dict) -> dict:
        """Crop the volumes `(C, H, W, D)` of one case, which are on one grid."""
        image = data["image"]
        start, end = generate_spatial_bounding_box(image.as_tensor(), lambda voxels: voxels != 0)
        if start == end:  # there is nothing
            end = list(image.shape[1:])
        crop = SpatialCrop(roi_start=start, roi_end=end)
        cropped = {**data, **{key: crop(data[key]) for key in self.key_iterator(data)}}
        size = [b - a for a, b in zip(start, end, strict=True)]
        cropped["image"].meta |= {"crop_start": start, "crop_size": size}
        return cropped


class NormalizeChannelsd(MapTransform):
    """Normalises each channel of `image` `(C, H, W, D)` in its own way.

    Args:
        normalization: One of the following for all channels, or a list with one per channel:
            `zscore`: mean 0 and standard deviation 1 over the volume (MR);
            `percentile_zscore`: the same after clipping to the 0.5th and 99.5th percentile;
            `{"clip": [low, high], "mean": m, "std": s}`: clipped and scaled by these numbers in
            every volume, for intensities in absolute units (CT).

    A `ValueError` says that one is none of these, or that a volume has other channels.
    """

    def __init__(self, normalization: Normalization | Sequence[Normalization]) -> None:
        super().__init__("image")
        self.is_common = isinstance(normalization, str | Mapping)
        given: Any = [normalization] if self.is_common else normalization
        self.channels = [_transform(one) for one in given]

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Normalise one case's image."""
        image = data["image"]
        channels = self.channels * len(image) if self.is_common else self.channels
        if len(channels) != len(image):
            raise ValueError(
                f"normalization: expected {len(image)} entries, one per channel, "
                f"got {len(channels)}. Give one for each, or one for all."
            )
        normalized = [f(image[n : n + 1]) for n, f in enumerate(channels)]
        return {**data, "image": torch.cat(normalized)}


def _transform(normalization: Normalization) -> Callable:
    zscore, given = NormalizeIntensity(channel_wise=True), cast(Any, normalization)
    clip = ClipIntensityPercentiles(lower=0.5, upper=99.5, channel_wise=True)
    if normalization in ("zscore", "percentile_zscore"):
        return zscore if normalization == "zscore" else Compose([clip, zscore])
    with contextlib.suppress(KeyError, TypeError, ValueError):
        numbers = torch.tensor([*given["clip"], given["mean"], given["std"]], dtype=torch.float64)
        low, high, mean, std = numbers.tolist()
        if len(given) == 3 and low < high and std > 0 and numbers.isfinite().all():
            ends = (low - mean) / std, (high - mean) / std
            return ScaleIntensityRange(low, high, *ends, clip=True)
    raise ValueError(
        "normalization: expected one of zscore, percentile_zscore, or clip (two rising numbers), "
        f"mean and std (above 0), got {normalization!r}."
    )


class Preprocessing(Compose):
    """All of preprocessing as one transform, and its two parts.

    After `load`, `image` is `(C, H, W, D)` as in its file; `regularize` is all that follows.
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
    `label`: files of volumes, or DICOM. Afterwards `image` is `(C, H, W, D)` float32 and `label`
    is `(1, H, W, D)` uint8, both MetaTensors in RAS order.

    Args:
        spacing: Voxel size in mm along R, A, S.
        normalization: See `NormalizeChannelsd`.
        crop_empty_borders: Whether to cut off what is zero around the image first.
        keys: What to load. A key that a case lacks is left out.
        before: The user's own dictionary transforms after loading, each a `UserTransform`.
        after: The same, after everything else.

    A `ValueError` says that `spacing` or `normalization` is not valid, or a transform is random.
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
    """A user's own dictionary transform, which has to keep image and label on one grid.

    `where` is the config key that it stands in. A `ValueError` says that it is random, since
    preprocessing is done once and kept, or when it is called, that it moved image or label alone.
    """

    def __init__(self, transform: Callable[[dict], dict], where: str) -> None:
        self.transform, self.where = transform, where
        parts = Compose([transform]).flatten().transforms
        if random := [type(one).__name__ for one in parts if isinstance(one, RandomizableTrait)]:
            raise ValueError(
                f"{where}: expected a transform that is not random, got {random[0]}. "
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


def _are_together(data: dict) -> bool:
    """Return whether there are an image and a label, on one grid."""
    if not isinstance(data, dict) or not {"image", "label"} <= data.keys():
        return False
    (shape, affine), onto = (
        (data[key].shape[1:], np.asarray(getattr(data[key], "affine", np.eye(4))))
        for key in ("label", "image")
    )
    return compare(shape, affine, *onto).distance_mm <= TOLERANCE_MM


class SpacingOfKeysd(Spacingd):
    """MONAI's Spacingd, which is shown nothing but the volumes.

    It takes a key `image_…` for metadata; MONAI Label keeps the file's name under `image_path`.
    """

    def __call__(self, data: Any, lazy: bool | None = None) -> dict:
        """Resample the volumes of one case."""
        volumes = {key: data[key] for key in self.keys if key in data}
        return {**data, **super().__call__(volumes, lazy)}


class ValidationPreprocessing(Transform):
    """Preprocessing by `image` that leaves the label as it is, for scoring on the file's grid.

    `label` becomes `(1, H, W, D)` uint8 on the grid of the image's file.
    """

    def __init__(self, image: Callable[[dict], dict]) -> None:
        self.image = image
        steps = LoadVolumesd, EnsureChannelFirstd, WholeLabelsd
        self.label = Compose([step("label") for step in steps])

    def __call__(self, case: dict) -> dict:
        """Load one case."""
        processed = self.image({key: value for key, value in case.items() if key != "label"})
        return self.label({**processed, "label": case["label"]})
