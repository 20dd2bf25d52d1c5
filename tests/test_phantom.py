"""The phantom: what it promises as data, and that it is neither trivial nor half written."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import REPOSITORY
from monai.bundle import ConfigParser

from benchmarks.phantom_baselines import measure
from pipeline.data import phantom
from pipeline.data.phantom import ORGANS, make_case, make_phantom
from pipeline.data.plan import SETTINGS
from pipeline.errors import InputError

NUM_CASES = 24


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_phantom(tmp_path_factory.mktemp("data") / "phantom", num_cases=NUM_CASES)


@pytest.fixture(scope="module")
def volumes(dataset):
    """Per case: the image and the label as nibabel volumes, read through dataset.json."""
    training = json.loads((dataset / "dataset.json").read_text())["training"]
    return [tuple(nib.load(dataset / entry[key]) for key in ("image", "label"))
            for entry in training]  # fmt: skip


@pytest.fixture(scope="module")
def arrays(volumes):
    return [(np.asarray(image.dataobj), np.asarray(label.dataobj)) for image, label in volumes]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.*")}


def test_make_phantom_writes_a_decathlon_folder(dataset, arrays):
    record = json.loads((dataset / "dataset.json").read_text())
    assert record["modality"] == {"0": "MRI"}
    names = ["background", "liver", "spleen", "left_kidney", "right_kidney", "spine"]
    assert record["labels"] == {str(n): name for n, name in enumerate(names)}
    assert record["numTraining"] == len(record["training"]) == NUM_CASES
    listed = {entry[key].removeprefix("./") for entry in record["training"] for key in entry}
    assert listed | {"dataset.json"} == contents(dataset).keys()
    for image, label in arrays:
        assert image.shape == label.shape
        assert (image.dtype, label.dtype) == (np.int16, np.uint8)
        assert 0 <= image.min() < image.max() < np.iinfo(np.int16).max


def test_make_phantom_is_deterministic_and_cases_do_not_depend_on_their_number(dataset, tmp_path):
    again = contents(make_phantom(tmp_path / "again", num_cases=2))
    first = contents(dataset)
    again.pop("dataset.json")
    assert len(again) == 4
    assert all(first[name] == content for name, content in again.items())
    assert not np.array_equal(make_case(0, 0)[0], make_case(1, 0)[0])


def test_inference_config_states_the_plan_of_the_phantom(dataset, tmp_path):
    source = json.loads((REPOSITORY / "configs/amp.json").read_text())
    source |= {"dataset_dir": str(dataset), "cache_dir": str(tmp_path), "device": "cpu"}
    data_module = ConfigParser(source).get_parsed_content("data_module")
    plan = data_module.plan(data_module.run_preflight(data_module.load())).as_dict()
    inference = json.loads((REPOSITORY / "configs/inference.json").read_text())
    shared = {*SETTINGS} & inference.keys()
    assert len(shared) == 11
    assert {key: inference[key] for key in shared} == {key: plan[key] for key in shared}
    recipe = [plan[key] for key in ("base_channels", "norm", "learning_rate", "warmup_steps")]
    assert recipe == [8, "instance", 0.005, 40]
    assert (plan["steps_per_epoch"], plan["max_epochs"]) == (60, 6)
    metadata = json.loads((REPOSITORY / "configs/metadata.json").read_text())
    for side in metadata["network_data_format"].values():
        assert [value["spatial_shape"] for value in side.values()] == [plan["roi_size"]]


def test_every_class_is_present_in_every_case(arrays):
    counts = [np.bincount(label.ravel(), minlength=len(ORGANS) + 1) for _, label in arrays]
    assert np.shape(counts) == (NUM_CASES, len(ORGANS) + 1)
    assert np.min(counts) >= 150


def test_grids_are_oblique_anisotropic_and_differ(volumes):
    affines = [image.affine for image, _ in volumes]
    spacings = np.array([np.sort(nib.affines.voxel_sizes(affine)) for affine in affines])
    assert np.all(spacings[:, 2] > 1.5 * spacings[:, 0])
    assert len(np.unique(spacings.round(3), axis=0)) == NUM_CASES
    assert np.median([np.rad2deg(nib.affines.obliquity(a)).max() for a in affines]) > 4
    assert len({image.shape for image, _ in volumes}) > NUM_CASES / 2
    codes = {"".join(nib.aff2axcodes(affine)) for affine in affines}
    assert codes == set(phantom.ORIENTATIONS)
    assert {np.sign(np.linalg.det(affine)) for affine in affines} == {-1, 1}


def test_headers_agree_on_one_affine_in_mm(volumes):
    for image, label in volumes:
        np.testing.assert_array_equal(image.affine, label.affine)
        for volume in (image, label):
            assert (volume.header["sform_code"], volume.header["qform_code"]) == (1, 1)
            np.testing.assert_allclose(volume.get_qform(), volume.get_sform(), atol=1e-3)
            assert volume.header.get_xyzt_units()[0] == "mm"


def test_sides_are_the_patients_in_world_space(volumes, arrays):
    for (image, _), (_, label) in zip(volumes, arrays, strict=True):
        right_mm = {  # mean world x: it grows from the patient's left to the right
            organ.name: nib.affines.apply_affine(image.affine, np.argwhere(label == c)).mean(0)[0]
            for c, organ in enumerate(ORGANS, 1)
        }
        assert right_mm["right_kidney"] > right_mm["spine"] + 5 > right_mm["left_kidney"] + 10
        assert right_mm["liver"] > right_mm["spleen"] + 20


def test_neither_intensity_nor_an_average_label_map_solves_the_phantom(dataset):
    result = measure(dataset)
    assert result["num_validation"] == NUM_CASES // 5
    for baseline in ("intensity_dice", "atlas_dice"):
        assert 0.1 < result[baseline]["mean"] < 0.5


def test_make_phantom_leaves_a_complete_dataset_untouched(tmp_path):
    directory = make_phantom(tmp_path / "phantom", num_cases=1)
    before = contents(directory)
    assert make_phantom(directory, seed=5, num_cases=3) == directory
    assert contents(directory) == before


def test_make_phantom_raises_when_something_else_is_there(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "note.txt"):
        with pytest.raises(InputError, match=r"expected a dataset folder.*Name another directory"):
            make_phantom(taken)
    assert contents(tmp_path) == {"note.txt": b"mine"}


def test_make_phantom_leaves_nothing_behind_when_it_fails(tmp_path, monkeypatch):
    def fail_at_the_second(seed, case):
        if case == 1:
            raise KeyboardInterrupt
        return make_case(seed, case)

    monkeypatch.setattr(phantom, "make_case", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make_phantom(tmp_path / "phantom", num_cases=2)
    assert not list(tmp_path.iterdir())


def test_make_phantom_keeps_the_winners_dataset_when_it_lost_the_race(tmp_path, monkeypatch):
    directory = tmp_path / "phantom"

    def let_the_other_win(seed, case):
        monkeypatch.setattr(phantom, "make_case", make_case)
        make_phantom(directory, seed=1, num_cases=1)
        return make_case(seed, case)

    monkeypatch.setattr(phantom, "make_case", let_the_other_win)
    assert make_phantom(directory, seed=0, num_cases=1) == directory
    assert "seed 1" in json.loads((directory / "dataset.json").read_text())["description"]
    assert list(tmp_path.iterdir()) == [directory]
