"""A synthetic abdomen: the dataset that is used when none is given, and by tests.

Voxel grids of differing size, spacing, obliquity and axis order sample an anatomy in world RAS+ mm.
Tissues share intensities, kidneys differ by their side alone, and the pose varies by more than an
organ's radius: no window and no average label map solves it (`benchmarks/phantom_baselines.py`).
"""

from __future__ import annotations

import gzip
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from pipeline.errors import require

FloatArray = NDArray[np.float64]

NOISE = 3.0  # standard deviation of each Rician channel; contrasts are some 30 to 45
ORIENTATIONS = ("RAS", "LPS", "LAS", "PSR", "ASL", "SRP", "RPI", "LSA")


@dataclass(frozen=True)
class Tissue:
    """An ellipsoid of the body frame; lengths are along `(x, y, z)`."""

    name: str  # of the class; empty for structures that are not labelled
    centre_mm: tuple[float, float, float]  # mean
    radii_mm: tuple[float, float, float]  # mean
    intensity: float  # mean, before gain, bias and noise
    texture: float = 4.0  # amplitude of the fine structure added to it
    spread_mm: tuple[float, float, float] = (1.5, 1.5, 1.5)  # half-width of the centre's scatter
    hilum_mm: float | None = None  # where along x, from the centre, a dark hilum lies


BODY = Tissue("", (0, 0, 0), (36, 28, 58), 100, 4)
DISTRACTORS = (  # painted first, hence never over an organ
    Tissue("", (0, 12, -17), (5, 5, 7), 145, spread_mm=(17, 4, 9)),  # bowel
    Tissue("", (0, 12, -17), (7, 5, 5), 128, spread_mm=(17, 4, 9)),
    Tissue("", (0, 12, -17), (4, 4, 4), 10, spread_mm=(17, 4, 9)),  # its gas
    Tissue("", (-12, 14, 15), (8, 6, 8), 132, 8, (3, 2, 3)),  # stomach
    Tissue("", (-18, -20, -8), (10, 3, 45), 72),  # muscle beside the spine
    Tissue("", (18, -20, -8), (10, 3, 45), 72),
)
ORGANS = (  # the label of an organ is its position here, from 1
    Tissue("liver", (16, 5, 13), (14, 14, 13), 136, 5),
    Tissue("spleen", (-21, -4, 15), (8.5, 11, 12), 145),
    Tissue("left_kidney", (-16, -7, -13), (8.5, 8.5, 12), 152, hilum_mm=4.5),
    Tissue("right_kidney", (16, -7, -13), (8.5, 8.5, 12), 152, hilum_mm=-4.5),
    Tissue("spine", (0, -14, 0), (6.5, 6.5, 70), 72),
)


def make_phantom(directory: str | Path, *, seed: int = 0, num_cases: int = 24) -> Path:
    """Make the phantom as a Medical Segmentation Decathlon folder, unless it is there.

    The folder gets `dataset.json`, `imagesTr` (int16) and `labelsTr` (uint8), and appears whole or
    not at all: of two processes at once, the first to finish wins. One that holds a `dataset.json`
    is left as it is. Case i depends on `(seed, i)` alone, not on `num_cases`.

    Raises:
        InputError: If `num_cases` is below 1, or if something else is in the directory's place.
    """
    directory = Path(directory)
    require(num_cases > 0, "phantom", "num_cases >= 1", num_cases, "Ask for more cases.")
    if (directory / "dataset.json").is_file():
        return directory
    is_free = not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))
    expected, got = "a dataset folder, an empty one or none", "something without dataset.json"
    remedy = "Name another directory or remove this one."
    require(is_free, directory, expected, got, remedy)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as staging:
        built = Path(staging) / directory.name
        _write_dataset(built, seed, num_cases)
        try:
            built.rename(directory)  # atomic; refused where a non-empty folder is in place
        except OSError:
            if not (directory / "dataset.json").is_file():
                raise
    return directory


def make_case(seed: int, case: int) -> tuple[NDArray[np.int16], NDArray[np.uint8], FloatArray]:
    """Sample patient number `case`, from 0, of the dataset of a seed on one voxel grid.

    Image and label map are `(I, J, K)`. The affine `(4, 4)`, from voxel to world RAS+ in mm, has
    another axis order, flips and obliquity in each case.
    """
    rng = np.random.default_rng((seed, case))
    shape, affine = _grid(rng, ORIENTATIONS[case % len(ORIENTATIONS)])
    voxels = np.moveaxis(np.indices(shape), 0, -1)  # (I, J, K, 3)
    centre = affine[:3, :3] @ (np.array(shape) - 1) / 2 + affine[:3, 3]
    world = voxels @ affine[:3, :3].T + affine[:3, 3] - centre  # mm from the grid's centre
    intensity, label = _paint(rng, _body_frame(rng, world))

    spacing = nib.affines.voxel_sizes(affine)
    signal = gaussian_filter(intensity, 0.5 / spacing)  # partial volume
    signal *= rng.uniform(2, 5) * np.exp(0.12 * _waves(rng, world, wavelength_mm=160))
    noise = NOISE * signal.max() / intensity.max() * rng.normal(size=(2, *shape))
    image = np.hypot(signal + noise[0], noise[1])  # Rician
    return np.rint(image).astype(np.int16), label, affine


def _grid(rng: np.random.Generator, orientation: str) -> tuple[tuple[int, ...], FloatArray]:
    """Draw a voxel grid: its shape, and an oblique affine whose axes are near `orientation`."""
    in_plane, thickness = rng.uniform(1.45, 1.7), rng.uniform(2.8, 3.4)
    spacing = np.array([in_plane, in_plane, thickness])
    shape = np.rint(rng.uniform((78, 70, 72), (86, 80, 86)) / spacing).astype(int)
    rotation = Rotation.from_euler("xyz", rng.uniform(-8, 8, 3), degrees=True).as_matrix()

    order, flips = axcodes2ornt(orientation).T
    order = order.astype(int)
    affine = np.eye(4)
    affine[:3, :3] = (rotation * spacing)[:, order] * flips
    affine[:3, 3] = rng.uniform(-40, 40, 3) - affine[:3, :3] @ (shape[order] - 1) / 2
    return tuple(shape[order].tolist()), affine


def _body_frame(rng: np.random.Generator, world: FloatArray) -> FloatArray:
    """World points `(..., 3)` in mm in the frame of a patient of random pose, size and bend."""
    rotation = Rotation.from_euler("xyz", rng.uniform(-10, 10, 3), degrees=True).as_matrix()
    shift, scale = rng.uniform(-6.5, 6.5, 3), rng.uniform(0.9, 1.06)
    points = (world - shift) @ rotation / scale
    bend = [_waves(rng, points, wavelength_mm=70) for _ in range(3)]
    return points + np.stack(bend, axis=-1)


def _waves(rng: np.random.Generator, points: FloatArray, *, wavelength_mm: float) -> FloatArray:
    """A smooth random field at `points` `(..., 3)`: four plane waves, of unit variance together."""
    direction = rng.normal(size=(3, 4))
    direction /= np.linalg.norm(direction, axis=0)
    phase = points @ (2 * np.pi / wavelength_mm * direction) + rng.uniform(0, 2 * np.pi, 4)
    return np.sqrt(0.5) * np.cos(phase).sum(axis=-1)


def _paint(rng: np.random.Generator, points: FloatArray) -> tuple[FloatArray, NDArray[np.uint8]]:
    """Noise-free intensity and label map at body-frame points `(I, J, K, 3)` in mm."""
    label = np.zeros(points.shape[:-1], np.uint8)
    intensity = np.zeros(label.shape)
    texture = gaussian_filter(rng.normal(size=label.shape), 1.0)
    texture /= texture.std()
    for tissue in (BODY, *DISTRACTORS, *ORGANS):
        centre = tissue.centre_mm + rng.uniform(-1, 1, 3) * tissue.spread_mm
        radii = tissue.radii_mm * rng.uniform(0.93, 1.07, 3)
        inside = np.square((points - centre) / radii).sum(axis=-1) < 1
        level = tissue.intensity + rng.normal(0, 3)
        intensity[inside] = level + tissue.texture * texture[inside]
        if tissue.hilum_mm is not None:
            distance = np.square(points[inside] - centre - (tissue.hilum_mm, 0, 0)).sum(axis=-1)
            intensity[inside] -= 60 * np.exp(-distance / (2 * 4**2))
        if tissue.name:
            label[inside] = 1 + ORGANS.index(tissue)
    return intensity, label


def _write_dataset(directory: Path, seed: int, num_cases: int) -> None:
    """Write all cases and, last, `dataset.json`."""
    training = []
    for case in range(num_cases):
        image, label, affine = make_case(seed, case)
        entry = {key: f"./{key}sTr/phantom_{case + 1:03d}.nii.gz" for key in ("image", "label")}
        _write_nifti(directory / entry["image"], image, affine)
        _write_nifti(directory / entry["label"], label, affine)
        training.append(entry)
    record = {
        "name": "phantom",
        "description": f"Synthetic abdomen with five organs, seed {seed}",
        "reference": "pipeline/data/phantom.py",
        "licence": "Apache-2.0",
        "release": "1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {str(i): n for i, n in enumerate(["background", *(o.name for o in ORGANS)])},
        "numTraining": num_cases,
        "numTest": 0,
        "training": training,
        "test": [],
    }
    (directory / "dataset.json").write_text(json.dumps(record, indent=2) + "\n")


def _write_nifti(path: Path, voxels: NDArray, affine: FloatArray) -> None:
    """Write a NIfTI with sform and qform both set, and no time stamp in the gzip header."""
    volume = nib.Nifti1Image(voxels, affine)
    volume.set_sform(affine, code=1)
    volume.set_qform(affine, code=1)
    volume.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(volume.to_bytes(), compresslevel=6, mtime=0))
