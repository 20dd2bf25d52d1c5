import hashlib
import json
import re
import shutil

import pytest
from conftest import make_dataset, write_dataset_json

from pipeline.data.dataset import load_cases
from pipeline.errors import InputError


def ids(cases):
    return sorted(case["case_id"] for case in cases.train + cases.validation)


@pytest.fixture
def writable(tmp_path):
    """A dataset of four cases that the test may change."""
    return make_dataset(tmp_path / "tiny", num_cases=4)


def faults_of(function, *arguments, **keywords):
    with pytest.raises(InputError) as caught:
        function(*arguments, **keywords)
    assert str(caught.value).splitlines() == list(caught.value.faults)
    return caught.value.faults


def fingerprint_of(root, **keywords):
    return load_cases(root, **{"num_folds": 2, **keywords}).fingerprint


def test_fingerprint_is_that_of_the_data_not_of_the_place(writable, tmp_path):
    before = fingerprint_of(writable)
    shutil.copytree(writable, tmp_path / "copy")
    assert fingerprint_of(tmp_path / "copy") == before
    assert fingerprint_of(writable, num_folds=3, fold=1, split_seed=5) == before


def rename_class(root):
    text = (root / "dataset.json").read_text()
    (root / "dataset.json").write_text(text.replace("bright", "brighter"))


def lengthen(root):
    with open(root / "labelsTr/tiny_002.nii.gz", "ab") as file:
        file.write(b"\0")


def remove_case(root):
    write_dataset_json(root, ["tiny_001", "tiny_002", "tiny_003"])


@pytest.mark.parametrize("change", [remove_case, rename_class, lengthen])
def test_fingerprint_differs_with_cases_file_sizes_and_classes(writable, change):
    before = fingerprint_of(writable)
    change(writable)
    assert fingerprint_of(writable) != before


def test_fingerprint_is_the_one_that_stored_runs_have(writable):
    """Computed here as the first version of the pipeline did."""
    source = json.loads((writable / "dataset.json").read_text())
    facts = []
    for case_id in [f"tiny_{n:03d}" for n in (1, 2, 3, 4)]:
        files = (writable / folder / f"{case_id}.nii.gz" for folder in ("imagesTr", "labelsTr"))
        facts.append((case_id, *(file.stat().st_size for file in files)))
    expected = hashlib.sha256(json.dumps([facts, source["labels"]]).encode()).hexdigest()
    assert fingerprint_of(writable) == expected


def take_files(root):
    (root / "imagesTr" / "tiny_002.nii.gz").unlink()
    (root / "labelsTr" / "tiny_002.nii.gz").unlink()
    (root / "labelsTr" / "tiny_004.nii.gz").unlink()
    return [("tiny_002", "image"), ("tiny_002", "label"), ("tiny_004", "label")]


def missing_of(lines):
    return [re.match(r"(\w+): expected (\w+) file", line).groups() for line in lines]


def test_load_cases_leaves_out_what_is_excluded_before_its_faults_are_found(writable):
    take_files(writable)
    cases = load_cases(writable, num_folds=2, exclude=["tiny_004", "tiny_002"])
    assert (ids(cases), cases.issues) == (["tiny_001", "tiny_003"], [])
    assert cases.excluded == ["tiny_002", "tiny_004"]
    write_dataset_json(writable, ["tiny_001", "tiny_003"])
    assert fingerprint_of(writable) == cases.fingerprint


def test_load_cases_names_the_nearest_case_when_exclude_has_an_unknown_one(writable):
    faults = faults_of(load_cases, writable, num_folds=2, exclude=["tiny_01", "zzz"])
    assert faults[0] == (
        "exclude: expected cases of the dataset, got 'tiny_01'. Did you mean 'tiny_001'?"
    )
    assert faults[1].startswith("exclude: expected cases of the dataset, got 'zzz'. Valid are: ")


def test_load_cases_finds_all_missing_files(writable):
    missing = take_files(writable)
    cases = load_cases(writable, num_folds=2)
    assert ids(cases) == ["tiny_001", "tiny_003"]
    assert {(issue.check, issue.warning) for issue in cases.issues} == {("missing", False)}
    assert missing_of(issue.line for issue in cases.issues) == missing
    *faults, split = faults_of(load_cases, writable, num_folds=4)
    assert missing_of(faults) == missing
    assert split.startswith("num_folds: expected 2 to 2")


def test_load_cases_names_all_missing_and_empty_keys(writable):
    write_dataset_json(writable, [], labels=["background", "dim"], modality={})
    faults = faults_of(load_cases, writable)
    keys = [re.search(r"expected '(\w+)'", fault)[1] for fault in faults]
    assert keys == ["labels", "modality", "training"]


def test_load_cases_names_all_invalid_training_entries(writable):
    right = {"image": "./imagesTr/tiny_001.nii.gz", "label": "./labelsTr/tiny_001.nii.gz"}
    wrong = ["tiny_002", {"image": "a.nii.gz"}, {"image": [], "label": "b.nii.gz"}]
    write_dataset_json(writable, [], training=[right, *wrong])
    faults = faults_of(load_cases, writable)
    assert [re.search(r"training\[(\d)\]", fault)[1] for fault in faults] == ["1", "2", "3"]
