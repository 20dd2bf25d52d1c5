"""Augmentation on the training device: one resampling, then intensity, a pure function of a seed.

Operations, order and defaults are nnU-Net's (Isensee et al., Nature Methods 18, 2021), but space is
physical, a scale above 1 magnifies, all channels share parameters, and there is no low resolution.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation

Size = tuple[int, ...]
Settings = Mapping[str, Any]
Images = Sequence[torch.Tensor]  # (C, H, W, D) each, of one shape
SPACE = (-3, -2, -1)  # the axes

SPATIAL: Settings = {
    "rotation": {"prob": 0.2, "degrees": [-30, 30]},  # about each axis
    "scale": {"prob": 0.2, "range": [0.7, 1.4]},
    "flip": {"prob": 0.5},  # for each axis of flip_axes
}
INTENSITY: Settings = {  # in order of application, for images normalised to mean 0 and std 1
    "noise": {"prob": 0.1, "std": [0.0, 0.1]},
    "blur": {"prob": 0.2, "sigma": [0.5, 1.0]},  # voxels
    "brightness": {"prob": 0.15, "range": [0.75, 1.25]},
    "contrast": {"prob": 0.15, "range": [0.75, 1.25]},
    "gamma_inverted": {"prob": 0.1, "range": [0.7, 1.5]},
    "gamma": {"prob": 0.3, "range": [0.7, 1.5]},
}
WORDS = re.compile(r"[A-Za-z]\d+|[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # L1 is one, LKidney two
SIDES = re.compile(r"(left|right|sinist|dext).*|[lr][th]?")


@dataclass(frozen=True)
class Draw:
    """The parameters of one sample, drawn from its seed."""

    matrix: np.ndarray | None  # (3, 3), output to input offsets from the centre, in voxels
    flips: tuple[int, ...]  # spatial axes
    intensity: dict[str, float]  # operation -> value, in order of application
    noise_seed: int


class Augment:
    """Rotate, scale, flip, crop and change the intensity of a batch: MONAI's `prepare_batch`.

    The result depends on the sample's seed alone, bit for bit, not on its batch. Samples therefore
    share a kernel only where each voxel is computed from its own sample with one rounding per
    operation; sums over voxels and powers are computed sample by sample. (On CUDA, if the voxels in
    `roi_size` are not a multiple of four, results agree to rounding.) Parameters come from the host
    or pinned memory, so that the host never waits for the device.

    Args:
        roi_size: Size of what is returned, in voxels.
        spacing: Voxel size in mm, in array-axis order.
        flip_axes: Spatial axes that may be flipped, or `"auto"` (see `resolve_flip_axes`).
        class_names: Names of the classes, for `flip_axes="auto"`.
        spatial: Changes to `SPATIAL`, key by key: `{"rotation": {"prob": 0}}` turns rotation off.
        intensity: Changes to `INTENSITY`, likewise.
        enabled: If false, batches are cropped at their centre and nothing else.

    Workers deliver crops of `input_size` voxels (see `margin_size`). A `ValueError` has a line for
    each name that does not exist and each value out of range.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        *,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        flip_axes: str | Sequence[int] = "auto",
        class_names: Sequence[str] = (),
        spatial: Settings | None = None,
        intensity: Settings | None = None,
        enabled: bool = True,
    ) -> None:
        found = self.find_setting_faults(spatial=spatial, intensity=intensity, enabled=enabled)
        if faults := [f"augment#{'#'.join(place)}: {text}" for place, text in found]:
            raise ValueError("\n".join(faults))
        self.spatial, self.intensity = (
            {name: {**default, **(given or {}).get(name, {})} for name, default in defaults.items()}
            for given, defaults in ((spatial, SPATIAL), (intensity, INTENSITY))
        )
        self.roi_size: Size = tuple(int(n) for n in roi_size)
        self.spacing = np.asarray(spacing, float)
        self.flip_axes = resolve_flip_axes(flip_axes, class_names)
        self.enabled = enabled
        rotation, scale = self.spatial["rotation"], self.spatial["scale"]
        degrees = _degrees(rotation["degrees"]) if enabled and rotation["prob"] else _degrees(0)
        lowest = min(1.0, scale["range"][0]) if enabled and scale["prob"] else 1.0
        self.input_size = margin_size(self.roi_size, self.spacing, degrees, lowest)

    @staticmethod
    def find_setting_faults(**given: Any) -> Iterator[tuple[list[str], str]]:
        """Yield the place and text of each fault in `spatial`, `intensity` and `enabled`."""
        for where, defaults in (("spatial", SPATIAL), ("intensity", INTENSITY)):
            yield from _find_faults([where], given.get(where), defaults)
        if not isinstance(enabled := given.get("enabled", True), bool):  # "false" is true
            yield ["enabled"], f"expected true or false, got {enabled!r}. Correct it."

    @torch.no_grad()
    def __call__(
        self,
        batch: Mapping[str, torch.Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment one batch on `device`, by default where `image` is.

        Args:
            batch: `image` (B, C, *input_size); `label` (B, 1, *input_size), integers below 2**24;
                `seed` (B,) int64 on the CPU, which is not read if `enabled` is false.
            non_blocking: As for `Tensor.to`.
            kwargs: For `Tensor.to` of the returned image, such as `memory_format`.

        Returns:
            `image` (B, C, *roi_size) float32, and `label` (B, 1, *roi_size) in its own dtype.
        """
        self._check(batch)
        images, labels = (batch[key].as_subclass(torch.Tensor) for key in ("image", "label"))
        device = device or images.device
        images = images.to(device, torch.float32, non_blocking=non_blocking)
        labels = labels.to(device, non_blocking=non_blocking)
        draws = [Draw(None, (), {}, 0)] * len(images)
        if self.enabled:
            draws = [self.draw(seed) for seed in batch["seed"].tolist()]
        parts, label_parts = self._place(images, labels, draws)
        for name in self.intensity:
            chosen = [n for n, draw in enumerate(draws) if name in draw.intensity]
            if chosen:
                values = [draws[n].intensity[name] for n in chosen]
                seeds = [draws[n].noise_seed for n in chosen]
                change = partial(add_noise, seeds=seeds) if name == "noise" else CHANGES[name]
                changed = change([parts[n] for n in chosen], values)
                for n, part in zip(chosen, changed, strict=True):
                    parts[n] = part
        image, label = torch.stack(parts), torch.stack(label_parts)
        return (image.to(**kwargs) if kwargs else image), label

    def _check(self, batch: Mapping[str, torch.Tensor]) -> None:
        got = {key: tuple(batch[key].shape[2:]) for key in ("image", "label")}
        if {*got.values()} != {self.input_size}:
            raise ValueError(
                f"augment: expected a spatial size of {self.input_size}, got {got}. "
                "Let the sampler crop Augment.input_size voxels."
            )
        seed = batch.get("seed")
        if self.enabled and (seed is None or seed.is_cuda or len(seed) != len(batch["image"])):
            raise ValueError(
                f"augment#seed: expected an int64 for each sample, on the CPU, got {seed}. Add it."
            )

    def draw(self, seed: int) -> Draw:
        """Draw a sample's parameters; turning one operation off does not move the others."""
        random = np.random.default_rng(seed % 2**64)
        spatial = self.spatial
        # all at once: the same numbers as one by one
        coin, u, v, w, scale_coin, scale_u, *others = random.random(9 + 2 * len(self.intensity))
        rotated = coin < spatial["rotation"]["prob"]
        scale = _value(scale_coin, scale_u, spatial["scale"])
        matrix = None
        if rotated or scale is not None:
            low, high = _degrees(spatial["rotation"]["degrees"]).T
            angles = low + np.array([u, v, w]) * (high - low)
            # from voxels to mm, turned, and back: entry (i, j) gains spacing_j / spacing_i
            matrix = _rotation(angles * rotated) * self.spacing / self.spacing[:, None]
            matrix = matrix / (1.0 if scale is None else scale)
        prob = spatial["flip"]["prob"]
        flips = tuple(axis for axis in self.flip_axes if others[axis] < prob)
        coins, us = others[3::2], others[4::2]
        values = {
            name: _value(coin, u, known)
            for (name, known), coin, u in zip(self.intensity.items(), coins, us, strict=True)
        }
        intensity = {name: value for name, value in values.items() if value is not None}
        return Draw(matrix, flips, intensity, int(random.integers(2**63)))

    def _place(
        self, images: torch.Tensor, labels: torch.Tensor, draws: Sequence[Draw]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Rotate, scale, flip and cut samples (C, *input_size) and (1, *input_size)."""
        moved = [n for n, draw in enumerate(draws) if draw.matrix is not None]
        image, label = (
            [  # without a matrix no interpolation: voxels keep their exact values
                x if draw.matrix is not None else crop_and_flip(x, self.roi_size, draw.flips)
                for x, draw in zip(batch, draws, strict=True)
            ]
            for batch in (images, labels)
        )
        if moved:
            signs = [[-1 if axis in draws[n].flips else 1 for axis in range(3)] for n in moved]
            matrices = np.array([draws[n].matrix for n in moved]) * np.array(signs)[:, None]
            grid = sampling_grid(matrices, self.roi_size, self.input_size, images.device)
            turned = F.grid_sample(_stacked([image[n] for n in moved]), grid, align_corners=False)
            classes = _stacked([label[n] for n in moved]).float()
            classes = F.grid_sample(classes, grid, "nearest", align_corners=False).to(labels.dtype)
            for n, x, y in zip(moved, turned, classes, strict=True):
                image[n], label[n] = x, y
        return image, label


def resolve_flip_axes(
    flip_axes: str | Sequence[int], class_names: Sequence[str] = ()
) -> tuple[int, ...]:
    """Return the axes that may be flipped; axis 0 of the volume is the patient's left-right (RAS).

    `"auto"` is all three, or (1, 2) if a class name has a word for a side: left, right, l, r, lt,
    rt, lh, rh, sinister, dexter and their forms, set apart by punctuation or case ("kidney_r",
    "LKidney"). L1 is a vertebra and no side; the ventricles LV and RV differ in shape.
    """
    if flip_axes == "auto":
        words = (word.lower() for name in class_names for word in WORDS.findall(name))
        return (1, 2) if any(SIDES.fullmatch(word) for word in words) else (0, 1, 2)
    if not isinstance(flip_axes, list | tuple) or not {*flip_axes} <= {0, 1, 2}:
        raise ValueError(
            'augment#flip_axes: expected "auto" or a list of axes 0, 1 and 2, got '
            f"{flip_axes!r}. Correct it."
        )
    return tuple(sorted({*flip_axes}))


def margin_size(
    roi_size: Size, spacing: np.ndarray, degrees: np.ndarray, lowest_scale: float
) -> Size:
    """Return the size of the crop that contains every rotation and scale in range.

    The farthest sample on axis i is the largest `sum_j |R_ij| half_j` over the rotations R,
    searched on a grid of angles. Second derivatives are at most `norm(half)`, which bounds what the
    grid misses: at the maximum, an angle is an end of its range or has a first derivative of zero.
    Sizes are in voxels, of one parity so that centres coincide; `spacing` is in mm, `degrees`
    (3, 2) holds the lowest and highest angle about each axis, `lowest_scale` is at most 1.
    """
    half = (np.asarray(roi_size) - 1) / 2 * spacing  # mm, from the centre to the last voxel's
    angles = np.meshgrid(*(np.unique(np.linspace(low, high, 41)) for low, high in degrees))
    turns = np.abs(_rotation(np.stack(angles, -1).reshape(-1, 3)))
    missed = np.deg2rad(np.ptp(degrees, axis=1) / 80).sum() ** 2 / 2 * np.linalg.norm(half)
    reach = np.minimum((turns @ half).max(0) + missed, np.linalg.norm(half))
    reach = np.maximum(reach, half) / lowest_scale  # at least half: rotation may not be drawn
    margin = np.ceil((reach - half) / spacing - 1e-6)
    return tuple(n + 2 * int(m) for n, m in zip(roi_size, margin, strict=True))


def crop_and_flip(x: torch.Tensor, size: Size, flips: Sequence[int]) -> torch.Tensor:
    """Return the central `size` voxels of `x` (C, H, W, D), flipped along the axes `flips`."""
    for axis, length in enumerate(size, start=1):
        x = x.narrow(axis, (x.shape[axis] - length) // 2, length)
    return x.flip([axis + 1 for axis in flips])


def sampling_grid(
    matrices: np.ndarray, roi_size: Size, input_size: Size, device: torch.device
) -> torch.Tensor:
    """Return a grid for `grid_sample` with `align_corners=False`, (N, *roi_size, 3) float32.

    `matrices` (N, 3, 3) map output to input offsets from the centre, in voxels. `F.affine_grid`
    is not used: its matrix product may run in TF32, which is off by a tenth of a voxel.
    """
    factors = (2 * matrices / np.asarray(input_size)[:, None]).astype(np.float32)
    factors = factors[:, ::-1]  # grid_sample wants the last axis first
    ramps = [np.arange(n, dtype=np.float32) - np.float32((n - 1) / 2) for n in roi_size]  # voxels
    offsets = np.concatenate([factors[..., j, None] * ramp for j, ramp in enumerate(ramps)], -1)
    tensor = torch.from_numpy(offsets)
    if device.type == "cuda":  # from pageable memory the host would wait for the copy
        tensor = tensor.pin_memory()
    h, w, d = tensor.to(device, non_blocking=True).split(roi_size, -1)  # (N, 3, length) each
    grid = h[..., None, None] + w[..., None, :, None] + d[..., None, None, :]
    return grid.permute(0, 2, 3, 4, 1)


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack tensors; a single one becomes a view."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tuple(tensors))


def add_noise(images: Images, stds: Sequence[float], seeds: Sequence[int]) -> Images:
    """Add to each image (C, H, W, D) normal noise of its std, from a generator of its seed."""
    noise = []
    for image, seed in zip(images, seeds, strict=True):
        generator = torch.Generator(image.device).manual_seed(seed)
        noise.append(torch.randn(image.shape, generator=generator, device=image.device))
    torch._foreach_mul_(noise, list(stds))
    return torch._foreach_add(list(images), noise)


def gaussian_blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur (C, H, W, D) by `sigma` voxels, cut at 4 sigma, the border voxels repeated.

    A sum of shifted images, since a convolution would run in TF32 on a GPU.
    """
    radius = int(4 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    first, *others = (weights / weights.sum()).tolist()
    for axis in (1, 2, 3):
        pad = [0] * 6
        pad[6 - 2 * axis : 8 - 2 * axis] = [radius, radius]  # F.pad wants the last axis first
        padded = F.pad(image, pad, mode="replicate")
        length, image = image.shape[axis], padded.narrow(axis, 0, image.shape[axis]) * first
        for start, weight in enumerate(others, 1):
            image.add_(padded.narrow(axis, start, length), alpha=weight)
    return image


def adjust_contrast(images: Images, factors: Sequence[float]) -> Images:
    """Scale each (C, H, W, D) about its channels' means, cut to the channel's range."""
    stacked, mean = _stacked(images), _stacked([x.mean(SPACE, True) for x in images])
    low, high = stacked.amin(SPACE, True), stacked.amax(SPACE, True)
    changed = stacked - mean
    torch._foreach_mul_(changed.unbind(), list(factors))
    return (changed + mean).clamp(low, high).unbind()


def adjust_gamma(images: Images, gammas: Sequence[float]) -> Images:
    """Raise each (C, H, W, D) to its gamma within each channel's range, its mean and std kept."""
    stacked = _stacked(images)
    low, high = stacked.amin(SPACE, True), stacked.amax(SPACE, True)
    raised = (stacked - low) / (high - low).clamp(min=1e-7)
    torch._foreach_pow_(raised.unbind(), list(gammas))
    std, mean = _std_and_mean(images)
    raised_std, raised_mean = _std_and_mean(raised.unbind())
    changed = (raised - raised_mean) * (std / raised_std.clamp(min=1e-7)) + mean
    return changed.unbind()


def _std_and_mean(images: Images) -> list[torch.Tensor]:
    """Return std and mean of each channel, (N, C, 1, 1, 1), computed sample by sample."""
    both = [torch.std_mean(image, SPACE, keepdim=True) for image in images]
    return [_stacked(values) for values in zip(*both, strict=True)]


CHANGES: dict[str, Callable[[Images, Sequence[float]], Images]] = {
    "blur": lambda images, sigmas: list(map(gaussian_blur, images, sigmas)),
    "brightness": lambda images, factors: torch._foreach_mul(list(images), list(factors)),
    "contrast": adjust_contrast,
    "gamma_inverted": lambda images, gammas: torch._foreach_neg(
        list(adjust_gamma(torch._foreach_neg(list(images)), gammas))
    ),
    "gamma": adjust_gamma,
}


def _value(coin: float, u: float, settings: Settings) -> float | None:
    """Draw an operation's value, or None; half of the factors are below 1, as in nnU-Net."""
    (_, prob), (key, (low, high)) = settings.items()
    if coin >= prob:
        return None
    middle = 1 if key == "range" and low < 1 < high else (low + high) / 2
    return float(np.interp(u, [0, 0.5, 1], [low, middle, high]))


def _rotation(degrees: np.ndarray) -> np.ndarray:
    """Return matrices (…, 3, 3) of rotations (…, 3) about the fixed axes 0, 1 and 2, in order."""
    return Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()


def _degrees(value: Any) -> np.ndarray:
    """Expand one number, a pair or three pairs to the range of angles about each axis, (3, 2)."""
    array = np.asarray(value, float)
    return np.broadcast_to(array if array.ndim else [-abs(array), abs(array)], (3, 2))


RANGE = ("a pair [lo, hi] with 0 < lo <= hi", lambda a: a.shape == (2,) and 0 < a[0] <= a[1])
RULES: dict[str, tuple[str, Callable[[np.ndarray], Any]]] = {
    "prob": ("a probability from 0 to 1", lambda a: a.ndim == 0 and 0 <= a <= 1),
    "degrees": (
        "a number, a pair [lo, hi] or a pair for each axis, within -180..180 and lo <= hi",
        lambda a: (
            a.shape in {(), (2,), (3, 2)}
            and abs(a).max() <= 180
            and np.diff(_degrees(a)).min() >= 0
        ),
    ),
    "std": ("a pair [lo, hi] with 0 <= lo <= hi", lambda a: a.shape == (2,) and 0 <= a[0] <= a[1]),
    "range": RANGE,
    "sigma": RANGE,
}


def _find_faults(
    place: list[str], given: Any, defaults: Settings
) -> Iterator[tuple[list[str], str]]:
    names = ", ".join(defaults)
    if given is not None and not isinstance(given, Mapping):
        yield place, f"expected a mapping with keys of {names}, got {given!r}. Correct it."
        return
    for name, value in (given or {}).items():
        if name not in defaults:
            nearest = difflib.get_close_matches(str(name), defaults, 1, 0)[0]
            yield place, f"expected one of {names}, got {name!r}. Use {nearest!r} if meant."
        elif isinstance(defaults[name], Mapping):
            yield from _find_faults([*place, name], value, defaults[name])
        elif not _is_valid(name, value):
            remedy = f"Correct it, or leave it out for {defaults[name]}."
            yield [*place, name], f"expected {RULES[name][0]}, got {value!r}. {remedy}"


def _is_valid(key: str, value: Any) -> bool:
    try:
        array = np.asarray(value)
    except ValueError:  # a ragged list
        return False
    is_number = array.dtype.kind in "iuf" and array.size > 0 and np.isfinite(array).all()
    return bool(is_number and RULES[key][1](array))
