"""Scores against sets and all pairwise distances in float64, and their summary by hand."""

import csv
import itertools
import json
import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

from pipeline.errors import InputError
from pipeline.evaluation.scores import COLUMNS, read_scores, score_case, write_scores

NAN = float("nan")
NAMES = ["background", "dim", "bright"]
SPACINGS = [(1.0, 1.0, 1.0), (0.7, 0.7, 3.0), (2.5, 0.4, 1.2)]
MEASURES = COLUMNS[4:]


# ---- an independent implementation


def voxels_of(mask):
    return set(map(tuple, np.argwhere(np.asarray(mask)).tolist()))


def surface_of(voxels):
    """Those that one of six neighbours is not among; what is outside of the volume never is."""
    steps = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    return [
        v for v in voxels if any(tuple(np.add(v, step).tolist()) not in voxels for step in steps)
    ]


def percentile_95(values):
    """Between the two nearest ranks, linearly."""
    ordered, place = sorted(values), 0.95 * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def brute(pred, label, spacing, tolerance):
    """Scores of two masks that are not empty, from sets and every pair of surface voxels."""
    p, q = voxels_of(pred), voxels_of(label)
    between = cdist(*(np.array(surface_of(v)) * np.array(spacing) for v in (p, q)))
    there, back = between.min(axis=1).tolist(), between.min(axis=0).tolist()
    voxel_ml = spacing[0] * spacing[1] * spacing[2] / 1000
    return {
        "dice": 2 * len(p & q) / (len(p) + len(q)),
        "iou": len(p & q) / len(p | q),
        "sensitivity": len(p & q) / len(q),
        "precision": len(p & q) / len(p),
        "hd95_mm": max(percentile_95(there), percentile_95(back)),
        "assd_mm": (math.fsum(there) + math.fsum(back)) / len(there + back),
        "nsd": sum(d <= tolerance for d in there + back) / len(there + back),
        "volume_difference_ml": (len(p) - len(q)) * voxel_ml,
        "label_volume_ml": len(q) * voxel_ml,
        "pred_volume_ml": len(p) * voxel_ml,
    }


def blobs(seed, size=(15, 12, 10)):
    """Smooth regions of two classes that touch the borders; prediction and label are alike."""
    rng = np.random.default_rng(seed)
    common = gaussian_filter(rng.normal(size=size), 1.5)
    maps = []
    for _ in range(2):
        field = common + 0.5 * gaussian_filter(rng.normal(size=size), 1)
        maps.append(np.digitize(field, np.quantile(field, [0.6, 0.85])).astype(np.uint8))
    return maps


def filled(*boxes, size=(9, 8, 7)):
    mask = np.zeros(size, np.uint8)
    for box in boxes:
        mask[box] = 1
    return mask


def box(*ends):
    return tuple(slice(a, b) for a, b in ends)


EVERYTHING = (slice(None),) * 3
SHAPES = {
    "one voxel and itself": (filled((4, 3, 2)), filled((4, 3, 2))),
    "two voxels far apart": (filled((0, 0, 0)), filled((8, 7, 6))),
    "corner voxel and all": (filled((8, 0, 6)), filled(EVERYTHING)),
    "a plane on the border": (filled(box((0, 1), (0, 8), (0, 7))), filled(box((2, 3), (1, 5)))),
    "a hollow and a solid": (
        np.where(filled(box((3, 5), (3, 5), (3, 4))), 0, filled(box((1, 8), (1, 7), (1, 6)))),
        filled(box((1, 8), (1, 7), (1, 6))),
    ),
}


def compared(pred, label, spacing, tolerance, names, device="cpu"):
    """Largest relative disagreement over all classes and measures."""
    rows = score_case(
        pred, label, spacing_mm=spacing, class_names=names, tolerance_mm=tolerance, device=device
    )
    worst = 0.0
    for value, row in enumerate(rows, 1):
        expected = brute(pred == value, label == value, spacing, tolerance)
        assert row["status"] == "scored"
        for name, number in expected.items():
            worst = max(worst, abs(row[name] - number) / max(abs(number), 1e-3))
    return worst


@pytest.mark.parametrize("spacing", SPACINGS)
def test_score_case_agrees_with_every_pair_of_surface_voxels(spacing, device):
    worst = {}
    for seed, tolerance in itertools.product(range(8), (0.9, 2.9)):
        pred, label = blobs(seed)
        worst[seed] = compared(pred, label, spacing, tolerance, NAMES, device)
    for name, (pred, label) in SHAPES.items():
        worst[name] = compared(pred, label, spacing, 1.9, ["background", "shape"], device)
    assert max(worst.values()) < 1e-6, worst


def one_class(pred, label, spacing=(1, 1, 1), tolerance=1.0):
    (row,) = score_case(
        pred, label, spacing_mm=spacing, class_names=["background", "shape"], tolerance_mm=tolerance
    )
    return row


@pytest.mark.parametrize("size", [1.2, float(np.float32(1.2)), 0.1 * 3, 1e-3 * 7])
def test_nsd_counts_what_lies_one_voxel_of_the_tolerance_off(size):
    """Though in float32, as MONAI gives distances, 1.2 is more than 1.2."""
    tolerance = round(size, 6)
    off = filled((4, 3, 2)), filled((5, 3, 2))
    assert one_class(*off, spacing=(size, 9, 9), tolerance=tolerance)["nsd"] == 1
    assert one_class(*off, spacing=(size, 9, 9), tolerance=0.999 * tolerance)["nsd"] == 0


# ---- empty sets and ignored voxels


@pytest.mark.parametrize(
    ("pred", "label", "expected"),
    [
        (0, 1, ("missed", 0, 0, 0, NAN, NAN, NAN, 0, -0.006, 0.006, 0)),
        (1, 0, ("spurious", 0, 0, NAN, 0, NAN, NAN, 0, 0.006, 0, 0.006)),
        (0, 0, ("absent", NAN, NAN, NAN, NAN, NAN, NAN, NAN, 0, 0, 0)),
        (1, 1, ("scored", 1, 1, 1, 1, 0, 0, 1, 0, 0.006, 0.006)),
    ],
)
def test_status_tells_what_is_empty(pred, label, expected):
    mask = filled((4, 3, 2))
    row = one_class(mask * pred, mask * label, spacing=(1, 2, 3))
    assert list(row) == [name for name in COLUMNS if name not in ("case_id", "person")]
    assert row["status"] == expected[0]
    assert [row[name] for name in MEASURES] == pytest.approx(list(expected[1:]), nan_ok=True)


def test_ignored_voxels_count_nowhere():
    pred, label = blobs(5)
    # of one class each, whatever is predicted there, be it no class at all
    label[:, 5:8], pred[:, 5:8, 5:] = 255, 77
    assert (pred[:, 5:8] == 1).any()
    how = {"spacing_mm": (1, 2, 3), "class_names": NAMES, "tolerance_mm": 2.5}
    rows = score_case(pred, label, ignore_value=255, **how)
    pred[:, 5:8] = label[:, 5:8] = 0
    for value, row in enumerate(rows, 1):
        expected = brute(pred == value, label == value, (1, 2, 3), 2.5)
        assert {name: row[name] for name in expected} == pytest.approx(expected)


SMALL = np.zeros((4, 3, 2), np.uint8)


@pytest.mark.parametrize(
    ("pred", "label", "message"),
    [
        (SMALL, SMALL - np.int16(1), r"values 0 to 2 in the label, got -1\. Name all"),
        (np.arange(24).reshape(4, 3, 2), SMALL, r"the prediction, got 3, 4, 5, 6, 7 and 16 more"),
    ],
)
def test_score_case_refuses(pred, label, message):
    with pytest.raises(InputError, match=message):
        score_case(pred, label, spacing_mm=(1, 1, 1), class_names=NAMES, tolerance_mm=1)


# ---- over cases


def made_row(case_id, person, name, status, dice, hd95=NAN, volume=0.0):
    row = dict.fromkeys(COLUMNS, NAN)
    words = {"case_id": case_id, "person": person, "class": name, "status": status}
    return row | words | {"dice": dice, "hd95_mm": hd95, "volume_difference_ml": volume}


ROWS = [
    made_row("case_1", "ann", "dim", "scored", 0.9, 2.0, 1.0),
    made_row("case_1", "ann", "bright", "scored", 0.5, 4.0, -2.0),
    made_row("case_2", "ann", "dim", "scored", 0.7, 8.0),
    made_row("case_2", "ann", "bright", "absent", NAN),
    made_row("case_3", "bob", "dim", "missed", 0.0),
    made_row("case_3", "bob", "bright", "spurious", 0.0),
    made_row("case_4", "cat", "dim", "absent", NAN),
    made_row("case_4", "cat", "bright", "absent", NAN),
    made_row("case_5", "dan", "dim", "scored", 0.8, 6.0),
    made_row("case_5", "dan", "bright", "absent", NAN),
]


def write(directory, rows=ROWS, **changes):
    how = {"class_names": NAMES, "tolerance_mm": 1.5, **changes}
    return write_scores(directory, rows, **how)


def test_summary_agrees_with_numbers_by_hand(tmp_path):
    summary = write(tmp_path, refused={"case_9": "expected one thing, got another. Mend it."})
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    # of 0.7, 0.7, 0 and 0.8; over all values it would be 0.483
    assert summary["mean_dice"] == pytest.approx((0.7 + 0.7 + 0 + 0.8) / 4)
    assert (summary["num_cases"], summary["num_persons"]) == (5, 4)
    assert summary["refused"] == {"case_9": "expected one thing, got another. Mend it."}
    dim, bright = summary["classes"]["dim"], summary["classes"]["bright"]
    assert dim["status"] == {"scored": 3, "missed": 1, "spurious": 0, "absent": 1}
    assert bright["status"] == {"scored": 1, "missed": 0, "spurious": 1, "absent": 3}
    dim["dice"].pop("interval")
    expected = {"n": 4, "mean": 0.6, "median": 0.75, "q1": 0.525, "q3": 0.825}
    assert dim["dice"] == pytest.approx(expected)
    dim["hd95_mm"].pop("interval")
    expected = {"n": 3, "mean": 16 / 3, "median": 6, "q1": 4, "q3": 7}
    assert dim["hd95_mm"] == pytest.approx(expected)
    assert (bright["hd95_mm"]["n"], bright["hd95_mm"]["mean"]) == (1, 4)
    assert bright["volume_difference_ml"]["mean"] == pytest.approx(-0.4)
    over = summary["over_classes"]
    assert (over["hd95_mm"]["n"], over["hd95_mm"]["mean"]) == (3, pytest.approx((3 + 8 + 6) / 3))
    assert over["dice"]["median"] == pytest.approx(0.7)
    assert summary["mean_dice_interval"] == over["dice"]["interval"]
    assert set(summary["definitions"]) == set(MEASURES[:8])


def test_summary_has_null_where_nothing_is_defined(tmp_path):
    figures = write(tmp_path)["classes"]["dim"]["nsd"]
    keys = ("mean", "median", "q1", "q3", "interval")
    assert figures == {"n": 0, **dict.fromkeys(keys)}
    assert write(tmp_path, rows=[])["mean_dice"] is None


def test_worst_cases_are_the_lowest_first_and_none_without_a_score(tmp_path):
    worst = write(tmp_path)["worst_cases"]
    # of equal scores by name
    assert [case["case_id"] for case in worst] == ["case_3", "case_1", "case_2", "case_5"]
    assert [case["mean_dice"] for case in worst] == pytest.approx([0, 0.7, 0.7, 0.8])


# ---- files


def test_metrics_csv_comes_back_as_it_was(tmp_path):
    pred, label = blobs(1)
    pred[pred == 2] = 0
    how = {"spacing_mm": (0.3, 0.7, 1.1), "class_names": NAMES, "tolerance_mm": 1}
    rows = score_case(pred, label, **how)
    rows = [{"case_id": 'a, "b"; c', "person": "01", **row} for row in rows]
    rows[0]["class"] = "links, größer"
    write(tmp_path, rows=rows, class_names=["background", "links, größer", "bright"])
    back = read_scores(tmp_path / "metrics.csv")
    assert [list(row) for row in back] == [list(COLUMNS)] * 2
    for row, expected in zip(back, rows, strict=True):
        assert [row[name] for name in COLUMNS[:4]] == [expected[name] for name in COLUMNS[:4]]
        np.testing.assert_array_equal(*([r[name] for name in MEASURES] for r in (row, expected)))
    assert back[1]["status"] == "missed"


def test_metrics_csv_has_exactly_these_columns_and_blanks(tmp_path):
    write(tmp_path)
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.reader(file))
    assert ",".join(table[0]) == (
        "case_id,person,class,status,dice,iou,sensitivity,precision,hd95_mm,assd_mm,nsd,"
        "volume_difference_ml,label_volume_ml,pred_volume_ml"
    )
    assert len(table) == 1 + len(ROWS)
    assert table[1][:6] == ["case_1", "ann", "dim", "scored", "0.9", ""]
    assert table[4][4:] == [""] * 7 + ["0.0", "", ""]


@pytest.mark.parametrize("content", ["case_id,dice\na,1\n", f"{','.join(COLUMNS)}\na,b\n"])
def test_read_scores_refuses_other_tables(content, tmp_path):
    (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises((KeyError, ValueError)):
        read_scores(tmp_path / "metrics.csv")


@pytest.mark.parametrize(
    "name",
    ["=1+1", "+1", "-1", "@SUM(A1)", "'=1", "''=1", "'quoted'", "\uff1d1", "x=1", "-", "'", "7",
     "' =1", r"\t=1", "left\xa0kidney"],
)  # fmt: skip
def test_no_cell_of_text_begins_a_formula_and_names_come_back(name, tmp_path):
    row = dict.fromkeys(MEASURES, -1.5) | {"class": name, "status": "scored"}
    write(tmp_path, rows=[{"case_id": name, "person": name, **row}], class_names=["b", name])
    with open(tmp_path / "metrics.csv", encoding="utf-8", newline="") as file:
        _, cells = csv.reader(file)
    assert not [cell for cell in cells[:4] if cell.lstrip()[:1] in set("=+-@\t\r\uff1d")]
    assert cells[4] == "-1.5"
    (back,) = read_scores(tmp_path / "metrics.csv")
    assert [back[key] for key in ("case_id", "person", "class")] == [name] * 3
