"""The fingerprint of a dataset, and the plan that is made of it."""

import itertools
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from conftest import make_dataset, write_case, write_dataset_json

from pipeline.data.dataset import load_cases
from pipeline.data.memory import RESERVE, TrainingStep
from pipeline.data.plan import AUTO, SETTINGS, Planner, choose_strides
from pipeline.data.preflight import preflight
from pipeline.data.statistics import ChannelFingerprint, ClassFingerprint, DatasetFingerprint
from pipeline.errors import InputError
from transforms.preprocess import preprocessing

GIB = 2**30

CT = ChannelFingerprint("CT", [0, 1], [0, 1], 40.0, 20.0, {"0.5": -60.0, "99.5": 200.0})
EMPTY = replace(CT, foreground_mean=None, foreground_std=None, foreground_percentiles={})
CLASSES = [ClassFingerprint(name, 1, 1.0) for name in ("background", "tumour")]


def fingerprint_of(spacings, shapes, num_channels=1, **changes):
    """One of a dataset whose cases have these grids."""
    known = {"occupied_shapes": shapes, "occupied_share": 1.0, "channels": [EMPTY]}
    known |= {"classes": CLASSES} | changes
    return DatasetFingerprint(len(shapes), num_channels, spacings, shapes, **known)


def declare(class_names=None, channel_names=None, ignore_value=None):
    """What a plan asks of a dataset."""
    declared = {"class_names": class_names, "channel_names": channel_names, "train": [{}] * 4}
    return SimpleNamespace(name="dataset.json", ignore_value=ignore_value, **declared)


def plan_of(fingerprint, dataset=None, *, budget=8 * GIB, base_channels=32, **given):
    settings = {**dict.fromkeys(SETTINGS, AUTO), "base_channels": base_channels, **given}
    return Planner(fingerprint, dataset or declare(), budget).make_plan(settings)


def needed_bytes(*step):
    return (1 + RESERVE) * TrainingStep(*step).estimate_bytes()


def faults_of(*arguments, **keywords):
    with pytest.raises(InputError) as caught:
        plan_of(*arguments, **keywords)
    return caught.value.faults


# ---- fingerprint


def rotated(spacing, order, signs, degrees=0):
    affine = np.zeros((4, 4))
    for n in range(3):
        affine[order[n], n] = signs[n] * spacing[n]
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    affine[:3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ affine[:3]
    affine[:, 3] = (3, -4, 5, 1)
    return affine


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize(("signs", "degrees"), [((1, 1, 1), 0), ((-1, 1, -1), 20)])
def test_fingerprint_has_the_axes_that_nibabel_makes_of_a_file(tmp_path, order, signs, degrees):
    affine = rotated((1.0, 1.5, 4.0), order, signs, degrees)
    for n in (1, 2):
        write_case(tmp_path, f"c{n}", seed=n, size=(20, 18, 12), affine=affine)
        path = tmp_path / "imagesTr" / f"c{n}.nii.gz"
        voxels = np.asarray(nib.load(path).dataobj).copy()
        voxels[:3], voxels[:, 15:] = 0, 0  # 17 x 15 x 12 are left
        nib.save(nib.Nifti1Image(voxels, affine), path)
    write_dataset_json(tmp_path, ["c1", "c2"])
    found = preflight(load_cases(tmp_path, num_folds=2))
    assert found.issues == []
    image = nib.as_closest_canonical(nib.load(path))
    left = [1 + np.ptp(axis) for axis in np.nonzero(image.get_fdata())]
    for n in range(2):
        assert found.fingerprint.shapes[n] == list(image.shape)
        assert found.fingerprint.occupied_shapes[n] == left
        np.testing.assert_allclose(
            found.fingerprint.spacings_mm[n], image.header.get_zooms(), rtol=1e-6
        )
    assert found.fingerprint.occupied_share == pytest.approx(17 * 15 / (20 * 18))


def test_fingerprint_counts_classes_and_grey_values(tmp_path):
    cases = load_cases(make_dataset(tmp_path / "d", 4), num_folds=2)
    got = preflight(cases).fingerprint
    every = cases.train + cases.validation
    images, labels = (
        [nib.load(case[key]).get_fdata() for case in every] for key in ("image", "label")
    )
    assert [entry.name for entry in got.classes] == ["background", "dim", "bright"]
    for value, entry in enumerate(got.classes):
        counts = [(label == value).sum() for label in labels]
        assert entry.num_cases == 4
        assert entry.median_volume_ml == pytest.approx(np.median(counts) * 1.5 / 1000)
    (channel,) = got.channels
    for found, values in ((channel.means, [i.mean() for i in images]),
                          (channel.stds, [i.std() for i in images])):  # fmt: skip
        assert found == pytest.approx([min(values), max(values)])
    levels = (np.arange(200) + 0.5) / 200
    pooled = [
        np.quantile(i.ravel("F")[label.ravel("F") > 0], levels)
        for i, label in zip(images, labels, strict=True)
    ]
    for name, value in channel.foreground_percentiles.items():
        assert value == pytest.approx(np.percentile(pooled, float(name)))
    assert json.loads(json.dumps(asdict(got))) == asdict(got)


@pytest.mark.parametrize("level", ["fast", "off"])
def test_fingerprint_is_of_headers_alone_when_voxels_are_not_to_be_read(tmp_path, level):
    """Also when a cache knows the voxels."""
    cases = load_cases(make_dataset(tmp_path / "d", 4), num_folds=2)
    preflight(cases, cache_dir=tmp_path / "cache")
    got = preflight(cases, level, tmp_path / "cache").fingerprint
    assert got == preflight(cases, level).fingerprint
    assert (got.channels, got.classes, got.occupied_share) == ([], [], None)
    plan = plan_of(got, cases)
    assert plan.crop_empty_borders is False
    assert plan.normalization == ["zscore"]


# ---- spacing


def test_spacing_is_the_median():
    spacings = [[1.0, 1.0, 2.0], [0.78125, 0.78125, 1.5], [0.5, 0.5, 2.5]]
    got = plan_of(fingerprint_of(spacings, [[64] * 3] * 3))
    assert got.spacing == [0.7812, 0.7812, 2.0]
    micro = plan_of(fingerprint_of([[0.0014] * 3], [[64] * 3]))
    assert micro.spacing == [0.0014] * 3


@pytest.mark.parametrize("thick", range(3))
def test_spacing_along_thick_slices_is_a_low_percentile_but_not_below_the_others(thick):
    coarse = np.array([3.0, 4, 5, 6, 7, 7, 7, 7, 7, 7, 7])
    for fine in (1.0, 2.0):
        spacings = np.full((11, 3), fine)
        spacings[:, thick] = coarse * fine
        shapes = np.full((11, 3), 200.0)
        shapes[:, thick] = 20
        got = plan_of(fingerprint_of(spacings, shapes)).spacing
        expected = [fine] * 3
        expected[thick] = np.percentile(coarse * fine, 10)
        assert got == expected
        shapes[:, thick] = 70  # slices enough
        expected[thick] = np.median(coarse * fine)
        assert plan_of(fingerprint_of(spacings, shapes)).spacing == expected
    spacings[:2] = 1.0
    spacings[2:] = np.where(np.arange(3) == thick, 8.0, 2.0)
    shapes[:, thick] = 10
    assert plan_of(fingerprint_of(spacings, shapes)).spacing == [2.0] * 3


# ---- strides and patch


def grids(number, seed=0):
    """Random spacings and shapes, some anisotropic, some tiny."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        spacing = np.exp(rng.uniform(np.log(0.3), np.log(8), 3))
        shape = np.exp(rng.uniform(np.log(2), np.log(700), 3)).astype(int)
        yield [spacing.tolist()], [shape.tolist()], np.exp(rng.uniform(np.log(1e8), np.log(4e10)))


def test_strides_leave_slices_alone_until_they_are_no_longer_thick():
    assert choose_strides([1, 1, 4], [160, 160, 40])[0] == [[2, 2, 1], [2, 2, 1], [2, 2, 2]]
    assert choose_strides([1, 1, 1], [160, 160, 160])[0] == [[2, 2, 2]] * 3
    assert choose_strides([1, 1, 1.5], [160, 160, 10])[0] == [[2, 2, 1], [2, 2, 2], [2, 2, 1]]
    assert choose_strides([1, 1, 1], [7, 7, 7])[0] == [[1, 1, 1]]


def test_strides_bring_levels_nearer_to_isotropic():
    for (spacing,), (shape,), _ in grids(300):
        strides, _ = choose_strides(spacing, shape)
        spaced, left = np.array(spacing), np.array(shape, float)
        if strides == [[1, 1, 1]]:
            assert left.max() < 8
            continue
        for stride in strides:
            roomy = left >= 8  # axes that keep 4 voxels
            before = np.ptp(np.log(spaced[roomy]))
            assert np.array(stride)[~roomy].tolist() == [1] * int((~roomy).sum())
            spaced, left = spaced * stride, left / stride
            after = np.ptp(np.log(spaced[roomy]))
            assert after <= max(np.log(2), before - np.log(2) / 2) + 1e-9
        assert len(strides) == 3 or left.max() < 8


def test_roi_size_fits_strides_and_budget():
    fitted = whole = 0
    for spacings, shapes, budget in grids(60, seed=1):
        try:
            plan = plan_of(fingerprint_of(spacings, shapes), budget=budget)
        except InputError:
            continue  # see below
        step = np.prod(plan.strides, axis=0)
        size = np.array(plan.roi_size)
        assert (size % step == 0).all()
        assert (size >= 2 * step).all()

        def needed(roi, number, plan=plan):
            return needed_bytes(roi, number, plan.strides, 32, 2)

        assert needed(plan.roi_size, 2) <= budget
        assert needed(plan.roi_size, plan.batch_size) <= budget
        median = np.maximum(np.rint(np.array(shapes[0]) * spacings[0] / plan.spacing), 1)
        largest = np.maximum(np.ceil(median / step) * step, 2 * step)
        assert (size <= largest).all()
        if (size < largest).any():
            fitted += 1
            # the one cut last, put back, would be too much
            assert max(needed(size + step * (np.arange(3) == n), 2) for n in range(3)) > budget
        else:
            whole += 1
    assert min(fitted, whole) > 10


def test_roi_size_is_refused_when_two_of_the_smallest_do_not_fit():
    (fault,) = faults_of(fingerprint_of([[1] * 3], [[64] * 3]), budget=1e6)
    assert fault.startswith("memory_budget_bytes: expected ")
    assert "got 1000000. Raise it, or lower base_channels." in fault


def test_roi_size_is_the_median_volume_when_rounding_is_all_that_differs():
    """40 voxels of 0.3 mm at 0.3 mm are 40, and not 40.000000000000007."""
    for spacing, shape in (([0.3, 0.7, 1.1], [40, 48, 56]), ([1 / 3] * 3, [512, 512, 64])):
        fingerprint = fingerprint_of([spacing], [shape])
        assert plan_of(fingerprint, strides=[2, 2, 2], budget=1e12).roi_size == shape


# ---- batch, intensities, borders, axes


@pytest.mark.parametrize(
    ("cases", "budget", "batch"),
    [(1, 8 * GIB, 2), (400, 8 * GIB, None), (4000, 1e12, 200), (4000, 1e6, 1)],
)
def test_batch_size_is_a_share_of_the_data_as_far_as_memory_goes(cases, budget, batch):
    got = plan_of(
        fingerprint_of([[1] * 3] * cases, [[64] * 3] * cases), roi_size=[64] * 3, budget=budget
    )
    network = [2, 2, 2], 32, 2
    taken = needed_bytes([64] * 3, got.batch_size, *network)
    if batch is None:  # as many as fit
        assert 2 < got.batch_size < 20
        assert taken <= budget < needed_bytes([64] * 3, got.batch_size + 1, *network)
    else:
        assert got.batch_size == batch
    assert ("more than" in got.reasons["batch_size"]) == (budget == 1e6)
    assert f"{taken / GIB:.3g} GiB" in got.reasons["batch_size"]


@pytest.mark.parametrize(
    ("names", "channels", "expected"),
    [
        (["CT"], [CT], [{"clip": [-60.0, 200.0], "mean": 40.0, "std": 20.0}]),
        (["ct"], [], ["percentile_zscore"]),
        (["CT"], [replace(CT, foreground_std=None)], ["percentile_zscore"]),
        (["CT"], [replace(CT, foreground_percentiles={"0.5": 7.0, "99.5": 7.0})],
         ["percentile_zscore"]),
        (["T1", "CT"], [CT, CT], ["zscore", {"clip": [-60.0, 200.0], "mean": 40.0, "std": 20.0}]),
        (["MRI"], [CT], ["zscore"]),
        (None, [], ["zscore"] * 3),
        (None, [CT] * 3, ["zscore"] * 3),
    ],
)  # fmt: skip
def test_normalization_is_by_hounsfield_units_for_ct_alone(names, channels, expected):
    number = len(names or "123")
    fingerprint = fingerprint_of([[1] * 3], [[64] * 3], channels=channels, num_channels=number)
    plan = plan_of(fingerprint, declare(channel_names=names))
    assert plan.normalization == expected
    preprocessing(plan.spacing, plan.normalization)  # takes it


@pytest.mark.parametrize(("share", "crop"), [(0.5, True), (0.8, False), (None, False)])
def test_borders_are_cut_off_when_that_pays_and_the_patch_is_of_what_is_left(share, crop):
    occupied = {"occupied_shapes": [[64, 72, 80]], "occupied_share": share}
    got = plan_of(fingerprint_of([[1] * 3], [[128] * 3], **occupied), budget=1e12)
    assert got.crop_empty_borders is crop
    assert got.roi_size == ([64, 72, 80] if crop else [128] * 3)


@pytest.mark.parametrize(
    ("names", "axes"),
    [(["background", "liver"], [0, 1, 2]), (["background", "left kidney"], [1, 2])],
)
def test_left_and_right_are_not_mirrored_when_classes_tell_them_apart(names, axes):
    assert plan_of(fingerprint_of([[1] * 3], [[64] * 3]), declare(names)).flip_axes == axes


def test_foreground_is_drawn_more_when_a_patch_sees_little_of_a_volume():
    fingerprint = fingerprint_of([[1] * 3], [[128] * 3])
    assert plan_of(fingerprint, roi_size=[64] * 3).foreground_ratio == 0.67
    assert plan_of(fingerprint, roi_size=[128, 128, 64]).foreground_ratio == 0.33


# ---- the plan as a whole


def test_given_values_are_kept_and_others_are_chosen_around_them():
    fingerprint = fingerprint_of([[1, 1, 4]] * 4, [[160, 160, 40]] * 4)
    plan = plan_of(fingerprint, spacing=[1, 1, 1])
    assert plan.strides == [[2, 2, 2]] * 3  # isotropic now
    assert plan.reasons["spacing"] == "given"
    plan = plan_of(fingerprint, strides=[2, 2])
    assert plan.strides == [2, 2]
    assert (np.array(plan.roi_size) % 4 == 0).all()
    plan = plan_of(fingerprint, roi_size=[32, 32, 8])
    assert plan.roi_size == [32, 32, 8]
    assert np.prod(plan.strides, axis=0).tolist() == [8, 8, 2]
    plan = plan_of(fingerprint, class_names=["a", "b", "left", "right"])
    assert (plan.num_classes, plan.flip_axes) == (4, [1, 2])
    fewer = plan_of(fingerprint, base_channels=16, budget=2e9)
    assert np.prod(fewer.roi_size) > np.prod(plan_of(fingerprint, budget=2e9).roi_size)


def test_every_value_has_a_reason_and_a_line():
    plan = plan_of(fingerprint_of([[1] * 3], [[64] * 3]), declare(["a", "b"], ["CT"], 9))
    assert set(plan.reasons) == set(SETTINGS)
    assert all(plan.reasons.values())
    assert len(plan.lines()) == len(SETTINGS)
    assert plan.ignore_value == 9
    assert json.loads(json.dumps(plan.as_dict())) == plan.as_dict() | {}


def test_values_that_do_not_fit_the_dataset_are_refused_all_at_once():
    fingerprint = fingerprint_of([[1] * 3], [[64] * 3])
    given = {"in_channels": 2, "num_classes": 2, "class_names": ["a"]}
    faults = faults_of(fingerprint, declare(["a", "b", "c"]), **given)
    keys = [fault.split(":")[0] for fault in faults]
    assert keys == ["in_channels", "class_names", "num_classes"]


def test_names_are_asked_for_when_neither_declared_nor_read():
    (fault,) = faults_of(fingerprint_of([[1] * 3], [[64] * 3], classes=[]))
    assert fault.startswith("class_names: expected names")


# ---- the recipe


@pytest.mark.parametrize("cases", [4, 160, 5000])
@pytest.mark.parametrize(("batch_size", "accumulation", "roi"), [(2, 1, 32), (5, 3, 64)])
def test_plan_takes_steps_by_cases_and_patches(cases, batch_size, accumulation, roi):
    fingerprint = fingerprint_of([[1, 1, 1]] * 3, [[60, 64, 64], [64, 64, 64], [70, 64, 64]])
    dataset = declare()
    dataset.train = [{}] * cases
    given = {"batch_size": batch_size, "roi_size": [roi] * 3, "base_channels": AUTO}
    settings = {**dict.fromkeys(SETTINGS, AUTO), **given}
    planner = Planner(fingerprint, dataset, 8 * GIB, accumulation_steps=accumulation)
    plan = planner.make_plan(settings)
    drawn = 80 * cases * (64 // roi) ** 3
    wanted = min(max(drawn / (batch_size * accumulation), 2000), 20_000)
    assert (plan.steps_per_epoch, plan.base_channels, plan.learning_rate) == (250, 32, 0.008)
    assert 0 <= plan.max_epochs * 250 - wanted < 250
    assert plan.warmup_steps == 100
    assert plan.reasons["roi_size"] == "given" != plan.reasons["max_epochs"]


@pytest.mark.parametrize(
    ("batch_size", "ranks", "norm"), [(3, 1, "instance"), (4, 1, "batch"), (7, 2, "batch")]
)
def test_plan_takes_batch_norm_from_four_patches_on(batch_size, ranks, norm):
    fingerprint = fingerprint_of([[1, 1, 1]], [[32, 32, 32]])
    settings = {**dict.fromkeys(SETTINGS, AUTO), "batch_size": batch_size, "max_epochs": 1}
    plan = Planner(fingerprint, declare(), 8 * GIB, num_ranks=ranks).make_plan(settings)
    assert (plan.norm, plan.max_epochs, plan.warmup_steps) == (norm, 1, 25)
