import gzip
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

from pipeline.data.datasets import list_images, load_cases, person_of
from pipeline.data.integrity import preflight
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
    assert cases.num_classes == 11
    assert cases.num_channels == 2
    assert cases.normalization == "zscore"
    assert cases.description == {"description": "Left and right", "licence": "CC-BY-SA 4.0"}
    case = min(cases.train + cases.validation, key=lambda case: case["case_id"])
    assert case == {
        "case_id": "tiny_001",
        "image": str(writable / "imagesTr" / "tiny_001.nii.gz"),
        "label": str(writable / "labelsTr" / "tiny_001.nii.gz"),
    }


@pytest.mark.parametrize(
    ("modality", "normalization"),
    [("CT", "percentile_zscore"), ("ct", "percentile_zscore"), ("MRI", "zscore"), ("T2", "zscore")],
)
def test_load_cases_chooses_normalization_by_modality(writable, modality, normalization):
    write_dataset_json(writable, ["tiny_001", "tiny_002"], modality={"0": modality})
    assert load_cases(writable, num_folds=2).normalization == normalization


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
    preflight(cases)


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


def test_load_cases_names_all_missing_files(writable):
    (writable / "imagesTr" / "tiny_002.nii.gz").unlink()
    (writable / "labelsTr" / "tiny_002.nii.gz").unlink()
    (writable / "labelsTr" / "tiny_004.nii.gz").unlink()
    faults = faults_of(load_cases, writable)
    assert [re.match(r"(\w+): expected (\w+) file", fault).groups() for fault in faults] == [
        ("tiny_002", "image"),
        ("tiny_002", "label"),
        ("tiny_004", "label"),
    ]


def test_load_cases_refuses_a_case_listed_twice(writable):
    write_dataset_json(writable, ["tiny_001", "tiny_002", "tiny_001"])
    (fault,) = faults_of(load_cases, writable, num_folds=2)
    assert fault.startswith("tiny_001: expected one case of this name")


def test_load_cases_tells_names_with_dots_apart(tmp_path):
    for n, case_id in enumerate(["sub-1.v1", "sub-1.v2"]):
        write_case(tmp_path, case_id, seed=n)
    write_dataset_json(tmp_path, ["sub-1.v1", "sub-1.v2"])
    cases = load_cases(tmp_path, num_folds=2)
    assert sorted(ids(cases.train + cases.validation)) == ["sub-1.v1", "sub-1.v2"]


def test_load_cases_refuses_a_folder_without_dataset_json(tmp_path):
    (fault,) = faults_of(load_cases, tmp_path)
    assert re.search(rf"dataset_dir: expected .*dataset.json.*{re.escape(str(tmp_path))}", fault)


@pytest.mark.parametrize("text", ["", "{'labels': 1}", '{"labels": {', "\ufeff{}"])
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
        {"background": 0, "whole": [1, 2]},  # regions
    ],
)
def test_load_cases_refuses_labels_that_do_not_count_from_0(writable, labels):
    write_dataset_json(writable, ["tiny_001", "tiny_002"], labels=labels)
    (fault,) = faults_of(load_cases, writable, num_folds=2)
    assert "without gaps" in fault
    assert str(list(labels)) in fault


def test_list_images_finds_nifti_files_by_name(tmp_path):
    for name in ("b.nii.gz", "a.b.nii", "._a.nii", "a.nii.gz.part", "notes.txt"):
        (tmp_path / name).touch()
    assert list_images(tmp_path) == [
        {"case_id": "a.b", "image": str(tmp_path / "a.b.nii")},
        {"case_id": "b", "image": str(tmp_path / "b.nii.gz")},
    ]


@pytest.mark.parametrize("folder", [".", "absent"])
def test_list_images_refuses_a_folder_without_images(tmp_path, folder):
    with pytest.raises(InputError, match=r"expected NIfTI files in .*, found none"):
        list_images(tmp_path / folder)


# ---- splits


@pytest.fixture
def many(tmp_path):
    """Forty cases, of which a split looks at nothing but the names."""
    case_ids = [f"case_{n:03d}" for n in range(1, 41)]
    touch_cases(tmp_path, case_ids)
    return tmp_path


def touch_cases(root, case_ids):
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(exist_ok=True)
        for case_id in case_ids:
            (root / folder / f"{case_id}.nii.gz").touch()
    write_dataset_json(root, case_ids)


def test_split_folds_are_disjoint_and_cover_everything(many):
    folds = [load_cases(many, fold=fold) for fold in range(5)]
    everything = {f"case_{n:03d}" for n in range(1, 41)}
    for cases in folds:
        assert len(cases.train) + len(cases.validation) == 40
        assert set(ids(cases.train)) | set(ids(cases.validation)) == everything
    validated = [case_id for cases in folds for case_id in ids(cases.validation)]
    assert len(validated) == 40
    assert set(validated) == everything
    assert [len(cases.validation) for cases in folds] == [8] * 5


def test_split_is_deterministic_and_differs_with_its_seed(many):
    first, again, other = (load_cases(many, split_seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert ids(first.validation) != ids(other.validation)


def test_split_does_not_depend_on_the_order_of_dataset_json(many):
    before = load_cases(many)
    write_dataset_json(many, [f"case_{n:03d}" for n in range(40, 0, -1)])
    assert ids(load_cases(many).validation) == ids(before.validation)[::-1]


def test_split_moves_no_case_farther_than_the_next_fold_when_a_case_is_added(many):
    def fold_of():
        return {
            case_id: fold
            for fold in range(5)
            for case_id in ids(load_cases(many, fold=fold).validation)
        }

    before = fold_of()
    touch_cases(many, [f"case_{n:03d}" for n in range(1, 42)])
    after = fold_of()
    assert {(after[case_id] - fold) % 5 for case_id, fold in before.items()} <= {0, 1}


def number(case_id):
    return int(case_id.removeprefix("case_"))


@pytest.mark.parametrize(
    ("group_pattern", "person"),
    [
        ("pairs", lambda case_id: -(-number(case_id) // 2)),
        (r"case_(\d\d)", lambda case_id: case_id[5:7]),
        (r"\d$", lambda case_id: case_id[-1]),
        (lambda case_id: number(case_id) % 7, lambda case_id: number(case_id) % 7),
    ],
    ids=["pairs", "regex with group", "regex without group", "callable"],
)
def test_split_keeps_a_persons_cases_together(many, group_pattern, person):
    sizes = []
    for fold in range(4):
        cases = load_cases(many, fold=fold, num_folds=4, group_pattern=group_pattern)
        sides = [{person(case_id) for case_id in ids(c)} for c in (cases.train, cases.validation)]
        assert not sides[0] & sides[1]
        sizes.append(len(sides[1]))
    assert max(sizes) - min(sizes) <= 1


def test_split_takes_persons_apart_when_there_is_no_pattern(many):
    # with 20 folds of two cases, some pair of neighbours surely lands on two sides
    cases = load_cases(many, num_folds=20)
    pairs = {person_of(case_id, "pairs") for case_id in ids(cases.validation)}
    assert len(cases.validation) == 2
    assert len(pairs) == 2


@pytest.mark.parametrize(
    ("case_id", "pattern", "person"),
    [
        ("hippocampus_017", "pairs", "9"),
        ("hippocampus_018", "pairs", "9"),
        ("hippocampus_019", "pairs", "10"),
        ("site2_p7_visit1", r"p(\d+)", "7"),
        ("site2_p7_visit1", r"p\d+", "p7"),
        ("site2_p7_visit1", str.upper, "SITE2_P7_VISIT1"),
        ("site2_p7_visit1", None, "site2_p7_visit1"),
    ],
)
def test_person_of_names_the_person(case_id, pattern, person):
    assert person_of(case_id, pattern) == person


def test_split_names_all_cases_that_do_not_match(many):
    faults = faults_of(load_cases, many, group_pattern=r"_(0[012]\d)")
    assert [fault.split(":")[0] for fault in faults] == [f"case_{n:03d}" for n in range(30, 41)]
    assert all("expected the case id to match group_pattern" in fault for fault in faults)


def test_split_refuses_a_pattern_that_is_no_regular_expression(many):
    (fault,) = faults_of(load_cases, many, group_pattern="case_(")
    assert fault.startswith("group_pattern: expected a regular expression or 'pairs', got 'case_('")


@pytest.mark.parametrize("fold", [-1, 5])
def test_split_refuses_a_fold_out_of_range(many, fold):
    with pytest.raises(InputError, match=f"^fold: expected 0 to 4, got {fold}"):
        load_cases(many, fold=fold)


@pytest.mark.parametrize(
    ("num_folds", "pattern", "most"), [(41, None, 40), (21, "pairs", 20), (1, None, 40)]
)
def test_split_refuses_a_number_of_folds_without_persons(many, num_folds, pattern, most):
    with pytest.raises(InputError, match=f"^num_folds: expected 2 to {most} .*got {num_folds}"):
        load_cases(many, num_folds=num_folds, group_pattern=pattern)


# ---- preflight


def rewrite(path, change):
    """Save the file again, its voxels changed."""
    file = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asanyarray(file.dataobj).copy()), file.affine), path)


def put(value):
    def change(voxels):
        voxels[0, 0, 0] = value
        return voxels

    return change


def preflight_faults(root):
    return faults_of(preflight, load_cases(root, num_folds=2))


def test_preflight_passes_right_cases(writable):
    preflight(load_cases(writable, num_folds=2))


def test_preflight_passes_images_with_several_channels_and_labels_with_one(writable):
    for n in (1, 2):
        rewrite(writable / "imagesTr" / f"tiny_00{n}.nii.gz", lambda v: np.stack([v, v], -1))
        rewrite(writable / "labelsTr" / f"tiny_00{n}.nii.gz", lambda v: v[..., None])
    write_dataset_json(writable, ["tiny_001", "tiny_002"], modality={"0": "T1", "1": "T2"})
    preflight(load_cases(writable, num_folds=2))


FAULTS = {
    "label value outside the declared set": (
        "labelsTr",
        put(7),
        r"expected label values 0 to 2 \(dataset.json\), got 7\.",
    ),
    "negative label value": ("labelsTr", lambda v: put(-1)(v.astype(np.int16)), r"got -1\."),
    "label value between classes": (
        "labelsTr",
        lambda v: put(1.5)(v.astype(np.float32)),
        r"got 1\.5\.",
    ),
    "many label values": ("labelsTr", lambda v: v * 20, r"got 20, 40\."),
    "label of another shape": (
        "labelsTr",
        lambda v: v[:, :-1],
        r"one shape, got \(20, 18, 12\) and \(20, 17, 12\)\.",
    ),
    "label with channels": ("labelsTr", lambda v: np.stack([v, v], -1), r"\(20, 18, 12, 2\)\."),
    "too many channels": (
        "imagesTr",
        lambda v: np.stack([v] * 3, -1),
        r"expected 1 image channels .*got 3\.",
    ),
    "flat image": ("imagesTr", lambda v: v[:, :, 0], r"expected an image of shape \(H, W, D\)"),
    "five axes": ("imagesTr", lambda v: v[..., None, None].repeat(2, -1), r"of shape \(H, W, D\)"),
    "NaN": ("imagesTr", put(np.nan), r"expected finite image values, got 1 NaN or infinite"),
    "complex voxels": ("imagesTr", lambda v: v.astype(np.complex64), "complex64"),
}


@pytest.mark.parametrize(("folder", "change", "message"), FAULTS.values(), ids=FAULTS)
def test_preflight_refuses(writable, folder, change, message):
    rewrite(writable / folder / "tiny_003.nii.gz", change)
    faults = preflight_faults(writable)
    assert all(fault.startswith("tiny_003: ") for fault in faults)
    assert any(re.search(message, fault) for fault in faults)


def test_preflight_refuses_a_label_with_another_affine(writable):
    path = writable / "labelsTr" / "tiny_003.nii.gz"
    voxels, affine = nib.load(path).dataobj, nib.load(path).affine
    for shift, refused in ((0.0005, False), (1.5, True)):
        moved = affine.copy()
        moved[1, 3] += shift
        nib.save(nib.Nifti1Image(np.asarray(voxels), moved), path)
        if refused:
            (fault,) = preflight_faults(writable)
            assert re.match(r"tiny_003: expected label affine .* 0.001 mm, got 1\.500 mm", fault)
        else:
            preflight(load_cases(writable, num_folds=2))


def test_preflight_measures_affines_at_the_farthest_corner(writable):
    """A voxel 0.01 mm longer is 0.19 mm out at the other end of 20 voxels."""
    path = writable / "labelsTr" / "tiny_003.nii.gz"
    voxels = np.asarray(nib.load(path).dataobj)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.01, 1, 1.5, 1])), path)
    assert "got 0.190 mm" in preflight_faults(writable)[0]


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_preflight_refuses_files_that_cannot_be_read(writable, folder):
    not_nifti, truncated, compressed = (writable / folder / f"tiny_00{n}.nii.gz" for n in (1, 2, 3))
    not_nifti.write_bytes(b"not a NIfTI file")
    truncated.write_bytes(truncated.read_bytes()[:-200])
    # whole as a gzip file, its voxels cut off
    compressed.write_bytes(gzip.compress(gzip.decompress(compressed.read_bytes())[:-2000]))
    faults = preflight_faults(writable)
    for n, fault in enumerate(sorted(faults), start=1):
        assert re.match(rf"tiny_00{n}: expected a readable NIfTI file tiny_00{n}\.nii\.gz", fault)
    assert len(faults) == 3


def test_preflight_reports_all_cases_and_kinds_at_once(writable):
    rewrite(writable / "imagesTr" / "tiny_001.nii.gz", put(np.inf))
    rewrite(writable / "labelsTr" / "tiny_001.nii.gz", put(9))
    rewrite(writable / "labelsTr" / "tiny_002.nii.gz", lambda v: v[1:])
    (writable / "imagesTr" / "tiny_004.nii.gz").write_bytes(b"")
    (writable / "labelsTr" / "tiny_004.nii.gz").write_bytes(b"")
    faults = preflight_faults(writable)
    assert sorted(fault.split(":")[0] for fault in faults) == [
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


def make_patches(**changes):
    arguments = {
        "data": [{"case_id": str(n)} for n in range(3)],
        "transform": Loaded(),
        "roi_size": (4, 5, 3),
        "patch_size": (8, 5, 7),
        "num_classes": 3,
        "seed": 7,
        "samples_per_epoch": 8,
    }
    return PatchDataset(**{**arguments, **changes})


def equal(a, b):
    assert a.keys() == b.keys()
    return all(
        torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a if k != "case_id"
    )


def test_patches_are_a_function_of_seed_and_number():
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
def test_loader_gives_the_same_samples_whatever_batch_size_and_workers(batch_size, num_workers):
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


def test_patches_come_in_rounds_of_all_cases():
    patches = make_patches(data=[{"case_id": str(n)} for n in range(5)])
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
def test_patches_are_windows_of_the_volume_with_zeros_outside(roi_size, patch_size):
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


def test_patches_have_a_type_without_metadata():
    sample = make_patches()[0]
    assert type(sample["image"]) is type(sample["label"]) is torch.Tensor


def centres(patches, numbers):
    """Label values at the centres, which a roi of one voxel never moves."""
    return np.array([int(patches[n]["label"][0, 0, 0, 0]) for n in range(numbers)])


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_foreground_ratio_is_the_share_of_centres_on_foreground(ratio):
    patches = make_patches(roi_size=(1, 1, 1), patch_size=(1, 1, 1), foreground_ratio=ratio)
    drawn = centres(patches, 2000)
    by_chance = (volumes("0")[1] > 0).mean()
    expected = ratio + (1 - ratio) * by_chance
    deviation = np.sqrt(expected * (1 - expected) / 2000)
    assert abs((drawn > 0).mean() - expected) <= 4 * deviation


def test_rare_classes_are_drawn_as_often_as_common_ones():
    patches = make_patches(roi_size=(1, 1, 1), patch_size=(1, 1, 1), foreground_ratio=1)
    drawn = centres(patches, 1000)
    assert set(drawn) == {1, 2}
    assert abs((drawn == 2).mean() - 0.5) <= 4 * np.sqrt(0.25 / 1000)


def test_every_voxel_is_drawn_when_it_can_be():
    patches = make_patches(
        data=[{"case_id": "0"}],
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
def test_patches_refuse_what_is_out_of_range(changes, message):
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
    for start, end in ((6, 24), (23, 24), (30, 48)):
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
    preflight(cases)
