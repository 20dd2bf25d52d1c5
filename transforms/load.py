"""Volumes from files: NIfTI, several NIfTI files as channels, or a folder with a DICOM series.

MONAI's own loading is kept, but for its choice of readers: its PydicomReader orders slices by
Instance Number and puts two series into one volume, its ITKReader takes one of two and reads
uneven gaps as even, and its NumpyReader unpickles. Here is one reader, which does none of that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor, NibabelReader
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type, ensure_tuple

from transforms.dicom import read_series


class VolumeReader(NibabelReader):
    """MONAI's reader of NIfTI files, which reads folders as well: as DICOM series."""

    def read(self, data: Any, **kwargs: Any) -> Any:
        """Open one path, or one per channel.

        Raises:
            ValueError: For what is neither NIfTI nor a regular DICOM series.
        """
        self.filenames = ensure_tuple(data)
        read = [_open(name) for name in self.filenames]
        return read if len(read) > 1 else read[0]


class LoadVolumesd(MapTransform):
    """MONAI's LoadImaged for the paths of a case, with `VolumeReader` in place of its readers.

    LoadImaged itself always makes all of its readers, and tries them after the one it was given.
    Each key holds one path, or a list with one per channel, and becomes a float32 MetaTensor with
    the metadata that LoadImaged gives it. A MetaTensor that a client has loaded itself is made
    float32 and stays as it is otherwise.
    """

    def __call__(self, data: dict) -> dict:
        """Load one case."""
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            loaded[key] = self._load(loaded[key])
        return loaded

    def _load(self, paths: Any) -> MetaTensor:
        if isinstance(paths, MetaTensor):
            return cast(MetaTensor, paths.to(torch.float32, copy=True))  # steps work in place
        reader = VolumeReader()
        voxels, meta = reader.get_data(reader.read(paths))
        voxels = convert_to_dst_type(voxels, dst=voxels, dtype=np.float32)[0]
        meta = {**meta, "filename_or_obj": str(ensure_tuple(paths)[0])}
        return cast(MetaTensor, MetaTensor.ensure_torch_and_prune_meta(voxels, meta))


def _open(path: str | Path) -> Any:
    """A nibabel image, which of a DICOM series is in memory; nibabel's types know no voxels.

    Its affine is what nibabel takes it for, also where `pixdim` is of another mind: NibabelReader
    itself would put the qform in place of the sform then, of the image and not of the label.
    """
    if Path(path).is_dir():
        return nib.Nifti1Image(*read_series(path))
    if not str(path).endswith((".nii", ".nii.gz")):
        raise ValueError(f"expected a .nii or .nii.gz file, got {Path(path).name}. Convert it.")
    image: Any = nib.load(path)
    while image.ndim > 3 and image.shape[-1] == 1:  # no axis of space, and no channels
        image = image.slicer[..., 0]
    return image
