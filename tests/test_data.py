import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import make_dataset, write_case, write_dataset_json
from monai.data import MetaTensor

from pipeline.data.cache import VolumeCache
from pipeline.data.dataset import load_cases
from pipeline.data.preflight import preflight
from pipeline.data.sampling import EpochSampler, PatchDataset, PatchLoader
from pipeline.errors import InputError

# ---- reading dataset.json


def ids(cases):
    return [case["case_id"] for case in cases]


@pytest.fixture
def writable(tmp_path):
    """A dataset of four cases that the test may change."""
    return make_dataset(tmp_path / "tiny", num_cases=4)


def faults_of(function, *arguments, **keywords):
    with pytest.raises(InputError) as caught:
        function(*arguments, **keywords)
    assert str(caught.value).splitlines() == list(caught.value.faults)
    return caught.value.faults


def test_load_cases_reads_dataset_json(writable):
    write_dataset_json(
        writable,
        ["tiny_001", "tiny_002", "tiny_003"],
        # 10 sorts before 2 as a word
        labels={**{str(n): f"class {n}" for n in (10, 2, 1, 3, 4, 5, 6, 7, 8, 9)}, "0": "none"},
        modality={"0": "FLAIR", "1": "T1w"},
        description="Left and right",
        licence="CC-BY-SA 4.0",
        release="2.0",
    )
    cases = load_cases(writable, num_folds=3)
    assert cases.name == "tiny"
    assert cases.class_names == ["none", *(f"class {n}" for n in range(1, 11))]
    assert cases.num_channels == 2
    assert cases.channel_names == ["FLAIR", "T1w"]
    assert cases.description == {"description": "Left and right", "licence": "CC-BY-SA 4.0"}
    case = min(cases.train + cases.validation, key=lambda case: case["case_id"])
    assert case == {
        "case_id": "tiny_001",
        "image": str(writable / "imagesTr" / "tiny_001.nii.gz"),
        "label": str(writable / "labelsTr" / "tiny_001.nii.gz"),
    }


def test_load_cases_names_dataset_by_its_folder_when_dataset_json_does_not(writable):
    text = (writable / "dataset.json").read_text().replace('"name"', '"title"')
    (writable / "dataset.json").write_text(text)
    assert load_cases(writable, num_folds=2).name == writable.name


def test_load_cases_keeps_the_names_of_links(writable):
    image = writable / "imagesTr" / "tiny_001.nii.gz"
    image.rename(writable / "0a1b2c")  # as in caches that store files under their hash
    image.symlink_to(writable / "0a1b2c")
    cases = load_cases(writable, num_folds=2)
    assert str(image) in [case["image"] for case in cases.train + cases.validation]
    assert preflight(cases).findings == []


def test_load_cases_makes_paths_absolute(writable, monkeypatch):
    monkeypatch.chdir(writable.parent)
    cases = load_cases("tiny", num_folds=2)
    assert all(Path(case["image"]).is_absolute() for case in cases.train)


def test_fingerprint_is_that_of_the_data_not_of_the_place(writable, tmp_path):
    before = load_cases(writable, num_folds=2).fingerprint
    shutil.copytree(writable, tmp_path / "copy")
    assert load_cases(tmp_path / "copy", num_folds=2).fingerprint == before
    assert load_cases(writable, num_folds=3, fold=1, split_seed=5).fingerprint == before


def test_fingerprint_differs_when_a_case_is_removed(writable):
    before = load_cases(writable, num_folds=2).fingerprint
    write_dataset_json(writable, ["tiny_001", "tiny_002", "tiny_003"])
    assert load_cases(writable, num_folds=2).fingerprint != before


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_fingerprint_differs_when_a_file_has_another_size(writable, folder):
    before = load_cases(writable, num_folds=2).fingerprint
    with open(writable / folder / "tiny_002.nii.gz", "ab") as file:
        file.write(b"\0")
    assert load_cases(writable, num_folds=2).fingerprint != before


def test_fingerprint_differs_when_a_class_is_renamed(writable):
    before = load_cases(writable, num_folds=2).fingerprint
    text = (writable / "dataset.json").read_text()
    (writable / "dataset.json").write_text(text.replace("bright", "brighter"))
    assert load_cases(writable, num_folds=2).fingerprint != before


def test_fingerprint_is_the_one_that_runs_already_have(writable):
    """Of an MSD dataset; computed here as the first version of the pipeline did."""
    source = json.loads((writable / "dataset.json").read_text())
    facts = []
    for case_id in [f"tiny_{n:03d}" for n in (1, 2, 3, 4)]:
        files = (writable / folder / f"{case_id}.nii.gz" for folder in ("imagesTr", "labelsTr"))
        facts.append((case_id, *(file.stat().st_size for file in files)))
    expected = hashlib.sha256(json.dumps([facts, source["labels"]]).encode()).hexdigest()
    assert load_cases(writable, num_folds=2).fingerprint == expected


def test_load_cases_leaves_out_what_is_excluded_before_it_is_found_wanting(writable):
    take_files(writable)
    cases = load_cases(writable, num_folds=2, exclude=["tiny_004", "tiny_002"])
    assert sorted(ids(cases.train + cases.validation)) == ["tiny_001", "tiny_003"]
    assert cases.findings == []
    assert cases.excluded == ["tiny_002", "tiny_004"]
    write_dataset_json(writable, ["tiny_001", "tiny_003"])
    assert load_cases(writable, num_folds=2).fingerprint == cases.fingerprint


def test_load_cases_names_the_nearest_case_when_exclude_has_an_unknown_one(writable):
    faults = faults_of(load_cases, writable, num_folds=2, exclude=["tiny_01", "zzz"])
    assert faults[0] == (
        "exclude: expected cases of the dataset, got 'tiny_01'. Did you mean 'tiny_001'?"
    )
    assert faults[1].startswith("exclude: expected cases of the dataset, got 'zzz'. Valid are: ")


def take_files(root):
    (root / "imagesTr" / "tiny_002.nii.gz").unlink()
    (root / "labelsTr" / "tiny_002.nii.gz").unlink()
    (root / "labelsTr" / "tiny_004.nii.gz").unlink()
    return [("tiny_002", "image"), ("tiny_002", "label"), ("tiny_004", "label")]


def test_load_cases_finds_all_missing_files(writable):
    missing = take_files(writable)
    cases = load_cases(writable, num_folds=2)
    assert sorted(ids(cases.train + cases.validation)) == ["tiny_001", "tiny_003"]
    assert {finding.check for finding in cases.findings} == {"missing"}
    assert not any(finding.warning for finding in cases.findings)
    lines = [finding.line for finding in cases.findings]
    assert [re.match(r"(\w+): expected (\w+) file", line).groups() for line in lines] == missing


def test_load_cases_names_missing_files_before_the_split_that_lacks_them(writable):
    missing = take_files(writable)
    *faults, split = faults_of(load_cases, writable, num_folds=4)
    assert [re.match(r"(\w+): expected (\w+) file", fault).groups() for fault in faults] == missing
    assert split.startswith("num_folds: expected 2 to 2")


def test_load_cases_finds_a_case_listed_twice(writable):
    write_dataset_json(writable, ["tiny_001", "tiny_002", "tiny_001", "tiny_003"])
    cases = load_cases(writable, num_folds=2)
    (finding,) = cases.findings
    assert finding.check == "duplicate_id"
    assert finding.line.startswith("tiny_001: expected one case of this name")
    assert sorted(ids(cases.train + cases.validation)) == ["tiny_002", "tiny_003"]


def test_load_cases_tells_names_with_dots_apart(tmp_path):
    for n, case_id in enumerate(["sub-1.v1", "sub-1.v2"]):
        write_case(tmp_path, case_id, seed=n)
    write_dataset_json(tmp_path, ["sub-1.v1", "sub-1.v2"])
    cases = load_cases(tmp_path, num_folds=2)
    assert sorted(ids(cases.train + cases.validation)) == ["sub-1.v1", "sub-1.v2"]


def test_load_cases_refuses_a_folder_without_dataset_json(tmp_path):
    (fault,) = faults_of(load_cases, tmp_path)
    assert re.search(rf"dataset_dir: expected .*dataset.json.*{re.escape(str(tmp_path))}", fault)


@pytest.mark.parametrize("text", ["", "{'labels': 1}", '{"labels": {', "[" * 100_000])
def test_load_cases_refuses_broken_json_in_one_line(writable, text):
    (writable / "dataset.json").write_text(text)
    (fault,) = faults_of(load_cases, writable)
    assert re.match(r".*dataset\.json: expected JSON, got: ", fault)


def test_load_cases_refuses_json_that_is_no_object(writable):
    (writable / "dataset.json").write_text('["training"]')
    assert re.search("expected a JSON object, got list", faults_of(load_cases, writable)[0])


def test_load_cases_names_all_missing_and_empty_keys(writable):
    write_dataset_json(writable, [], labels=["background", "dim"], modality={})
    faults = faults_of(load_cases, writable)
    assert [re.search(r"expected '(\w+)'", fault)[1] for fault in faults] == [
        "labels",
        "modality",
        "training",
    ]


def test_load_cases_names_all_broken_training_entries(writable):
    right = {"image": "./imagesTr/tiny_001.nii.gz", "label": "./labelsTr/tiny_001.nii.gz"}
    wrong = ["tiny_002", {"image": "a.nii.gz"}, {"image": ["a.nii.gz"], "label": "b.nii.gz"}]
    write_dataset_json(writable, [], training=[right, *wrong])
    faults = faults_of(load_cases, writable)
    assert [re.search(r"training\[(\d)\]", fault)[1] for fault in faults] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "labels",
    [
        {"0": "background", "2": "bright"},
        {"1": "dim", "2": "bright"},
        {"0": "background"},
        {"0": "background", "1": "dim", "one": "bright"},
        {"0": "background", "1": "dim", "²": "bright"},
        {"background": 0, "dim": 1, "bright": 3},
        {"background": 0, "dim": 1, "bright": 1},
    ],
)
def test_load_cases_refuses_labels_that_do_not_count_from_0(writable, labels):
    write_dataset_json(writable, ["tiny_001", "tiny_002"], labels=labels)
    (fault,) = faults_of(load_cases, writable, num_folds=2)
    assert "without gaps" in fault
    assert str(list(labels)) in fault


# ---- preflight


def rewrite(path, change):
    """Save the file again, its voxels changed."""
    file = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asanyarray(file.dataobj).copy()), file.affine), path)


def lines_of(root):
    return [finding.line for finding in preflight(load_cases(root, num_folds=2)).findings]


def test_preflight_passes_images_with_several_channels_and_labels_with_one(writable):
    for n in (1, 2):
        rewrite(writable / "imagesTr" / f"tiny_00{n}.nii.gz", lambda v: np.stack([v, v], -1))
        rewrite(writable / "labelsTr" / f"tiny_00{n}.nii.gz", lambda v: v[..., None])
    write_dataset_json(writable, ["tiny_001", "tiny_002"], modality={"0": "T1", "1": "T2"})
    assert lines_of(writable) == []


@pytest.mark.parametrize(("shift", "refused"), [(0.0005, False), (1.5, True)])
def test_preflight_allows_affines_a_tolerance(writable, shift, refused):
    path = writable / "labelsTr" / "tiny_003.nii.gz"
    moved = nib.load(path).affine
    moved[1, 3] += shift
    nib.save(nib.Nifti1Image(np.asarray(nib.load(path).dataobj), moved), path)
    lines = lines_of(writable)
    assert len(lines) == refused
    if refused:
        assert re.match(r"tiny_003: expected label affine .* 0.001 mm, got 1\.500 mm", lines[0])


def test_preflight_measures_affines_at_the_farthest_corner(writable):
    """A voxel 0.01 mm longer is 0.19 mm out at the other end of 20 voxels."""
    path = writable / "labelsTr" / "tiny_003.nii.gz"
    voxels = np.asarray(nib.load(path).dataobj)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.01, 1, 1.5, 1])), path)
    assert "got 0.190 mm" in lines_of(writable)[0]


def test_preflight_refuses_label_values_that_a_byte_does_not_hold(writable):
    names = {str(n): f"class {n}" for n in range(300)}
    ids = [f"tiny_00{n}" for n in (1, 2, 3, 4)]
    write_dataset_json(writable, ids, labels=names)
    label = writable / "labelsTr" / "tiny_002.nii.gz"
    rewrite(label, lambda v: np.where(v == 2, np.int16(299), v))
    (line,) = lines_of(writable)
    assert line.startswith("tiny_002: expected label values 0 to 254, got 299.")


def test_preflight_reports_all_cases_and_kinds_at_once(writable):
    def put(value):
        def change(voxels):
            voxels[0, 0, 0] = value
            return voxels

        return change

    rewrite(writable / "imagesTr" / "tiny_001.nii.gz", put(np.inf))
    rewrite(writable / "labelsTr" / "tiny_001.nii.gz", put(9))
    rewrite(writable / "labelsTr" / "tiny_002.nii.gz", lambda v: v[1:])
    (writable / "imagesTr" / "tiny_004.nii.gz").write_bytes(b"")
    (writable / "labelsTr" / "tiny_004.nii.gz").write_bytes(b"")
    assert sorted(line.split(":")[0] for line in lines_of(writable)) == [
        "tiny_001",
        "tiny_001",
        "tiny_002",
        "tiny_004",
        "tiny_004",
    ]


# ---- sampling

SIZE = (13, 9, 7)


def volumes(case_id):
    """Preprocessed volumes of a case, every voxel of the image a number of its own."""
    rng = np.random.default_rng(int(case_id))
    image = rng.permutation(np.prod(SIZE)).reshape(1, *SIZE).astype(np.float32) + 1
    label = np.zeros((1, *SIZE), np.uint8)
    label[0, 1:5, 2:6, 1:4] = 1  # common
    label[0, 9:11, 4, 5] = 2  # rare
    return image, label


class Loaded:
    """Stands for preprocessing: gives the first `size` voxels of a case's volumes."""

    def __init__(self, size=SIZE):
        self.window = (slice(None), *(slice(n) for n in size))

    def __call__(self, case):
        image, label = (MetaTensor(v[self.window]) for v in volumes(case["case_id"]))
        return {"image": image, "label": label}


def patch_cases(number):
    """Cases without files; what else a case says tells them apart in the cache."""
    return [{"case_id": str(n), "number": n} for n in range(number)]


@pytest.fixture
def make_patches(tmp_path):
    def make(**changes):
        arguments = {
            "data": patch_cases(3),
            "transform": Loaded(),
            "roi_size": (4, 5, 3),
            "patch_size": (8, 5, 7),
            "num_classes": 3,
            "seed": 7,
            "samples_per_epoch": 8,
            "cache": VolumeCache(tmp_path / "cache", 10**9, {}),
        }
        return PatchDataset(**{**arguments, **changes})

    return make


def equal(a, b):
    assert a.keys() == b.keys()
    return all(
        torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a if k != "case_id"
    )


def test_patches_are_a_function_of_seed_and_number(make_patches):
    first, again, other = (make_patches(seed=seed) for seed in (7, 7, 8))
    forwards = [first[n] for n in range(24)]
    backwards = [again[n] for n in reversed(range(24))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert a["case_id"] == b["case_id"]
        assert equal(a, b)
    assert len({sample["seed"] for sample in forwards}) == 24
    assert not {sample["seed"] for sample in forwards} & {other[n]["seed"] for n in range(24)}
    assert [s["case_id"] for s in forwards] != [other[n]["case_id"] for n in range(24)]
    assert any(not torch.equal(forwards[n]["origin"], other[n]["origin"]) for n in range(24))


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (2, 2), (4, 0), (4, 2)])
def test_loader_gives_the_same_samples_whatever_batch_size_and_workers(
    make_patches, batch_size, num_workers
):
    patches = make_patches()
    loader = PatchLoader(
        patches, EpochSampler(batch_size, 1, 8 // batch_size), batch_size, num_workers
    )
    loader.sampler.start = 8  # second epoch
    got = [
        {key: values[n] for key, values in batch.items()}
        for batch in loader
        for n in range(batch_size)
    ]
    assert len(got) == 8
    for number, sample in enumerate(got, start=8):
        expected = patches[number]
        assert sample["case_id"] == expected["case_id"]
        assert equal(sample, expected)


def test_patches_come_in_rounds_of_all_cases(make_patches):
    patches = make_patches(data=patch_cases(5))
    order = [patches[n]["case_id"] for n in range(100)]
    rounds = [order[n : n + 5] for n in range(0, 100, 5)]  # they pass over ends of epochs of 8
    assert all(sorted(r) == list("01234") for r in rounds)
    assert len({tuple(r) for r in rounds}) > 10


@pytest.mark.parametrize(
    ("roi_size", "patch_size"),
    [
        ((4, 5, 3), (8, 5, 7)),
        ((13, 9, 7), (13, 9, 7)),
        ((4, 4, 4), (20, 30, 10)),
        ((3, 15, 7),) * 2,
    ],
    ids=["smaller", "equal", "patch larger than volume", "roi larger than volume"],
)
def test_patches_are_windows_of_the_volume_with_zeros_outside(make_patches, roi_size, patch_size):
    patches = make_patches(roi_size=roi_size, patch_size=patch_size)
    padded = 0
    for n in range(30):
        sample = patches[n]
        origin = sample["origin"].numpy()
        # around the volume, a frame of zeros that holds every patch
        frame = [(0, 0), *((p + 20, p + 20) for p in patch_size)]
        start = origin + [p + 20 for p in patch_size]
        window = (slice(None), *(slice(a, a + p) for a, p in zip(start, patch_size, strict=True)))
        for key, volume in zip(("image", "label"), volumes(sample["case_id"]), strict=True):
            assert sample[key].dtype == torch.as_tensor(volume).dtype
            np.testing.assert_array_equal(sample[key].numpy(), np.pad(volume, frame)[window])
        padded += bool((sample["image"] == 0).any())
        roi_start = origin + np.array(patch_size) // 2 - np.array(roi_size) // 2
        for a, r, size in zip(roi_start, roi_size, SIZE, strict=True):
            if r <= size:
                assert 0 <= a <= size - r
            else:  # the volume lies in the middle
                assert a == size // 2 - r // 2
    assert (padded > 0) == (patch_size != SIZE)


def test_patches_have_a_type_without_metadata(make_patches):
    sample = make_patches()[0]
    assert type(sample["image"]) is type(sample["label"]) is torch.Tensor


def centres(patches, numbers):
    """Label values at the centres, which a roi of one voxel never moves."""
    return np.array([int(patches[n]["label"][0, 0, 0, 0]) for n in range(numbers)])


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_foreground_ratio_is_the_share_of_centres_on_foreground(make_patches, ratio):
    patches = make_patches(roi_size=(1, 1, 1), patch_size=(1, 1, 1), foreground_ratio=ratio)
    drawn = centres(patches, 2000)
    by_chance = (volumes("0")[1] > 0).mean()
    expected = ratio + (1 - ratio) * by_chance
    deviation = np.sqrt(expected * (1 - expected) / 2000)
    assert abs((drawn > 0).mean() - expected) <= 4 * deviation


def test_rare_classes_are_drawn_as_often_as_common_ones(make_patches):
    patches = make_patches(roi_size=(1, 1, 1), patch_size=(1, 1, 1), foreground_ratio=1)
    drawn = centres(patches, 1000)
    assert set(drawn) == {1, 2}
    assert abs((drawn == 2).mean() - 0.5) <= 4 * np.sqrt(0.25 / 1000)


def test_every_voxel_is_drawn_when_it_can_be(make_patches):
    patches = make_patches(
        data=patch_cases(1),
        transform=Loaded(size=(3, 2, 3)),
        roi_size=(1, 1, 1),
        patch_size=(1, 1, 1),
        foreground_ratio=1,  # there is none: any voxel then
    )
    drawn = {tuple(patches[n]["origin"].tolist()) for n in range(300)}
    assert drawn == set(np.ndindex(3, 2, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": []}, "expected at least one"),
        ({"foreground_ratio": 1.1}, "foreground_ratio: expected 0 to 1, got 1.1"),
        ({"roi_size": (4, 6, 3)}, r"roi_size: expected 1 to \(8, 5, 7\)"),
        ({"roi_size": (0, 5, 3)}, "roi_size"),
    ],
)
def test_patches_refuse_what_is_out_of_range(make_patches, changes, message):
    with pytest.raises(ValueError, match=message):
        make_patches(**changes)


def test_epoch_sampler_yields_whole_epochs():
    sampler = EpochSampler(batch_size=2, accumulation_steps=3, steps_per_epoch=4)
    assert sampler.samples_per_epoch == 24
    assert (list(sampler), len(sampler)) == (list(range(24)), 24)
    sampler.start = 24
    assert (list(sampler), len(sampler)) == (list(range(24, 48)), 24)


def test_epoch_sampler_yields_the_rest_when_started_within_an_epoch():
    sampler = EpochSampler(batch_size=2, accumulation_steps=3, steps_per_epoch=4)
    for start, end in ((6, 24), (22, 24), (30, 48)):
        sampler.start = start
        assert list(sampler) == list(range(start, end))
        assert len(sampler) == end - start


# ---- real data


def test_hippocampus_splits_by_person_and_passes_preflight():
    if "SEG_TEST_DATA" not in os.environ:
        pytest.skip("SEG_TEST_DATA is unset: it names the folder of Task04_Hippocampus")
    root = Path(os.environ["SEG_TEST_DATA"])
    root = root if root.name == "Task04_Hippocampus" else root / "Task04_Hippocampus"
    cases = load_cases(root, group_pattern="pairs")
    assert len(cases.train) + len(cases.validation) == 200
    assert cases.class_names == ["background", "Anterior", "Posterior"]
    persons = [
        {(int(case["case_id"].split("_")[1]) + 1) // 2 for case in side}
        for side in (cases.train, cases.validation)
    ]
    assert not persons[0] & persons[1]
    assert preflight(cases).findings == []
