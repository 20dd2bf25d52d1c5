"""From logits on the preprocessed grid back to labels on the grid of the input file."""

from __future__ import annotations

from typing import cast

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialResample
from monai.utils import convert_to_tensor


def to_original_grid(volume: torch.Tensor, image: MetaTensor) -> MetaTensor:
    """Resample `volume` to the grid that `image` had in its file.

    One linear interpolation undoes orientation and spacing together.

    Args:
        volume: `(C, H, W, D)` float, on the preprocessed grid of `image`.
        image: `(_, H, W, D)` the preprocessed image, whose metadata remember the file's grid.

    Returns:
        `(C, *shape of the file)` float32.
    """
    moving = MetaTensor(convert_to_tensor(volume).float(), affine=image.affine)
    resampled = SpatialResample(mode="bilinear", padding_mode="border")(
        moving,
        dst_affine=image.meta["original_affine"],
        spatial_size=[int(n) for n in image.meta["spatial_shape"]],
    )
    return cast(MetaTensor, resampled)


class ToOriginalGridd(MapTransform):
    """Turns `pred` (logits) into labels on the grid of the input file, and `image` with it.

    Probabilities are interpolated, not labels, so that boundaries fall between voxels. `pred`
    becomes `(1, *shape of the file)` uint8; `image` becomes `(C, *shape of the file)` float32.
    """

    def __init__(self) -> None:
        super().__init__(("image", "pred"))

    def __call__(self, data: dict) -> dict:
        """Turn one case's logits into labels."""
        image = data["image"]
        probabilities = torch.softmax(convert_to_tensor(data["pred"]).float(), dim=0)
        resampled = to_original_grid(probabilities, image)
        labels = cast(MetaTensor, resampled.argmax(dim=0, keepdim=True).to(torch.uint8))
        labels.meta["filename_or_obj"] = image.meta["filename_or_obj"]  # names the saved file
        return {**data, "pred": labels, "image": to_original_grid(image, image)}
