"""Where patches are centred, against a computation in memory that shares no code with ours."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from pipeline.data import sampling
from pipeline.data.cache import VolumeCache
from pipeline.data.sampling import (
    EpochSampler,
    PatchDataset,
    PatchLoader,
    sampling_positions,
)
from pipeline.errors import InputError

IGNORED = 9
SIZE = (13, 9, 7)


def volumes(number, ignored=0.0):
    """Image and label of a case; a share of the voxels is ignored."""
    rng = np.random.default_rng(number)
    image = rng.normal(size=(2, *SIZE)).astype(np.float32)
    label = rng.choice([0, 1, 2, 3], size=(1, *SIZE), p=[0.9, 0.06, 0.02, 0.02]).astype(np.uint8)
    label[rng.random(label.shape) < ignored] = IGNORED
    return image, label


def make_patches(folder, shares, **changes):
    """Patches of cases of which a share of the voxels is ignored."""

    def transform(case):
        image, label = volumes(case["number"], case["share"])
        return {**case, "image": MetaTensor(image), "label": MetaTensor(label)}

    arguments = {
        "data": [{"case_id": str(n), "number": n, "share": s} for n, s in enumerate(shares)],
        "transform": transform,
        "roi_size": (4, 5, 3),
        "patch_size": (8, 5, 7),
        "num_classes": 4,
        "seed": 3,
        "samples_per_epoch": 10,
        "cache": VolumeCache(folder / "cache", 10**9, {}),
        "foreground_ratio": 0.6,
    }
    return PatchDataset(**{**arguments, **changes})


def rng_of(*key):
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def in_memory(number, num_cases, roi=(4, 5, 3), patch=(8, 5, 7)):
    """Sample `number` as it was before there was a cache, from its description."""
    round_number, place = divmod(number, num_cases)
    case = int(rng_of(3, "order", round_number).permutation(num_cases)[place])
    image, label = volumes(case)
    rng = rng_of(3, *divmod(number, 10))
    if rng.random() < 0.6:
        present = [c for c in (1, 2, 3) if (label == c).any()]
        voxels = np.argwhere(label[0] == present[rng.integers(len(present))])
        centre = voxels[rng.integers(len(voxels))]
    else:
        centre = rng.integers(np.array(SIZE))
    start = [
        min(max(c, r // 2), s - (r - r // 2)) - p // 2
        for c, r, s, p in zip(centre, roi, SIZE, patch, strict=True)
    ]
    windows = []
    for volume in (image, label):
        padded = np.pad(volume, [(0, 0), *((10, 10),) * 3])
        a, b, c = (s + 10 for s in start)
        windows.append(padded[:, a : a + patch[0], b : b + patch[1], c : c + patch[2]])
    return case, start, *windows, int(rng.integers(2**63))


@pytest.mark.parametrize("ignore_value", [None, IGNORED])
def test_patches_are_those_of_a_computation_in_memory(tmp_path, ignore_value):
    patches = make_patches(tmp_path, [0, 0, 0], ignore_value=ignore_value)
    for number in range(60):
        got = patches[number]
        case, start, image, label, seed = in_memory(number, 3)
        assert (got["case_id"], got["seed"], got["number"]) == (str(case), seed, number)
        assert got["origin"].tolist() == start
        assert got["image"].dtype == torch.float32
        assert got["label"].dtype == torch.uint8
        np.testing.assert_array_equal(got["image"].numpy(), image)
        np.testing.assert_array_equal(got["label"].numpy(), label)


def test_patches_in_workers_are_the_same_when_entries_were_removed(tmp_path):
    patches = make_patches(tmp_path, [0, 0, 0])
    for path in (tmp_path / "cache").glob("*.safetensors"):
        path.unlink()
    loader = PatchLoader(patches, EpochSampler(2, 1, 5), 2, num_workers=2)
    got = torch.cat([batch["image"] for batch in loader])
    expected = np.stack([in_memory(number, 3)[2] for number in range(10)])
    np.testing.assert_array_equal(got.numpy(), expected)


def centres(patches, numbers):
    """Label values at the centres, which a roi of one voxel never moves."""
    return [int(patches[n]["label"][0, 0, 0, 0]) for n in range(numbers)]


@pytest.mark.parametrize("ratio", [0.0, 0.6, 1.0])
def test_patches_are_never_centred_on_an_ignored_voxel(tmp_path, ratio):
    one = {"roi_size": (1, 1, 1), "patch_size": (1, 1, 1), "foreground_ratio": ratio}
    patches = make_patches(tmp_path, [0.9, 0.5], ignore_value=IGNORED, **one)
    assert IGNORED not in centres(patches, 400)
    without = make_patches(tmp_path, [0.9, 0.5], num_classes=IGNORED + 1, **one)
    assert IGNORED in centres(without, 400)


def test_patches_are_never_centred_on_a_class_that_is_ignored(tmp_path):
    one = {"roi_size": (1, 1, 1), "patch_size": (1, 1, 1)}
    drawn = set(centres(make_patches(tmp_path, [0, 0], ignore_value=2, **one), 400))
    assert drawn == {0, 1, 3}


def test_patches_of_a_case_with_ignored_voxels_reach_every_annotated_one(tmp_path):
    one = {"roi_size": (1, 1, 1), "patch_size": (1, 1, 1), "foreground_ratio": 0.0}
    patches = make_patches(tmp_path, [0.97], ignore_value=IGNORED, **one)
    drawn = {tuple(patches[n]["origin"].tolist()) for n in range(400)}
    annotated = {tuple(p) for p in np.argwhere(volumes(0, 0.97)[1][0] != IGNORED).tolist()}
    assert drawn == annotated


def test_patches_refuse_a_case_without_annotation(tmp_path):
    with pytest.raises(InputError, match=r"^1: expected an annotated voxel, got 9 .*\.$"):
        make_patches(tmp_path, [0, 1.0], ignore_value=IGNORED)


def test_positions_follow_ignore_value_and_number_of_classes(tmp_path):
    classes = IGNORED + 1
    first = make_patches(tmp_path, [0.5], num_classes=classes).cached.keys
    assert make_patches(tmp_path, [0.5], num_classes=classes).cached.keys == first
    ignoring = make_patches(tmp_path, [0.5], num_classes=classes, ignore_value=IGNORED)
    assert ignoring.cached.keys != first
    assert make_patches(tmp_path, [0.5], num_classes=classes + 1).cached.keys != first


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 8, 8), np.uint8), ((4, 8, 9), np.uint16), ((64, 64, 17), np.uint32)]
)
def test_positions_have_the_smallest_dtype_that_holds_them(shape, dtype):
    label = torch.zeros((1, *shape), dtype=torch.uint8)
    label[..., -1] = 1
    label[0, 0, 0, 0] = IGNORED
    found = sampling_positions(label, 3, IGNORED)
    assert found.keys() == {"class_1", "annotated"}
    for name, values in found.items():
        expected = label.flatten() == 1 if name == "class_1" else label.flatten() != IGNORED
        assert values.dtype == dtype
        assert set(values.tolist()) <= set(np.flatnonzero(expected).tolist())
        assert values.max() == label.numel() - 1 or name == "annotated"


def test_positions_of_annotated_voxels_are_thinned_evenly_over_the_volume(monkeypatch):
    monkeypatch.setattr(sampling, "MAX_POSITIONS_PER_CLASS", 1000)
    label = torch.zeros((1, 50, 50, 50), dtype=torch.uint8)
    label.flatten()[: 50**3 - 99_901] = IGNORED
    found = sampling_positions(label, 2, IGNORED)["annotated"]
    assert len(set(found.tolist())) == 1000
    assert found.min() >= 50**3 - 99_901
    assert sorted(found.tolist()) == found.tolist()
    # a thousand regular steps would be of 100 voxels: all in one plane across the last axis
    assert len(set((found % 50).tolist())) == 50
