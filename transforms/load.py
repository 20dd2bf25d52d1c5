"""Volumes from files: NIfTI, several NIfTI files as channels, or a folder with a DICOM series.

MONAI's NumpyReader, which LoadImaged tries as well, unpickles.
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

from transforms.dicom import is_dicom, read_series


class LoadVolumesd(MapTransform):
    """MONAI's LoadImaged for the paths of a case, with `open_volume` in place of its readers.

    LoadImaged tries all of its readers after the given one. Each key holds one path, or a list with
    one per channel, and becomes a float32 MetaTensor with the metadata of LoadImaged. A MetaTensor
    that a client has loaded is only converted to float32.
    """

    def __call__(self, data: dict) -> dict:
        """Load one case."""
        return {**data, **{key: self._load(data[key]) for key in self.key_iterator(data)}}

    def _load(self, paths: Any) -> MetaTensor:
        if isinstance(paths, MetaTensor):
            return cast(MetaTensor, paths.to(torch.float32, copy=True))  # steps work in place
        reader = NibabelReader()
        reader.filenames = ensure_tuple(paths)
        voxels, meta = reader.get_data([open_volume(path) for path in reader.filenames])
        voxels = convert_to_dst_type(voxels, dst=voxels, dtype=np.float32)[0]
        meta = {**meta, "filename_or_obj": str(reader.filenames[0])}
        return cast(MetaTensor, MetaTensor.ensure_torch_and_prune_meta(voxels, meta))


def open_volume(path: str | Path) -> Any:
    """Open a NIfTI file, or a folder with a DICOM series, as a nibabel image.

    A `ValueError` says that it is neither. The affine is nibabel's, even if `pixdim` differs:
    NibabelReader would then replace the sform by the qform, for the image but not for the label.
    """
    if is_dicom(path):
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
