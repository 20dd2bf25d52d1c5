"""Loads volumes from files: one, several as channels, or a folder with a DICOM series.

MONAI's NumpyReader, which LoadImaged tries as well, unpickles.
"""

from __future__ import annotations

from typing import Any, cast

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor, NibabelReader
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type, ensure_tuple

from transforms.grid import TOLERANCE_MM, align, put_on_grid
from transforms.volumes import Header, read_header, read_label, read_voxels


class LoadVolumesd(MapTransform):
    """MONAI's LoadImaged for the paths of a case, with this project's readers in place of its own.

    LoadImaged tries all of its readers after the given one. Each key holds one path, or a list with
    one per channel, and becomes a float32 MetaTensor with the metadata of LoadImaged; `label` is
    put on the grid of `image`, if that is loaded. A MetaTensor that a client has loaded is copied,
    and a label of its put on the grid of the image in its file, or on that which it has now.
    """

    def __call__(self, data: dict) -> dict:
        """Load one case."""
        loaded = dict(data)
        for key in self.key_iterator(data):
            image = loaded.get("image") if key == "label" else None
            loaded[key] = self._load(data[key], image if isinstance(image, MetaTensor) else None)
        return loaded

    def _load(self, paths: Any, image: MetaTensor | None) -> MetaTensor:
        grid = None
        if image is not None:  # as it was in its file
            shape = tuple(int(n) for n in image.meta.get("spatial_shape", image.shape[-3:]))
            affine = np.asarray(image.meta.get("original_affine", image.affine))
            grid = Header(shape, affine, np.dtype(np.float32))
        if isinstance(paths, MetaTensor):
            copy = paths.to(torch.float32, copy=True)  # steps work in place
            return cast(MetaTensor, _put_on_grid(copy, grid, image) if grid else copy)
        reader = NibabelReader()
        reader.filenames = ensure_tuple(paths)
        voxels, meta = reader.get_data([_open_volume(str(p), grid) for p in reader.filenames])
        voxels = convert_to_dst_type(voxels, dst=voxels, dtype=np.float32)[0]
        meta = {**meta, "filename_or_obj": str(reader.filenames[0])}
        return cast(MetaTensor, MetaTensor.ensure_torch_and_prune_meta(voxels, meta))


def _put_on_grid(label: Any, file: Header, image: Any) -> Any:
    grids = [(file.shape, file.affine), (tuple(image.shape[-3:]), image.affine.numpy())]
    own, meta = label.affine.numpy(), label.meta
    fits = [align(label.shape[-3:], own, *g).distance_mm <= TOLERANCE_MM for g in grids]
    shape, affine = grids[fits == [False, True]]
    parts = [
        put_on_grid(one, own, shape, affine) for one in label.numpy().reshape(-1, *label.shape[-3:])
    ]
    voxels = torch.as_tensor(np.reshape(parts, (*label.shape[:-3], *shape)))
    return MetaTensor(voxels, meta={**meta, "affine": torch.as_tensor(affine)})


def _open_volume(path: str, image: Header | None) -> nib.Nifti1Image:
    """Read a volume; a label on the grid of its image, if that is given."""
    header = image or read_header(path)
    voxels = read_label(path, image) if image else read_voxels(path, header)
    return nib.Nifti1Image(voxels, header.affine, dtype=voxels.dtype)
