"""Cases: dictionaries of one person's image and label files, and which of the files are there."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.data.issues import DatasetIssue, require
from pipeline.errors import InputError
from transforms.load import dicom_files

Case = dict[str, Any]

ENDINGS = (".nii.gz", ".nii")
CASE_ID = r"[^/\\\0\n]*[^/\\\0\n.][^/\\\0\n]*"


@dataclass(frozen=True)
class DatasetLayout:
    """A dataset as it is stored.

    A case is a dictionary with `case_id`, `image` (a path, or a list with one per channel), `label`
    and, where declared, `group`, which names the person. A path is the absolute name of a NIfTI
    file, or of a folder that holds a DICOM series; links in it are kept, since the target of a link
    may have another name.
    """

    root: Path = Path()  # folder of the dataset, links resolved
    kind: str = ""  # msd, nnunet, folders, table or, where a client lists its cases, given
    name: str = ""
    class_names: list[str] | None = None  # by label value, background first; None: not declared
    channel_names: list[str] | None = None  # in the order of the channels; None: not declared
    ignore_value: int | None = None  # label of voxels that are not annotated; the highest
    cases: list[Case] = field(default_factory=list)  # all that can be used
    issues: list[DatasetIssue] = field(default_factory=list)  # of single cases
    description: dict[str, str] = field(default_factory=dict)  # description, reference, licence
    labels: Mapping[str, Any] | None = None  # as dataset.json states them


def case_name(path: str | Path) -> str:
    """File name without folder and `.nii` or `.nii.gz`; other dots belong to the name."""
    return re.sub(r"\.nii(\.gz)?$", "", Path(path).name)


def split_channel(name: str) -> tuple[str, str] | None:
    """Case and number of a channel that has a file of its own, `<case>_0000`; else None."""
    match = re.fullmatch(r"(.+)_(\d{4})", name)
    return (match[1], match[2]) if match else None


def add_case_id(case: Case) -> Case:
    """The case with a `case_id`: its own, or the name of its first image file."""
    return case if "case_id" in case else {"case_id": case_name(paths_of(case)[0]), **case}


def files_of(case: Mapping[str, Any]) -> dict[str, list[str]]:
    """Files of a case by key, as lists: `{"image": [...], "label": [...]}`."""
    return {
        key: [case[key]] if isinstance(case[key], str) else list(case[key])
        for key in ("image", "label")
        if key in case
    }


def paths_of(case: Mapping[str, Any]) -> list[str]:
    """All volumes of a case: the channels of its image, then its label if it has one."""
    return [path for paths in files_of(case).values() for path in paths]


def list_volumes(folder: Path) -> list[Path]:
    """NIfTI files and folders with DICOM files, by name; hidden ones are left out."""
    return sorted(
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if not path.name.startswith(".")
        and (dicom_files(path) if path.is_dir() else path.name.endswith(ENDINGS))
    )


def resolve_paths(
    layout: DatasetLayout, root: Path, data_roots: Sequence[str | Path], where: str
) -> DatasetLayout:
    """Make the paths of a layout absolute, and leave out the cases that have a fault.

    Args:
        layout: Its cases hold paths as the dataset states them.
        root: Folder that those start from; links in it are kept.
        data_roots: Other folders that files may lie in.
        where: What lists the cases, for messages.

    Raises:
        InputError: If no case is listed, or a case id could not name a file.
    """
    require(layout.cases or layout.issues, where, "cases", "none", "List one or more.")
    ids = Counter(case["case_id"] for case in layout.cases)
    if wrong := [case_id for case_id in ids if not re.fullmatch(CASE_ID, case_id)]:
        expected = f"{where}: expected case ids without / and not empty"
        raise InputError(*(f"{expected}, got {case_id!r}. Rename it." for case_id in wrong))
    issues = list(layout.issues)
    for case_id, count in ids.items():
        if count > 1:
            message = f"expected one case of this name in {where}, got {count}. Rename or remove "
            issues.append(DatasetIssue(case_id, "duplicate_id", message + "one."))
    allowed = [os.path.realpath(folder) for folder in (root, *data_roots)]
    for case in layout.cases:
        issues += _file_issues(case, root, allowed, where)
    bad, cases = {issue.case_id for issue in issues}, []
    for case in layout.cases:
        if case["case_id"] not in bad:
            *images, label = (os.path.abspath(root / path) for path in paths_of(case))
            image = images if isinstance(case["image"], list) else images[0]
            cases.append({**case, "image": image, "label": label})
    return replace(layout, root=root.resolve(), cases=cases, issues=[*dict.fromkeys(issues)])


def _file_issues(
    case: Case, root: Path, allowed: Sequence[str], where: str
) -> Iterator[DatasetIssue]:
    """Files of a case that are missing, or lie outside the allowed folders."""
    for key, name in ((key, name) for key, names in files_of(case).items() for name in names):
        path = Path(os.path.abspath(root / name))
        slices = list(path.iterdir()) if key == "image" and path.is_dir() else []
        if not path.is_file() and not (slices and dicom_files(path)):
            message = f"expected {key} file {name} of {where}, found none. Put it there or take "
            message += f"the case out of {Path(where).name}."
            yield DatasetIssue(case["case_id"], "missing", message)
            continue
        real = [os.path.realpath(file) for file in (path, *slices)]
        outside = [p for p in real if not any(os.path.commonpath([p, a]) == a for a in allowed)]
        if outside:
            message = f"expected {key} {name} within the dataset's folder, got {outside[0]}. Put "
            message += "it there or name its folder in data_roots."
            yield DatasetIssue(case["case_id"], "outside", message)
