"""Files in, label maps on the same grid out: by command, as a bundle, and in memory."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from conftest import REPOSITORY, run_tiny, write_case
from dicom_series import describe, write_series
from forked import monai_bundle
from monai.data import MetaTensor
from test_transforms import GRIDS, make_affine

from pipeline.errors import InputError
from pipeline.prediction.predictor import Predictor
from pipeline.run import main


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory) -> Path:
    """Two runs of the same plan, `a` and `b`, and `c` of another, with weights that find things."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        for name, changes in {"a": {}, "b": {"seed": 1}, "c": {"roi_size": [16, 16, 16]}}.items():
            assert run_tiny(dataset, root / name, max_epochs=1, val_interval=9, **changes) == 0
            path = root / name / "models/model.pt"
            weights = torch.load(path, weights_only=True)
            two = {"a": (3, -3), "b": (2, -3), "c": (3, -2)}[name]  # of two features the classes
            head = torch.tensor([[0, 0], two, two[::-1]], dtype=torch.float32)
            weights["head.weight"] = head[..., None, None, None]
            weights["head.bias"] = torch.tensor([0.5, 0, 0])
            torch.save(weights, path)
    return root


@pytest.fixture
def predict(runs, tmp_path, monkeypatch):
    """`predict(input, key=value, ...)` → exit status; results are in `tmp_path / "out"`."""
    monkeypatch.chdir(REPOSITORY)

    def command(images, **values) -> int:
        given = {
            "run_dir": str(runs / "a"),
            "input": str(images),
            "output_dir": str(tmp_path / "out"),
            **values,
        }
        words = [
            word
            for key, value in given.items()
            for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
        ]
        try:
            return main(["configs/inference.json", *words])
        except SystemExit as end:
            return end.code

    return command


def labels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


# ---- the grid


@pytest.mark.parametrize("form", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("codes", [(1, 1), (2, 0), (0, 3)])
@pytest.mark.parametrize("name", GRIDS)
def test_prediction_lies_on_the_inputs_own_grid(predict, tmp_path, name, codes, form):
    affine = make_affine(*GRIDS[name])
    write_case(tmp_path, "case", seed=3, size=(21, 15, 12), affine=affine)
    path = tmp_path / "imagesTr/case.nii.gz"
    voxels = np.asarray(nib.load(path).dataobj)
    image = form(voxels[..., None], affine)  # a trailing axis of one
    image.set_sform(affine, code=codes[0])
    image.set_qform(affine, code=codes[1])
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"of somebody"
    nib.save(image, path)
    assert predict(path) == 0
    given, got = nib.load(path), nib.load(tmp_path / "out/case.nii.gz")
    assert type(got) is form
    assert got.shape == (21, 15, 12)
    assert got.get_data_dtype() == np.uint8
    assert set(np.unique(got.dataobj)) == {0, 1, 2}
    np.testing.assert_array_equal(got.affine, given.affine)
    assert nib.aff2axcodes(got.affine) == nib.aff2axcodes(given.affine)
    for field in ("sform_code", "qform_code", "xyzt_units", "srow_x", "quatern_b", "qoffset_x"):
        assert got.header[field] == pytest.approx(given.header[field]), field
    np.testing.assert_array_equal(got.header["pixdim"][:4], given.header["pixdim"][:4])
    assert b"somebody" not in got.header["descrip"].tobytes()


def test_prediction_of_a_dicom_series(predict, tmp_path):
    voxels = np.random.default_rng(0).integers(0, 99, (18, 16, 12)).astype(np.int16)
    affine = make_affine(*GRIDS["RAS"])
    write_series(tmp_path / "images/one", voxels, affine)
    assert predict(tmp_path / "images") == 0
    got = nib.load(tmp_path / "out/one.nii.gz")
    assert got.shape == (18, 16, 12)
    # as a file its axes are turned, the labels lie where they lay
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "same.nii.gz")
    assert predict(tmp_path / "same.nii.gz") == 0
    same = nib.load(tmp_path / "out/same.nii.gz")
    back, expected = (nib.as_closest_canonical(image) for image in (got, same))
    np.testing.assert_allclose(back.affine, expected.affine, atol=1e-4)
    assert (np.asarray(back.dataobj) == np.asarray(expected.dataobj)).mean() > 0.999
    assert (int(got.header["sform_code"]), int(got.header["qform_code"])) == (1, 1)
    assert got.header.get_xyzt_units()[0] == "mm"


# ---- ways to predict


def test_command_bundle_and_memory_agree(predict, runs, dataset, tmp_path):
    assert predict(dataset / "imagesTr") == 0
    done = monai_bundle(
        "--config_file", "configs/inference.json", "--output_dir", str(tmp_path / "bundle"),
        "--input", str(dataset / "imagesTr"), "--strict", "false", cwd=runs / "a",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    predictor = Predictor(runs / "a")
    paths = sorted((dataset / "imagesTr").iterdir())
    assert len(paths) == 6
    for path in paths:
        image = nib.load(path)
        ours = labels(tmp_path / "out" / path.name)
        assert len(np.unique(ours)) == 3
        np.testing.assert_array_equal(labels(tmp_path / "bundle" / path.name), ours)
        array = predictor(image.get_fdata(), image.affine)
        assert (predictor(path) == array).all()
        assert (predictor(image) == array).all()
        tensor = predictor(MetaTensor(torch.as_tensor(image.get_fdata()[None]), image.affine))
        for got in (array, tensor):
            assert isinstance(got, MetaTensor)
            assert got.dtype == torch.uint8
            np.testing.assert_array_equal(got, ours)
            np.testing.assert_allclose(got.affine, image.affine)


def test_evaluator_for_clients_gives_the_same_labels(predict, runs, dataset, tmp_path, monkeypatch):
    assert predict(dataset / "imagesTr") == 0
    done = monai_bundle(
        "--config_file", "configs/inference.json", "--run", "['$@evaluator.run()']",
        "--output_dir", str(tmp_path / "clients"), cwd=runs / "a",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path in sorted((dataset / "imagesTr").iterdir()):
        theirs = nib.load(tmp_path / "clients" / path.name)
        np.testing.assert_array_equal(
            np.asarray(theirs.dataobj), labels(tmp_path / "out" / path.name)
        )
        np.testing.assert_allclose(theirs.affine, nib.load(path).affine, atol=1e-5)


def test_ensemble_and_mirrors(predict, runs, dataset, tmp_path):
    image = dataset / "imagesTr/tiny_002.nii.gz"
    found = {}
    for name, values in {
        "a": {},
        "b": {"run_dir": str(runs / "b")},
        "both": {"run_dir": [str(runs / "a"), str(runs / "b")]},
        "mirrored": {"mirror": True, "flip_axes": [0, 1]},
    }.items():
        assert predict(image, probabilities=True, **values) == 0
        got = nib.load(tmp_path / "out/tiny_002_probabilities.nii.gz")
        found[name] = got.get_fdata()
        assert (got.shape, got.get_data_dtype()) == ((20, 18, 12, 3), np.float32)
        np.testing.assert_allclose(got.affine, nib.load(image).affine)
        np.testing.assert_allclose(found[name].sum(-1), 1, atol=1e-5)
        ours = labels(tmp_path / "out/tiny_002.nii.gz")
        np.testing.assert_array_equal(found[name].argmax(-1), ours)
    np.testing.assert_allclose(found["both"], (found["a"] + found["b"]) / 2, atol=1e-6)
    assert np.abs(found["a"] - found["b"]).max() > 0.1
    assert np.abs(found["a"] - found["mirrored"]).max() > 0.01
    array = nib.load(image)
    got = Predictor(runs / "a", runs / "b")(array.get_fdata(), array.affine)
    np.testing.assert_array_equal(got, found["both"].argmax(-1))


def test_cleanup_and_weights_are_config_values(predict, runs, dataset, tmp_path):
    image = dataset / "imagesTr/tiny_002.nii.gz"
    assert predict(image) == 0
    plain = labels(tmp_path / "out/tiny_002.nii.gz")
    assert predict(image, keep_largest=["dim"], min_volume_ml={"bright": 99}) == 0
    cleaned = labels(tmp_path / "out/tiny_002.nii.gz")
    assert not (cleaned == 2).any()
    assert 0 < (cleaned == 1).sum() <= (plain == 1).sum()
    assert predict(image, weights="models/last.pt") == 0
    assert (labels(tmp_path / "out/tiny_002.nii.gz") != plain).any()


# ---- what a person does wrong


def broken(folder: Path) -> dict[str, str]:
    """A folder with a good case and bad ones; what is expected to be said of each."""
    write_case(folder, "good", seed=1)
    images = folder / "imagesTr"
    good = (images / "good.nii.gz").read_bytes()
    rng = np.random.default_rng(0)
    (images / "cut.nii.gz").write_bytes(good[: len(good) // 2])
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    (images / "flipped.nii.gz").write_bytes(bytes(flipped))
    (images / "text.nii.gz").write_text("hello")
    for ending in ("nii", "nii.gz"):
        nib.save(nib.load(images / "good.nii.gz"), images / f"twice.{ending}")
    volumes = {
        "channels": rng.normal(size=(9, 8, 7, 3)),
        "five": rng.normal(size=(9, 8, 7, 3, 2)),
        "nan": np.full((20, 18, 12), np.nan),
    }
    for name, voxels in volumes.items():
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.eye(4)), images / f"{name}.nii.gz")
    readable = "expected a readable NIfTI file"
    return {
        "cut": readable,
        "flipped": readable,
        "text": readable,
        "twice": "expected one volume of this name in ",
        "channels": "expected 1 image channels, got 3",
        "five": "expected an image of shape (H, W, D) or (H, W, D, channels)",
        "nan": "expected finite voxels, got 4320",
    }


def test_bad_cases_are_named_and_the_rest_is_done(predict, tmp_path, capsys):
    expected = broken(tmp_path)
    assert predict(tmp_path / "imagesTr") == 1
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["good.nii.gz"]
    listed = capsys.readouterr().err.split(f"Not predicted: {len(expected)} of 8\n")[1]
    lines = dict(line.strip().split(": ", 1) for line in listed.splitlines())
    assert lines.keys() == expected.keys()
    for case_id, words in expected.items():
        assert lines[case_id].startswith(words), case_id


def test_folder_of_predictions_shows_what_came_out(predict, tmp_path):
    expected = broken(tmp_path)
    path = tmp_path / "imagesTr/good.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(image.get_fdata() * 100, image.affine), path)
    assert predict(tmp_path / "imagesTr", dicom_seg=True) == 1
    out = tmp_path / "out"
    content = json.loads((out / "predictions.json").read_text())["cases"]
    assert {case_id for case_id, of in content.items() if of["fault"]} == expected.keys()
    got = labels(out / "good.nii.gz")
    with open(out / "volumes.csv") as file:
        rows = [(row["case"], row["class"], row["voxels"]) for row in csv.DictReader(file)]
    counted = [("dim", (got == 1).sum()), ("bright", (got == 2).sum())]
    assert rows == [("good", name, str(count)) for name, count in counted]
    page = (out / "index.html").read_text()
    first, second = content["good"]["warnings"]
    assert first.startswith("expected intensities of MRI as in training")
    assert second.startswith("dicom_seg: expected a DICOM series")
    for text in (
        first[:40],
        second[:40],
        "expected one volume of this name",
        "dim",
        "1 of 8 cases",
    ):
        assert text in page, text


def test_series_is_predicted_as_a_dicom_segmentation_too(predict, tmp_path):
    voxels = np.random.default_rng(0).integers(0, 99, (18, 16, 12)).astype(np.int16)
    series = write_series(tmp_path / "images/one", voxels, np.eye(4), change=describe)
    for _ in range(2):  # the second overwrites the first
        assert predict(tmp_path / "images", dicom_seg=True) == 0
    segmentation = pydicom.dcmread(tmp_path / "out/one.dcm")
    counts = np.zeros(3, int)
    groups = segmentation.PerFrameFunctionalGroupsSequence
    for frame, group in zip(segmentation.pixel_array, groups, strict=True):
        counts[group.SegmentIdentificationSequence[0].ReferencedSegmentNumber] += frame.sum()
    got = labels(tmp_path / "out/one.nii.gz")
    assert counts[1:].tolist() == [(got == 1).sum(), (got == 2).sum()]
    bare = write_series(tmp_path / "bare/two", voxels, np.eye(4))  # names no study
    assert predict(bare, dicom_seg=True) == 0
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    assert content["cases"]["two"]["warnings"][-1].startswith("dicom_seg: expected a series that")
    assert (tmp_path / "out/two.nii.gz").exists() > (tmp_path / "out/two.dcm").exists()
    shutil.copy(next(series.iterdir()), tmp_path / "out/one.dcm")
    assert predict(tmp_path / "images", dicom_seg=True) == 2  # a slice is not overwritten


def test_strict_stops_at_the_first(predict, tmp_path, capsys):
    broken(tmp_path)
    assert predict(tmp_path / "imagesTr", strict=True) == 1
    assert not list((tmp_path / "out").glob("*.nii.gz"))
    assert "Not predicted: 1 of 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run_dir": "nowhere"}, "run_dir: expected the directory of a run, got nowhere"),
        ({"run_dir": []}, "--run_dir: expected a path, got []"),
        ({"output_dir": None}, "--output_dir: expected a path, got null"),
        ({"images": "nowhere"}, "--input: expected images to predict, found nothing at "),
        ({"wieghts": "x"}, "--wieghts: expected a known option, got '--wieghts'. Did you mean "),
        ({"weights": "models/no.pt"}, "models/no.pt. Did you mean 'model.pt'?"),
        ({"weights": "plan.json"}, "plan.json: expected the weights of this network, got: "),
        ({"keep_largest": ["liver"]}, "keep_largest: expected classes of dim, bright, got liver"),
        ({"strict": 3}, "--strict: expected true or false (stop at the first case"),
        ({"overlap": 1.0}, "overlap: expected 0 to below 1, got 1.0"),
    ],
)
def test_mistakes_are_one_line_and_status_2(predict, dataset, tmp_path, capsys, change, words):
    change = dict(change)
    assert predict(change.pop("images", dataset / "imagesTr"), **change) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


def test_ensemble_of_another_plan_is_refused(predict, runs, dataset, capsys):
    assert predict(dataset / "imagesTr", ensemble=[str(runs / "c")]) == 2
    assert "expected a run of the same plan, got another roi_size" in capsys.readouterr().err


def as_it_was(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["nii.gz", "nii", "series", "in a series"])
def test_images_are_never_written_among(predict, dataset, tmp_path, capsys, kind):
    out = tmp_path / "out"
    if "series" in kind:
        series = out / "one" if kind == "series" else out.parent / "one"
        write_series(series, np.ones((9, 8, 7), np.int16), np.eye(4))
        images, out = series, out if kind == "series" else series / "pred"
    else:
        out.mkdir()
        images = out
        nib.save(nib.load(dataset / "imagesTr/tiny_001.nii.gz"), out / f"a.{kind}")
    before = as_it_was(tmp_path)
    assert predict(images, output_dir=str(out)) == 2
    assert "output_dir: expected another folder than that of the images" in capsys.readouterr().err
    assert as_it_was(tmp_path) == before


def test_labels_are_never_overwritten_but_predictions_are(predict, dataset, tmp_path, capsys):
    shutil.copytree(dataset / "labelsTr", tmp_path / "out")
    before = as_it_was(tmp_path)
    assert predict(dataset / "imagesTr") == 2
    assert "expected a folder without other files of the results' names" in capsys.readouterr().err
    assert as_it_was(tmp_path) == before
    assert predict(dataset / "imagesTr", output_dir=str(tmp_path / "mine")) == 0
    assert predict(dataset / "imagesTr", output_dir=str(tmp_path / "mine")) == 0


def test_result_of_one_case_is_not_another_cases(predict, tmp_path, capsys):
    for case_id in ("q", "q_probabilities"):
        write_case(tmp_path, case_id, seed=0)
    assert predict(tmp_path / "imagesTr", probabilities=True) == 2
    assert "got several q_probabilities.nii.gz. Rename an image." in capsys.readouterr().err
    assert predict(tmp_path / "imagesTr") == 0


def test_predictions_of_other_classes_are_not_mixed(predict, dataset, tmp_path):
    image = dataset / "imagesTr/tiny_001.nii.gz"
    assert predict(image) == 0
    assert predict(image, class_names=["background", "a", "b"]) == 2


def test_files_of_others_beside_the_results_are_never_overwritten(predict, dataset, tmp_path):
    image = dataset / "imagesTr/tiny_001.nii.gz"
    for name in ("index.html", "labels.json", "predictions.json", "pictures"):
        out = tmp_path / name.replace(".", "_")
        out.mkdir()
        (out / name).write_text('{"mine": 1}')
        assert predict(image, output_dir=str(out)) == 2
        assert [path.name for path in out.iterdir()] == [name]


def test_interrupted_prediction_lists_what_it_could_not_do(predict, tmp_path, monkeypatch, capsys):
    broken(tmp_path)

    def interrupt(self, image, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.prediction.segmenter.Segmenter.__call__", interrupt)
    assert predict(tmp_path / "imagesTr") == 130
    told = capsys.readouterr().err
    assert "Not predicted: 4 of 8" in told  # those before the good one
    assert "Interrupted." in told


@pytest.mark.parametrize(
    ("scale", "spacing", "words"),
    [
        (1, 1.5, None),
        (1, 5.0, "expected voxels of 1x1x1.5 to 1x1x1.5 mm (R, A, S), as in training, got 1x1x5"),
        (100, 1.5, "expected intensities of MRI as in training"),
    ],
)
def test_images_unlike_those_of_training_are_predicted_with_a_warning(
    predict, tmp_path, capsys, scale, spacing, words
):
    write_case(tmp_path, "case", seed=1, affine=np.diag([1, 1, spacing, 1]))
    path = tmp_path / "imagesTr/case.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(image.get_fdata(dtype=np.float32) * scale, image.affine), path)
    assert predict(path) == 0
    told = capsys.readouterr()
    told = told.out + told.err
    assert (words in told) if words else ("as in training" not in told)
    assert (tmp_path / "out/case.nii.gz").exists()


def test_predictor_leaves_the_image_as_it_is(runs, dataset):
    """With nothing to resample and float32, normalisation would work in the caller's memory."""
    predictor = Predictor(runs / "a")
    voxels = np.random.default_rng(0).normal(50, 9, (20, 18, 12)).astype(np.float32)
    before = voxels.copy()
    first = predictor(voxels, np.eye(4))
    tensor = MetaTensor(torch.as_tensor(voxels)[None], affine=torch.eye(4))
    np.testing.assert_array_equal(predictor(tensor), first)
    np.testing.assert_array_equal(voxels, before)
    np.testing.assert_array_equal(predictor(np.asfortranarray(voxels), np.eye(4)), first)
    leaf = torch.as_tensor(voxels).requires_grad_()
    np.testing.assert_array_equal(predictor(leaf, np.eye(4)), first)


def test_predictor_refuses(runs, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "r")
    (tmp_path / "r/models/model.pt").unlink()
    with pytest.raises(InputError, match=r"expected the weights of this network, got: .* No such"):
        Predictor(tmp_path / "r")
    with pytest.raises(InputError, match=r"the directory of a run, found nothing at .*mean 'a'"):
        Predictor(f"{runs / 'a'}a")
    for values, words in (
        (
            {"devcie": "cpu"},
            r"expected keys of .*inference.json, got devcie. Did you mean 'device'",
        ),
        ({"device": "gpu"}, "device: expected auto, cpu or cuda"),
        ({"overlap": 1.0}, "overlap: expected 0 to below 1"),
        ({"sw_batch_size": "x"}, "sw_batch_size: expected a whole number"),
        ({"ensemble": ["nowhere"]}, "run_dir: expected the directory of a run, got"),
    ):
        with pytest.raises(InputError, match=words):
            Predictor(runs / "a", **values)
    predictor = Predictor(runs / "a")
    for affine in (None, np.eye(3), np.zeros((4, 4))):
        with pytest.raises(ValueError, match=r"affine: expected .4, 4. with three directions"):
            predictor(np.zeros((9, 9, 9)), affine)
    with pytest.raises(ValueError, match=r"expected 1 channels, .* got shape"):
        predictor(np.zeros((2, 9, 9, 9)), np.eye(4))
    for case_id in ("a", "b"):
        write_case(tmp_path, case_id, seed=0)
    with pytest.raises(InputError, match="expected one image, got 2"):
        predictor(tmp_path / "imagesTr")
    assert len(Predictor(runs / "a", ensemble=[str(runs / "b")]).segmenter.networks) == 2


def test_predictor_refuses_a_run_whose_config_holds_code(runs, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "r")
    path = tmp_path / "r/configs/inference.json"
    source = json.loads(path.read_text())
    source["network_def"]["_target_"] = "os.system"
    path.write_text(json.dumps(source))
    with pytest.raises(InputError, match="expected a class or function of the list"):
        Predictor(tmp_path / "r")
