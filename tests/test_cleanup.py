"""Small parts away, the largest kept, holes filled."""

import numpy as np
import pytest
from scipy import ndimage

from transforms.cleanup import Cleanup

NAMES = ["background", "a", "b"]
SPACING = (1.0, 2.0, 5.0)  # a voxel is 0.01 ml


@pytest.fixture
def labels():
    """Class 1: parts of 27 and 8 voxels, 1 more at a corner of the second; class 2: 8 and 1."""
    made = np.zeros((14, 12, 10), np.uint8)
    made[0:3, 0:3, 0:3] = 1
    made[6:8, 6:8, 6:8] = 1
    made[8, 8, 8] = 1
    made[10:12, 0:2, 0:2] = 2
    made[13, 11, 9] = 2
    return made


def clean(labels, **values):
    return Cleanup(NAMES, **values)(labels, SPACING)


def test_cleanup_is_off_by_default(labels):
    np.testing.assert_array_equal(clean(labels), labels)


def test_keep_largest_keeps_one_part_of_the_classes_named(labels):
    before = labels.copy()
    got = clean(labels, keep_largest=["a"])
    expected = labels.copy()
    expected[5:9, 5:9, 5:9] = 0
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(labels, before)
    expected[13, 11, 9] = 0
    np.testing.assert_array_equal(clean(labels, keep_largest="all"), expected)


def test_parts_touch_at_corners(labels):
    """8 voxels and the one at their corner are a part of 9."""
    got = clean(labels, min_volume_ml={"a": 0.085})
    np.testing.assert_array_equal(got, labels)


@pytest.mark.parametrize(("least", "kept"), [(0.09, {27, 9}), (0.091, {27}), (0.28, set())])
def test_min_volume_is_in_ml(labels, least, kept):
    got = clean(labels, min_volume_ml={"a": least})
    assert (got == 1).sum() == sum(kept)
    assert (got == 2).sum() == 9


def test_min_volume_as_one_number_is_of_all_classes(labels):
    got = clean(labels, min_volume_ml=0.02)
    assert ((got == 1).sum(), (got == 2).sum()) == (36, 8)


def test_fill_holes_takes_enclosed_background_alone():
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[1:8, 1:8, 1:8] = 1
    labels[3:6, 3:6, 3:6] = 0  # a hole
    labels[4, 4, 4] = 2  # in which there is something
    labels[1:3, 7, 7] = 0  # not a hole
    got = clean(labels, fill_holes=["a"])
    assert got[3, 3, 3] == 1
    assert got[4, 4, 4] == 2
    assert got[1, 7, 7] == 0
    assert (got != labels).sum() == 26


def straightforward(labels, voxel_ml, min_volume_ml, keep_largest, fill_holes):
    """One step and class after another, on the whole volume."""
    labels = labels.copy()
    for value, least in min_volume_ml.items():
        parts, count = ndimage.label(labels == value, np.ones((3, 3, 3)))
        for n in range(1, count + 1):
            if (parts == n).sum() * voxel_ml < least:
                labels[parts == n] = 0
    for value in keep_largest:
        parts, count = ndimage.label(labels == value, np.ones((3, 3, 3)))
        if count:
            sizes = [(parts == n).sum() for n in range(1, count + 1)]
            labels[(parts > 0) & (parts != np.argmax(sizes) + 1)] = 0
    for value in fill_holes:
        labels[ndimage.binary_fill_holes(labels == value) & (labels == 0)] = value
    return labels


@pytest.mark.parametrize("seed", range(12))
def test_cleanup_agrees_with_a_straightforward_one(seed):
    """Of blobs that touch, lie within one another and reach the faces; class 5 is nowhere."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(6, 22, 19, 17)), (0, 1, 1, 1))
    labels = noise[:5].argmax(axis=0).astype(np.uint8)
    labels[noise[5] > 0.1] = 0
    labels[rng.random(labels.shape) < 0.05] = 0  # holes
    least = {value: rng.choice([0, 0.05, 0.3, 9]) for value in range(1, 6)}
    largest = [int(n) for n in rng.permutation(5)[: rng.integers(6)] + 1]
    filled = [int(n) for n in rng.permutation(5)[: rng.integers(1, 6)] + 1]
    names = ["background", *"abcde"]
    cleanup = Cleanup(
        names,
        {names[value]: ml for value, ml in least.items()},
        [names[n] for n in largest],
        [names[n] for n in filled],
    )
    got = cleanup(labels, SPACING)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, straightforward(labels, 0.01, least, largest, filled))
    assert ((got != 0) & (labels == 0)).any()
    assert ((got == 0) & (labels != 0)).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [({"keep_largest": ["liver"]}, "keep_largest: expected classes of a, b, got liver"),
     ({"fill_holes": "a"}, "fill_holes: expected classes of a, b, got a"),
     ({"min_volume_ml": {"c": 1}}, "min_volume_ml: expected classes of a, b, got c"),
     ({"min_volume_ml": -1}, "min_volume_ml: expected 0 or more")],
)  # fmt: skip
def test_cleanup_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        Cleanup(NAMES, **values)
