import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss

from pipeline.errors import InputError
from pipeline.training.loss import SegmentationLoss


def volume(*shape, num_classes=3, seed=0):
    """Logits (B, C, H, W, D) and a label (B, 1, H, W, D) that they favour but do not repeat."""
    generator = torch.Generator().manual_seed(seed)
    batch, *size = shape
    label = torch.randint(num_classes, (batch, 1, *size), generator=generator)
    logits = torch.randn(batch, num_classes, *size, generator=generator)
    return logits.scatter_add(1, label, torch.ones(label.shape)), label


def reference(
    logits,
    label,
    *,
    dice_weight=1.0,
    ce_weight=1.0,
    include_background=True,
    class_weights=None,
    batch_dice=False,
    smooth=1e-5,
    ignore_value=None,
):
    """The loss by its definition in float64, class by class and volume by volume."""
    num_classes = logits.shape[1]
    weights = class_weights or [1.0] * num_classes
    exponentials = logits.double().exp()
    probabilities = exponentials / exponentials.sum(1, keepdim=True)
    valid = torch.ones_like(label[:, 0], dtype=torch.bool)
    if ignore_value is not None:
        valid = label[:, 0] != ignore_value
    volumes = [slice(None)] if batch_dice else [slice(b, b + 1) for b in range(len(label))]
    dice, entropy, mass = [], 0.0, 0.0
    for c in range(num_classes):
        is_class = label[:, 0] == c
        p = probabilities[:, c]
        for v in volumes if c > 0 or include_background else []:
            inside, true = p[v][valid[v]], is_class[v][valid[v]].double()
            overlap = (inside * true).sum()
            ratio = (2 * overlap + smooth) / (inside.sum() + true.sum() + smooth)
            dice.append(weights[c] * (1 - ratio))
        entropy = entropy - weights[c] * p[is_class & valid].log().sum()
        mass += weights[c] * (is_class & valid).sum().item()
    return dice_weight * sum(dice) / len(dice) + ce_weight * entropy / mass


def value_and_gradient(loss, logits, label):
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf, label)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def assert_agrees(loss, logits, label, *, rtol=1e-5, gradient_rtol=1e-4, **options):
    value, gradient = value_and_gradient(loss, logits, label)
    expected, expected_gradient = value_and_gradient(
        lambda x, y: reference(x, y, **options), logits.double(), label
    )
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert gradient.dtype == logits.dtype
    assert value.item() == pytest.approx(expected.item(), rel=rtol)
    largest = expected_gradient.abs().max()
    error = (gradient.double() - expected_gradient).abs().max()
    assert error <= gradient_rtol * largest


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dice_weight": 0.0},
        {"ce_weight": 0},
        {"include_background": False},
        {"class_weights": [0.2, 1, 3.5], "include_background": False, "batch_dice": True},
        {"smooth": 1.0},
        {"ignore_value": 2},
        {"ignore_value": -1, "batch_dice": True, "class_weights": [0.2, 1, 3.5]},
        {"ignore_value": 255, "include_background": False},
    ],
    ids=str,
)
def test_every_option_agrees_with_the_definition_in_float64(options):
    logits, label = volume(2, 7, 6, 5)
    if (ignored := options.get("ignore_value")) is not None:
        label[0, :, :3], label[1, ..., 4] = ignored, ignored
    assert_agrees(SegmentationLoss(**options), logits, label, **options)


@pytest.mark.parametrize(
    ("dtype", "gradient_rtol"),
    [(torch.float32, 1e-4), (torch.float16, 0.3), (torch.bfloat16, 5e-3)],
)
def test_value_and_gradient_are_right_at_96_cubed(dtype, gradient_rtol):
    logits, label = volume(1, 96, 96, 96)
    logits = logits.to(dtype)
    # A float16 gradient is rounded to its subnormals, 6e-8 apart, without loss scaling.
    assert_agrees(SegmentationLoss(), logits, label, gradient_rtol=gradient_rtol)


def test_default_is_the_loss_of_monai():
    logits, label = volume(2, 12, 10, 8)
    value, gradient = value_and_gradient(SegmentationLoss(), logits, label)
    expected = value_and_gradient(DiceCELoss(to_onehot_y=True, softmax=True), logits, label)
    torch.testing.assert_close(value, expected[0], rtol=5e-7, atol=0)
    assert (gradient - expected[1]).abs().max() <= 1e-6 * expected[1].abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_change_the_loss(dtype):
    logits, label = volume(1, 48, 48, 48)
    loss = SegmentationLoss()
    outside, gradient_outside = value_and_gradient(loss, logits.to(dtype), label)
    with torch.autocast("cpu", dtype=dtype):
        inside, gradient_inside = value_and_gradient(loss, logits.to(dtype), label)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert torch.equal(gradient_inside, gradient_outside)


def test_deep_supervision_averages_the_levels_with_halving_weights():
    logits, label = volume(2, 8, 6, 5)
    sizes = [(8, 6, 5), (4, 3, 5), (2, 1, 2)]
    levels = [logits] + [volume(2, *size, seed=1)[0] for size in sizes[1:]]
    expected = 0.0
    for weight, size, level in zip((4 / 7, 2 / 7, 1 / 7), sizes, levels, strict=True):
        # centre of coarse voxel i, in voxels of the label: (i + 0.5) · fine / coarse
        grid = [
            ((torch.arange(n) + 0.5) * fine / n).floor().long()
            for n, fine in zip(size, sizes[0], strict=True)
        ]
        i, j, k = torch.meshgrid(*grid, indexing="ij")
        expected += weight * reference(level, label[:, :, i, j, k])
    loss = SegmentationLoss()
    assert loss(levels, label).item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(loss([logits], label), loss(logits, label))


def test_loss_and_gradient_are_zero_when_all_voxels_are_ignored():
    logits, label = volume(2, 4, 4, 4)
    loss = SegmentationLoss(ignore_value=255, class_weights=[1.0, 2.0, 3.0])
    value, gradient = value_and_gradient(loss, logits, torch.full_like(label, 255))
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32])
def test_label_may_have_any_dtype_and_be_a_metatensor(dtype):
    logits, label = volume(1, 4, 4, 4)
    value = SegmentationLoss()(MetaTensor(logits), MetaTensor(label.to(dtype)))
    assert type(value) is torch.Tensor
    assert torch.equal(value, SegmentationLoss()(logits, label))


@pytest.mark.parametrize(
    "arguments",
    [
        {"dice_weight": -1},
        {"ce_weight": float("nan")},
        {"dice_weight": 0, "ce_weight": 0},
        {"smooth": 0},
        {"class_weights": [1, 0]},
    ],
)
def test_wrong_argument_is_refused_in_one_line(arguments):
    with pytest.raises(InputError, match=r"^SegmentationLoss: expected dice_weight and [^\n]*$"):
        SegmentationLoss(**arguments)


def test_shapes_that_do_not_fit_are_refused():
    logits, label = volume(2, 4, 4, 4)
    with pytest.raises(ValueError, match=r"expected 3 class_weights, one per class, got 2\."):
        SegmentationLoss(class_weights=[1, 2])(logits, label)
    with pytest.raises(ValueError, match=r"label of shape \(2, 1, 4, 4, 4\), got \(2, 4, 4, 4\)"):
        SegmentationLoss()(logits, label[:, 0])
    with pytest.raises(ValueError, match="at least 2 classes, background included, got 1"):
        SegmentationLoss()(logits[:, :1], label)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"ignore_value": 2, "class_weights": [0.5, 1, 2]}])
def test_cuda_loss_of_float16_logits_is_float32_deterministic_and_never_waits(options):
    logits, label = volume(1, 96, 96, 96)
    logits, label = logits.half().cuda(), label.cuda()
    loss = SegmentationLoss(**options).cuda()
    torch.use_deterministic_algorithms(True)
    torch.cuda.set_sync_debug_mode("error")  # an operation that waits for the card raises
    try:
        with torch.autocast("cuda", dtype=torch.float16):
            value, gradient = value_and_gradient(loss, logits, label)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.cuda.set_sync_debug_mode("default")
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.float16
    expected = reference(logits.cpu(), label.cpu(), **options)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
