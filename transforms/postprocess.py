"""From logits on the preprocessed grid back to labels on the grid of the input file."""

from __future__ import annotations

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_tensor

from transforms.file_grid import FileGrid


def to_original_grid(volume: torch.Tensor, image: MetaTensor) -> MetaTensor:
    """Resample `volume` to the grid that `image` had in its file.

    One linear interpolation undoes orientation and spacing together. Where empty borders were cut
    off, what is outside is 0; of probabilities, in every class: the first one is argmax.

    Args:
        volume: `(C, H, W, D)` float, on the preprocessed grid of `image`.
        image: `(_, H, W, D)` the preprocessed image, whose metadata remember the file's grid.

    Returns:
        `(C, *shape of the file)` float32.
    """
    grid = FileGrid(image)
    values = convert_to_tensor(volume).float()
    whole = values.new_zeros((len(values), *grid.shape))
    for piece in grid.pieces(values):
        piece.write(piece.values, whole)
    return MetaTensor(whole, affine=torch.as_tensor(grid.affine))


class ToOriginalGridd(MapTransform):
    """Turns `pred` (logits) into labels on the grid of the input file, and `image` with it.

    Probabilities are interpolated, not labels, so that boundaries fall between voxels. `pred`
    becomes `(1, *shape of the file)` uint8; where it is uint8 it is that already, and keeps its
    values. `image` becomes `(C, *shape of the file)` float32.
    """

    def __init__(self) -> None:
        super().__init__(("image", "pred"))

    def __call__(self, data: dict) -> dict:
        """Turn one case's logits into labels."""
        image, pred = data["image"], convert_to_tensor(data["pred"])
        if pred.dtype != torch.uint8:
            probabilities = torch.softmax(pred.float(), dim=0)
            pred = to_original_grid(probabilities, image).argmax(dim=0, keepdim=True)
        affine = torch.as_tensor(image.meta["original_affine"], dtype=torch.float64)
        labels = MetaTensor(convert_to_tensor(pred, dtype=torch.uint8), affine=affine)
        # names the saved file; of an image that is a folder, a dot in the name begins no ending
        name = f"{data['case_id']}.nii.gz" if "case_id" in data else None
        labels.meta["filename_or_obj"] = name or image.meta.get("filename_or_obj", "")
        return {**data, "pred": labels, "image": to_original_grid(image, image)}
