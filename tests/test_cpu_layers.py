"""The network's operations on a CPU, against float64 arithmetic written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from networks.dense_unet import DenseUNet
from networks.fused_layers import InstanceNorm, upsample
from pipeline.training.allocator import keep_freed_memory

LAST = torch.channels_last_3d


def volume(*shape: int, shift: float = 0.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=rng) + shift).contiguous(memory_format=LAST)


def gradients(function, x, *parameters, dtype=torch.float32):
    """Result and gradients of `sum(weights * function(x, *parameters))`."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *parameters)]
    y = function(*leaves)
    y.backward(volume(*y.shape, shift=0.5).to(dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def written_out(x, weight, bias):
    mean = x.mean((2, 3, 4), keepdim=True)
    var = (x - mean).square().mean((2, 3, 4), keepdim=True)
    weight, bias = (t.view(1, -1, 1, 1, 1) for t in (weight, bias))
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("shift", [0.0, 3.0, 300.0])
def test_instance_norm_and_its_gradients_are_those_of_float64(batch_size, shift):
    x = volume(batch_size, 4, 6, 5, 7, shift=shift)
    norm = InstanceNorm(4, affine=True)
    parameters = torch.tensor([0.5, 1.0, 2.0, -1.0]), torch.tensor([0.0, 1.0, -1.0, 0.3])

    def ours(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, x)

    found = gradients(ours, x, *parameters)
    expected = gradients(written_out, x, *parameters, dtype=torch.float64)
    assert shift > 10 or all(t.is_contiguous(memory_format=LAST) for t in found[:2])
    for one, other in zip(found, expected, strict=True):
        bound = 2e-5 if shift < 10 else 1e-3  # a float32 near 300 is known to 3e-5
        torch.testing.assert_close(one.double(), other, rtol=bound, atol=bound * 10)


@pytest.mark.parametrize("value", [0.0, 5.0, float("inf"), float("nan")])
def test_instance_norm_of_a_constant_or_not_finite_channel_is_torchs(value):
    x = volume(2, 3, 4, 4, 4)
    x[1, 2] = value
    expected = nn.InstanceNorm3d(3, affine=True)(x.contiguous())
    torch.testing.assert_close(InstanceNorm(3, affine=True)(x), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradient_of_one_volume_is_right_in_other_dtypes(dtype):
    x, ones, zeros = volume(1, 4, 6, 5, 7), torch.ones(4), torch.zeros(4)
    norm = InstanceNorm(4, affine=True).to(dtype)
    found = gradients(norm, x, dtype=dtype)[1]
    expected = gradients(written_out, x, ones, zeros, dtype=torch.float64)[1]
    bound = 1e-9 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("size", [(6, 8, 10), (5, 4, 7), (3, 4, 5), (9, 12, 5)])
def test_upsampling_and_its_gradient_are_those_of_float64(batch_size, size):
    x = volume(batch_size, 4, 3, 4, 5)
    found = gradients(lambda x: upsample(x, list(size)), x)
    expected = gradients(
        lambda x: F.interpolate(x, size=size, mode="trilinear", align_corners=False),
        x.contiguous(),
        dtype=torch.float64,
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert found[1].is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_networks_gradients_in_channels_last_are_those_of_float64(norm):
    network = DenseUNet(1, 3, 4, [[2, 2, 1], 2], norm, 2, 4, seed=0)
    exact = copy.deepcopy(network).double()
    network = network.to(memory_format=LAST)
    x = volume(2, 1, 12, 10, 9)
    for model, image in ((network, x), (exact, x.double().contiguous())):
        model(image).square().mean().backward()
    for (name, one), other in zip(network.named_parameters(), exact.parameters(), strict=True):
        error = (one.grad.double() - other.grad).norm() / other.grad.norm().clamp_min(1e-6)
        assert error < 1e-4, name


def test_memory_is_kept_unless_the_user_chose_otherwise(monkeypatch):
    calls = []

    class Libc:
        def mallopt(self, parameter, value):
            calls.append((parameter, value))
            return 1

    monkeypatch.setattr("ctypes.CDLL", lambda name: Libc())
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("LD_PRELOAD", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    assert keep_freed_memory()
    assert calls == [(-3, 2**30), (-1, 2**31 - 1)]  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    assert not keep_freed_memory()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())  # a C library without it
    assert not keep_freed_memory()
    assert len(calls) == 2
