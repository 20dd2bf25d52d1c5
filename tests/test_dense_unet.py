import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from networks.dense_unet import DenseUNet

TINY = {"base_channels": 4, "growth_rate": 4, "num_dense_layers": 2, "seed": 0}
ANISOTROPIC = [[2, 2, 1], [2, 2, 2]]


def tiny(**kwargs):
    return DenseUNet(**{**TINY, **kwargs})


def image(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def interpolation_matrix(n_out, n_in):
    """(n_out, n_in) linear interpolation between voxel centres, edges repeated."""
    centres = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
    return torch.tensor(
        np.stack([np.interp(centres, np.arange(n_in), basis) for basis in np.eye(n_in)], axis=1)
    )


def reference_upsample(x, size):
    for axis, n_out in enumerate(size, start=2):
        matrix = interpolation_matrix(n_out, x.shape[axis])
        x = torch.movedim(torch.tensordot(x, matrix, dims=([axis], [1])), -1, axis)
    return x


def reference_norm(x, weights, name, *, running):
    axes = (0, 2, 3, 4) if f"{name}.running_mean" in weights else (2, 3, 4)
    mean, var = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
    if running and f"{name}.running_mean" in weights:
        mean = weights[f"{name}.running_mean"].view(1, -1, 1, 1, 1)
        var = weights[f"{name}.running_var"].view(1, -1, 1, 1, 1)
    scale, shift = (weights[f"{name}.{key}"].view(1, -1, 1, 1, 1) for key in ("weight", "bias"))
    return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift


def reference_forward(x, weights, strides, *, training):
    """The architecture as a plain function of the weights: logits of all levels, finest first."""

    def norm_relu(x, name):
        return reference_norm(x, weights, name, running=not training).clamp(min=0)

    def block(x, name):
        for i in (1, 2):
            x = F.conv3d(x, weights[f"{name}.conv{i}.weight"], padding=1)
            x = norm_relu(x, f"{name}.norm{i}")
        return x

    def head(x, name):
        return F.conv3d(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    skips = []
    for i, stride in enumerate(strides):
        skips.append(block(x, f"encoders.{i}"))
        x = F.max_pool3d(skips[-1], stride)
    x = block(x, "deepest")
    for i in range(TINY["num_dense_layers"]):
        new = F.conv3d(
            norm_relu(x, f"bottleneck.{i}.norm1"), weights[f"bottleneck.{i}.conv1.weight"]
        )
        new = norm_relu(new, f"bottleneck.{i}.norm2")
        new = F.conv3d(new, weights[f"bottleneck.{i}.conv2.weight"], padding=1)
        x = torch.cat([x, new], dim=1)
    outputs = []
    for i, skip in enumerate(reversed(skips)):
        x = torch.cat([reference_upsample(x, skip.shape[2:]), skip], dim=1)
        x = block(x, f"decoders.{i}")
        last = i == len(skips) - 1
        if last or f"deep_heads.{i}.weight" in weights:
            outputs.insert(0, head(x, "head" if last else f"deep_heads.{i}"))
    return outputs


def test_default_network_has_6_88_million_parameters():
    assert sum(p.numel() for p in DenseUNet(out_channels=14).parameters()) == 6_881_710


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("strides", "size"), [(ANISOTROPIC, (9, 11, 5)), ([[2, 2, 2], [1, 3, 2]], (7, 13, 10))]
)
def test_forward_agrees_with_a_plain_function_of_the_weights(norm, training, strides, size):
    network = tiny(norm=norm, strides=strides, in_channels=2, out_channels=3, deep_supervision=True)
    network = network.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # initial shifts and running means of 0 would hide mistakes
        for tensor in network.state_dict().values():
            if tensor.ndim == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    x = image(2, 2, *size).double()
    outputs = network.train(training)(x)
    expected = reference_forward(x, weights, strides, training=training)
    outputs = outputs if training else [outputs]
    assert len(outputs) == (len(expected) if training else 1)
    for output, reference in zip(outputs, expected, strict=False):
        torch.testing.assert_close(output, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("norm", "training", "batch_size", "voxels"),
    [
        ("batch", True, 2, 1),
        ("batch", True, 1, 2),
        ("batch", False, 1, 1),
        ("instance", True, 2, 2),
        ("instance", False, 1, 2),
    ],
)
def test_minimum_size_is_named_and_works(norm, training, batch_size, voxels):
    network = tiny(strides=ANISOTROPIC, norm=norm).train(training)
    size = network.minimum_size(batch_size)
    assert math.prod(size) == voxels * math.prod(network.reduction)
    assert network(image(batch_size, 1, *size)).shape == (batch_size, 2, *size)
    named, smaller = "x".join(map(str, size)), (size[0] - 1, *size[1:])
    got = "x".join(map(str, smaller))
    with pytest.raises(ValueError, match=f"^DenseUNet: expected .* {named} voxels, got {got}"):
        network(image(batch_size, 1, *smaller))


@pytest.mark.parametrize("shape", [(1, 2, 8, 8, 8), (1, 8, 8, 8)])
def test_image_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected an image of shape \(B, 1, H, W, D\), got \("):
        tiny()(image(*shape))


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("norm", "group", "batch, instance"),
        ("in_channels", 0, "positive integer"),
        ("base_channels", 32.0, "positive integer"),
        ("num_dense_layers", True, "positive integer"),
        ("strides", [], "positive ints or triples"),
        ("strides", [[2, 2]], "positive ints or triples"),
        ("strides", [[2, 2, 0]], "positive ints or triples"),
        ("dropout", 1.0, r"number in \[0, 1\)"),
        ("deep_supervision", "yes", "true or false"),
        ("seed", -1, "integer from 0 up"),
        ("recompute_levels", 4, "0 to 3, as many as there are decoders"),
    ],
)
def test_wrong_argument_is_refused_in_one_line(argument, value, expected):
    match = rf"^DenseUNet: expected {argument} to be .*{expected}, got [^\n]*$"
    with pytest.raises(ValueError, match=match):
        tiny(**{argument: value})


def after_two_passes(levels, norm, device="cpu", dtype=torch.float32, last=True):
    """Logits, gradients and buffers, and how many values are kept for a backward pass."""
    network = tiny(
        strides=[[2, 2, 1], 2], norm=norm, deep_supervision=True, recompute_levels=levels
    ).to(device)
    if last:
        network = network.to(memory_format=torch.channels_last_3d)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    for _ in range(2):
        kept.clear()
        autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
        with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = network(image(2, 1, 12, 8, 8).to(device))
        sum(logits.float().square().mean() for logits in outputs).backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    return [*outputs, *gradients, *network.buffers()], sum(kept)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_recomputed_levels_change_no_bit_and_keep_less(norm, last):
    expected, most = after_two_passes(0, norm, last=last)
    for levels in (1, 2):
        found, kept = after_two_passes(levels, norm, last=last)
        assert all(map(torch.equal, found, expected))
        assert kept < 0.75 * most
        most = kept


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_recomputed_levels_change_no_bit_on_a_card(norm, dtype):
    with torch.backends.cudnn.flags(deterministic=True):
        expected, _ = after_two_passes(0, norm, "cuda", dtype)
        for levels in (1, 2):
            found, _ = after_two_passes(levels, norm, "cuda", dtype)
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_nothing_is_recomputed_without_gradients_or_in_eval(norm, monkeypatch):
    network = tiny(norm=norm, recompute_levels=2)
    monkeypatch.setattr("networks.dense_unet.checkpoint", None)  # which would be called
    with torch.no_grad():
        network(image(2, 1, 16, 16, 16))
    network.eval()(image(1, 1, 16, 16, 16))


def test_deep_supervision_returns_every_decoder_level_only_in_training():
    network = tiny(deep_supervision="true", strides=[[2, 2, 1], 2, 2])
    shapes = [tuple(logits.shape) for logits in network(image(2, 1, 19, 16, 9))]
    assert shapes == [(2, 2, 19, 16, 9), (2, 2, 9, 8, 9), (2, 2, 4, 4, 4)]


def test_deep_heads_leave_the_rest_of_the_network_as_it_is():
    plain, deep = tiny().eval(), tiny(deep_supervision=True).eval()
    extra = deep.state_dict().keys() - plain.state_dict().keys()
    assert extra == {f"deep_heads.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")}
    x = image(1, 1, 8, 8, 8)
    torch.testing.assert_close(deep(x), plain(x), rtol=0, atol=0)


def test_dropout_zeroes_appended_channels_in_training():
    network = tiny(dropout=0.5, growth_rate=64, strides=[2, 2])
    outputs = []
    network.bottleneck.register_forward_hook(lambda *args: outputs.append(args[-1]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network(image(2, 1, 8, 8, 8))
    zeroed = (outputs[0][:, 16:] == 0).all(dim=(2, 3, 4)).float().mean()
    assert 0.35 < zeroed < 0.65


def test_seed_fixes_the_weights_and_leaves_the_global_state_alone():
    state = torch.get_rng_state()
    first = tiny(seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    second, other = tiny(seed=5), tiny(seed=6)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert not torch.equal(first.head.weight, other.head.weight)


def test_weights_are_kaiming_normal_by_fan_in():
    network = DenseUNet(seed=0)
    for name, weight in network.named_parameters():
        if weight.ndim == 5 and weight.numel() > 10_000:
            expected = math.sqrt(2 / weight[0].numel())
            assert weight.std().item() == pytest.approx(expected, rel=0.03), name


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_script_and_compile_agree_with_eager(norm):
    deep = {"deep_supervision": True, "recompute_levels": 1}
    network = tiny(strides=[[2, 2, 1]], num_dense_layers=1, norm=norm, **deep).eval()
    x, larger = image(1, 1, 5, 4, 3), image(2, 1, 7, 6, 4)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x))
    torch.testing.assert_close(torch.jit.script(network)(larger), network(larger))


def test_channels_last_and_autocast_give_the_same_logits():
    network = tiny(strides=[2, 2]).eval()
    x = image(1, 1, 8, 8, 8)
    expected = network(x)
    last = network.to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last_3d)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = last(x)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
