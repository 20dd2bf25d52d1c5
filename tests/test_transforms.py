import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Lambdad
from scipy import ndimage

from pipeline.data.cache import CachedDataset, VolumeCache
from transforms.postprocess import ToOriginalGridd, to_original_grid
from transforms.preprocess import (
    CropEmptyBordersd,
    NormalizeChannelsd,
    ValidationPreprocessing,
    preprocessing,
)

# ---- grids: voxel sizes in mm, then axis order and signs, then a turn in degrees

GRIDS = {
    "RAS": ((1.0, 1.5, 2.0), (0, 1, 2), (1, 1, 1), 0),
    "flipped LPS": ((1.0, 1.5, 2.0), (0, 1, 2), (-1, -1, 1), 0),
    "permuted": ((1.2, 2.5, 0.9), (2, 0, 1), (1, -1, 1), 0),
    "oblique": ((1.0, 1.4, 2.2), (0, 1, 2), (1, 1, 1), 17),
    "oblique, permuted, flipped": ((0.9, 3.0, 1.1), (1, 2, 0), (-1, 1, -1), 12),
}
SPACING = (1.3, 1.1, 1.7)


def make_affine(spacing, order, signs, degrees):
    """Array axis n runs along world axis order[n], by signs[n], turned about all three axes."""
    affine = np.eye(4)
    for n in range(3):
        affine[:3, n] = 0
        affine[order[n], n] = signs[n] * spacing[n]
    turn = np.eye(3)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        one = np.eye(3)
        one[[i, i, j, j], [i, j, i, j]] = [
            np.cos(np.deg2rad(degrees)),
            -np.sin(np.deg2rad(degrees)),
            np.sin(np.deg2rad(degrees)),
            np.cos(np.deg2rad(degrees)),
        ]
        turn = turn @ one
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = (-11.5, 7.25, 30.125)
    return affine


def voxels_of(shape):
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)  # (H, W, D, 3)


def world(shape, affine):
    """Position in mm of every voxel, `(H, W, D, 3)`."""
    affine = np.asarray(affine, dtype=np.float64)
    return voxels_of(shape) @ affine[:3, :3].T + affine[:3, 3]


@pytest.fixture(params=GRIDS.values(), ids=GRIDS)
def affine(request):
    return make_affine(*request.param)


def save(folder, name, voxels, affine):
    path = folder / f"{name}.nii.gz"
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return str(path)


SHAPE = (24, 20, 16)


def smooth(mm):
    """A smooth function of the position with periods of some 40 mm."""
    return np.sin(mm @ [0.15, 0.02, 0.0]) + np.cos(mm @ [0.0, 0.13, 0.1]) + 0.02 * mm[..., 2]


def test_preprocessing_agrees_with_scipy(tmp_path, affine):
    """SciPy interpolates linearly at the same points of the world, the edge repeated."""
    image = (smooth(world(SHAPE, affine)) * 100).astype(np.float32)
    got = preprocessing(SPACING)({"image": save(tmp_path, "a", image, affine)})["image"]
    assert (got.dtype, got.ndim, got.shape[0]) == (torch.float32, 4, 1)
    new = got.affine.numpy()
    assert nib.aff2axcodes(new) == ("R", "A", "S")
    np.testing.assert_allclose(nib.affines.voxel_sizes(new), SPACING, rtol=1e-6)
    # the axes keep their directions: only their order and signs change
    turned = (new[:3, :3] / SPACING).T @ (affine[:3, :3] / nib.affines.voxel_sizes(affine))
    np.testing.assert_allclose(np.sort(np.abs(turned))[:, 2], 1, atol=1e-6)
    ijk = world(got.shape[1:], np.linalg.inv(affine) @ new)
    expected = ndimage.map_coordinates(
        image.astype(np.float64), np.moveaxis(ijk, -1, 0), order=1, mode="nearest"
    )
    expected = (expected - expected.mean()) / expected.std()
    np.testing.assert_allclose(got[0].numpy(), expected, atol=1e-4)


def test_preprocessing_keeps_label_values(tmp_path, affine):
    rng = np.random.default_rng(0)
    label = rng.choice([0, 2, 5, 200], size=SHAPE).astype(np.int16)
    case = {
        "image": save(tmp_path, "image", rng.normal(size=SHAPE).astype(np.float32), affine),
        "label": save(tmp_path, "label", label, affine),
    }
    got = preprocessing(SPACING)(case)
    assert got["label"].dtype == torch.uint8
    assert got["label"].shape == got["image"].shape
    np.testing.assert_allclose(got["label"].affine, got["image"].affine)
    ijk = world(got["label"].shape[1:], np.linalg.inv(affine) @ got["label"].affine.numpy())
    # where it is clear which voxel is the nearest
    clear = (np.abs(ijk - np.floor(ijk) - 0.5) > 0.01).all(-1)
    nearest = np.clip(np.rint(ijk).astype(int), 0, np.array(SHAPE) - 1)
    expected = label[tuple(np.moveaxis(nearest, -1, 0))]
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(got["label"][0].numpy()[clear], expected[clear])


def test_preprocessing_takes_one_file_per_channel(tmp_path):
    rng = np.random.default_rng(0)
    files = [
        save(tmp_path, name, rng.normal(size=(6, 7, 8)).astype(np.float32), np.eye(4))
        for name in ("t1", "t2")
    ]
    got = preprocessing((1, 1, 1))({"image": files})["image"]
    assert got.shape == (2, 6, 7, 8)
    values = nib.load(files[1]).get_fdata()
    np.testing.assert_allclose(got[1], (values - values.mean()) / values.std(), atol=1e-5)


# ---- the user's own transforms, missing keys, mistakes


def test_users_transforms_run_after_loading_and_at_the_end(tmp_path):
    affine = make_affine(*GRIDS["permuted"])
    image = np.random.default_rng(0).uniform(10, 20, SHAPE).astype(np.float32)
    seen = []

    def look(volume):
        seen.append((tuple(volume.shape), volume.affine.numpy(), float(volume.mean())))
        return volume.clip(max=15) if len(seen) == 1 else volume + 5

    own = [Lambdad("image", look)]
    case = {"image": save(tmp_path, "image", image, affine)}
    got = preprocessing(SPACING, before=own, after=own)(case)["image"]
    assert seen[0][0] == (1, *SHAPE) != seen[1][0] == tuple(got.shape)
    np.testing.assert_allclose(seen[0][1], affine, atol=1e-4)
    assert nib.aff2axcodes(seen[1][1]) == ("R", "A", "S")
    assert [mean for _, _, mean in seen] == pytest.approx([image.mean(), 0], abs=1e-4)
    # the same as with a file that was clipped before
    clipped = {"image": save(tmp_path, "clipped", image.clip(max=15), affine)}
    np.testing.assert_allclose(got, preprocessing(SPACING)(clipped)["image"] + 5, atol=1e-5)


@pytest.mark.parametrize("keys", [("image", "label"), ("image",)])
def test_preprocessing_does_without_a_label(tmp_path, keys):
    case = {
        "case_id": "a",
        "image": save(tmp_path, "a", np.eye(9)[..., None] * np.ones(9), np.eye(4)),
    }
    got = preprocessing(SPACING, keys=keys)(case)
    assert got.keys() == {"case_id", "image"}
    assert got["case_id"] == "a"


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 1, 1), (1, 0, 1), (1, 1, -2)])
def test_preprocessing_refuses_a_wrong_spacing(spacing):
    with pytest.raises(ValueError, match="spacing: expected three positive numbers in mm"):
        preprocessing(spacing)


# ---- validation and the way back


def make_case(folder, affine):
    """An image and a label of two values on its grid."""
    image = (smooth(world(SHAPE, affine)) * 100).astype(np.float32)
    label = np.digitize(image, np.quantile(image, [0.5, 0.8])).astype(np.uint8)
    case = {"case_id": "a", "image": save(folder, "image", image, affine)}
    return {**case, "label": save(folder, "label", label, affine)}, label


def test_validation_preprocessing_leaves_the_label_as_it_is(tmp_path, affine):
    case, label = make_case(tmp_path, affine)
    got = ValidationPreprocessing(preprocessing(SPACING))(case)
    assert got["label"].dtype == torch.uint8
    np.testing.assert_array_equal(got["label"].numpy(), label[None])
    np.testing.assert_allclose(got["label"].affine, affine, atol=1e-5)
    np.testing.assert_array_equal(got["image"], preprocessing(SPACING)(case)["image"])
    assert got["case_id"] == "a"


# ---- what is empty around a volume is cut off, and comes back

BOX = (slice(3, 13), slice(2, 15), slice(5, 12))  # that is not empty
START, SIZE = [3, 2, 5], [10, 13, 7]


def make_bordered(folder, affine, channels=()):
    """An image that is zero outside of `BOX`, and a label with two classes inside."""
    rng = np.random.default_rng(0)
    image = np.zeros((*SHAPE, *channels), np.float32)
    image[BOX] = rng.uniform(50, 150, (*SIZE, *channels))
    label = np.zeros(SHAPE, np.uint8)
    label[4:10, 4:12, 6:10], label[10:12, 8:13, 7:11] = 1, 2
    case = {"case_id": "a", "image": save(folder, "image", image, affine)}
    return {**case, "label": save(folder, "label", label, affine)}, image, label


def rough_logits(image):
    """Rough, so that a wrong place shows."""
    noise = np.random.default_rng(2).normal(size=(3, *image.shape[1:]))
    return torch.as_tensor(ndimage.gaussian_filter(noise, (0, 1, 1, 1)) * 30).float()


def labels_on_file(logits, image, affine):
    """Index mapping in numpy, interpolation in scipy, background outside of the box."""
    inverse = np.linalg.inv(image.affine.numpy())
    ijk = np.moveaxis(world(SHAPE, inverse @ affine), -1, 0)
    probabilities = torch.softmax(logits.double(), 0).numpy()
    on_file = [ndimage.map_coordinates(p, ijk, order=1, mode="nearest") for p in probabilities]
    labels = np.zeros(SHAPE, int)
    labels[BOX] = np.stack(on_file).argmax(0)[BOX]
    return labels


def test_crop_keeps_an_image_that_is_zero_everywhere():
    image = MetaTensor(torch.zeros(2, 4, 3, 2))
    got = CropEmptyBordersd("image")({"image": image})["image"]
    assert (got.meta["crop_start"], got.meta["crop_size"]) == ([0, 0, 0], [4, 3, 2])


@pytest.mark.parametrize("channels", [(), (2,)])
def test_crop_keeps_every_voxel_at_its_place(tmp_path, affine, channels):
    case, image, label = make_bordered(tmp_path, affine, channels)
    process = preprocessing(SPACING, crop_empty_borders=True)
    crop = process.regularize.transforms
    names = [type(one).__name__ for one in crop]
    assert names.index("CropEmptyBordersd") < names.index("Orientationd")
    data = process.load(case)
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


@pytest.mark.parametrize("way", ["straight", "loader", "cache"])
def test_prediction_comes_back_to_its_place(tmp_path, affine, way):
    case, _, label = make_bordered(tmp_path, affine)
    transform = ValidationPreprocessing(preprocessing(SPACING, crop_empty_borders=True))
    data = transform(case)
    if way == "cache":
        cache = VolumeCache(tmp_path / "cache", 2**30, {"recipe": 1})
        data = CachedDataset([case], transform, cache)[0]
    logits = rough_logits(data["image"])
    data = {**data, "pred": MetaTensor(logits)}
    if way != "straight":
        data = decollate_batch(next(iter(DataLoader([data], collate_fn=list_data_collate))))[0]
    got = ToOriginalGridd()(data)
    expected = labels_on_file(logits, data["image"], affine)
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


@pytest.mark.parametrize("box", [(4, 5, 4), (slice(0, 2), 3, slice(3, 9))])
def test_volume_of_one_slice_comes_back_to_its_place(tmp_path, box):
    case, *_ = make_bordered(tmp_path, np.eye(4))
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
        {"clip": "01", "mean": 0, "std": 1},
        {"clip": [0, float("nan")], "mean": 0, "std": 1},
        {"clip": [0, 1], "mean": 0, "std": float("inf")},
    ],
)
def test_normalization_is_refused_when_it_is_none(wrong):
    with pytest.raises(ValueError, match="normalization: expected one of zscore"):
        NormalizeChannelsd([wrong])


@pytest.mark.parametrize("validation", [False, True])
def test_label_of_a_client_is_put_on_the_grid_of_its_image(validation):
    affine = np.diag([1.0, 1.0, 1.5, 1])
    voxels = np.random.default_rng(0).integers(0, 3, (7, 6, 5)).astype(np.float32)
    label = nib.Nifti1Image(voxels, affine)
    turned = label.as_reoriented(np.array([[1, -1], [2, 1], [0, 1]]))  # other axes, one place
    bare = {"original_channel_dim": "no_channel"}
    meta = {**bare, "original_affine": affine, "spatial_shape": np.array(voxels.shape)}
    case = {
        "image": MetaTensor(torch.as_tensor(voxels), affine=torch.as_tensor(affine), meta=meta),
        "label": MetaTensor(
            torch.as_tensor(turned.get_fdata().copy()), torch.as_tensor(turned.affine), bare
        ),
    }
    process = preprocessing((1.0, 1.0, 1.5))
    got = (ValidationPreprocessing(process) if validation else process)(case)["label"]
    np.testing.assert_array_equal(got[0], voxels)
