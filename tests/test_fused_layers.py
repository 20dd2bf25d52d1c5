"""The network's fused layers against torch's own in float64, on the card and by interpretation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import further
from torch import nn

from networks import fused_layers
from networks.dense_unet import DenseUNet

pytest.importorskip("triton")
LAST = torch.channels_last_3d
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# of one rounding, with a factor of two
EPS = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-5}


def tensor(*shape, dtype=torch.float16, seed=0, shift=0.0):
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=rng) + shift).to(dtype).contiguous(memory_format=LAST)


def leaf(x, device):
    return x.to(device, memory_format=LAST).requires_grad_()


def check(mine, oracle, dtype=torch.float16):
    """Each value within the roundings of its dtype, of its own or of the largest one's size."""
    for one, other in zip(mine, oracle, strict=True):
        one, other = one.detach().cpu().double(), other.detach().cpu().double()
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=EPS[dtype], atol=EPS[dtype] * other.abs().max())


def norm_of(kind, channels, device):
    norm = nn.InstanceNorm3d if kind == "instance" else nn.BatchNorm3d
    norm = norm(channels, affine=True).to(device)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(channels, generator=rng))
        if kind != "instance":
            norm.running_mean.copy_(torch.randn(channels, generator=rng))
            norm.running_var.copy_(torch.rand(channels, generator=rng) + 0.5)
    return norm.eval() if kind == "eval" else norm


def norm_relu(kind, x, gradient, device):
    """Output, gradients and statistics of the kernels."""
    norm, x = norm_of(kind, x.shape[1], device), leaf(x, device)
    assert fused_layers.serves(x)
    out = fused_layers.norm_relu(norm, x)
    out.backward(gradient.to(device))
    assert out.is_contiguous(memory_format=LAST)
    assert x.grad.is_contiguous(memory_format=LAST)
    of_norm = [norm.weight.grad, norm.bias.grad]
    return [t.detach().cpu() for t in (out, x.grad, *of_norm, *norm.buffers())]


@pytest.mark.parametrize("kind", ["train", "eval", "instance"])
@pytest.mark.parametrize("channels", [8, 20, 80])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_relu_is_torchs(place, kind, channels, dtype):
    x = tensor(2, channels, 3, 5, 3, dtype=dtype, shift=3)
    gradient = tensor(*x.shape, dtype=dtype, seed=1)
    mine = place.run(norm_relu, kind, x, gradient, place.device)
    norm, y = norm_of(kind, channels, "cpu").double(), x.double().requires_grad_()
    out = F.relu(norm(y))
    out.backward(gradient.double())
    check(mine[:2], [out, y.grad], dtype)
    for one, other in zip(
        mine[2:], [norm.weight.grad, norm.bias.grad, *norm.buffers()], strict=True
    ):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-4)


def test_statistics_stay_exact_where_the_mean_is_large(place):
    x = tensor(2, 8, 9, 10, 11, shift=500)  # squares of float32 would leave two digits of 1
    mine = place.run(norm_relu, "train", x, tensor(*x.shape), place.device)
    norm = norm_of("train", 8, "cpu").double()
    norm(x.double())
    torch.testing.assert_close(mine[5].double(), norm.running_var, rtol=1e-4, atol=0)


def pool_and_skip(x, stride, gradients, device):
    x = leaf(x, device)
    wide = gradients[1].new_zeros(x.shape[0], 2 * x.shape[1], *x.shape[2:])
    wide = wide.to(device).contiguous(memory_format=LAST)
    wide[:, : x.shape[1]] = gradients[1]  # of a part of the channels, as the decoder's is
    outputs = fused_layers.pool_and_skip(x, nn.MaxPool3d(stride, stride))
    torch.autograd.backward(outputs, [gradients[0].to(device), wide[:, : x.shape[1]]])
    return [t.detach().cpu() for t in (*outputs, x.grad)]


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 3)])
def test_pooling_is_torchs(place, stride):
    x = tensor(2, 8, 5, 5, 7).mul(2).round().contiguous(memory_format=LAST)  # with equal values
    sizes = [n // s for n, s in zip(x.shape[2:], stride, strict=True)]
    gradients = [tensor(2, 8, *sizes, seed=1), tensor(*x.shape, seed=2)]
    mine = place.run(pool_and_skip, x, stride, gradients, place.device)
    y = x.double().requires_grad_()
    pooled, skip = F.max_pool3d(y, stride, stride), y * 1
    torch.autograd.backward([pooled, skip], [g.double() for g in gradients])
    assert torch.equal(mine[0].double(), pooled)
    assert torch.equal(mine[1], x)
    check(mine[2:], [y.grad])


def with_a_nan(device):
    x = tensor(1, 8, 4, 4, 4)
    x[0, 0, 1, 0, 0] = torch.nan
    pooled, _ = fused_layers.pool_and_skip(x.to(device), nn.MaxPool3d((2, 2, 2), (2, 2, 2)))
    return fused_layers.norm_relu(norm_of("train", 8, device), x.to(device)).cpu(), pooled.cpu()


def test_nan_is_not_hidden_by_relu_and_is_the_largest_value(place):
    out, pooled = place.run(with_a_nan, place.device)
    assert out[:, 0].isnan().all()
    assert out[:, 1:].isfinite().all()
    assert pooled.isnan().sum() == 1
    assert pooled[0, 0, 0, 0, 0].isnan()


def upsample_concat(x, skip, gradient, device):
    x, skip = leaf(x, device), leaf(skip, device)
    out = fused_layers.upsample_concat(x, skip)
    out.backward(gradient.to(device))
    assert out.is_contiguous(memory_format=LAST)
    return [t.detach().cpu() for t in (out, x.grad, skip.grad)]


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ((2, 3, 2), (4, 6, 4)),
        ((2, 1, 2), (5, 2, 5)),  # what an odd size leaves after pooling
        ((2, 3, 2), (2, 3, 4)),
        further((1, 2, 1), (3, 6, 3)),
        further((1, 2, 1), (4, 3, 2)),
    ],
    ids=str,
)
def test_upsampling_is_torchs(place, small, large):
    number = 1 if place.device == "cpu" and math.prod(large) > 50 else 2  # of images
    x, skip = tensor(number, 24, *small), tensor(number, 8, *large, seed=1)
    gradient = tensor(number, 32, *large, seed=2)
    mine = place.run(upsample_concat, x, skip, gradient, place.device)
    y, other = x.double().requires_grad_(), skip.double().requires_grad_()
    up = F.interpolate(y, size=large, mode="trilinear", align_corners=False)
    out = torch.cat([up, other], 1)
    out.backward(gradient.double())
    check(mine, [out, y.grad, other.grad])
    assert torch.equal(mine[2], gradient[:, 24:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_lines_may_be_more_than_an_axis_of_a_grid_takes():
    x, skip = tensor(70, 8, 64, 64, 4).cuda(), tensor(70, 8, 128, 128, 4, seed=1).cuda()
    pooled, _ = fused_layers.pool_and_skip(skip, nn.MaxPool3d((2, 2, 1), (2, 2, 1)))
    assert torch.equal(pooled, F.max_pool3d(skip, (2, 2, 1)))
    x.requires_grad_()
    out = fused_layers.upsample_concat(x, skip)
    (gradient,) = torch.autograd.grad(out.float().sum(), x)
    up = F.interpolate(x.float(), size=skip.shape[2:], mode="trilinear")
    (expected,) = torch.autograd.grad(up.sum(), x)
    check([out[:, :8], gradient], [up, expected])


def counted(function, name, seen):
    def count(*args):
        if seen is not None:
            seen.append(name)
        return function(*args)

    return count


def network_step(device, dtype, seen=None):
    """Logits, gradients and buffers of a step; names of the fused operations go to `seen`."""
    network = DenseUNet(1, 3, 8, ((2, 2, 2), (1, 2, 2)), num_dense_layers=1, growth_rate=8, seed=0)
    network = network.to(device, dtype, memory_format=LAST)
    image = tensor(2, 1, 4, 6, 7, dtype=dtype).to(device)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_NormReLU", "_PoolAndSkip", "_UpsampleConcat"):
            operation = getattr(fused_layers, name)
            patch.setattr(operation, "apply", counted(operation.apply, name, seen))
        with torch.autocast("cuda", torch.float16, enabled=device == "cuda"):
            logits = network(image)
        (logits.to(dtype) * tensor(*logits.shape, dtype=dtype, seed=3).to(device)).sum().backward()
    tensors = {name: p.grad for name, p in network.named_parameters()}
    tensors |= dict(network.named_buffers()) | {"logits": logits}
    return {name: t.detach().double().cpu() for name, t in tensors.items()}, seen


def test_network_of_fused_layers_is_the_network(place):
    mine, seen = place.run(network_step, place.device, torch.float32, [])
    counts = {name: seen.count(name) for name in seen}
    norms = counts.pop("_NormReLU")
    assert norms == (12 if place.device == "cuda" else 11)  # a CPU chooses the first one's layout
    assert counts == {"_PoolAndSkip": 2, "_UpsampleConcat": 2}
    oracle, _ = network_step("cpu", torch.float64)
    assert mine.keys() == oracle.keys()
    tolerance = 0.2 if place.device == "cuda" else 1e-5  # there ten layers round to float16
    for name, expected in oracle.items():
        assert (mine[name] - expected).norm() <= tolerance * expected.norm().clamp_min(1), name


def gradient_of_strides(shape, step, device):
    """Error of a gradient of which an axis of length 1 has any stride."""
    norm, x = norm_of("eval", shape[1], device), leaf(tensor(*shape, dtype=torch.float32), device)
    gradient = tensor(*shape, dtype=torch.float32, seed=2).to(device)
    _, channels, height, width, depth = shape
    line = depth * channels
    strides = (height * width * line, 1, width * line, line, step)
    out = fused_layers.norm_relu(norm, x)
    (mine,) = torch.autograd.grad(out, x, gradient.as_strided(shape, strides))
    (true,) = torch.autograd.grad(F.relu(norm(x)), x, gradient)
    return (mine - true).abs().max().item()


@pytest.mark.parametrize(
    ("shape", "step"), [((4, 8, 1, 1, 1), 1), ((2, 8, 3, 4, 1), 1), ((2, 8, 3, 4, 1), 99)], ids=str
)
def test_stride_of_an_axis_of_length_one_means_nothing(place, shape, step):
    assert place.run(gradient_of_strides, shape, step, place.device) < 1e-5


def calls_of_norm(what, device):
    options = {"not affine": {"affine": False}, "no statistics": {"track_running_stats": False}}
    norm = nn.BatchNorm3d(8, **options.get(what, {})).to(device).eval()
    calls = []
    if what == "hook":
        norm.register_forward_hook(lambda *args: calls.append(1))
    elif what == "pre_hook":
        norm.register_forward_pre_hook(lambda *args: calls.append(1))
    else:
        inner = norm.forward
        norm.forward = lambda x: calls.append(1) or inner(x)
    fused_layers.norm_relu(norm, tensor(2, 8, 3, 3, 3).float().to(device))
    return len(calls)


@pytest.mark.parametrize("what", ["hook", "pre_hook", "not affine", "no statistics"])
def test_norms_that_kernels_do_not_know_are_called(place, what):
    assert place.run(calls_of_norm, what, place.device) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_network_in_the_default_layout_stays_there():
    network, seen = DenseUNet(1, 2, 8, (2,), num_dense_layers=1, growth_rate=8).cuda(), []
    for module in network.modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size == (3, 3, 3):
            module.register_forward_hook(lambda m, args, out: seen.append(out.is_contiguous()))
    network(torch.randn(2, 1, 8, 8, 8, device="cuda"))
    assert len(seen) == 7
    assert all(seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_operations_give_the_same_bits_each_time():
    (first, _), (again, _) = (network_step("cuda", torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
