"""Deterministic preprocessing: from a NIfTI file to a regular, normalised volume.

Orientation is made RAS, so that axis 0 runs from the patient's left to the right in every case;
voxels are made `spacing` mm; intensities are normalised by the volume's own statistics, so that
nothing measured on the training set has to travel with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.transforms import (
    CastToTyped,
    ClipIntensityPercentilesd,
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    Spacingd,
    Transform,
)

NORMALIZATIONS = ("zscore", "percentile_zscore")


def preprocessing(
    spacing: Sequence[float],
    normalization: str = "zscore",
    *,
    keys: Sequence[str] = ("image", "label"),
    before: Sequence[Callable] = (),
    after: Sequence[Callable] = (),
) -> Compose:
    """Load and make regular the volumes of one case.

    A case is a dictionary with file names under `image` (one file, or a list with one file per
    channel) and `label`. Afterwards `image` is `(C, H, W, D)` float32 and `label` is
    `(1, H, W, D)` uint8, both MetaTensors in RAS orientation.

    Args:
        spacing: Voxel size in mm along R, A, S.
        normalization: `zscore` (per channel over the whole volume; for MR), or
            `percentile_zscore` (clipped to the 0.5th and 99.5th percentile before; for CT).
        keys: What to load. A key that a case lacks is left out.
        before: The user's own dictionary transforms, after loading and before orientation.
        after: The user's own dictionary transforms, after everything else.

    Raises:
        ValueError: If `normalization` is unknown or `spacing` is not three positive numbers.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"normalization: expected one of {', '.join(NORMALIZATIONS)}, got {normalization!r}."
        )
    if len(spacing) != 3 or min(spacing) <= 0:
        raise ValueError(f"spacing: expected three positive numbers in mm, got {spacing!r}.")
    optional: dict[str, Any] = {"allow_missing_keys": True}
    labels = [key for key in keys if key == "label"]
    modes = ["nearest" if key == "label" else "bilinear" for key in keys]
    clip = [ClipIntensityPercentilesd("image", lower=0.5, upper=99.5, channel_wise=True)]
    return Compose(
        [
            LoadImaged(keys, image_only=True, **optional),
            EnsureChannelFirstd(keys, **optional),
            *before,
            Orientationd(keys, axcodes="RAS", labels=None, **optional),
            Spacingd(keys, pixdim=spacing, mode=modes, padding_mode="border", **optional),
            *(clip if normalization == "percentile_zscore" else []),
            NormalizeIntensityd("image", channel_wise=True),
            EnsureTyped(keys, dtype=torch.float32, **optional),
            *(CastToTyped(key, dtype=torch.uint8, **optional) for key in labels),
            *after,
        ]
    )


class ValidationPreprocessing(Transform):
    """Preprocessing that leaves the label as it is in its file, for scoring on the original grid.

    Args:
        image: Preprocessing of the image; its other keys are skipped for lack of them.

    Called with a case, returns `image` as `image` makes it and `label` `(1, H, W, D)` uint8 on
    the grid of its file. A class of MONAI's kind, since CacheDataset caches no other.
    """

    def __init__(self, image: Callable[[dict], dict]) -> None:
        self.image = image
        self.label = Compose(
            [
                LoadImaged("label", image_only=True),
                EnsureChannelFirstd("label"),
                CastToTyped("label", dtype=torch.uint8),
            ]
        )

    def __call__(self, case: dict) -> dict:
        """Load one case."""
        processed = self.image({key: value for key, value in case.items() if key != "label"})
        return {**processed, **self.label({"label": case["label"]})}
