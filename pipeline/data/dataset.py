"""A dataset as one run sees it: its cases, split, and what is known of images and labels."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.data.issues import DatasetIssue
from pipeline.data.layouts import read_layout
from pipeline.data.listing import Case, DatasetLayout, named, paths_of, resolved
from pipeline.data.split_files import split_by_file
from pipeline.data.splits import GroupPattern, Split, split_by_hash
from pipeline.errors import InputError, nearest
from transforms.dicom import dicom_files


@dataclass(frozen=True)
class Cases:
    """The cases of a dataset, split for one run.

    Attributes:
        name: Of the dataset.
        class_names: In the order of the label values, background first; None where the layout does
            not declare them.
        train: Dictionaries with `case_id`, `image` (a path, or a list with one per channel),
            `label` and perhaps `group`. A path is an absolute file name, or a folder's that holds a
            DICOM series.
        validation: The same, of other persons.
        fingerprint: SHA-256 over case ids, file sizes and labels: the same data has the same
            one wherever it lies.
        description: Free facts of `dataset.json`: description, reference, licence.
        test: Cases of persons that no fold trains or validates on.
        root: Folder of the dataset, links resolved.
        layout: `msd`, `nnunet`, `folders`, `table` or, of `given_cases`, `given`.
        channel_names: In the order of the channels; None where the layout does not declare them.
        ignore_value: Label value of voxels that count for nothing; None if there is none.
        findings: What is wrong with single cases; a case with a fault is in no part of the split.
        excluded: Ids of the cases that were left out on demand.
    """

    name: str
    class_names: list[str] | None
    train: list[Case]
    validation: list[Case]
    fingerprint: str
    description: dict[str, str]
    test: list[Case] = field(default_factory=list)
    root: Path = Path()
    layout: str = "msd"
    channel_names: list[str] | None = None
    ignore_value: int | None = None
    findings: list[DatasetIssue] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)

    def image_dir(self, dataset_dir: str) -> str:
        """Folder of the first training image, as seen from where the dataset is `dataset_dir`."""
        image = self.train[0]["image"]
        first = image if isinstance(image, str) else image[0]
        place = os.path.relpath(Path(first).parent, self.root)
        start = (
            dataset_dir
            if Path(dataset_dir).suffix not in (".csv", ".json")
            else (os.path.dirname(dataset_dir))
        )
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
        fold: Which of the folds is validated on, or `all`; see `split_by_hash`.
        num_folds: Parts that the persons are divided into; with `split_file` of no meaning.
        split_seed: Which division; with `split_file` of no meaning.
        group_pattern: Tells persons apart; see `person_of`.
        test_fraction: Of the persons, kept from training and validation.
        split_file: States the split in place of the four before; see `split_by_file`.
        exclude: Ids of cases to leave out before anything else is done with them.
        data_roots: Folders outside of the dataset's that files may lie in.

    Raises:
        InputError: One line per fault of the dataset as a whole, of the split or of `exclude`, the
            faults of single cases before them. These alone raise nothing: see `Cases.findings`.
    """
    layout = _without(read_layout(dataset_dir, data_roots=data_roots), exclude)
    how: dict[str, Any] = {"fold": fold, "group_pattern": group_pattern}
    by_hash: dict[str, Any] = {
        "num_folds": num_folds,
        "split_seed": split_seed,
        "test_fraction": test_fraction,
    }
    try:
        if split_file is None:
            split = split_by_hash(layout.cases, **how, **by_hash)
        elif test_fraction:
            raise InputError(
                f"test_fraction: expected 0 with split_file, got {test_fraction}. State the test "
                "cases in the file."
            )
        else:
            left_out = {*exclude, *(finding.case_id for finding in layout.findings)}
            split = split_by_file(layout.cases, split_file, **how, left_out=left_out)
    except InputError as error:
        # cases with a fault are not there to be split, which may be why there are too few
        raise InputError(*(finding.line for finding in layout.findings), *error.faults) from None
    return _cases(layout, split, sorted(set(exclude)))


def given_cases(
    train: Sequence[Case], validation: Sequence[Case], class_names: list[str] | None = None
) -> Cases:
    """Cases that a client hands over in place of a dataset, and has split itself.

    Args:
        train: Dictionaries with `image` and `label`, absolute file names; one that has no `case_id`
            is called as its image is.
        validation: The same.
        class_names: In the order of the label values, background first, where they are known.

    Raises:
        InputError: If there is none to train on, or one is not as described.
    """
    where = "train#dataset#data"
    listed = [*train, *validation]
    for case in listed:
        if not isinstance(case, dict) or not _are_paths(case.get("image"), case.get("label")):
            raise InputError(f"{where}: expected cases with image and label, got {case!r}.")
    if not train:
        raise InputError(f"{where}: expected cases, got none. List one or more.")
    listed = [named(case) for case in listed]
    folders = [os.path.dirname(os.path.abspath(path)) for case in listed for path in paths_of(case)]
    root = Path(os.path.commonpath(folders))
    # what their folder is called may name a person
    stated = DatasetLayout(root, "given", "data of a client", class_names, cases=listed)
    layout = resolved(stated, root, (), where)
    sides = {case["case_id"]: number < len(train) for number, case in enumerate(listed)}
    split = Split(
        train=[case for case in layout.cases if sides[case["case_id"]]],
        validation=[case for case in layout.cases if not sides[case["case_id"]]],
        test=[],
    )
    return _cases(layout, split, [])


def _are_paths(image: Any, label: Any) -> bool:
    several = image if isinstance(image, list) and image else [image]
    return all(isinstance(path, str) for path in [*several, label])


def _without(layout: DatasetLayout, exclude: Sequence[str]) -> DatasetLayout:
    """The layout without some cases.

    Raises:
        InputError: For each that is not in it.
    """
    known = [case["case_id"] for case in layout.cases]
    known += [finding.case_id for finding in layout.findings]
    faults = [
        f"exclude: expected cases of the dataset, got '{case_id}'. {nearest(case_id, known)}"
        for case_id in dict.fromkeys(exclude)
        if case_id not in known
    ]
    if faults:
        raise InputError(*faults)
    return replace(
        layout,
        cases=[case for case in layout.cases if case["case_id"] not in exclude],
        findings=[finding for finding in layout.findings if finding.case_id not in exclude],
    )


def _cases(layout: DatasetLayout, split: Split, excluded: list[str]) -> Cases:
    return Cases(
        name=layout.name,
        class_names=layout.class_names,
        train=split.train,
        validation=split.validation,
        fingerprint=_fingerprint(layout.cases, layout.labels),
        description=layout.description,
        test=split.test,
        root=layout.root,
        layout=layout.kind,
        channel_names=layout.channel_names,
        ignore_value=layout.ignore_value,
        findings=[*layout.findings, *split.findings],
        excluded=excluded,
    )


def _fingerprint(cases: list[Case], labels: Mapping[str, Any] | None) -> str:
    facts = [(case["case_id"], *map(_size, paths_of(case))) for case in cases]
    stated = None if labels is None else dict(labels)
    return hashlib.sha256(json.dumps([sorted(facts), stated]).encode()).hexdigest()


def _size(path: str) -> int | list[int]:
    """Bytes of a file, or of each file of a DICOM series."""
    if Path(path).is_dir():
        return [file.stat().st_size for file in dicom_files(path)]
    return Path(path).stat().st_size
