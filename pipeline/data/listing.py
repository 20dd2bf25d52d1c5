"""What a dataset lists: its cases as they are named, and which of their files are there.

Each layout has a reader that makes a `DatasetLayout` whose cases still hold the paths as stated;
`resolved` makes them absolute and takes out the cases that cannot be used.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.data.issues import DatasetIssue
from pipeline.errors import InputError
from transforms.dicom import dicom_files

Case = dict[str, Any]

ENDINGS = (".nii.gz", ".nii")


@dataclass(frozen=True)
class DatasetLayout:
    """A dataset as it lies on the disk.

    Attributes:
        root: Its folder, links resolved.
        kind: `msd`, `nnunet`, `folders` or `table`.
        name: Of the dataset.
        class_names: In the order of the label values, background first; None if not declared.
        channel_names: Of an image, in order; None if not declared.
        ignore_value: Label value of voxels that count for nothing, the one after the classes.
        cases: Dictionaries with `case_id`, `image` (a path, or a list with one per channel),
            `label` and, where declared, `group`, which names the person. Paths are absolute; links
            in them are kept, since what they point to may bear another name.
        findings: Faults of cases; those cases are not among `cases`.
        description: Free facts of `dataset.json`: description, reference, licence.
        labels: As `dataset.json` states them.
    """

    root: Path
    kind: str
    name: str
    class_names: list[str] | None = None
    channel_names: list[str] | None = None
    ignore_value: int | None = None
    cases: list[Case] = field(default_factory=list)
    findings: list[DatasetIssue] = field(default_factory=list)
    description: dict[str, str] = field(default_factory=dict)
    labels: Mapping[str, Any] | None = None


def case_name(path: str | Path) -> str:
    """File name without folder and `.nii` or `.nii.gz`; other dots belong to the name."""
    return re.sub(r"\.nii(\.gz)?$", "", Path(path).name)


def volumes_in(folder: Path) -> list[Path]:
    """NIfTI files and folders with DICOM files, by name; hidden ones are left out."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".")
        and (dicom_files(path) if path.is_dir() else path.name.endswith(ENDINGS))
    )


def channel_of(name: str) -> tuple[str, str] | None:
    """Case and number of `<case>_0000`, as channels are named that lie in files of their own."""
    match = re.fullmatch(r"(.+)_(\d{4})", name)
    return (match[1], match[2]) if match else None


def named(case: Case) -> Case:
    """The case with a `case_id`: its own, or the name of its image's file."""
    if "case_id" in case:
        return case
    image = case["image"]
    return {"case_id": case_name(image if isinstance(image, str) else image[0]), **case}


def paths_of(case: Case) -> list[str]:
    """Of all volumes of a case: the channels of its image, then its label if it has one."""
    image = case["image"] if isinstance(case["image"], list) else [case["image"]]
    return image + ([case["label"]] if "label" in case else [])


def resolved(
    layout: DatasetLayout, root: Path, data_roots: Sequence[str | Path], where: str
) -> DatasetLayout:
    """`layout` with absolute paths, without the cases that have a fault.

    Args:
        layout: Its cases hold paths as they are stated.
        root: Folder that those start from, links in it kept.
        data_roots: Other folders that files may lie in.
        where: What lists the cases, for messages.

    Raises:
        InputError: If no case is listed, or a name could not name a file.
    """
    if not layout.cases and not layout.findings:
        raise InputError(f"{where}: expected cases, got none. List one or more.")
    faults = [
        f"{where}: expected case ids without / and not empty, got {case['case_id']!r}. Rename it."
        for case in layout.cases
        if not re.fullmatch(r"[^/\\\0\n]*[^/\\\0\n.][^/\\\0\n]*", case["case_id"])
    ]
    if faults:
        raise InputError(*faults)
    allowed = [os.path.realpath(folder) for folder in (root, *data_roots)]
    findings = [
        DatasetIssue(
            case_id,
            "duplicate_id",
            f"expected one case of this name in {where}, got {count}. Rename or remove one.",
        )
        for case_id, count in Counter(case["case_id"] for case in layout.cases).items()
        if count > 1
    ]
    for case in layout.cases:
        findings += _path_findings(case, root, allowed, where)
    bad = {finding.case_id for finding in [*layout.findings, *findings]}
    cases = [_absolute(case, root) for case in layout.cases if case["case_id"] not in bad]
    return replace(layout, cases=cases, findings=[*layout.findings, *dict.fromkeys(findings)])


def _absolute(case: Case, root: Path) -> Case:
    image = case["image"]
    paths = [os.path.abspath(root / path) for path in paths_of(case)]
    image = paths[:-1] if isinstance(image, list) else paths[0]
    return {**case, "image": image, "label": paths[-1]}


def _path_findings(case: Case, root: Path, allowed: list[str], where: str) -> list[DatasetIssue]:
    """Of files that are not there, and of those that lie elsewhere."""
    findings = []
    stated = paths_of(case)
    for number, name in enumerate(stated):
        key = "label" if number == len(stated) - 1 else "image"
        path = Path(os.path.abspath(root / name))
        series = key == "image" and path.is_dir() and bool(dicom_files(path))
        if not (series or path.is_file()):
            what, check = f"expected {key} file {name} of {where}, found none. ", "missing"
            mend = f"Put it there or take the case out of {Path(where).name}."
        elif strays := [
            p for p in [path, *(path.iterdir() if series else [])] if _outside(p, allowed)
        ]:
            what = f"expected {key} {name} within the dataset's folder, got {_real(strays[0])}. "
            check, mend = "outside", "Put it there or name its folder in data_roots."
        else:
            continue
        findings.append(DatasetIssue(case["case_id"], check, what + mend))
    return findings


def _real(path: Path) -> str:
    return os.path.realpath(path)


def _outside(path: Path, allowed: list[str]) -> bool:
    real = _real(path)
    return not any(os.path.commonpath([real, folder]) == folder for folder in allowed)
