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
from pipeline.data.layouts import read_layout
from pipeline.data.splits import GroupPattern, Split, split_by_file, split_by_hash
from pipeline.errors import InputError, nearest, refuse, require
from transforms.load import dicom_files


@dataclass(frozen=True, kw_only=True)
class Cases(DatasetLayout):
    """The cases of a dataset, split for one run; see `DatasetLayout` for what a case is.

    A case with a fault is in no part of the split; its faults are in `issues`. The fingerprint is
    the SHA-256 over case ids, file sizes and labels: the same data has the same in any folder.
    """

    train: list[Case]
    validation: list[Case]  # of other persons; empty with fold `all`
    test: list[Case] = field(default_factory=list)  # of persons in no fold
    fingerprint: str
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
        fold: The part to validate on, 0 to `num_folds` - 1, or `all`; see `split_by_hash`.
        num_folds: Number of parts that the persons are divided into; unused with `split_file`.
        split_seed: Seed of the division; unused with `split_file`.
        group_pattern: Tells persons apart; see `person_of`.
        test_fraction: Share of the persons that is kept from training and validation.
        split_file: States the split in place of the four before; see `split_by_file`.
        exclude: Ids of cases to leave out before anything else is done with them.
        data_roots: Folders outside the dataset's that files may lie in.

    Raises:
        InputError: One line per fault of the dataset as a whole, of the split or of `exclude`,
            after the faults of single cases. These alone do not raise: see `Cases.issues`.
    """
    layout = _exclude(read_layout(dataset_dir, data_roots=data_roots), exclude)
    how: dict[str, Any] = {"fold": fold, "group_pattern": group_pattern}
    try:
        if split_file is None:
            how |= {"num_folds": num_folds, "split_seed": split_seed}
            split = split_by_hash(layout.cases, **how, test_fraction=test_fraction)
        else:
            remedy = "State the test cases in the file."
            expected = "0 with split_file"
            require(not test_fraction, "test_fraction", expected, test_fraction, remedy)
            left_out = {*exclude, *(issue.case_id for issue in layout.issues)}
            split = split_by_file(layout.cases, split_file, **how, left_out=left_out)
    except InputError as error:
        # cases with a fault are left out, which may be why there are too few to split
        raise InputError(*(issue.line for issue in layout.issues), *error.faults) from None
    return _make_cases(layout, split, sorted(set(exclude)))


def given_cases(
    train: Sequence[Case], validation: Sequence[Case], class_names: list[str] | None = None
) -> Cases:
    """Take cases that a client lists and splits itself, in place of a dataset.

    Cases are dictionaries with `image` and `label`, absolute file names; without `case_id` a case
    is named after its image. Class names are in the order of the label values, where known.

    Raises:
        InputError: If there is no training case, or a case has another form.
    """
    where = "train#dataset#data"
    for case in (*train, *validation):
        stated = case if isinstance(case, dict) else {}
        images, label = stated.get("image"), stated.get("label")
        paths = [*(images if isinstance(images, list) and images else [images]), label]
        if not all(isinstance(path, str) for path in paths):
            raise InputError(f"{where}: expected cases with image and label, got {case!r}.")
    require(train, where, "cases", "none", "List one or more.")
    listed = [add_case_id(case) for case in (*train, *validation)]
    folders = [os.path.dirname(os.path.abspath(path)) for case in listed for path in paths_of(case)]
    root = Path(os.path.commonpath(folders))
    # the folder's own name may name a person
    unresolved = DatasetLayout(root, "given", "data of a client", class_names, cases=listed)
    layout = resolve_paths(unresolved, root, (), where)
    train_ids = {case["case_id"] for case in listed[: len(train)]}
    first = [case for case in layout.cases if case["case_id"] in train_ids]
    second = [case for case in layout.cases if case["case_id"] not in train_ids]
    return _make_cases(layout, Split(first, second, test=[]), [])


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


def _make_cases(layout: DatasetLayout, split: Split, excluded: list[str]) -> Cases:
    sizes = [(case["case_id"], *map(_size, paths_of(case))) for case in layout.cases]
    labels = None if layout.labels is None else dict(layout.labels)
    fingerprint = hashlib.sha256(json.dumps([sorted(sizes), labels]).encode()).hexdigest()
    values = vars(layout) | vars(split) | {"issues": [*layout.issues, *split.issues]}
    return Cases(**values, fingerprint=fingerprint, excluded=excluded)


def _size(path: str) -> int | list[int]:
    """Bytes of a file, or of each file of a DICOM series."""
    is_series = os.path.isdir(path)
    return list(map(os.path.getsize, dicom_files(path))) if is_series else os.path.getsize(path)
