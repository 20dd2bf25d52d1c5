"""Figures and pictures: what is drawn is what was given, the right way round and to scale."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from torch.utils.tensorboard import SummaryWriter

from pipeline import drawing
from pipeline.reporting import figures
from pipeline.reporting.run_files import read_curves


def largest_white(picture: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the largest white thing; letters are smaller."""
    found, _ = ndimage.label((picture > 200).all(axis=2))
    sizes = np.bincount(found.ravel())[1:]
    return ndimage.find_objects(found)[int(np.argmax(sizes))]


def draw_plane(case: drawing.CaseVolumes, name: str = "axial") -> np.ndarray:
    return np.asarray(drawing.draw_plane(case, name))


def volumes(label: np.ndarray, pred: np.ndarray):
    image = np.full(label.shape, 0.5)
    image[..., 0], image[..., -1] = 0, 1  # so that all between is in the middle of the window
    return drawing.CaseVolumes(image, label, pred, np.ones(3))


def write(tmp_path, name: str, ras: np.ndarray, spacing=(1, 1, 1), axes: str = "RAS"):
    """A volume given along R, A, S, in a file whose axes are others."""
    image = nib.Nifti1Image(ras, np.diag([*spacing, 1.0]))
    ornt = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)
    )
    path = tmp_path / f"{name}.nii.gz"
    nib.save(image.as_reoriented(ornt), path)
    return path


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
def test_plane_shows_right_anterior_superior_at_the_upper_left(tmp_path, axes):
    image, label = np.zeros((40, 36, 30), np.int16), np.zeros((40, 36, 30), np.uint8)
    image[30:38, 26:34, 20:28] = 100  # right, anterior, superior
    label[30:38, 26:34, 20:28] = label[0, 0, 0] = 1
    paths = {
        "image": write(tmp_path, "image", image, axes=axes),
        "label": write(tmp_path, "label", label, axes=axes[::-1]),  # the same grid otherwise
    }
    case = drawing.read_case(paths)
    np.testing.assert_array_equal(case.image, image)
    np.testing.assert_array_equal(case.label, label)
    for name in drawing.PLANES:
        picture = draw_plane(case, name)
        rows, columns = largest_white(picture)
        height, width, _ = picture.shape
        assert rows.stop < height / 2, name
        assert columns.stop < width / 2, name


def test_plane_is_to_scale_in_mm(tmp_path):
    image = np.zeros((60, 40, 20), np.float32)
    image[25:35, 15:25, 5:15] = 1
    paths = {
        key: write(tmp_path, key, volume, (1, 2, 4), "ASL")
        for key, volume in (("image", image), ("label", np.zeros(image.shape, np.uint8)))
    }
    case = drawing.read_case(paths)
    for name, expected in {"axial": 10 / 20, "coronal": 10 / 40, "sagittal": 20 / 40}.items():
        height, width = (s.stop - s.start for s in largest_white(draw_plane(case, name)))
        assert width / height == pytest.approx(expected, rel=0.06)  # a pixel or two


def count_pixels(picture: np.ndarray, value: int) -> int:
    return int((picture == drawing.class_color(value)).all(axis=2).sum())


def test_plane_outlines_the_label_solid_and_the_prediction_dashed_in_the_colours_of_classes():
    label = np.zeros((30, 30, 30), int)
    label[5:15, 5:15, 5:15], label[16:26, 5:15, 5:15] = 1, 2
    nothing = np.zeros_like(label)
    solid, dashed = (draw_plane(volumes(*n)) for n in ((label, nothing), (nothing, label)))
    for value in (1, 2):
        drawn, in_dashes = count_pixels(solid, value), count_pixels(dashed, value)
        per_px = drawn / drawing.LABEL_WIDTH, in_dashes / drawing.PREDICTION_WIDTH
        assert 0.35 < per_px[1] / per_px[0] < 0.65
    swapped = draw_plane(volumes(label, np.choose(label, [0, 2, 1])))
    left = swapped[:, : swapped.shape[1] // 2]  # one organ, in both colours
    assert min(count_pixels(left, 1), count_pixels(left, 2)) > 500


def test_class_colors_differ_and_neighbours_do_so_clearly():
    colors = np.array([drawing.class_color(value) for value in range(1, 141)], int)
    assert len({tuple(one) for one in colors.tolist()}) == 140
    assert np.abs(np.diff(colors, axis=0)).sum(axis=1).min() > 60


def test_case_has_no_prediction_where_the_label_is_ignored_and_none_on_another_grid(tmp_path):
    label = np.zeros((6, 5, 4), np.uint8)
    label[0], label[1] = 255, 1
    paths = {key: write(tmp_path, key, label) for key in ("image", "label")}
    case = drawing.read_case({**paths, "pred": write(tmp_path, "pred", label**0)}, 255)
    for voxels in (case.label, case.pred):
        assert voxels[:2].max(axis=(1, 2)).tolist() == [0, 1]
    paths["pred"] = write(tmp_path, "pred", label, (1, 1, 2))
    with pytest.raises(ValueError, match="on one grid within"):
        drawing.read_case(paths)


def test_case_has_the_first_of_its_channels(tmp_path):
    first, second = np.random.default_rng(0).normal(size=(2, 6, 5, 4)).astype(np.float32)
    label = write(tmp_path, "label", np.zeros((6, 5, 4), np.uint8))
    files = [write(tmp_path, "a", first), write(tmp_path, "b", second)]
    together = tmp_path / "both.nii.gz"
    nib.save(nib.Nifti1Image(np.stack([first, second], axis=3), np.eye(4)), together)
    for image in (files, together):
        case = drawing.read_case({"image": image, "label": label})
        np.testing.assert_array_equal(case.image, first)


def test_curves_are_those_of_the_event_files_without_what_was_lost(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(1, 7):
            writer.add_scalar("train/loss", step, step)
    next(tmp_path.iterdir()).rename(tmp_path / "events.out.tfevents.0.first")
    with SummaryWriter(str(tmp_path), purge_step=4) as writer:  # as after a resume
        writer.add_scalar("train/loss", 40, 4)
    curve = read_curves(tmp_path)["train/loss"]
    np.testing.assert_array_equal(curve, [[1, 1], [2, 2], [3, 3], [4, 40]])
    assert read_curves(tmp_path / "nothing") == {}


def test_curves_of_an_earlier_version_go_on_under_todays_tags(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for tag in ("AMP/loss_scale", "LR", "val/dice_left lung"):
            writer.add_scalar(tag, 1, 1)
        writer.add_scalar("weight_update/loss_scale", 2, 2)
    curves = read_curves(tmp_path)
    assert curves.pop("weight_update/loss_scale").tolist() == [[1, 1], [2, 2]]
    assert sorted(curves) == ["val/mean_dice_left lung", "weight_update/lr"]


def test_loss_leaves_out_what_is_not_finite():
    steps = np.arange(1.0, 201)
    values = np.where(steps == 50, np.nan, 1 / steps)
    ax = figures.plot_loss({"train/loss": np.column_stack([steps, values])}, [50]).axes[0]
    logged, smooth, skipped = ax.lines
    assert len(logged.get_xdata()) == 199
    assert np.isfinite(smooth.get_ydata()).all()
    assert skipped.get_xdata().tolist() == [50]


def test_boxes_are_the_quartiles_of_what_is_defined():
    values = np.array([0.1, 0.4, np.nan, 0.5, 0.9, 0.95])
    ax = figures.plot_boxes({"first": np.array([0.2]), "second": values}, "Dice", 1.0).axes[0]
    ends = ax.patches[1].get_path().vertices[:, 0]
    low, high = np.nanpercentile(values, [25, 75])
    assert (min(ends), max(ends)) == pytest.approx((low, high))
    assert [text.get_text() for text in ax.get_yticklabels()] == ["first", "second"]
    dots = ax.collections[1].get_offsets()
    assert sorted(dots[:, 0]) == sorted(values[~np.isnan(values)])


def test_boxes_have_the_colours_of_their_classes():
    values = dict.fromkeys("abc", np.array([0.1, 0.2]))
    ax = figures.plot_boxes(values, "Dice", shown=["c", "a"]).axes[0]
    for dots, value in zip(ax.collections, (3, 1), strict=True):
        color = 255 * dots.get_facecolors()[0, :3]
        assert tuple(color.round()) == drawing.class_color(value)


@pytest.mark.parametrize(("largest", "scale"), [(12.0, "linear"), (1200.0, "symlog")])
def test_volumes_are_dots_in_class_colours_beside_the_line_of_equality(largest, scale):
    label = {"a": np.array([2.0, 3.0, 0.0]), "b": np.array([largest, 0.0, 5.0])}
    pred = {"a": np.array([2.5, 0.0, 0.0]), "b": np.array([10.0, 4.0, 5.0])}
    ax = figures.plot_volumes(label, pred).axes[0]
    dots = ax.collections[0]
    expected = [(2, 2.5), (3, 0), (largest, 10), (0, 4), (5, 5)]  # one is in neither
    assert [tuple(dot) for dot in dots.get_offsets()] == expected
    colors = [tuple((255 * color[:3]).round()) for color in dots.get_facecolors()]
    assert colors == [drawing.class_color(value) for value in (1, 1, 2, 2, 2)]
    assert ax.get_xscale() == ax.get_yscale() == scale
    np.testing.assert_array_equal(*ax.lines[0].get_data())


def test_long_curves_are_small_files():
    points = np.random.default_rng(0).normal(size=(100_000, 2))
    points[:, 0] = np.arange(len(points))
    figure = figures.plot_loss({"train/loss": points}, range(len(points)))
    assert len(figures.to_svg(figure, "x")) < 100_000
