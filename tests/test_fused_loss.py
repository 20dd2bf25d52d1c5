"""The loss's Triton kernels: on a card, and here by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import InputError
from pipeline.training import loss
from pipeline.training.loss import SegmentationLoss

pytest.importorskip("triton")
fused_loss = pytest.importorskip("networks.kernels.fused_loss")

CLASSES = [2, 3, 14, 33, 70, 256]
EPS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}


def volume(num_classes, size, seed=0, batch=2):
    rng = torch.Generator().manual_seed(seed)
    label = torch.randint(num_classes, (batch, 1, *size), generator=rng)
    return 2 * torch.randn(batch, num_classes, *size, generator=rng), label


def definition(logits, label, class_weights=None, ignore_value=None, smooth=1e-5, **options):
    """Loss by its formula in float64; a label that is no class counts in the masses alone."""
    logits, num_classes = logits.double(), logits.shape[1]
    log_p = logits - logits.logsumexp(1, keepdim=True)
    w = torch.ones(num_classes) if class_weights is None else torch.tensor(class_weights)
    w = w.double().to(logits.device)
    valid = (label != ignore_value) if ignore_value is not None else (label == label)
    classes = torch.arange(num_classes, device=label.device).view(1, -1, *[1] * (label.ndim - 2))
    true = ((label == classes) & valid).double()
    axes = tuple(range(2, label.ndim))
    if options.get("batch_dice"):
        axes = (0, *axes)
    p = log_p.exp() * valid
    overlap, mass, size = (x.sum(axes) for x in (p * true, p, true))
    dice = w * (1 - (2 * overlap + smooth) / (mass + size + smooth))
    if not options.get("include_background", True):
        dice = dice[..., 1:]
    spread = (w.view(classes.shape) * true).flatten(1).sum()
    entropy = -(w.view(classes.shape) * true * log_p).sum() / spread.clamp_min(1e-30)
    return options.get("dice_weight", 1) * dice.mean() + options.get("ce_weight", 1) * entropy


def laid_out(logits, layout):
    if layout == "last":
        return logits.to(memory_format=torch.channels_last_3d)
    if layout == "strided":
        wide = logits.repeat_interleave(2, -1)
        wide[..., 1::2] = 77
        return wide[..., ::2]
    return logits


def fused(logits, label, device, scale=1.0, options=None, levels=()):
    """Value and gradients by the kernels, on the CPU."""
    loss = SegmentationLoss(backend="triton", **(options or {}))
    leaves = [x.to(device).requires_grad_() for x in (logits, *levels)]
    value = loss(leaves if levels else leaves[0], label.to(device))
    gradients = torch.autograd.grad(scale * value, leaves)
    assert value.dtype == torch.float32
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape)
        if leaf.is_contiguous(memory_format=torch.channels_last_3d):
            assert gradient.stride() == leaf.stride()
    return value.item(), [gradient.cpu() for gradient in gradients]


def exact(logits, label, **options):
    leaf = logits.double().requires_grad_()
    value = definition(leaf, label, **options)
    return value.item(), torch.autograd.grad(value, leaf)[0]


def assert_right(place, logits, label, scale=1.0, **options):
    value, (gradient,) = place.run(fused, logits, label, place.device, scale, options)
    expected, expected_gradient = exact(logits, label, **options)
    assert value == pytest.approx(expected, rel=1e-5)
    error = (gradient.double() / scale - expected_gradient).abs().max()
    assert error <= EPS[logits.dtype] * expected_gradient.abs().max()


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("num_classes", CLASSES)
def test_value_and_gradient_are_those_of_the_definition(place, num_classes, layout):
    size = (3, 4, 5) if num_classes > 14 and place.device == "cpu" else place.size
    logits, label = volume(num_classes, size)
    assert_right(place, laid_out(logits, layout), label)


@pytest.mark.parametrize("layout", ["first", "last", "strided"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradient_is_rounded_once_to_the_dtype_of_the_logits(place, dtype, layout):
    logits, label = volume(14, (4, 4, 16))
    assert_right(place, laid_out(logits.to(dtype), layout), label, scale=256.0)


OPTIONS = [
    {"dice_weight": 0},
    {"ce_weight": 0},
    {"dice_weight": 0.3, "ce_weight": 2, "smooth": 1.0},
    {"include_background": False, "batch_dice": True},
    {"class_weights": [0.2, 1, 3.5]},
    {"class_weights": [0.2, 1, 3.5], "dice_weight": 0, "ignore_value": 0},
    {"class_weights": [0.2, 1, 3.5], "include_background": False, "ignore_value": -1},
    {"ignore_value": 2, "batch_dice": True},
    {"ignore_value": 255, "ce_weight": 0},
    {"ignore_value": 255, "class_weights": [3, 1, 2], "batch_dice": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_is_that_of_the_definition(place, options):
    logits, label = volume(3, place.size)
    if (ignored := options.get("ignore_value")) is not None:
        label[0, :, :3], label[1, ..., 4] = ignored, ignored
    assert_right(place, logits, label, **options)
    assert_right(place, laid_out(logits, "last"), label, **options)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32], ids=str)
def test_label_is_read_in_its_own_dtype_and_layout(place, dtype):
    logits, label = volume(2, place.size)
    other = label.to(dtype).repeat_interleave(2, -1)[..., ::2]
    expected = place.run(fused, logits, label, place.device)
    value, (gradient,) = place.run(fused, logits, other, place.device)
    assert (value, True) == (expected[0], torch.equal(gradient, expected[1][0]))


def test_label_that_is_no_class_counts_in_the_masses_alone(place):
    logits, label = volume(3, place.size)
    label[0, 0, 0, 0, :3] = torch.tensor([3, -1, 2**31 - 1])
    assert_right(place, laid_out(logits, "last"), label, class_weights=[1, 2, 3])


@pytest.mark.parametrize("options", [{}, {"batch_dice": True, "class_weights": [1, 2, 3]}], ids=str)
def test_loss_and_gradient_are_zero_when_all_voxels_are_ignored(place, options):
    logits, label = volume(3, place.size)
    options, label = {"ignore_value": 7, **options}, torch.full_like(label, 7)
    value, (gradient,) = place.run(fused, logits, label, place.device, 1.0, options)
    assert (value, bool(gradient.any())) == (0, False)


def test_levels_of_deep_supervision_have_halving_weights(place):
    logits, label = volume(3, (4, 6, 8))
    level = volume(3, (2, 3, 4), seed=1)[0]
    value, gradients = place.run(fused, logits, label, place.device, 1.0, None, [level])
    first = exact(logits, label)
    second = exact(level, label[..., 1::2, 1::2, 1::2])
    assert value == pytest.approx((2 * first[0] + second[0]) / 3, rel=1e-5)
    for gradient, expected in zip(gradients, (first[1] * 2 / 3, second[1] / 3), strict=True):
        assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_loss_scale_is_in_the_gradient_before_it_is_rounded(place):
    logits, label = volume(70, (5, 6, 7), batch=1)
    is_own = torch.arange(70).view(1, -1, 1, 1, 1) == label
    logits = logits.half() + 15 * is_own.half()
    _, (small,) = place.run(fused, logits, label, place.device)
    _, (scaled,) = place.run(fused, logits, label, place.device, 65536.0)
    expected = exact(logits, label)[1]
    assert (small == 0).float().mean() > 0.5  # what scaling is there for
    # a normal number after scaling, and no small difference of p to 1
    inside = (expected.abs() > 2.0**-14 / 65536) & ~is_own
    assert inside.float().mean() > 0.5
    error = (scaled.double() / 65536 - expected).abs()
    assert (error <= 2e-3 * expected.abs())[inside].all()


def test_two_passes_agree_bit_for_bit(place):
    logits, label = volume(14, place.size)
    (first, [one]), (second, [other]) = (
        place.run(fused, logits, label, place.device) for _ in range(2)
    )
    assert first == second
    assert torch.equal(one, other)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_logits_at_the_ends_of_float16_are_no_overflow(place, layout):
    logits, label = volume(3, (4, 4, 16))
    logits = laid_out((30000 * logits).clamp(-6e4, 6e4).half(), layout)
    assert logits.abs().max() > 59000
    assert_right(place, logits, label, scale=256.0)


@pytest.mark.parametrize("options", [{}, {"dice_weight": 0}, {"ce_weight": 0}], ids=str)
@pytest.mark.parametrize("where", [0, slice(None)], ids=["one", "all"])
def test_nan_among_the_logits_makes_the_loss_nan(place, options, where):
    logits, label = volume(3, (4, 4, 4))
    logits[0, where, 1, 2, 3] = torch.nan
    value, _ = place.run(fused, logits, label, place.device, 1.0, options)
    assert value != value


def chosen(backend, device, num_classes):
    try:
        return SegmentationLoss(backend=backend).in_force(torch.device(device), num_classes)
    except InputError as error:
        return str(error)


def test_backend_is_torch_on_a_cpu_unless_interpreted(interpreter):
    assert chosen("auto", "cpu", 2) == chosen("torch", "cpu", 2) == "torch"
    assert chosen("triton", "cpu", 2) == (
        "SegmentationLoss: expected logits on CUDA for backend 'triton', got cpu. Use auto."
    )
    assert interpreter(chosen, "auto", "cpu", 256) == "triton"
    assert interpreter(chosen, "torch", "cpu", 2) == "torch"
    assert interpreter(chosen, "auto", "cpu", 257) == "torch"
    assert interpreter(chosen, "triton", "cpu", 257) == (
        "SegmentationLoss: expected at most 256 classes for backend 'triton', got 257. Use auto."
    )


def test_backend_that_is_not_there_is_refused_in_one_line(monkeypatch):
    with pytest.raises(InputError, match=r"^SegmentationLoss: backend: .*got 'tritn'\. .*"):
        SegmentationLoss(backend="tritn")
    monkeypatch.setattr(loss, "_fused", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with monkeypatch.context() as patch:
        patch.setattr(loss, "_obstacle", loss._obstacle.__wrapped__)  # without its memory
        with pytest.raises(InputError, match=r"expected triton for backend 'triton', got no such"):
            SegmentationLoss(backend="triton").in_force(torch.device("cpu"))
    assert SegmentationLoss().in_force(torch.device("cpu")) == "torch"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", ["first", "last"])
def test_cuda_takes_no_memory_but_the_gradient(layout):
    logits = laid_out(torch.randn(2, 70, 64, 96, 80, device="cuda").half(), layout)
    label = torch.randint(70, (2, 1, 64, 96, 80), device="cuda").to(torch.uint8)
    logits.requires_grad_()
    loss = SegmentationLoss()
    assert loss.in_force(logits.device, 70) == "triton"
    for _ in range(2):  # the first compiles
        logits.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(logits, label).backward()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < logits.nbytes + 2 * 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_numbers_of_voxels_are_exact_above_the_integers_of_float32():
    logits = torch.zeros(1, 2, 257, 257, 257, device="cuda", dtype=torch.float16)
    label = torch.ones(1, 1, 257, 257, 257, device="cuda", dtype=torch.uint8)
    assert fused_loss.sums(logits, label)[0, 4:6].tolist() == [0, 257**3]
