"""A dataset as one run sees it: its cases and their split, its classes and its channels."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.data.cases import Case, DatasetLayout, add_case_id, paths_of, resolve_paths
from pipeline.data.layouts import name_segments, read_layout
from pipeline.data.splits import GroupPattern, Sides, split_by_file, split_by_hash
from pipeline.errors import DatasetIssue, InputError, nearest, refuse, require
from transforms.dicom import dicom_files
from transforms.formats import list_files


@dataclass(frozen=True, kw_only=True)
class Cases(DatasetLayout):
    """The cases of a dataset, split for one run; one with a fault is in no part of the split."""

    train: list[Case]
    validation: list[Case]  # of other persons; empty with fold `all`
    test: list[Case] = field(default_factory=list)  # of persons in no fold
    fingerprint: str  # SHA-256 over case ids, file sizes and labels, whatever the folder
    excluded: list[str] = field(default_factory=list)  # case ids that were left out on demand

    def image_dir(self, dataset_dir: str) -> str:
        """Folder of the first training image, as seen from where the dataset is `dataset_dir`."""
        place = os.path.relpath(Path(paths_of(self.train[0])[0]).parent, self.root)
        is_table = Path(dataset_dir).suffix in (".csv", ".json")
        start = os.path.dirname(dataset_dir) if is_table else dataset_dir
        return os.path.normpath(os.path.join(start, place))

    @property
    def all(self) -> list[Case]:
        """Training, validation and test cases, in this order."""
        return [*self.train, *self.validation, *self.test]

    @property
    def num_channels(self) -> int | None:
        """Channels of an image; None where the layout does not declare them."""
        return None if self.channel_names is None else len(self.channel_names)


def load_cases(
    dataset_dir: str | Path,
    *,
    fold: int | str = 0,
    num_folds: int = 5,
    split_seed: int = 0,
    group_pattern: GroupPattern = None,
    test_fraction: float = 0.0,
    split_file: str | Path | None = None,
    exclude: Sequence[str] = (),
    data_roots: Sequence[str | Path] = (),
) -> Cases:
    """Recognise a dataset's layout, read its cases and split them.

    Args:
        dataset_dir: A folder, or a table; see `pipeline.data.layouts`.
        fold: The part to validate on, 0 to `num_folds` - 1, or `all`.
        num_folds: Number of parts that the persons are divided into; see `split_by_hash`.
        split_seed: Seed of the division.
        group_pattern: See `person_of`.
        test_fraction: Share of the persons that is kept from training and validation.
        split_file: States the split in place of the others; see `split_by_file`.
        exclude: Ids of cases to leave out before anything else is done with them.
        data_roots: Folders outside the dataset's that files may lie in.

    Raises:
        InputError: One line per fault of the dataset as a whole, of the split or of `exclude`,
            after the faults of single cases. These alone do not raise: see `Cases.issues`.
    """
    layout = _exclude(read_layout(dataset_dir, data_roots=data_roots), exclude)
    how: dict[str, Any] = {"fold": fold, "group_pattern": group_pattern}
    unlisted: list[DatasetIssue] = []
    try:
        if split_file is None:
            how |= {"num_folds": num_folds, "split_seed": split_seed}
            sides = split_by_hash(layout.cases, **how, test_fraction=test_fraction)
        else:
            expected, remedy = "0 with split_file", "State the test cases in the file."
            require(not test_fraction, "test_fraction", expected, test_fraction, remedy)
            left_out = {*exclude, *(issue.case_id for issue in layout.issues)}
            sides, unlisted = split_by_file(layout.cases, split_file, **how, left_out=left_out)
    except InputError as error:
        # cases with a fault are left out, which may be why there are too few to split
        faults = error.faults if layout.cases else ()  # which follow where no case is left
        raise InputError(*(issue.line for issue in layout.issues), *faults) from None
    layout = replace(layout, issues=layout.issues + unlisted)
    return _make_cases(layout, sides, sorted(set(exclude)))


def given_cases(
    train: Sequence[Case], validation: Sequence[Case], class_names: list[str] | None = None
) -> Cases:
    """Take cases that a client lists and splits itself, in place of a dataset.

    Their file names are absolute; class names are in the order of the label values, where known.

    Raises:
        InputError: If there is no training case, or a case has another form.
    """
    where = "train#dataset#data"
    for case in (*train, *validation):
        stated = (case.get("image"), case.get("label")) if isinstance(case, dict) else (None, None)
        is_case = isinstance(stated[0], str | list) and isinstance(stated[1], str)
        require(is_case, where, "cases with image and label", repr(case), "Name both files.")
    require(train, where, "cases", "none", "List one or more.")
    listed = [add_case_id(case) for case in (*train, *validation)]
    folders = [os.path.dirname(os.path.abspath(path)) for case in listed for path in paths_of(case)]
    root = Path(os.path.commonpath(folders))
    # the folder's own name may name a person
    unresolved = DatasetLayout(root, "given", "data of a client", class_names, cases=listed)
    layout = name_segments(resolve_paths(unresolved, root, (), where))
    ids = [case["case_id"] for case in listed]
    return _make_cases(layout, [ids[: len(train)], ids[len(train) :], []], [])


def _exclude(layout: DatasetLayout, exclude: Collection[str]) -> DatasetLayout:
    known = [case["case_id"] for case in layout.cases]
    known += [issue.case_id for issue in layout.issues]
    refuse(
        f"exclude: expected cases of the dataset, got '{case_id}'. {nearest(case_id, known)}"
        for case_id in dict.fromkeys(exclude)
        if case_id not in known
    )
    return replace(
        layout,
        cases=[case for case in layout.cases if case["case_id"] not in exclude],
        issues=[issue for issue in layout.issues if issue.case_id not in exclude],
    )


def _make_cases(layout: DatasetLayout, sides: Sides, excluded: list[str]) -> Cases:
    train, validation, test = ([c for c in layout.cases if c["case_id"] in s] for s in sides)
    sizes = [(case["case_id"], *map(_size, paths_of(case))) for case in layout.cases]
    labels = None if layout.labels is None else dict(layout.labels)
    fingerprint = hashlib.sha256(json.dumps([sorted(sizes), labels]).encode()).hexdigest()
    values = {**vars(layout), "train": train, "validation": validation, "test": test}
    return Cases(**values, fingerprint=fingerprint, excluded=excluded)


def _size(path: str) -> int | list[int]:
    """Bytes of a file, or of each file of a volume that has several."""
    files = dicom_files(path) or list_files(path)
    return list(map(os.path.getsize, files)) if len(files) > 1 else os.path.getsize(files[0])
