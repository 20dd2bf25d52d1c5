"""Cropping to what is not empty, intensities channel by channel, and the way back."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor, decollate_batch, list_data_collate
from scipy import ndimage

from pipeline.data.cache import CachedDataset, VolumeCache
from transforms.borders import CropEmptyBordersd, occupied_box
from transforms.normalize import NormalizeChannelsd
from transforms.postprocess import ToOriginalGridd, to_original_grid
from transforms.preprocess import ValidationPreprocessing, preprocessing

SHAPE = (16, 18, 14)
BOX = (slice(3, 13), slice(2, 15), slice(5, 12))  # that is not empty
START, SIZE = [3, 2, 5], [10, 13, 7]
SPACING = (1.3, 1.1, 1.7)
GRIDS = {
    "RAS": ((1.0, 1.5, 2.0), (0, 1, 2), (1, 1, 1), 0),
    "LPS": ((1.0, 1.5, 2.0), (0, 1, 2), (-1, -1, 1), 0),
    "permuted": ((1.2, 2.5, 0.9), (2, 0, 1), (1, -1, 1), 0),
    "oblique": ((1.0, 1.4, 2.2), (0, 1, 2), (1, 1, 1), 17),
    "oblique, permuted, flipped": ((0.9, 3.0, 1.1), (1, 2, 0), (-1, 1, -1), 12),
}


@pytest.fixture(params=GRIDS.values(), ids=GRIDS)
def affine(request):
    spacing, order, signs, degrees = request.param
    affine = np.zeros((4, 4))
    for n in range(3):
        affine[order[n], n] = signs[n] * spacing[n]
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ [[1, 0, 0], [0, c, -s], [0, s, c]]
    affine[:3] = turn @ affine[:3]
    affine[:, 3] = (-11.5, 7.25, 30.125, 1)
    return affine


def make_case(folder, affine, channels=(), case_id="a"):
    """An image that is zero outside of `BOX`, and a label with two classes inside."""
    rng = np.random.default_rng(0)
    image = np.zeros((*SHAPE, *channels), np.float32)
    image[BOX] = rng.uniform(50, 150, (*SIZE, *channels))
    label = np.zeros(SHAPE, np.uint8)
    label[4:10, 4:12, 6:10], label[10:12, 8:13, 7:11] = 1, 2
    case = {"case_id": case_id}
    for key, voxels in (("image", image), ("label", label)):
        case[key] = str(folder / f"{case_id}_{key}.nii.gz")
        nib.save(nib.Nifti1Image(voxels, affine), case[key])
    return case, image, label


def places(shape, affine):
    """Position in mm of every voxel, `(H, W, D, 3)`."""
    return nib.affines.apply_affine(np.asarray(affine), np.moveaxis(np.indices(shape), 0, -1))


# ---- cropping


@pytest.mark.parametrize("channels", [1, 3])
def test_occupied_box_agrees_with_scipy(channels):
    rng = np.random.default_rng(1)
    for _ in range(30):
        image = np.zeros((channels, 9, 8, 7), np.float32)
        for _ in range(rng.integers(1, 4)):
            image[tuple(rng.integers(0, n) for n in image.shape)] = rng.choice([-1.0, np.nan, 2])
        (expected,) = ndimage.find_objects((image != 0).any(0).astype(int))
        start, end = occupied_box(torch.as_tensor(image))
        assert [slice(a, b) for a, b in zip(start, end, strict=True)] == list(expected)


def test_occupied_box_is_the_whole_when_the_image_is_zero_everywhere():
    assert occupied_box(torch.zeros(2, 4, 3, 2)) == ([0, 0, 0], [4, 3, 2])


@pytest.mark.parametrize("channels", [(), (2,)])
def test_crop_keeps_every_voxel_at_its_place(tmp_path, affine, channels):
    case, image, label = make_case(tmp_path, affine, channels)
    crop = preprocessing(SPACING, crop_empty_borders=True).transforms
    names = [type(one).__name__ for one in crop]
    assert names.index("CropEmptyBordersd") < names.index("Orientationd")
    data = case
    for one in crop:
        data = one(data)
        if isinstance(one, CropEmptyBordersd):
            break
    file = nib.load(case["image"])
    expected = file.slicer[BOX]
    np.testing.assert_allclose(data["image"].affine, expected.affine, atol=1e-5)
    np.testing.assert_allclose(data["label"].affine, expected.affine, atol=1e-5)
    moved = image[BOX] if not channels else np.moveaxis(image[BOX], -1, 0)
    np.testing.assert_array_equal(data["image"].numpy().reshape(moved.shape), moved)
    np.testing.assert_array_equal(data["label"][0], label[BOX])
    assert (data["image"].meta["crop_start"], data["image"].meta["crop_size"]) == (START, SIZE)
    np.testing.assert_allclose(data["image"].meta["original_affine"], file.affine, atol=1e-6)


def test_crop_takes_the_image_alone_when_there_is_no_label(tmp_path):
    case, *_ = make_case(tmp_path, np.eye(4))
    image = preprocessing((1, 1, 1), crop_empty_borders=True)({"image": case["image"]})["image"]
    assert list(image.shape) == [1, *SIZE]


# ---- the way back


def logits_of(image):
    """Rough, so that a wrong place shows."""
    noise = np.random.default_rng(2).normal(size=(3, *image.shape[1:]))
    return torch.as_tensor(ndimage.gaussian_filter(noise, (0, 1, 1, 1)) * 30).float()


def expected_labels(logits, image, file):
    """Index mapping in numpy, interpolation in scipy, background outside of the box."""
    probabilities = torch.softmax(logits.double(), 0).numpy()
    ijk = nib.affines.apply_affine(
        np.linalg.inv(image.affine.numpy()), places(SHAPE, nib.load(file).affine)
    )
    on_file = np.stack(
        [
            ndimage.map_coordinates(p, np.moveaxis(ijk, -1, 0), order=1, mode="nearest")
            for p in probabilities
        ]
    )
    labels = np.zeros(SHAPE, int)
    labels[BOX] = on_file.argmax(0)[BOX]
    return labels


@pytest.mark.parametrize("way", ["straight", "loader", "cache"])
def test_prediction_comes_back_to_its_place(tmp_path, affine, way):
    case, _, label = make_case(tmp_path, affine)
    transform = ValidationPreprocessing(preprocessing(SPACING, crop_empty_borders=True))
    data = transform(case)
    if way == "cache":
        cache = VolumeCache(tmp_path / "cache", 2**30, {"recipe": 1})
        data = CachedDataset([case], transform, cache)[0]
    logits = logits_of(data["image"])
    data = {**data, "pred": MetaTensor(logits)}
    if way != "straight":
        data = decollate_batch(next(iter(DataLoader([data], collate_fn=list_data_collate))))[0]
    got = ToOriginalGridd()(data)
    expected = expected_labels(logits, data["image"], case["image"])
    assert (got["pred"].shape, got["pred"].dtype) == ((1, *SHAPE), torch.uint8)
    pred = got["pred"][0].numpy()
    outside = np.ones(SHAPE, bool)
    outside[BOX] = False
    assert not pred[outside].any()
    assert (pred == expected).mean() > 0.999
    assert len(np.unique(expected)) == 3
    np.testing.assert_allclose(got["pred"].affine, affine, atol=1e-5)
    np.testing.assert_allclose(got["image"].affine, affine, atol=1e-5)
    np.testing.assert_array_equal(got["label"][0], label)


def test_what_was_drawn_in_mm_comes_back_in_mm(tmp_path, affine):
    case, *_ = make_case(tmp_path, affine)
    image = preprocessing(SPACING, crop_empty_borders=True)({"image": case["image"]})["image"]
    centre = nib.affines.apply_affine(affine, [7.5, 8.5, 8.5])
    distance = np.linalg.norm(places(image.shape[1:], image.affine) - centre, axis=-1)
    blob = to_original_grid(torch.as_tensor(np.exp(-((distance / 4) ** 2)))[None], image)[0]
    distance = np.linalg.norm(places(SHAPE, affine) - centre, axis=-1)[BOX]
    drawn, seen = np.exp(-((distance / 4) ** 2)) > 0.4, blob.numpy()[BOX] > 0.4
    assert 2 * (drawn & seen).sum() / (drawn.sum() + seen.sum()) > 0.93
    assert drawn.sum() > 50


@pytest.mark.parametrize("box", [(4, 5, 4), (slice(0, 2), 3, slice(3, 9))])
def test_volume_of_one_slice_comes_back_to_its_place(tmp_path, box):
    case, *_ = make_case(tmp_path, np.eye(4))
    voxels = np.zeros(SHAPE, np.float32)
    voxels[box] = 7
    voxels[(box[0], box[1], box[2])] += np.arange(np.size(voxels[box])).reshape(voxels[box].shape)
    affine = np.diag([-1.0, 2.0, 1.5, 1.0])
    nib.save(nib.Nifti1Image(voxels, affine), case["image"])
    image = preprocessing((1, 2, 1.5), crop_empty_borders=True)({"image": case["image"]})["image"]
    got = to_original_grid(torch.ones(1, *image.shape[1:]), image)[0]
    np.testing.assert_array_equal(got.numpy() > 0.5, voxels > 0)


def test_batches_of_one_crop_each_come_back(tmp_path):
    """Start and size are collated to tensors, and must be those of each case again."""
    transform = preprocessing((1, 1, 1), crop_empty_borders=True)
    made = []
    for n, start in enumerate(([1, 2, 3], [4, 5, 6])):
        voxels = np.zeros(SHAPE, np.float32)
        inside = tuple(slice(s, s + 5) for s in start)
        voxels[inside] = np.random.default_rng(n).uniform(1, 2, (5, 5, 5))
        path = tmp_path / f"{n}.nii"
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
        made.append((transform({"image": str(path)}), inside))
    loader = DataLoader([data for data, _ in made], batch_size=2, collate_fn=list_data_collate)
    for data, (_, inside) in zip(decollate_batch(next(iter(loader))), made, strict=True):
        got = to_original_grid(torch.ones(1, 5, 5, 5), data["image"])[0].numpy()
        expected = np.zeros(SHAPE)
        expected[inside] = 1
        np.testing.assert_allclose(got, expected, atol=1e-6)


# ---- intensities


def volume(channels=3):
    values = np.random.default_rng(4).gamma(2, 50, (channels, 9, 8, 7)).astype(np.float32)
    return MetaTensor(torch.as_tensor(values), affine=np.diag([2.0, 3, 4, 1])), values


def zscore(values):
    values = values.astype(np.float64)
    return (values - values.mean()) / values.std()


def clipped(values):
    return np.clip(values, *np.percentile(values.astype(np.float64), (0.5, 99.5)))


def test_channels_are_normalised_each_in_its_own_way():
    image, values = volume()
    image.meta["crop_start"] = START
    units = {"clip": [20, 300], "mean": 90.0, "std": 40.0}
    got = NormalizeChannelsd(["zscore", "percentile_zscore", units])({"image": image})["image"]
    expected = [
        zscore(values[0]),
        zscore(clipped(values[1])),
        (np.clip(values[2].astype(np.float64), 20, 300) - 90) / 40,
    ]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-4)
    assert (got.meta["crop_start"], got.dtype) == (START, torch.float32)
    np.testing.assert_array_equal(got.affine, np.diag([2.0, 3, 4, 1]))


@pytest.mark.parametrize(("name", "oracle"), [("zscore", zscore), ("percentile_zscore", clipped)])
def test_one_normalization_is_for_all_channels(name, oracle):
    image, values = volume()
    got = NormalizeChannelsd(name)({"image": image})["image"]
    expected = [zscore(channel if oracle is zscore else clipped(channel)) for channel in values]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-4)


def test_image_of_one_value_is_normalised_to_zero():
    for name in ("zscore", "percentile_zscore"):
        image = MetaTensor(torch.full((1, 4, 4, 4), 7.0))
        assert not NormalizeChannelsd(name)({"image": image})["image"].any()


def test_normalization_is_refused_when_channels_and_entries_differ():
    with pytest.raises(ValueError, match="expected 3 entries, one per channel, got 2"):
        NormalizeChannelsd(["zscore", "zscore"])({"image": volume()[0]})


@pytest.mark.parametrize(
    "wrong",
    [
        "minmax",
        None,
        3,
        {"clip": [0, 1], "mean": 0},
        {"clip": [1, 0], "mean": 0, "std": 1},
        {"clip": [0, 1], "mean": 0, "std": 0},
        {"clip": [0, 1, 2], "mean": 0, "std": 1},
        {"clip": "01", "mean": 0, "std": 1},
        {"clip": [0, 1], "mean": "0", "std": 1},
        {"clip": [0, float("nan")], "mean": 0, "std": 1},
        {"clip": [0, 1], "mean": float("nan"), "std": 1},
        {"clip": [0, 1], "mean": 0, "std": float("inf")},
    ],
)
def test_normalization_is_refused_when_it_is_none(wrong):
    with pytest.raises(ValueError, match="normalization: expected one of zscore"):
        NormalizeChannelsd([wrong])
