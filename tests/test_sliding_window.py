"""Windows blended slab by slab, against MONAI's whole volumes."""

import itertools

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.prediction import sliding_window
from pipeline.prediction.sliding_window import SlidingWindow

CASES = [
    # volume, window, overlap
    ((30, 41, 25), (16, 16, 8), 0.5),
    ((25, 30, 41), (16, 8, 16), 0.25),
    ((10, 41, 25), (16, 16, 8), 0.5),  # narrower than a window
    ((9, 7, 5), (16, 16, 8), 0.5),  # smaller than one
    ((33, 20, 17), (8, 16, 16), 0.7),
    ((33, 20, 50), (8, 16, 16), 0.0),
]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return torch.nn.Conv3d(2, 5, 3, padding=1).double().requires_grad_(False)


@pytest.mark.parametrize(("shape", "roi", "overlap"), CASES)
def test_sliding_window_agrees_with_monai(network, shape, roi, overlap):
    volume = torch.randn(2, 2, *shape, dtype=torch.float64)
    expected = sliding_window_inference(volume, roi, 3, network, overlap, "gaussian")
    window = SlidingWindow(roi, 5, 3, overlap)
    got = window(volume, network)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, expected, atol=2e-6)
    assert torch.equal(got.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("shape", [(30, 41, 25), (9, 41, 25), (3, 20, 8)])
def test_slabs_follow_one_another_without_padding(network, shape, monkeypatch):
    monkeypatch.setattr(sliding_window, "CHUNK_BYTES", 2000)  # a few planes at a time
    volume = torch.randn(2, *shape, dtype=torch.float64)
    slabs = list(SlidingWindow((16, 16, 8), 5, 3).slabs(volume, [network]))
    (axis,) = {slab.axis for slab in slabs}
    ends = [(slab.start, slab.start + slab.logits.shape[axis + 2]) for slab in slabs]
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ends))
    joined = torch.cat([slab.logits[0] for slab in slabs], dim=axis + 1)
    expected = sliding_window_inference(volume[None], (16, 16, 8), 3, network, 0.5, "gaussian")
    np.testing.assert_allclose(joined, expected[0], atol=2e-6)


def test_mirror_averages_over_all_mirror_images(network):
    volume = torch.randn(1, 2, 16, 16, 8, dtype=torch.float64)
    axes = (2, 4)
    window = SlidingWindow((16, 16, 8), 5, mirror=True, flip_axes=(0, 2))
    flips = [some for n in range(3) for some in itertools.combinations(axes, n)]
    assert len(flips) == 4
    expected = sum(network(volume.flip(some)).flip(some) for some in flips) / 4
    np.testing.assert_allclose(window(volume, network), expected, atol=1e-6)
    off = SlidingWindow((16, 16, 8), 5, mirror=False, flip_axes=(0, 2))
    np.testing.assert_allclose(off(volume, network), network(volume), atol=1e-6)


def test_sums_are_float32_whatever_the_networks_dtype():
    """In float16 products with weights would be off by a thousandth."""

    def half(windows):
        return torch.full((len(windows), 2, 8, 8, 8), 1025.0, dtype=torch.float16)

    got = SlidingWindow((8, 8, 8), 2, overlap=0.75)(torch.zeros(1, 1, 20, 20, 20), half)
    np.testing.assert_allclose(got, 1025.0, rtol=1e-5)


def test_result_of_a_metatensor_is_one_with_its_affine(network):
    affine = np.diag([2.0, 1, 1, 1])
    volume = MetaTensor(torch.randn(1, 2, 9, 9, 9, dtype=torch.float64), affine=affine)
    got = SlidingWindow((16, 16, 8), 5)(volume, network)
    assert isinstance(got, MetaTensor)
    np.testing.assert_array_equal(got.affine, affine)
    assert got.shape == (1, 5, 9, 9, 9)


class LargestOutput(TorchDispatchMode):
    """Remembers the most elements of a tensor that an operation made."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.most = max(self.most, made.numel() if isinstance(made, torch.Tensor) else 0)
        return made


def test_memory_grows_with_a_slab_and_not_with_the_volume():
    for length in (80, 320):
        volume = torch.zeros(1, length, 40, 16)
        window = SlidingWindow((8, 8, 8), 99)
        with LargestOutput() as found:
            for _ in window.slabs(volume, [lambda w: w.expand(-1, 99, -1, -1, -1)]):
                pass
        assert found.most == 99 * 8 * 40 * 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_slab_that_is_too_large_is_blended_on_the_host(network):
    volume = torch.randn(2, 30, 41, 25).cuda()
    on_card = network.float().cuda()
    sums = 4 * 5 * 8 * 30 * 41  # along the third axis there are the most windows
    found = {}
    for limit in (sums, sums - 1):
        window = SlidingWindow((16, 16, 8), 5, 3, max_blend_bytes=limit)
        slabs = list(window.slabs(volume, [on_card]))
        found[limit] = torch.cat([slab.logits[0].cpu() for slab in slabs], dim=slabs[0].axis + 1)
        assert {slab.logits.device.type for slab in slabs} == {"cuda" if limit == sums else "cpu"}
    np.testing.assert_allclose(found[sums], found[sums - 1], atol=1e-5)


def test_windows_of_many_classes_or_voxels_are_fewer_at_once():
    assert SlidingWindow((16, 16, 16), 2, 4).batch_size == 4
    assert SlidingWindow((128, 128, 128), 2, 4).batch_size == 2
    assert SlidingWindow((256, 256, 256), 2, 4).batch_size == 1
    logits = 4 * 100 * 16**3
    assert SlidingWindow((16, 16, 16), 100, 4, max_blend_bytes=8 * 2 * logits).batch_size == 2
    assert SlidingWindow((16, 16, 16), 100, 4, max_blend_bytes=logits).batch_size == 1
