import json
import re

import pytest
from conftest import write_dataset_json

from pipeline.data.dataset import load_cases
from pipeline.data.splits import person_of
from pipeline.errors import InputError


def names(*numbers):
    return [f"case_{n:03d}" for n in numbers]


def ids(cases):
    return [case["case_id"] for case in cases]


def faults_of(function, *arguments, **keywords):
    with pytest.raises(InputError) as caught:
        function(*arguments, **keywords)
    assert str(caught.value).splitlines() == list(caught.value.faults)
    return caught.value.faults


@pytest.fixture
def many(tmp_path):
    """Forty cases, of which a split looks at nothing but the names."""
    case_ids = names(*range(1, 41))
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
        for case_id in case_ids:
            (tmp_path / folder / f"{case_id}.nii.gz").touch()
    write_dataset_json(tmp_path, case_ids)
    return tmp_path


def test_split_folds_are_disjoint_and_cover_everything(many):
    folds = [load_cases(many, fold=fold) for fold in range(5)]
    for cases in folds:
        assert sorted(ids(cases.train) + ids(cases.validation)) == names(*range(1, 41))
    validated = [case_id for cases in folds for case_id in ids(cases.validation)]
    assert sorted(validated) == names(*range(1, 41))
    assert [len(cases.validation) for cases in folds] == [8] * 5


def test_split_is_deterministic_and_differs_with_its_seed(many):
    first, again, other = (load_cases(many, split_seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert ids(first.validation) == names(7, 8, 9, 11, 16, 17, 19, 29)  # as in every version
    assert ids(first.validation) != ids(other.validation)


def number(case_id):
    return int(case_id.removeprefix("case_"))


@pytest.mark.parametrize(
    ("group_pattern", "person"),
    [
        ("pairs", lambda case_id: -(-number(case_id) // 2)),
        (r"case_(\d\d)", lambda case_id: case_id[5:7]),
        (lambda case_id: number(case_id) % 7, lambda case_id: number(case_id) % 7),
    ],
    ids=["pairs", "regex", "callable"],
)
def test_split_keeps_a_persons_cases_together(many, group_pattern, person):
    sizes = []
    for fold in range(4):
        cases = load_cases(many, fold=fold, num_folds=4, group_pattern=group_pattern)
        sides = [{person(case_id) for case_id in ids(c)} for c in (cases.train, cases.validation)]
        assert not sides[0] & sides[1]
        sizes.append(len(sides[1]))
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("pattern", "person"),
    [
        ("pairs", "9"),
        (r"e(\d+)", "2"),
        (r"e\d+", "e2"),
        (str.upper, "SITE2_017"),
        (None, "site2_017"),
    ],
)
def test_person_of_names_the_person(pattern, person):
    assert person_of("site2_017", pattern) == person
    assert person_of("site2_018", "pairs") == "9"


def test_split_names_all_cases_that_do_not_match(many):
    faults = faults_of(load_cases, many, group_pattern=r"_(0[012]\d)")
    assert [fault.split(":")[0] for fault in faults] == [f"case_{n:03d}" for n in range(30, 41)]
    assert all("expected the case id to match group_pattern" in fault for fault in faults)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"fold": fold}, f"fold: expected 0 to 4 or 'all', got {fold!r}. ") for fold in
          (-1, 5, "any", True)),
        ({"num_folds": 41}, "num_folds: expected 2 to 40 (the number of persons), got 41. "),
        ({"num_folds": 21, "group_pattern": "pairs"}, "num_folds: expected 2 to 20 "),
        *(({"test_fraction": share}, "test_fraction: expected 0 to below 1, got ") for share in
          (-0.1, 1, 1.5, True, float("nan"))),
        ({"test_fraction": 0.99, "fold": "all"},
         "test_fraction: expected persons left to train on, got 0.99 of 40. "),
    ],
)  # fmt: skip
def test_split_refuses_a_value_out_of_range(many, changes, message):
    (fault,) = faults_of(load_cases, many, **changes)
    assert fault.startswith(message)


def test_split_all_trains_on_everything(many):
    cases = load_cases(many, fold="all", num_folds=1000)
    assert len(cases.train) == 40
    assert cases.validation == cases.test == []


@pytest.mark.parametrize(
    ("share", "persons"), [(0.1, 2), (0.01, 1), (0.5, 10), (0.31, 7), (0.55, 11)]
)
def test_split_keeps_test_persons_out_of_every_fold(many, share, persons):
    def sides(**keywords):
        cases = load_cases(many, group_pattern="pairs", test_fraction=share, **keywords)
        return set(ids(cases.train)), set(ids(cases.validation)), set(ids(cases.test))

    _, _, test = sides()
    assert len({person_of(case_id, "pairs") for case_id in test}) == persons
    assert len(test) == 2 * persons
    folds = [{"fold": fold, "num_folds": number} for number in (2, 5) for fold in range(number)]
    for keywords in (*folds, {"fold": "all"}):
        train, validation, again = sides(**keywords)
        assert again == test
        assert not test & (train | validation)
        assert len(train | validation | test) == 40
        assert not train & validation
    assert sides(split_seed=1)[2] != test


def test_split_takes_the_group_for_the_person(tmp_path):
    rows = ["image,label,case_id,group"]
    for n in range(12):
        for kind in ("image", "label"):
            (tmp_path / f"{kind}{n}.nii.gz").touch()
        rows.append(f"image{n}.nii.gz,label{n}.nii.gz,case_{n:03d},p{n % 4}")
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    for fold in range(4):
        cases = load_cases(tmp_path, fold=fold, num_folds=4)
        assert len({number(case_id) % 4 for case_id in ids(cases.validation)}) == 1
        assert len(cases.validation) == 3


def write_split(root, content):
    path = root / "splits_final.json"
    path.write_text(json.dumps(content))
    return path


def test_split_file_chooses_the_entry_of_the_fold(many):
    rest = range(5, 41)
    path = write_split(
        many,
        [
            {"train": names(1, *rest), "val": names(3, 2, 4)},
            {"train": names(2, 3, *rest), "val": names(1, 4)},
        ],
    )
    for fold, validation in ((0, names(2, 3, 4)), (1, names(1, 4))):
        cases = load_cases(many, split_file=path, fold=fold, num_folds=1000)
        assert ids(cases.validation) == validation
        assert ids(cases.train) == sorted({*names(*range(1, 41))} - {*validation})
        assert cases.issues == []


@pytest.mark.parametrize("key", ["val", "validation"])
def test_split_file_may_be_one_object_with_a_test(many, key):
    path = write_split(many, {"train": names(1, 2), key: names(3), "test": names(*range(4, 41))})
    cases = load_cases(many, split_file=str(path))
    assert ids(cases.train) == names(1, 2)
    assert ids(cases.validation) == names(3)
    assert ids(cases.test) == names(*range(4, 41))


def test_split_file_trains_on_all_of_it_but_the_test_when_fold_is_all(many):
    entries = [
        {"train": names(1, 2), "val": names(3), "test": names(9)},
        {"train": names(1, 3, 9), "val": names(2, 4)},
    ]
    cases = load_cases(many, split_file=write_split(many, entries), fold="all")
    assert ids(cases.train) == names(1, 2, 3, 4)
    assert ids(cases.test) == names(9)
    assert cases.validation == []


def test_split_file_leaves_unlisted_cases_out_with_a_warning(many):
    path = write_split(many, {"train": names(*range(1, 38)), "val": names(38)})
    cases = load_cases(many, split_file=path)
    assert [finding.case_id for finding in cases.issues] == names(39, 40)
    assert all(f.warning and f.check == "not_in_split" for f in cases.issues)
    assert set(names(39, 40)).isdisjoint(ids(cases.train + cases.validation + cases.test))


def test_split_file_may_name_cases_that_are_excluded_or_faulty(many):
    path = write_split(many, {"train": names(*range(1, 38)), "val": names(38, 39, 40)})
    (many / "imagesTr" / "case_039.nii.gz").unlink()
    cases = load_cases(many, split_file=path, exclude=names(40))
    assert ids(cases.validation) == names(38)
    assert [finding.check for finding in cases.issues] == ["missing"]


REST = names(*range(4, 41))


@pytest.mark.parametrize(
    ("content", "keywords", "message"),
    [
        ({"train": [*REST, "case_001"], "val": ["case_002"]}, {"group_pattern": "pairs"},
         r"a person's cases on one side, got case_001 and case_002 of person 1 on two\."),
        ({"train": REST, "val": ["case_003"], "test": ["case_04"]}, {},
         r"cases of the dataset, got 'case_04'\. Did you mean 'case_0\d\d'\?"),
        ({"train": [*REST, "case_004"], "val": ["case_003"]}, {},
         r"each case once in a fold, got case_004 2 times\. Remove one"),
        ({"train": [*REST, "case_003"], "val": ["case_003"]}, {},
         r"each case once in a fold, got case_003 2 times\. Remove one"),
        ({"train": [], "val": ["case_003"]}, {}, r"cases to train on, got none\."),
        ({"train": REST}, {}, r"fold 0: expected an object with train and val"),
        ([{"train": REST, "val": []}, 3], {}, r"fold 1: expected an object with train and val"),
        ([{"train": REST, "val": []}], {"fold": 1}, r"^fold: expected 0 to 0 or 'all' .*, got 1\."),
        ([{"train": REST, "val": []}], {"fold": -1}, r"^fold: expected 0 to 0 .*, got -1\."),
        ({"train": REST, "val": []}, {"test_fraction": 0.1}, r"^test_fraction: expected 0 with s"),
    ],
)  # fmt: skip
def test_split_file_refuses_in_one_line(many, content, keywords, message):
    (fault,) = faults_of(load_cases, many, split_file=write_split(many, content), **keywords)
    assert re.search(message, fault)
