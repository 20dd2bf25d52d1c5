import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from pipeline.data.cache import VolumeCache
from pipeline.data.sampling import EpochSampler, PatchDataset, PatchLoader

SIZE = (13, 9, 7)


def volumes(case_id):
    """Preprocessed volumes of a case, every voxel of the image a number of its own."""
    rng = np.random.default_rng(int(case_id))
    image = rng.permutation(np.prod(SIZE)).reshape(1, *SIZE).astype(np.float32) + 1
    label = np.zeros((1, *SIZE), np.uint8)
    label[0, 1:5, 2:6, 1:4] = 1  # common
    label[0, 9:11, 4, 5] = 2  # rare
    return image, label


class Loaded:
    """Stands for preprocessing: gives the first `size` voxels of a case's volumes."""

    def __init__(self, size=SIZE):
        self.window = (slice(None), *(slice(n) for n in size))

    def __call__(self, case):
        image, label = (MetaTensor(v[self.window]) for v in volumes(case["case_id"]))
        return {"image": image, "label": label}


def patch_cases(number):
    """Cases without files; what else a case says tells them apart in the cache."""
    return [{"case_id": str(n), "number": n} for n in range(number)]


@pytest.fixture
def make_patches(tmp_path):
    def make(**changes):
        arguments = {
            "data": patch_cases(3),
            "transform": Loaded(),
            "roi_size": (4, 5, 3),
            "patch_size": (8, 5, 7),
            "num_classes": 3,
            "seed": 7,
            "samples_per_epoch": 8,
            "cache": VolumeCache(tmp_path / "cache", 10**9, {}),
        }
        return PatchDataset(**{**arguments, **changes})

    return make


def equal(a, b):
    assert a.keys() == b.keys()
    return all(
        torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a if k != "case_id"
    )


def test_patches_are_a_function_of_seed_and_number(make_patches):
    first, again, other = (make_patches(seed=seed) for seed in (7, 7, 8))
    forwards = [first[n] for n in range(24)]
    backwards = [again[n] for n in reversed(range(24))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert a["case_id"] == b["case_id"]
        assert equal(a, b)
    assert len({sample["seed"] for sample in forwards}) == 24
    assert not {sample["seed"] for sample in forwards} & {other[n]["seed"] for n in range(24)}
    assert [s["case_id"] for s in forwards] != [other[n]["case_id"] for n in range(24)]
    assert any(not torch.equal(forwards[n]["origin"], other[n]["origin"]) for n in range(24))


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (2, 2), (4, 0), (4, 2)])
def test_loader_gives_the_same_samples_whatever_batch_size_and_workers(
    make_patches, batch_size, num_workers
):
    patches = make_patches()
    loader = PatchLoader(
        patches, EpochSampler(batch_size, 1, 8 // batch_size), batch_size, num_workers
    )
    loader.sampler.start = 8  # second epoch
    got = [
        {key: values[n] for key, values in batch.items()}
        for batch in loader
        for n in range(batch_size)
    ]
    assert len(got) == 8
    for number, sample in enumerate(got, start=8):
        expected = patches[number]
        assert sample["case_id"] == expected["case_id"]
        assert equal(sample, expected)


def test_patches_come_in_rounds_of_all_cases(make_patches):
    patches = make_patches(data=patch_cases(5))
    order = [patches[n]["case_id"] for n in range(100)]
    rounds = [order[n : n + 5] for n in range(0, 100, 5)]  # they pass over ends of epochs of 8
    assert all(sorted(r) == list("01234") for r in rounds)
    assert len({tuple(r) for r in rounds}) > 10


@pytest.mark.parametrize(
    ("roi_size", "patch_size"),
    [
        ((4, 5, 3), (8, 5, 7)),
        ((13, 9, 7), (13, 9, 7)),
        ((4, 4, 4), (20, 30, 10)),
        ((3, 15, 7),) * 2,
    ],
    ids=["smaller", "equal", "patch larger than volume", "roi larger than volume"],
)
def test_patches_are_windows_of_the_volume_with_zeros_outside(make_patches, roi_size, patch_size):
    patches = make_patches(roi_size=roi_size, patch_size=patch_size)
    padded = 0
    for n in range(30):
        sample = patches[n]
        origin = sample["origin"].numpy()
        # around the volume, a frame of zeros that holds every patch
        frame = [(0, 0), *((p + 20, p + 20) for p in patch_size)]
        start = origin + [p + 20 for p in patch_size]
        window = (slice(None), *(slice(a, a + p) for a, p in zip(start, patch_size, strict=True)))
        for key, volume in zip(("image", "label"), volumes(sample["case_id"]), strict=True):
            assert sample[key].dtype == torch.as_tensor(volume).dtype
            np.testing.assert_array_equal(sample[key].numpy(), np.pad(volume, frame)[window])
        padded += bool((sample["image"] == 0).any())
        roi_start = origin + np.array(patch_size) // 2 - np.array(roi_size) // 2
        for a, r, size in zip(roi_start, roi_size, SIZE, strict=True):
            if r <= size:
                assert 0 <= a <= size - r
            else:  # the volume lies in the middle
                assert a == size // 2 - r // 2
    assert (padded > 0) == (patch_size != SIZE)


def centres(patches, numbers):
    """Label values at the centres, which a roi of one voxel never moves."""
    return np.array([int(patches[n]["label"][0, 0, 0, 0]) for n in range(numbers)])


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_foreground_ratio_is_the_share_of_centres_on_foreground(make_patches, ratio):
    patches = make_patches(roi_size=(1, 1, 1), patch_size=(1, 1, 1), foreground_ratio=ratio)
    drawn = centres(patches, 2000)
    by_chance = (volumes("0")[1] > 0).mean()
    expected = ratio + (1 - ratio) * by_chance
    deviation = np.sqrt(expected * (1 - expected) / 2000)
    assert abs((drawn > 0).mean() - expected) <= 4 * deviation


def test_rare_classes_are_drawn_as_often_as_common_ones(make_patches):
    patches = make_patches(roi_size=(1, 1, 1), patch_size=(1, 1, 1), foreground_ratio=1)
    drawn = centres(patches, 1000)
    assert set(drawn) == {1, 2}
    assert abs((drawn == 2).mean() - 0.5) <= 4 * np.sqrt(0.25 / 1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": []}, "expected at least one"),
        ({"foreground_ratio": 1.1}, "foreground_ratio: expected 0 to 1, got 1.1"),
        ({"roi_size": (4, 6, 3)}, r"roi_size: expected 1 to \(8, 5, 7\)"),
        ({"roi_size": (0, 5, 3)}, "roi_size"),
    ],
)
def test_patches_refuse_what_is_out_of_range(make_patches, changes, message):
    with pytest.raises(ValueError, match=message):
        make_patches(**changes)


def test_epoch_sampler_yields_the_rest_of_its_epoch():
    sampler = EpochSampler(batch_size=2, accumulation_steps=3, steps_per_epoch=4)
    assert sampler.samples_per_epoch == 24
    for start, end in ((0, 24), (24, 48), (6, 24), (22, 24), (30, 48)):
        sampler.start = start
        assert (list(sampler), len(sampler)) == (list(range(start, end)), end - start)
