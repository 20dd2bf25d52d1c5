import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.metrics import compute_dice
from monai.networks.utils import one_hot
from monai.transforms import AsDiscreted

from pipeline.evaluation.metrics import MeanDice, dice_per_class

NAMES = ["background", "dim", "bright"]


def blocks(**boxes):
    """`(6, 6, 6)` label map, `_1=(a, b)` setting planes a to b of class 1."""
    volume = torch.zeros(6, 6, 6, dtype=torch.uint8)
    for name, (a, b) in boxes.items():
        volume[a:b] = int(name.removeprefix("_"))
    return volume


def sets_dice(pred, label, value):
    """Dice's own words: twice the shared number over the sum of both numbers."""
    p, q = (set(zip(*np.nonzero(np.asarray(v) == value), strict=True)) for v in (pred, label))
    return 2 * len(p & q) / (len(p) + len(q)) if p or q else float("nan")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_dice_per_class_agrees_with_monai_and_with_sets(dtype):
    rng = np.random.default_rng(0)
    for num_classes in (2, 3, 5):
        pred, label = (
            torch.as_tensor(rng.integers(num_classes, size=(7, 6, 5))).to(dtype) for _ in "pl"
        )
        got = dice_per_class(pred, label, num_classes)
        assert (got.shape, got.dtype) == ((num_classes - 1,), np.float64)
        expected = [sets_dice(pred, label, value) for value in range(1, num_classes)]
        np.testing.assert_allclose(got, expected, rtol=1e-14)
        theirs = compute_dice(
            *(one_hot(v[None, None], num_classes) for v in (pred, label)), include_background=False
        )
        np.testing.assert_allclose(got, theirs[0], rtol=1e-6)


def test_dice_per_class_is_nan_when_absent_from_both_and_0_when_absent_from_one():
    got = dice_per_class(blocks(_1=(0, 2), _2=(2, 4)), blocks(_1=(0, 2), _3=(2, 4)), 5)
    np.testing.assert_array_equal(got, [1, 0, 0, np.nan])


def test_dice_per_class_refuses_different_shapes():
    # of the same number of voxels, so that nothing else would notice
    with pytest.raises(ValueError, match=r"expected the label's shape .*2, 3, 4.*got .*4, 3, 2"):
        dice_per_class(torch.zeros(4, 3, 2), torch.zeros(2, 3, 4), 2)


def test_dice_per_class_refuses_values_that_are_no_class():
    right, wrong = blocks(_1=(0, 2)), blocks(_1=(0, 2))
    wrong[5, 5, 5] = 3
    with pytest.raises(ValueError, match="pred: expected values 0 to 2, got 0 to 3"):
        dice_per_class(wrong, right, 3)
    with pytest.raises(ValueError, match="label: expected values 0 to 2, got 0 to 3"):
        dice_per_class(right, wrong, 3)


# ---- over cases

# dim and bright of each case, by hand
PRED_AND_LABEL = {
    "both": (blocks(_1=(0, 2), _2=(2, 4)), blocks(_1=(0, 2), _2=(3, 5))),  # 1, 1/2
    "no bright": (blocks(_1=(0, 3)), blocks(_1=(2, 3))),  # 1/2, absent
    "missed": (blocks(), blocks(_1=(0, 1))),  # 0, absent
    "nothing": (blocks(), blocks()),  # absent, absent
}
DICE = {
    "both": [1, 0.5],
    "no bright": [0.5, np.nan],
    "missed": [0, np.nan],
    "nothing": [np.nan, np.nan],
}


def batch(*case_ids):
    """A decollated batch and its output."""
    cases = [{"case_id": case_id} for case_id in case_ids]
    outputs = [
        {"pred": MetaTensor(pred[None]), "label": MetaTensor(label[None])}
        for pred, label in (PRED_AND_LABEL[case_id] for case_id in case_ids)
    ]
    return cases, outputs


def make_engine(metric):
    """An engine whose batches are pairs of decollated batch and output, as MONAI leaves them."""

    def step(engine, pair):
        engine.state.batch, output = pair
        return output

    engine = Engine(step)
    engine.state.metric_details = {}
    metric.attach(engine, "mean_dice")
    return engine


def test_mean_dice_is_over_present_classes_then_cases():
    engine = make_engine(MeanDice(NAMES))
    engine.run([batch("both", "no bright"), batch("missed", "nothing")])
    # pooled over all scores, or over classes first, it would be 0.5
    assert engine.state.metrics["mean_dice"] == pytest.approx((0.75 + 0.5 + 0) / 3)
    details = engine.state.metric_details["mean_dice"]
    assert details["classes"] == pytest.approx({"dim": 0.5, "bright": 0.5})
    assert details["absent"] == {"dim": 1, "bright": 3}
    assert list(details["cases"]) == list(DICE)
    for case_id, dice in DICE.items():
        np.testing.assert_allclose(details["cases"][case_id], dice)


def test_mean_dice_starts_anew_each_epoch():
    engine = make_engine(MeanDice(NAMES))
    engine.run([batch("both")])
    assert engine.state.metrics["mean_dice"] == pytest.approx(0.75)
    engine.run([batch("missed")])
    assert engine.state.metrics["mean_dice"] == 0
    details = engine.state.metric_details["mean_dice"]
    assert list(details["cases"]) == ["missed"]
    assert details["absent"] == {"dim": 0, "bright": 1}


def test_mean_dice_works_in_monais_own_evaluator():
    pred, label = PRED_AND_LABEL["both"]
    case = {"image": torch.eye(3)[pred.long()].movedim(-1, 0), "label": label[None]}
    loader = DataLoader([{**case, "case_id": name} for name in ("a", "b")], batch_size=2)
    to_labels = AsDiscreted(("pred",), argmax=True)
    evaluator = SupervisedEvaluator(
        "cpu", loader, torch.nn.Identity(), postprocessing=to_labels,
        key_val_metric={"mean_dice": MeanDice(NAMES)},
    )  # fmt: skip
    evaluator.run()
    assert evaluator.state.metrics["mean_dice"] == pytest.approx(0.75)
    assert list(evaluator.state.metric_details["mean_dice"]["cases"]) == ["a", "b"]
