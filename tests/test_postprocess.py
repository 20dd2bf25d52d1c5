"""Values on the preprocessed grid at the voxels of the file, against SciPy, whole and in slabs."""

import itertools

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage
from test_transforms import GRIDS, make_affine

from transforms.postprocess import FileGrid

FILE, SOURCE = (13, 11, 12), (17, 9, 14)
SHEAR = np.array([[1, 0.3, 0, 0], [0, 1, 0.2, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def grid_of(affine, crop=None):
    """A volume of noise whose grid, of right angles, overlaps that of a file, and its affine."""
    left, _, right = np.linalg.svd(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    own = affine.copy()
    own[:3, :3] = left @ right @ np.diag([0.8, 1.3, 0.9])
    meta = {"original_affine": affine, "spatial_shape": np.array(FILE)}
    if crop:
        meta |= {"crop_start": crop[0], "crop_size": crop[1]}
    voxels = np.random.default_rng(0).normal(size=(3, *SOURCE)).astype(np.float32)
    volume = MetaTensor(torch.as_tensor(voxels), affine=torch.as_tensor(own), meta=meta)
    return volume, own


def expected(volume, own, affine):
    inverse = np.linalg.inv(own) @ affine
    ijk = np.stack(np.meshgrid(*map(np.arange, FILE), indexing="ij")).reshape(3, -1)
    places = (inverse[:3, :3] @ ijk + inverse[:3, 3:]).reshape(3, *FILE)
    channels = volume.numpy().astype(np.float64)
    return np.stack(
        [ndimage.map_coordinates(one, places, order=1, mode="nearest") for one in channels]
    )


def written(grid, slabs):
    whole = torch.full((3, *FILE), torch.nan)
    for slab in slabs:
        for values, write in grid.pieces(*slab):
            own = torch.zeros(FILE)
            write(torch.ones(values.shape[1:]), own)
            assert whole[:, own == 1].isnan().all(), "a voxel belongs to one slab only"
            write(values, whole)
    return whole.numpy()


AFFINES = {name: make_affine(*grid) for name, grid in GRIDS.items()}
AFFINES["sheared"] = AFFINES["RAS"] @ SHEAR
AFFINES["sheared, permuted, flipped"] = AFFINES["oblique, permuted, flipped"] @ SHEAR


@pytest.fixture(params=AFFINES.values(), ids=AFFINES)
def affine(request):
    return request.param


def in_slabs(values, axis, cuts):
    """Slabs of a volume that share a plane."""
    for start, stop in itertools.pairwise(cuts):
        first = max(start - 1, 0)
        yield values.narrow(axis + 1, first, stop - first), axis, first


def test_file_grid_agrees_with_scipy(affine):
    volume, own = grid_of(affine)
    got = written(FileGrid(volume), [(volume.as_tensor(),)])
    np.testing.assert_allclose(got, expected(volume, own, affine), atol=2e-6)


@pytest.mark.parametrize("axis", range(3))
def test_file_grid_gives_the_same_bits_however_the_volume_is_cut(affine, axis):
    volume, _ = grid_of(affine)
    values, grid = volume.as_tensor(), FileGrid(volume)
    slabs = in_slabs(values, axis, [0, 1, 4, 5, SOURCE[axis]])
    np.testing.assert_array_equal(written(grid, slabs), written(grid, [(values,)]))


def test_file_grid_gives_the_same_bits_in_small_chunks(affine, monkeypatch):
    volume, _ = grid_of(affine)
    whole = written(FileGrid(volume), [(volume.as_tensor(),)])
    monkeypatch.setattr("transforms.postprocess.CHUNK", 500)
    got = written(FileGrid(volume), [(volume.as_tensor(),)])
    np.testing.assert_array_equal(got, whole)


def test_file_grid_leaves_what_was_cut_off(affine):
    start, size = [2, 3, 1], [6, 5, 9]
    volume, own = grid_of(affine, (start, size))
    grid = FileGrid(volume)
    got = written(grid, [(volume.as_tensor(),)])
    inside = (slice(None), *(slice(a, a + n) for a, n in zip(start, size, strict=True)))
    np.testing.assert_allclose(got[inside], expected(volume, own, affine)[inside], atol=2e-6)
    got[inside] = np.nan
    assert np.isnan(got).all()


def test_file_grid_of_the_same_grid_changes_no_bit():
    volume, _ = grid_of(np.eye(4))
    meta = {"original_affine": np.eye(4), "spatial_shape": np.array(SOURCE)}
    same = MetaTensor(volume.as_tensor(), affine=torch.eye(4), meta=meta)
    ((values, _),) = FileGrid(same).pieces(same.as_tensor())
    assert torch.equal(values, same.as_tensor())


@pytest.fixture
def sizes(monkeypatch):
    """Shapes of the arrays that `_axes` makes."""
    found = []
    make = FileGrid._axes

    def spy(self, box):
        axes = make(self, box)
        found.extend(values.shape for axis in axes for values in axis)
        return axes

    monkeypatch.setattr(FileGrid, "_axes", spy)
    return found


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", ["oblique", "oblique, permuted, flipped"])
def test_file_grid_takes_axes_one_by_one_when_a_header_rounded_them(name, cut, sizes):
    """As float32 they are oblique to those of the preprocessed grid, by digits alone."""
    volume, own = grid_of(AFFINES[name])
    rounded = AFFINES[name].astype(np.float32).astype(np.float64)
    coupled = np.abs(np.linalg.inv(own) @ rounded)[:3, :3]
    assert (np.sort(coupled, axis=0)[:2] > 1e-9).any()
    volume.meta["original_affine"] = rounded
    cuts = [0, 4, 5, SOURCE[0]] if cut else [0, SOURCE[0]]
    slabs = list(in_slabs(volume.as_tensor(), 0, cuts))
    grid = FileGrid(volume)
    np.testing.assert_allclose(written(grid, slabs), expected(volume, own, rounded), atol=1e-5)
    assert all(sum(n > 1 for n in shape) <= 1 for shape in sizes)
