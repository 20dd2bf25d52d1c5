import random

import numpy as np
import pytest
import torch
from scipy import ndimage

from transforms.augment import INTENSITY, Augment, margin_size, resolve_flip_axes

ROI = (12, 15, 10)
SPACING = (1.0, 1.5, 3.0)
NO_SPACE = {"rotation": {"prob": 0}, "scale": {"prob": 0}, "flip": {"prob": 0}}
NO_INTENSITY = {name: {"prob": 0} for name in INTENSITY}
ALL_INTENSITY = {name: {"prob": 1} for name in INTENSITY}
SOMETIMES = {name: {"prob": 0.5} for name in INTENSITY}
MOVED = {"rotation": {"prob": 1}, "scale": {"prob": 1}, "flip": {"prob": 0.5}}


def make_batch(size, seeds, num_channels=2, dtype=torch.uint8):
    """Each sample's voxels come from its seed, so that equal seeds mean equal samples."""
    images, labels = [], []
    for seed in seeds:
        rng = np.random.default_rng(seed + 1000)
        images.append(ndimage.gaussian_filter(rng.normal(size=(num_channels, *size)), (0, 1, 1, 1)))
        label = ndimage.gaussian_filter(rng.normal(size=(1, *size)), (0, 2, 2, 2))
        labels.append(np.digitize(label, [-0.05, 0.05]))
    image = torch.from_numpy(np.stack(images)).float()
    label = torch.from_numpy(np.stack(labels)).to(dtype)
    return {"image": image, "label": label, "seed": torch.tensor(seeds)}


def central(x, size):
    starts = [(n - m) // 2 for n, m in zip(x.shape[2:], size, strict=True)]
    window = (slice(a, a + m) for a, m in zip(starts, size, strict=True))
    return x[(..., *window)]


def only(name, key, value):
    return NO_INTENSITY | {name: {"prob": 1, key: [value, value]}}


def turn(degrees):
    """About axis 0, then 1, then 2, written out."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    first = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    second = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    third = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    return third @ second @ first


@pytest.mark.parametrize("flip_axes", [(), (0, 2)])
def test_augment_agrees_with_scipy_when_rotated_scaled_and_flipped(flip_axes):
    degrees, scale = (20.0, -30.0, 10.0), 0.8
    spatial = {
        "rotation": {"prob": 1, "degrees": [[d, d] for d in degrees]},
        "scale": {"prob": 1, "range": [scale, scale]},
        "flip": {"prob": 1},
    }
    augment = Augment(
        (24, 25, 16),
        spacing=SPACING,
        flip_axes=flip_axes,
        spatial=spatial,
        intensity=NO_INTENSITY,
    )
    batch = make_batch(augment.input_size, [5], dtype=torch.int64)
    batch["label"][batch["label"] == 2] = 255
    image, label = augment(batch)

    signs = [-1 if axis in flip_axes else 1 for axis in range(3)]
    matrix = np.diag(1 / np.array(SPACING)) @ turn(degrees) @ np.diag(SPACING) @ np.diag(signs)
    matrix /= scale
    centre_in, centre_out = ((np.array(n) - 1) / 2 for n in (augment.input_size, augment.roi_size))
    how = {"offset": centre_in - matrix @ centre_out, "output_shape": augment.roi_size}
    for channel in range(2):
        source = batch["image"][0, channel].double().numpy()
        expected = ndimage.affine_transform(source, matrix, order=1, **how)
        assert np.abs(image[0, channel].numpy() - expected).max() < 1e-4
    expected = ndimage.affine_transform(batch["label"][0, 0].numpy(), matrix, order=0, **how)
    assert (label[0, 0].numpy() == expected).mean() > 0.995
    assert label.dtype == torch.int64
    assert set(label.unique().tolist()) == {0, 1, 255}


@pytest.mark.parametrize("kwargs", [{"spatial": NO_SPACE, "intensity": NO_INTENSITY}, {}])
def test_augment_returns_the_input_exactly_when_off(kwargs):
    augment = Augment(ROI, enabled=bool(kwargs), **kwargs)
    batch = make_batch(ROI, [1, 2])
    image, label = augment(batch)
    assert augment.input_size == ROI
    assert torch.equal(image, batch["image"])
    assert torch.equal(label, batch["label"])
    assert image.is_contiguous()
    assert image.dtype == torch.float32
    assert label.dtype == torch.uint8


def test_augment_crops_the_centre_exactly_when_nothing_is_drawn():
    spatial = {name: {"prob": 1e-9} for name in ("rotation", "scale", "flip")}
    augment = Augment(ROI, spatial=spatial, intensity=NO_INTENSITY)
    batch = make_batch(augment.input_size, [1, 2])
    image, label = augment(batch)
    assert torch.equal(image, central(batch["image"], ROI))
    assert torch.equal(label, central(batch["label"], ROI))


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
def test_augment_flips_exactly(axes):
    augment = Augment(
        ROI, flip_axes=axes, spatial=NO_SPACE | {"flip": {"prob": 1}}, intensity=NO_INTENSITY
    )
    batch = make_batch(ROI, [1, 2])
    before = batch["image"].clone()
    image, label = augment(batch)
    spatial_axes = [axis - 3 for axis in axes]
    assert torch.equal(image, batch["image"].flip(spatial_axes))
    assert torch.equal(label, batch["label"].flip(spatial_axes))
    assert torch.equal(batch["image"], before)


@pytest.mark.parametrize("intensity", [ALL_INTENSITY, SOMETIMES, {}])
@pytest.mark.parametrize("roi", [(5, 7, 3), ROI])  # 105 voxels: no whole number of vectors
def test_augment_depends_on_the_seed_alone(roi, intensity):
    spatial = {name: {"prob": 0.6} for name in ("rotation", "scale", "flip")}
    augment = Augment(roi, spacing=SPACING, spatial=spatial, intensity=intensity)
    batch = make_batch(augment.input_size, [0, 1, 2, 3])
    batch["seed"] = torch.tensor([7, -3, 2**62, 11])
    image, label = augment(batch)
    order = [3, 0, 1, 2]
    shuffled = augment({key: value[order] for key, value in batch.items()})
    assert torch.equal(shuffled[0], image[order])
    assert torch.equal(shuffled[1], label[order])
    for i in range(4):
        alone = augment({key: value[i : i + 1] for key, value in batch.items()})
        assert torch.equal(alone[0][0], image[i])
        assert torch.equal(alone[1][0], label[i])


def test_draw_is_made_of_single_draws_in_their_order():
    augment = Augment(ROI, spacing=SPACING, intensity=SOMETIMES, flip_axes=[1, 2])
    for seed in range(200):
        rng = np.random.default_rng(seed)
        turned, angles = rng.random() < 0.2, -30 + rng.random(3) * 60
        values = {}
        scaled, u = rng.random(2)
        flips = [bool(r < 0.5) for r in rng.random(3)]
        for name, settings in augment.intensity.items():
            coin, v = rng.random(2)
            (_, prob), (key, (low, high)) = settings.items()
            middle = 1 if key == "range" else (low + high) / 2
            if coin < prob:
                values[name] = np.interp(v, [0, 0.5, 1], [low, middle, high])
        draw = augment.draw(seed)
        assert (draw.intensity, draw.noise_seed) == (values, rng.integers(2**63))
        assert draw.flips == tuple(axis for axis in (1, 2) if flips[axis])
        scale = np.interp(u, [0, 0.5, 1], [0.7, 1, 1.4]) if scaled < 0.2 else None
        assert (draw.matrix is None) == (not turned and scale is None)
        if draw.matrix is not None:
            matrix = np.diag(1 / np.array(SPACING)) @ turn(angles * turned) @ np.diag(SPACING)
            np.testing.assert_allclose(draw.matrix, matrix / (scale or 1), atol=1e-12)


def test_augment_leaves_global_random_states_alone():
    augment = Augment(ROI, spatial=MOVED, intensity=ALL_INTENSITY)
    batch = make_batch(augment.input_size, [1])
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        outputs.append(augment(batch)[0])
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (np.random.get_state()[1] == states[1]).all()
        assert random.getstate() == states[2]
    assert torch.equal(*outputs)


def test_draw_does_not_move_when_another_operation_is_turned_off():
    full = Augment(ROI, spatial=MOVED, intensity=ALL_INTENSITY).draw(4)
    less = Augment(ROI, spatial=NO_SPACE, intensity=ALL_INTENSITY | {"blur": {"prob": 0}}).draw(4)
    assert less.intensity == {k: v for k, v in full.intensity.items() if k != "blur"}
    assert less.noise_seed == full.noise_seed
    assert list(full.intensity) == list(INTENSITY)


def intensity_of(name, key, value, image):
    augment = Augment(ROI, spatial=NO_SPACE, intensity=only(name, key, value))
    batch = make_batch(ROI, [1]) | {"image": image}
    return augment(batch)[0].double().numpy()[0]


def gamma_oracle(x, gamma):
    low, high = x.min(), x.max()
    y = ((x - low) / (high - low)) ** gamma * (high - low) + low
    return (y - y.mean()) / y.std() * x.std() + x.mean()


ORACLES = {
    "blur": ("sigma", 0.8, lambda x: ndimage.gaussian_filter(x, 0.8, mode="nearest")),
    "brightness": ("range", 1.2, lambda x: x * 1.2),
    "contrast": (
        "range",
        1.25,
        lambda x: np.clip((x - x.mean()) * 1.25 + x.mean(), x.min(), x.max()),
    ),
    "gamma": ("range", 1.4, lambda x: gamma_oracle(x, 1.4)),
    "gamma_inverted": ("range", 0.7, lambda x: -gamma_oracle(-x, 0.7)),
}


@pytest.mark.parametrize("name", ORACLES)
def test_intensity_agrees_with_numpy(name):
    key, value, oracle = ORACLES[name]
    image = make_batch(ROI, [1])["image"] * torch.tensor([1.0, 5.0])[:, None, None, None] + 0.3
    result = intensity_of(name, key, value, image)
    for channel in range(2):
        expected = oracle(image[0, channel].double().numpy())
        assert np.abs(result[channel] - expected).max() < 2e-5


def test_noise_has_the_drawn_std_and_differs_between_samples_and_channels():
    augment = Augment((32, 32, 32), spatial=NO_SPACE, intensity=only("noise", "std", 0.1))
    size = (2, 2, 32, 32, 32)
    batch = {"image": torch.ones(size), "label": torch.ones(2, 1, 32, 32, 32, dtype=torch.uint8)}
    noise = augment(batch | {"seed": torch.tensor([1, 2])})[0] - 1
    assert noise.mean().abs() < 2e-3
    assert (noise.std((2, 3, 4)) - 0.1).abs().max() < 2e-3
    assert torch.corrcoef(noise.flatten(0, 1).flatten(1)).fill_diagonal_(0).abs().max() < 0.03


@pytest.mark.parametrize("name", ["contrast", "gamma", "gamma_inverted", "blur"])
def test_intensity_stays_finite_when_an_image_is_constant(name):
    result = intensity_of(name, ORACLES[name][0], ORACLES[name][1], torch.full((1, 1, *ROI), 3.0))
    assert np.abs(result - 3).max() < 1e-5


@pytest.mark.parametrize("degrees", [[-180, 180], [-90, 90], [-30, 30], [10, 25]])
def test_margin_size_bounds_what_a_random_search_finds(degrees):
    degrees = np.broadcast_to(degrees, (3, 2))
    spacing = np.array(SPACING)
    half = (np.array(ROI) - 1) / 2 * spacing
    angles = np.random.default_rng(0).uniform(*degrees[0], (20000, 3))
    angles[:8] = np.stack(np.meshgrid(*degrees), -1).reshape(-1, 3)
    reach = max_reach = half
    for angle in angles:
        reach = np.abs(turn(angle)) @ half
        max_reach = np.maximum(max_reach, reach)
    size = np.array(margin_size(ROI, spacing, degrees, 0.7))
    assert ((size - ROI) % 2 == 0).all()
    found = np.array(ROI) + 2 * (max_reach / 0.7 - half) / spacing
    assert (size >= found - 1e-6).all()
    assert (size <= found + 4).all()


def test_augment_works_on_a_thin_roi():
    augment = Augment((1, 8, 8), spatial=MOVED)
    image, _ = augment(make_batch(augment.input_size, [0, 1]))
    assert image.shape == (2, 2, 1, 8, 8)
    assert image.isfinite().all()


SIDED = [
    "left_kidney", "Kidney Left", "kidney_r", "L-lung", "Left-Hippocampus", "ctx-lh-insula",
    "rt_eye", "LT eye", "kidneyLeft", "LKidney", "KIDNEY_R", "lung (R)", "left1", "atrium sinister",
    "ventriculus dexter", "leftkidney", "kidney_r_2",
]  # fmt: skip
UNSIDED = [
    "bright", "cleft lip", "liver", "vertebrae_L1", "vertebrae L5", "LV", "RV", "T1", "ring",
    "lesion", "tumor", "portal vein", "colon", "upright", "Anterior", "",
]  # fmt: skip


@pytest.mark.parametrize("name", SIDED)
def test_resolve_flip_axes_spares_left_and_right_when_a_name_tells_them(name):
    assert resolve_flip_axes("auto", ["background", name]) == (1, 2)


@pytest.mark.parametrize("name", UNSIDED)
def test_resolve_flip_axes_allows_all_when_no_name_has_a_side(name):
    assert resolve_flip_axes("auto", ["background", name]) == (0, 1, 2)


def test_resolve_flip_axes_takes_what_is_given():
    assert resolve_flip_axes([2, 0], ["left"]) == (0, 2)
    assert resolve_flip_axes([]) == ()
    assert Augment(ROI, class_names=["left lung"]).flip_axes == (1, 2)


@pytest.mark.parametrize("axes", ["none", [3], [-1], 1, None, ["0"]])
def test_resolve_flip_axes_refuses_what_is_no_axis(axes):
    with pytest.raises(ValueError, match=r'flip_axes: expected "auto" or a list of axes 0, 1'):
        resolve_flip_axes(axes)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"spatial": {"rotatoin": {}}}, r"spatial: expected one of .*'rotatoin'. Use 'rotation'"),
        ({"spatial": {"scale": {"rang": [1, 2]}}}, r"spatial#scale: .*'rang'. Use 'range'"),
        ({"spatial": {"rotation": 30}}, r"spatial#rotation: expected a mapping .* got 30"),
        ({"spatial": [1]}, r"augment#spatial: expected a mapping"),
        ({"spatial": {"flip": {"prob": 1.5}}}, r"flip#prob: expected a probability .* got 1.5"),
        ({"spatial": {"scale": {"range": [0, 1]}}}, r"scale#range: .* 0 < lo <= hi, got \[0, 1\]"),
        ({"spatial": {"scale": {"range": [2, 1]}}}, r"leave it out for \[0.7, 1.4\]"),
        ({"spatial": {"rotation": {"degrees": [1, -1]}}}, r"rotation#degrees: .*lo <= hi"),
        ({"spatial": {"rotation": {"degrees": 200}}}, r"within -180..180"),
        ({"spatial": {"rotation": {"degrees": [[1, 2], [3]]}}}, r"rotation#degrees"),
        ({"intensity": {"noise": {"std": [-1, 1]}}}, r"noise#std: .*0 <= lo"),
        ({"intensity": {"gamma": {"range": [1, float("inf")]}}}, r"gamma#range"),
        ({"enabled": "false"}, r"enabled: expected true or false, got 'false'"),
    ],
)
def test_augment_refuses_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Augment(**({"roi_size": ROI} | kwargs))


def test_augment_names_every_fault_in_a_line_of_its_own():
    with pytest.raises(ValueError, match="spatial") as error:
        Augment(ROI, enabled="x", spatial={"spin": {}}, intensity={"gamma": {"prob": -1}})
    assert len(str(error.value).splitlines()) == 3


def test_augment_refuses_a_crop_of_another_size_and_missing_seeds():
    augment = Augment(ROI)
    with pytest.raises(ValueError, match=r"expected a spatial size of .*'image': \(12, 15, 10"):
        augment(make_batch(ROI, [1]))
    batch = make_batch(augment.input_size, [1, 2])
    with pytest.raises(ValueError, match=r"seed: .* got None"):
        augment({key: batch[key] for key in ("image", "label")})
    with pytest.raises(ValueError, match="seed"):
        augment(batch | {"seed": batch["seed"][:1]})


def test_augment_gives_plain_tensors_in_the_wanted_layout():
    monai_data = pytest.importorskip("monai.data")
    augment = Augment(ROI, spatial=MOVED)
    batch = make_batch(augment.input_size, [1, 2])
    batch["image"] = monai_data.MetaTensor(batch["image"].half())
    image, label = augment(batch, "cpu", True, memory_format=torch.channels_last_3d)
    assert type(image) is type(label) is torch.Tensor
    assert image.dtype == torch.float32
    assert image.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_augment_agrees_between_cuda_and_cpu_without_waiting():
    intensity = ALL_INTENSITY | {"noise": {"prob": 0}}
    augment = Augment((32, 40, 24), spacing=SPACING, spatial=MOVED, intensity=intensity)
    batch = make_batch(augment.input_size, [1, 2, 3])
    image, label = augment(batch)
    on_cuda = {key: batch[key].cuda() for key in ("image", "label")} | {"seed": batch["seed"]}
    torch.backends.cuda.matmul.allow_tf32, before = True, torch.backends.cuda.matmul.allow_tf32
    torch.cuda.set_sync_debug_mode("error")
    try:
        image_cuda, label_cuda = augment(on_cuda, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.backends.cuda.matmul.allow_tf32 = before
    assert (image_cuda.cpu() - image).abs().max() < 1e-4
    assert (label_cuda.cpu() == label).float().mean() > 0.9995
