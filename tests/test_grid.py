"""Image and label on one grid, however their files put it."""

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from transforms.grid import align, compare, put_on_grid
from transforms.preprocess import ValidationPreprocessing, preprocessing

SHAPE = (7, 6, 5)


def oblique(seed):
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    rotation = Rotation.from_euler("xyz", rng.uniform(-20, 20, 3), degrees=True).as_matrix()
    affine[:3, :3] = rotation * rng.uniform(0.8, 2.5, 3)
    affine[:3, 3] = rng.uniform(-40, 40, 3)
    return affine


ORIENTATIONS = [
    np.stack([order, flips], axis=1)
    for order in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize("change", ORIENTATIONS, ids=str)
def test_put_on_grid_undoes_every_order_and_direction_of_axes(change):
    affine = oblique(seed=1)
    voxels = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    other = nib.Nifti1Image(voxels, affine).as_reoriented(change.astype(float))
    got = put_on_grid(other.get_fdata(dtype=np.float32), other.affine, SHAPE, affine)
    np.testing.assert_array_equal(got, voxels)


def test_put_on_grid_refuses_another_grid():
    affine = oblique(seed=2)
    moved = affine.copy()
    moved[0, 3] += 0.5
    with pytest.raises(ValueError, match=r"on one grid within 0\.001 mm, .* 0\.500 mm apart"):
        put_on_grid(np.zeros(SHAPE), moved, SHAPE, affine)
    with pytest.raises(ValueError, match=r"got shapes \(7, 6, 5\) and \(7, 6, 4\), inf mm"):
        put_on_grid(np.zeros((7, 6, 4)), affine, SHAPE, affine)


def test_align_leaves_a_grid_at_45_degrees_as_it_is_when_digits_would_exchange_its_axes():
    turn = Rotation.from_euler("z", 45, degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn
    other = affine.copy()
    other[:3, :3] = Rotation.from_euler("z", 45 - 1e-6, degrees=True).as_matrix()
    assert nib.aff2axcodes(affine) != nib.aff2axcodes(other)
    found = align(SHAPE, other, SHAPE, affine)
    np.testing.assert_array_equal(found.change, [[0, 1], [1, 1], [2, 1]])
    assert found.distance_mm < 1e-3


def test_compare_measures_at_the_farthest_corner():
    stretched = np.diag([1.0, 1.0, 1.01, 1.0])
    assert compare((4, 4, 11), stretched, (4, 4, 11), np.eye(4)).distance_mm == pytest.approx(0.1)


@pytest.mark.parametrize("seed", range(5))
def test_preprocessing_keeps_label_on_image_when_their_affines_differ_in_the_last_digits(
    tmp_path, seed
):
    """MONAI's Spacing puts such a pair on two grids, which nobody sees afterwards."""
    affine, shape = oblique(seed), (20, 18, 16)
    label = np.zeros(shape, np.float32)
    label[5:12, 4:9, 6:13] = 1
    nib.save(nib.Nifti1Image(label, affine), tmp_path / "image.nii")
    nib.save(nib.Nifti1Image(label, affine * (1 + 1e-7 * np.eye(4))), tmp_path / "label.nii")
    other = nib.Nifti1Image(label, affine).as_reoriented([[1, -1], [0, 1], [2, -1]])
    nib.save(other, tmp_path / "turned.nii")
    image = str(tmp_path / "image.nii")
    same = preprocessing([1.3, 1.3, 1.3])({"image": image, "label": image})
    for name in ("label.nii", "turned.nii"):
        case = {"image": image, "label": str(tmp_path / name)}
        made = preprocessing([1.3, 1.3, 1.3])(case)
        assert torch.equal(made["label"].as_tensor(), same["label"].as_tensor())
        np.testing.assert_array_equal(made["label"].affine, made["image"].affine)
        scored = ValidationPreprocessing(preprocessing([1.3, 1.3, 1.3]))(case)
        np.testing.assert_array_equal(scored["label"][0], label)
