"""What a dataset folder holds: its cases, classes, modality and split.

The layout is that of the Medical Segmentation Decathlon: a `dataset.json` with `labels`,
`modality` and `training`, a list of image and label files relative to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError

Case = dict[str, Any]


@dataclass(frozen=True)
class Cases:
    """The cases of a dataset, split for one run.

    Attributes:
        name: Of the dataset.
        class_names: In the order of the label values, background first.
        num_channels: Channels of an image.
        normalization: What suits the modality: `zscore` or `percentile_zscore` (CT).
        train: Dictionaries with `case_id`, `image` and `label` (absolute file names).
        validation: The same, of other persons.
        fingerprint: SHA-256 over case ids, file sizes and labels: the same data has the same
            one wherever it lies.
        description: Free facts of `dataset.json`: description, reference, licence.
    """

    name: str
    class_names: list[str]
    num_channels: int
    normalization: str
    train: list[Case]
    validation: list[Case]
    fingerprint: str
    description: dict[str, str]

    @property
    def num_classes(self) -> int:
        """Classes, background included."""
        return len(self.class_names)


def load_cases(
    dataset_dir: str | Path,
    *,
    fold: int = 0,
    num_folds: int = 5,
    split_seed: int = 0,
    group_pattern: str | Callable[[str], str] | None = None,
) -> Cases:
    """Read `dataset.json` and split its training cases.

    Args:
        dataset_dir: Folder with `dataset.json`.
        fold: Which of the folds is validated on, 0 to `num_folds` - 1.
        num_folds: Parts that the persons are divided into.
        split_seed: Which division.
        group_pattern: Tells persons apart; see `person_of`.

    Raises:
        InputError: One line per fault: no or broken `dataset.json`, a missing file, a case listed
            twice, labels that do not count from 0, a pattern that does not match, too few persons.
    """
    root = Path(dataset_dir)
    source = _read_dataset_json(root)
    where = root / "dataset.json"
    cases, faults = [], []
    for entry in source["training"]:
        # links are kept: what they point to may bear another name
        case = {key: os.path.abspath(root / entry[key]) for key in ("image", "label")}
        case["case_id"] = _case_id(entry["image"])
        cases.append(case)
        faults += [
            f"{case['case_id']}: expected {key} file {entry[key]} of {where}, found none. "
            "Put it there or take the case out of dataset.json."
            for key in ("image", "label")
            if not Path(case[key]).is_file()
        ]
    faults += [
        f"{case_id}: expected one case of this name in {where}, got {count}. Rename or remove one."
        for case_id, count in Counter(case["case_id"] for case in cases).items()
        if count > 1
    ]
    if faults:
        raise InputError(*faults)
    validation = _validation_ids(cases, fold, num_folds, split_seed, group_pattern)
    return Cases(
        name=str(source.get("name", root.resolve().name)),
        class_names=_class_names(source["labels"], where),
        num_channels=len(source["modality"]),
        normalization=_normalization(source["modality"]),
        train=[case for case in cases if case["case_id"] not in validation],
        validation=[case for case in cases if case["case_id"] in validation],
        fingerprint=_fingerprint(cases, source["labels"]),
        description={
            key: str(source[key])
            for key in ("description", "reference", "licence")
            if key in source
        },
    )


def list_images(folder: str | Path) -> list[Case]:
    """The NIfTI files of a folder as cases without labels, by name.

    Raises:
        InputError: If there is none.
    """
    files = sorted(f for end in (".nii", ".nii.gz") for f in Path(folder).glob(f"[!.]*{end}"))
    if not files:
        raise InputError(f"dataset_dir: expected NIfTI files in {folder}, found none.")
    return [{"case_id": _case_id(path), "image": str(path)} for path in files]


def _case_id(image: str | Path) -> str:
    """File name without folder and `.nii` or `.nii.gz`; other dots belong to the name."""
    return re.sub(r"\.nii(\.gz)?$", "", Path(image).name)


def _read_dataset_json(root: Path) -> dict[str, Any]:
    path = root / "dataset.json"
    if not path.is_file():
        raise InputError(
            f"dataset_dir: expected a folder with dataset.json (Medical Segmentation Decathlon "
            f"layout), found none in {root}. Check the path."
        )
    try:
        source = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, got: {error}. Mend the file.") from None
    if not isinstance(source, Mapping):
        raise InputError(f"{path}: expected a JSON object, got {type(source).__name__}.")
    kinds = {"labels": Mapping, "modality": Mapping, "training": list}
    faults = [
        f"{path}: expected '{key}' ({kind.__name__.lower()}, not empty), got {source.get(key)!r}."
        for key, kind in kinds.items()
        if not isinstance(source.get(key), kind) or not source[key]
    ]
    if not faults:
        faults = [
            f"{path}: expected image and label (file names) in training[{number}], got {entry!r}."
            for number, entry in enumerate(source["training"])
            if not isinstance(entry, Mapping)
            or not all(isinstance(entry.get(key), str) for key in ("image", "label"))
        ]
    if faults:
        raise InputError(*faults)
    return dict(source)


def _class_names(labels: Mapping[str, str], where: Path) -> list[str]:
    """Names in the order of the values, which must be 0, 1, 2, …"""
    values = sorted(labels, key=lambda value: int(value) if value.isdecimal() else -1)
    if values != [str(n) for n in range(len(labels))] or len(labels) < 2:
        raise InputError(
            f"{where}: expected labels '0' (background), '1', '2', … without gaps, "
            f"got {list(labels)}. Renumber them."
        )
    return [str(labels[value]) for value in values]


def _normalization(modality: Mapping[str, str]) -> str:
    """Percentile clipping for CT, where metal and the table would else set the scale."""
    names = [str(name).upper() for name in modality.values()]
    return "percentile_zscore" if "CT" in names else "zscore"


def _fingerprint(cases: list[Case], labels: Mapping[str, str]) -> str:
    facts = [
        (case["case_id"], Path(case["image"]).stat().st_size, Path(case["label"]).stat().st_size)
        for case in cases
    ]
    return hashlib.sha256(json.dumps([sorted(facts), dict(labels)]).encode()).hexdigest()


def person_of(case_id: str, group_pattern: str | Callable[[str], str] | None) -> str:
    """The person a case belongs to, so that all of a person's cases stay on one side of a split.

    Args:
        case_id: Such as `hippocampus_017`.
        group_pattern: `None` (each case is a person of its own); `pairs` (the cases numbered
            2k−1 and 2k are one person); a function of the case id; or a regular expression whose
            first group, or whole match, names the person.

    Raises:
        InputError: If the pattern is not a regular expression or does not match.
    """
    if group_pattern is None:
        return case_id
    if callable(group_pattern):
        return str(group_pattern(case_id))
    expression = r"(\d+)$" if group_pattern == "pairs" else group_pattern
    try:
        match = re.search(expression, case_id)
    except re.error as error:
        raise InputError(
            f"group_pattern: expected a regular expression or 'pairs', got {group_pattern!r} "
            f"({error})."
        ) from None
    if match is None:
        raise InputError(
            f"{case_id}: expected the case id to match group_pattern {group_pattern!r}, "
            "it does not. Change the pattern."
        )
    name = match.group(1) if match.groups() else match.group()
    return str((int(name) + 1) // 2) if group_pattern == "pairs" else name


def _validation_ids(
    cases: list[Case],
    fold: int,
    num_folds: int,
    split_seed: int,
    group_pattern: str | Callable[[str], str] | None,
) -> set[str]:
    """Case ids of the fold: persons are ordered by a hash and dealt out in turn."""
    persons: dict[str, str] = {}
    faults: list[str] = []
    for case in cases:
        try:
            persons[case["case_id"]] = person_of(case["case_id"], group_pattern)
        except InputError as error:
            faults += error.faults
    if faults:
        raise InputError(*dict.fromkeys(faults))  # a broken pattern is one fault, not one a case

    def rank(person: str) -> str:
        return hashlib.sha256(f"{split_seed}/{person}".encode()).hexdigest()

    ordered = sorted(set(persons.values()), key=rank)
    if not 2 <= num_folds <= len(ordered):
        raise InputError(
            f"num_folds: expected 2 to {len(ordered)} (the number of persons), got {num_folds}."
        )
    if not 0 <= fold < num_folds:
        raise InputError(f"fold: expected 0 to {num_folds - 1}, got {fold}.")
    chosen = set(ordered[fold::num_folds])
    return {case_id for case_id, person in persons.items() if person in chosen}
