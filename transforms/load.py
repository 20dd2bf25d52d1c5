"""Volumes from files: NIfTI, several NIfTI files as channels, or a folder with a DICOM series.

Loading is MONAI's apart from its choice of readers: PydicomReader orders slices by Instance Number
and joins two series to one volume, ITKReader picks one of two series and reads uneven gaps as even,
and NumpyReader unpickles. This module uses one reader that does none of these.
"""

from __future__ import annotations

import gzip
import zlib
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
    """MONAI's reader of NIfTI files, which also reads a folder as a DICOM series."""

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

    LoadImaged always creates all of its readers, and tries them after the given one. Each key holds
    one path, or a list with one per channel, and becomes a float32 MetaTensor with the metadata of
    LoadImaged. A MetaTensor that a client has loaded is only converted to float32.
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
    """Open a file or a DICOM series as a nibabel image.

    The affine is nibabel's, also if `pixdim` contradicts it: NibabelReader would then replace the
    sform by the qform, for the image but not for the label.
    """
    if Path(path).is_dir():
        return nib.Nifti1Image(*read_series(path))
    if not str(path).endswith((".nii", ".nii.gz")):
        raise ValueError(f"expected a .nii or .nii.gz file, got {Path(path).name}. Convert it.")
    image: Any = nib.load(path)
    if str(path).endswith(".gz"):
        # to the end, where the checksum is: nibabel stops at the last voxel
        try:
            with gzip.open(path) as file:
                image = type(image).from_bytes(file.read())
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"expected a readable NIfTI file {Path(path).name}, got {error}. Replace the file."
            ) from None
    while image.ndim > 3 and image.shape[-1] == 1:  # no axis of space, and no channels
        image = image.slicer[..., 0]
    return image
