import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from transforms.augment import INTENSITY, Augment, margin_size, resolve_flip_axes

ROI = (12, 15, 10)
SPACING = (1.0, 1.5, 3.0)
NO_SPACE = {"rotation": {"prob": 0}, "scale": {"prob": 0}, "flip": {"prob": 0}}
NO_INTENSITY = {name: {"prob": 0} for name in INTENSITY}
ALL_INTENSITY = {name: {"prob": 1} for name in INTENSITY}
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


def test_augment_keeps_a_sphere_a_sphere_when_voxels_are_anisotropic():
    scale, radius_mm = 1.3, 8.0
    spatial = {"rotation": {"prob": 1}, "scale": {"prob": 1, "range": [scale, scale]}}
    augment = Augment((32, 24, 12), spacing=SPACING, spatial=spatial, intensity=NO_INTENSITY)

    def distance_mm(size):
        axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(size, SPACING, strict=True)]
        return np.sqrt(sum(x**2 for x in np.meshgrid(*axes, indexing="ij")))

    sphere = torch.from_numpy(distance_mm(augment.input_size) < radius_mm).to(torch.uint8)
    distance = torch.from_numpy(distance_mm(augment.input_size)).float()
    batch = {"image": distance[None, None], "label": sphere[None, None], "seed": torch.tensor([3])}
    image, label = augment(batch)
    expected = distance_mm(augment.roi_size)
    # nearest: off by at most half a voxel's diagonal, as magnified
    sure = np.abs(expected - radius_mm * scale) > np.linalg.norm(SPACING) / 2 * scale
    assert (label[0, 0].numpy() == (expected < radius_mm * scale))[sure].all()
    assert 0 < sure.mean() < 1
    assert np.abs(image[0, 0].numpy() * scale - expected)[expected > 6].max() < 0.5


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


def test_augment_resamples_to_the_centre_when_the_drawn_affine_is_the_identity():
    spatial = {"rotation": {"prob": 1, "degrees": 0}, "scale": {"prob": 0}, "flip": {"prob": 0}}
    augment = Augment(ROI, spatial=spatial, intensity=NO_INTENSITY)
    assert augment.input_size == ROI
    batch = make_batch(ROI, [1])
    image, label = augment(batch)
    assert torch.allclose(image, batch["image"], atol=1e-5)
    assert torch.equal(label, batch["label"])


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


@pytest.mark.parametrize("kwargs", [{"spatial": MOVED, "intensity": ALL_INTENSITY}, {}])
def test_augment_depends_on_the_seed_alone(kwargs):
    augment = Augment(ROI, spacing=SPACING, **kwargs)
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


def one_by_one(augment, image, label, draw):
    """A sample as the module's first version made it, each operation on this sample alone."""
    space = (1, 2, 3)
    if draw.matrix is None:
        for axis, n in enumerate(augment.roi_size, start=1):
            image, label = (x.narrow(axis, (x.shape[axis] - n) // 2, n) for x in (image, label))
        image, label = (x.flip([axis + 1 for axis in draw.flips]) for x in (image, label))
    else:
        matrix = draw.matrix * [-1 if axis in draw.flips else 1 for axis in range(3)]
        ramps = [torch.arange(n) - (n - 1) / 2 for n in augment.roi_size]
        columns = []
        for row, n in zip(matrix.tolist(), augment.input_size, strict=True):
            h, w, d = (ramp * (2 * entry / n) for ramp, entry in zip(ramps, row, strict=True))
            columns.append(h[:, None, None] + w[:, None] + d)
        grid = torch.stack(columns[::-1], -1)[None]
        image, label = (
            F.grid_sample(x[None].float(), grid, mode, align_corners=False)[0].to(x.dtype)
            for x, mode in ((image, "bilinear"), (label, "nearest"))
        )

    def gamma(x, value):
        low, high = x.amin(space, True), x.amax(space, True)
        raised = ((x - low) / (high - low).clamp(min=1e-7)) ** value
        (std, mean), (s, m) = (torch.std_mean(y, space, keepdim=True) for y in (x, raised))
        return (raised - m) * (std / s.clamp(min=1e-7)) + mean

    for name, value in draw.intensity.items():
        if name == "noise":
            generator = torch.Generator().manual_seed(draw.noise_seed)
            image = image + value * torch.randn(image.shape, generator=generator)
        elif name == "blur":
            radius = int(4 * value + 0.5)
            weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / value) ** 2)
            weights = (weights / weights.sum()).tolist()
            for axis in space:
                index = torch.arange(-radius, image.shape[axis] + radius)
                padded = image.index_select(axis, index.clamp(0, image.shape[axis] - 1))
                length, image = image.shape[axis], torch.zeros_like(image)
                for start, weight in enumerate(weights):
                    image.add_(padded.narrow(axis, start, length), alpha=weight)
        elif name == "contrast":
            low, high, mean = (f(image, space, True) for f in (torch.amin, torch.amax, torch.mean))
            image = ((image - mean) * value + mean).clamp(low, high)
        elif name == "brightness":
            image = image * value
        else:
            image = gamma(image, value) if name == "gamma" else -gamma(-image, value)
    return image, label


SOMETIMES = {name: {"prob": 0.5} for name in INTENSITY}


@pytest.mark.parametrize("roi", [(5, 7, 3), ROI])  # 105 voxels: no whole number of vectors
@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_augment_of_a_batch_is_that_of_each_sample_bit_for_bit(roi, num_channels, batch_size):
    spatial = {name: {"prob": 0.4} for name in ("rotation", "scale", "flip")}
    augment = Augment(roi, spacing=SPACING, spatial=spatial, intensity=SOMETIMES)
    for first in range(0, 4 * batch_size, batch_size):
        seeds = [*range(first, first + batch_size)]
        batch = make_batch(augment.input_size, seeds, num_channels)
        images, labels = augment(batch)
        for n, seed in enumerate(seeds):
            draw = augment.draw(seed)
            image, label = one_by_one(augment, batch["image"][n], batch["label"][n], draw)
            assert torch.equal(images[n], image), draw
            assert torch.equal(labels[n], label), draw


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


def test_augment_differs_between_seeds():
    augment = Augment(ROI, spatial=MOVED, intensity=ALL_INTENSITY)
    image, label = augment(make_batch(augment.input_size, [0, 0]) | {"seed": torch.tensor([1, 2])})
    assert (image[0] - image[1]).abs().mean() > 0.01
    assert not torch.equal(label[0], label[1])


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


@pytest.mark.parametrize("spacing", [(1, 1, 1), SPACING])
def test_input_size_is_enough_for_extreme_draws_and_no_larger_than_needed(spacing):
    scale = {"prob": 1, "range": [0.7, 0.7]}
    needed = np.zeros(3)
    input_size = Augment(ROI, spacing=spacing, spatial={"scale": scale}).input_size
    ones = {"image": torch.ones(1, 1, *input_size)}
    ones["label"] = torch.ones(1, 1, *input_size, dtype=torch.uint8)
    rng = np.random.default_rng(0)
    signs = np.stack(np.meshgrid(*[[-30, 0, 30]] * 3), -1).reshape(-1, 3)
    for degrees in (*signs, *rng.uniform(-30, 30, (60, 3))):
        rotation = {"prob": 1, "degrees": [[d, d] for d in degrees.tolist()]}
        exact = Augment(
            ROI,
            spacing=spacing,
            spatial={"scale": scale, "rotation": rotation},
            intensity=NO_INTENSITY,
        )
        needed = np.maximum(needed, exact.input_size)
        exact.input_size = input_size
        image, label = exact(ones | {"seed": torch.tensor([0])})
        assert image.min() > 1 - 1e-4
        assert label.min() == 1
    assert (needed <= input_size).all()
    assert (input_size - needed <= 2).all()
    assert ((np.array(input_size) - ROI) % 2 == 0).all()


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
    found = np.array(ROI) + 2 * (max_reach / 0.7 - half) / spacing
    assert (size >= found - 1e-6).all()
    assert (size <= found + 4).all()


def test_augment_works_on_a_thin_roi():
    augment = Augment((1, 8, 8), spatial=MOVED)
    image, _ = augment(make_batch(augment.input_size, [0, 1]))
    assert image.shape == (2, 2, 1, 8, 8)
    assert image.isfinite().all()


def test_draw_honours_probabilities_and_ranges():
    augment = Augment(ROI, flip_axes=[0, 2], spatial={"scale": {"prob": 0}})
    draws = [augment.draw(seed) for seed in range(4000)]
    for name, settings in INTENSITY.items():
        values = [d.intensity[name] for d in draws if name in d.intensity]
        assert abs(len(values) / 4000 - settings["prob"]) < 0.03
        low, high = next(value for key, value in settings.items() if key != "prob")
        assert low <= min(values) < low + 0.1 * (high - low)
        assert high >= max(values) > high - 0.1 * (high - low)
        if "range" in settings:
            assert abs(np.mean(np.array(values) < 1) - 0.5) < 0.1
    assert abs(np.mean([d.matrix is not None for d in draws]) - 0.2) < 0.03
    flips = np.array([[axis in d.flips for axis in range(3)] for d in draws]).mean(0)
    assert np.abs(flips - [0.5, 0, 0.5]).max() < 0.03


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
        ({"spatial": {"flip": {"prob": True}}}, r"flip#prob: .* got True"),
        ({"spatial": {"scale": {"range": [0, 1]}}}, r"scale#range: .* 0 < lo <= hi, got \[0, 1\]"),
        ({"spatial": {"scale": {"range": [2, 1]}}}, r"leave it out for \[0.7, 1.4\]"),
        ({"spatial": {"rotation": {"degrees": [1, -1]}}}, r"rotation#degrees: .*lo <= hi"),
        ({"spatial": {"rotation": {"degrees": 200}}}, r"within -180..180"),
        ({"spatial": {"rotation": {"degrees": [[1, 2], [3]]}}}, r"rotation#degrees"),
        ({"intensity": {"noise": {"std": [-1, 1]}}}, r"noise#std: .*0 <= lo"),
        ({"intensity": {"blur": {"sigma": "1"}}}, r"blur#sigma: .* got '1'"),
        ({"intensity": {"gamma": {"range": [1, float("inf")]}}}, r"gamma#range"),
        ({"roi_size": [8, 8]}, r"roi_size: expected three whole numbers above 0, got \[8, 8\]"),
        ({"roi_size": [8, 8, 8.0]}, r"roi_size"),
        ({"spacing": [1, 0, 1]}, r"spacing: expected three sizes in mm above 0"),
        ({"enabled": "false"}, r"enabled: expected true or false, got 'false'"),
    ],
)
def test_augment_refuses_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Augment(**({"roi_size": ROI} | kwargs))


def test_augment_names_every_fault_in_a_line_of_its_own():
    with pytest.raises(ValueError, match="spacing") as error:
        Augment(ROI, spacing="x", spatial={"spin": {}}, intensity={"gamma": {"prob": -1}})
    assert len(str(error.value).splitlines()) == 3


def test_augment_refuses_a_crop_of_another_size_and_missing_seeds():
    augment = Augment(ROI)
    with pytest.raises(ValueError, match=r"image: expected a spatial size of .*, got \(12, 15, 10"):
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
