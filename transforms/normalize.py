"""Normalisation of intensities, channel by channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.transforms import (
    ClipIntensityPercentiles,
    Compose,
    MapTransform,
    NormalizeIntensity,
    ScaleIntensityRange,
)

NORMALIZATIONS = ("zscore", "percentile_zscore")
Normalization = str | Mapping[str, Any]


class NormalizeChannelsd(MapTransform):
    """Normalises each channel of `image` `(C, H, W, D)` in its own way.

    Args:
        normalization: One of the following for all channels, or a list with one per channel:
            `zscore`: mean 0 and standard deviation 1 over the volume (MR);
            `percentile_zscore`: the same after clipping to the 0.5th and 99.5th percentile;
            `{"clip": [low, high], "mean": m, "std": s}`: clipped and scaled by these numbers in
            every volume, for intensities in absolute units (CT).

    Raises:
        ValueError: If one is none of these, or a volume has another number of channels.
    """

    def __init__(self, normalization: Normalization | Sequence[Normalization]) -> None:
        super().__init__("image")
        several = not isinstance(normalization, str | Mapping)
        given: Sequence[Normalization] = normalization if several else [normalization]  # type: ignore[assignment,list-item]
        self.channels = [_transform(one) for one in given]
        self.is_common = not several

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
    zscore = NormalizeIntensity(channel_wise=True)
    if normalization == "zscore":
        return zscore
    if normalization == "percentile_zscore":
        clip = ClipIntensityPercentiles(lower=0.5, upper=99.5, channel_wise=True)
        return Compose([clip, zscore])
    if isinstance(normalization, Mapping) and (units := _units(normalization)):
        low, high, mean, std = units
        return ScaleIntensityRange(low, high, (low - mean) / std, (high - mean) / std, clip=True)
    raise ValueError(
        f"normalization: expected one of {', '.join(NORMALIZATIONS)}, or clip (two rising "
        f"numbers), mean and std (above 0), got {normalization!r}."
    )


def _units(given: Mapping[str, Any]) -> list[float] | None:
    """Return `low`, `high`, `mean` and `std`, or None if they are not valid numbers."""
    if {*given} != {"clip", "mean", "std"}:
        return None
    try:
        numbers = torch.tensor([*given["clip"], given["mean"], given["std"]], dtype=torch.float64)
        low, high, _, std = numbers.tolist()
    except (TypeError, ValueError):
        return None
    return numbers.tolist() if low < high and std > 0 and numbers.isfinite().all() else None
