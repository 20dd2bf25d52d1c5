"""`python -m pipeline evaluate`: what it scores, what it refuses, and what it says."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from pipeline.commands.evaluate import main
from pipeline.evaluation import scores
from pipeline.evaluation.scores import read_scores, score_case

AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])
AFFINE[:3, 3] = [-3, 7, 11]
SIZE = (9, 8, 7)
NAMES = ["background", "dim", "bright"]
CASES = [f"person_{n}{side}" for n in (1, 2) for side in "ab"]


def label_map(seed):
    field = gaussian_filter(np.random.default_rng(seed).normal(size=SIZE), 1.5)
    return np.digitize(field, np.quantile(field, [0.7, 0.9])).astype(np.uint8)


def save(path, voxels, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)


@pytest.fixture
def root(tmp_path) -> Path:
    """Four labels and predictions that are one voxel off, and what nnU-Net says of them."""
    for seed, case_id in enumerate(CASES):
        save(tmp_path / "labelsTr" / f"{case_id}.nii.gz", label_map(seed))
        save(tmp_path / "pred" / f"{case_id}.nii.gz", np.roll(label_map(seed), 1, axis=2))
    write_description(tmp_path)
    return tmp_path


def write_description(folder, **labels):
    labels = labels or {name: value for value, name in enumerate(NAMES)}
    source = {"channel_names": {"0": "MRI"}, "labels": labels, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(source))


def run(root, *more, pred="pred", label="labelsTr"):
    return main([str(root / pred), str(root / label), *map(str, more)])


def summary_of(root, folder="pred_scores"):
    return json.loads((root / folder / "summary.json").read_text())


def scores_of(root, folder="pred_scores"):
    return read_scores(root / folder / "metrics.csv")


# ---- what it scores


def test_evaluate_writes_the_scores_of_each_case_and_prints_them(root, capsys):
    assert run(root, "--tolerance_mm", 1.7) == 0
    rows = scores_of(root)
    assert [(r["case_id"], r["class"]) for r in rows] == [(c, n) for c in CASES for n in NAMES[1:]]
    how = {"spacing_mm": (1, 1.5, 2), "class_names": NAMES, "tolerance_mm": 1.7}
    for seed in range(4):
        label = label_map(seed)
        expected = score_case(np.roll(label, 1, axis=2), label, **how)
        for row, other in zip(rows[2 * seed : 2 * seed + 2], expected, strict=True):
            assert {name: row[name] for name in other} == pytest.approx(other)
    summary = summary_of(root)
    assert (summary["tolerance_mm"], summary["num_cases"]) == (1.7, 4)
    assert (summary["num_persons"], summary["refused"]) == (4, {})
    told, faults = capsys.readouterr()
    dim = summary["classes"]["dim"]
    low, high = dim["dice"]["interval"]
    (line,) = [line for line in told.splitlines() if line.startswith("| dim")]
    numbers = [dim["dice"]["mean"], low, high, dim["nsd"]["mean"]]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert [*cells[1:4], cells[5]] == [f"{number:.3f}" for number in numbers]
    assert cells[4:] == [f"{dim['hd95_mm']['median']:.2f}", cells[5], *"000"]
    assert f"| all classes | {summary['mean_dice']:.3f}" in told
    assert str(root / "pred_scores" / "metrics.csv") in told
    assert not faults


@pytest.mark.parametrize("orientation", [[[2, -1], [0, 1], [1, -1]], [[0, -1], [1, 1], [2, 1]]])
def test_evaluate_takes_labels_whose_axes_are_in_another_order(root, orientation):
    assert run(root) == 0
    expected = (root / "pred_scores" / "metrics.csv").read_text()
    for path in (root / "labelsTr").iterdir():
        image = nib.load(path)
        turned = image.as_reoriented(np.array(orientation))
        save(path, np.asarray(turned.dataobj), turned.affine)
    assert run(root) == 0
    assert (root / "pred_scores" / "metrics.csv").read_text() == expected


def test_evaluate_takes_integers_stored_otherwise(root):
    assert run(root) == 0
    expected = (root / "pred_scores" / "metrics.csv").read_text()
    folder = root / "pred"
    (folder / f"._{CASES[0]}.nii.gz").write_text("what macOS leaves on foreign disks")
    save(folder / f"{CASES[0]}.nii.gz", np.roll(label_map(0), 1, axis=2).astype(np.float32))
    (folder / f"{CASES[1]}.nii.gz").unlink()
    save(folder / f"{CASES[1]}.nii", np.roll(label_map(1), 1, axis=2).astype(np.int16)[..., None])
    assert run(root) == 0
    assert (root / "pred_scores" / "metrics.csv").read_text() == expected


def test_predictions_decide_the_cases_and_labels_left_over_are_one_line(root, capsys):
    kept = CASES[1]
    for case_id in (*CASES[2:], CASES[0]):
        (root / "pred" / f"{case_id}.nii.gz").unlink()
    for number in range(5):
        save(root / "labelsTr" / f"q{number}.nii", label_map(number))
    (root / "pred" / "pictures").mkdir()
    for name in ("index.html", "volumes.csv", "labels.json", "labels.ctbl", "pictures/a.png"):
        (root / "pred" / name).write_text("beside predictions")
    save(root / "pred" / f"{kept}_probabilities.nii.gz", np.zeros((*SIZE, 3), np.float32))
    assert run(root) == 0
    told, faults = capsys.readouterr()
    words = "have no prediction and are not scored: person_1a, person_2a, person_2b, q0, q1 and 3"
    assert told.splitlines()[0] == f"8 labels of {root / 'labelsTr'} {words} more"
    assert not faults
    assert {row["case_id"] for row in scores_of(root)} == {kept}
    assert summary_of(root)["refused"] == {}


EVIL = "a\x1b[31m\x07\u202e\r\nb"


def is_safe(text):
    return all(c.isprintable() or c == "\n" for c in text)


def test_control_characters_of_names_are_escaped(root, capsys):
    for name in ("c", "d"):
        save(root / "pred" / f"{EVIL}{name}.nii.gz", label_map(0))
        save(root / "labelsTr" / f"{EVIL}{name}.nii.gz", label_map(0)[:, :, name == "d" :])
    save(root / "labelsTr" / f"{EVIL}e.nii.gz", label_map(0))
    assert run(root) == 1
    told, faults = capsys.readouterr()
    assert is_safe(told + faults)
    assert "not scored: a_[31m__" in told
    assert len(faults.splitlines()) == 1
    assert faults.startswith("a_[31m____bd: expected prediction and label of one shape")
    assert is_safe((root / "pred_scores" / "metrics.csv").read_text())
    assert scores_of(root)[0]["case_id"] == "a_[31m____bc"
    write_description(root, background=0, **{EVIL: 1})
    assert run(root) == 2
    told, faults = capsys.readouterr()
    assert is_safe(told + faults)
    assert r"class_names: expected" in faults


# ---- classes, ignored voxels, persons


def class_names(root):
    return list(summary_of(root)["classes"])


def test_classes_are_those_given_or_described_or_found(root):
    assert run(root) == 0  # dataset.json in the parent
    assert class_names(root) == ["dim", "bright"]
    (root / "labelsTr" / "dataset.json").write_text((root / "dataset.json").read_text())
    write_description(root, background=0, wrong=1, names=2)
    assert run(root) == 0  # dataset.json beside the labels
    assert class_names(root) == ["dim", "bright"]
    names = ["--class_names", '["background", "x", "y", "z"]']
    for folder in (root, root / "labelsTr"):
        (folder / "dataset.json").write_text("broken")
    assert run(root, *names) == 0
    assert summary_of(root)["classes"]["z"]["status"]["absent"] == 4


def test_classes_are_the_values_found_when_nobody_names_them(root):
    (root / "dataset.json").unlink()
    assert run(root) == 0
    expected = scores_of(root)
    assert class_names(root) == ["1", "2"]
    # 1 is 7 in the labels, and one prediction has a 30 besides
    for folder in ("pred", "labelsTr"):
        for path in (root / folder).iterdir():
            voxels = np.asarray(nib.load(path).dataobj)
            save(path, np.where(voxels == 1, 7, voxels).astype(np.uint8))
    path = root / "pred" / f"{CASES[3]}.nii.gz"
    voxels = np.asarray(nib.load(path).dataobj).copy()
    voxels[tuple(np.argwhere(voxels == 0)[0])] = 30
    save(path, voxels)
    assert run(root) == 0
    assert class_names(root) == ["2", "7", "30"]
    status = {"scored": 0, "missed": 0, "spurious": 1, "absent": 3}
    assert summary_of(root)["classes"]["30"]["status"] == status
    assert [r["dice"] for r in scores_of(root) if r["class"] == "7"] == [
        r["dice"] for r in expected if r["class"] == "1"
    ]


@pytest.mark.parametrize("value", [3, 9])
def test_ignored_voxels_are_those_of_the_description_or_option(root, value):
    for path in (root / "labelsTr").glob("*.nii.gz"):
        voxels = np.asarray(nib.load(path).dataobj).copy()
        voxels[:, :, 3:] = value
        save(path, voxels)
    if value == 3:
        write_description(root, background=0, dim=1, bright=2, ignore=3)
        assert run(root) == 0
    else:
        assert run(root) == 1
        assert "got 9" in summary_of(root)["refused"][CASES[0]]
        assert run(root, "--ignore_value", 9) == 0
    assert class_names(root) == ["dim", "bright"]
    label = label_map(0)
    counted = (int((label[:, :, :3] == n).sum()) for n in (1, 2))
    volumes = [row["label_volume_ml"] for row in scores_of(root)[:2]]
    assert volumes == pytest.approx([n * 3e-3 for n in counted])


def write_table(folder):
    """A dataset of `cases.csv`, with a person each for every two cases."""
    rows = ["case_id,image,label,group"]
    for case_id in CASES:
        for kind in ("image", "label"):
            save(folder / f"{case_id}_{kind}.nii.gz", label_map(0))
        rows.append(f"{case_id},{case_id}_image.nii.gz,{case_id}_label.nii.gz,group_{case_id[7]}")
    (folder / "cases.csv").write_text("\n".join(rows))


def test_persons_are_told_by_the_pattern_or_the_dataset_or_are_the_cases(root):
    def persons():
        found = list(dict.fromkeys(row["person"] for row in scores_of(root)))
        assert summary_of(root)["num_persons"] == len(found)
        return found

    assert run(root) == 0
    assert persons() == CASES
    assert run(root, "--group_pattern", r"person_(\d)") == 0
    assert persons() == ["1", "2"]
    write_table(root / "data")
    assert run(root, "--dataset_dir", root / "data") == 0
    assert persons() == ["group_1", "group_2"]
    assert run(root, "--dataset_dir", root / "data", "--group_pattern", "[ab]") == 0
    assert persons() == ["a", "b"]


# ---- what it refuses


def moved(distance):
    affine = AFFINE.copy()
    affine[0, 3] += distance
    return affine


def flat():
    affine = AFFINE.copy()
    affine[:3, 1] = affine[:3, 0]
    return affine


def with_value(value, dtype=np.float32):
    voxels = label_map(1).astype(dtype)
    voxels[4, 3, 2] = value
    return voxels


def truncated(path):
    save(path, label_map(1))
    path.write_bytes(path.read_bytes()[:-30])


def twice(path):
    save(path.with_name(path.name.removesuffix(".gz")), label_map(1))


KIND = {"pred": "prediction", "labelsTr": "label"}
BAD = {
    "shape": (label_map(1)[:-1], AFFINE, "prediction and label of one shape, got .*Resample"),
    "affine": (label_map(1), moved(1.5), "affine to match label within .*, got 1.500 mm. Resample"),
    "flat": (label_map(1), flat(), "an affine with three directions in the KIND, got .*Correct"),
    "2D": (np.zeros((9, 8), np.uint8), AFFINE, r"a KIND of shape \(H, W, D\), got \(9, 8\)\. "),
    "between": (with_value(0.5), AFFINE, "integer values in the KIND, got 0.5. Resample it"),
    "nan": (with_value(np.nan), AFFINE, "integer values in the KIND, got nan"),
    "large": (with_value(256, np.int16), AFFINE, "values 0 to 255 in the KIND, got 256"),
    "unknown": (with_value(3), AFFINE, "values 0 to 2 in the KIND, got 3. Name all"),
    "truncated": (truncated, None, "a readable NIfTI file person_1b.* of the KIND, got an end"),
    "gone": (lambda path: path.unlink(), None, r"a KIND in .*FOLDER, found none\. Add it"),
    "twice": (twice, None, r"one KIND in .*FOLDER, got .*nii and .*nii\.gz\. Remove one"),
}


@pytest.mark.parametrize(
    ("fault", "folder"),
    [(fault, folder) for fault in BAD for folder in KIND if (fault, folder) != ("gone", "pred")],
)
def test_a_bad_file_is_refused_by_its_case_and_the_others_are_scored(root, fault, folder, capsys):
    content, affine, message = BAD[fault]
    path = root / folder / "person_1b.nii.gz"
    if callable(content):
        content(path)
    else:
        save(path, content, affine)
    assert run(root) == 1
    told, faults = capsys.readouterr()
    (line,) = faults.splitlines()
    message = message.replace("KIND", KIND[folder]).replace("FOLDER", folder)
    assert line.startswith("person_1b: expected ")
    assert line.endswith(".")
    assert re.search(message, line), line
    assert "person_1b: " not in told
    summary = summary_of(root)
    assert summary["refused"] == {"person_1b": line.removeprefix("person_1b: ")}
    assert summary["num_cases"] == 3
    assert {row["case_id"] for row in scores_of(root)} == set(CASES) - {"person_1b"}


MISTAKES = [
    (["--tolerence_mm", "2"], r"--tolerence_mm: .* Did you mean '--tolerance_mm'"),
    (["--ignore_value", "2"], r"ignore_value: expected a value that is no class, got 2"),
    (["--class_names", "dim"], r"class_names: expected a JSON list of 2 to 256 .*, got dim"),
    (["--class_names", '["a"]'], r"class_names: expected a JSON list of 2 to 256 different"),
    (["--group_pattern", "x(.)"], r"person_1a: expected the case id to match group_pattern"),
    (["--device", "abacus"], r"device: expected auto, cpu or cuda"),
    (["--dataset_dir", "nowhere"], r"--dataset_dir: expected a dataset, found nothing at nowhere"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_a_mistake_on_the_command_line_ends_with_status_2(root, words, message, capsys):
    assert run(root, *words) == 2
    told, faults = capsys.readouterr()
    assert not told
    (line, *_) = faults.splitlines()
    assert re.match(message, line), line
    assert not (root / "pred_scores").exists()


def test_folders_with_nothing_to_compare_end_with_status_2(root, capsys):
    save(root / "other" / "stranger.nii.gz", label_map(0))
    assert run(root, pred="other") == 2
    assert "got 1 and 4 cases, none in common" in capsys.readouterr().err
    assert run(root, label="dataset.json") == 2
    assert "expected a folder of labels, got: Not a dir" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_ends_with_status_2(root, capsys, monkeypatch):
    (root / "file").write_text("")
    monkeypatch.delattr(scores, "read_pair")  # before any work
    assert run(root, "--output_dir", root / "file") == 2
    assert "--output_dir: expected a folder that can be written" in capsys.readouterr().err


def test_full_disk_is_told_with_path_and_bytes(root, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        status = run(root)
    assert status == 1
    (line,) = capsys.readouterr().err.splitlines()
    path = re.escape(str(root / "pred_scores" / "metrics.csv"))
    assert re.match(rf"{path}: expected to write \d+ bytes, got: No space left", line), line
