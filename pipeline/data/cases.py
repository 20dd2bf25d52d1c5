"""Cases: dictionaries of one person's image and label files, and which of the files are there.

Also the images of a folder to predict, as cases without labels.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.errors import DatasetIssue, make_issue, refuse, require
from transforms.load import dicom_files

Case = dict[str, Any]

Volumes = dict[str, dict[str, list[Path]]]  # by case and channel number (empty: not a channel)

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
    """The case with its own `case_id`, or the name of its first image file."""
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

    The paths start from `root`, links in which are kept; files may also lie in `data_roots`. In
    messages, `where` names what lists the cases.

    Raises:
        InputError: If no case is listed, or a case id could not name a file.
    """
    require(layout.cases or layout.issues, where, "cases", "none", "List one or more.")
    ids = Counter(case["case_id"] for case in layout.cases)
    refuse(
        f"{where}: expected case ids without / and not empty, got {case_id!r}. Rename it."
        for case_id in ids
        if not re.fullmatch(CASE_ID, case_id)
    )
    issues, expected = list(layout.issues), f"one case of this name in {where}"
    for case_id, count in ids.items():
        if count > 1:
            remedy = "Rename or remove one"
            issues.append(make_issue(case_id, "duplicate_id", expected, count, remedy))
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
            expected = f"{key} {name} within the dataset's folder"
            remedy = "Put it there or name its folder in data_roots"
            yield make_issue(case["case_id"], "outside", expected, outside[0], remedy)


# ---- images to predict


def list_images(
    folder: str | Path, num_channels: int | None = None, root: str | Path = ""
) -> list[Case]:
    """List the volumes of a folder, or a single file, as cases without labels, by name.

    Volumes are NIfTI files and folders with a DICOM series; a folder of DICOM files is one case.
    Names such as `amos_0000`, `amos_0001` may be cases or channels of one. They are channels

    - of several channels, if one case or more has exactly these, counted from 0; a case that lacks
      some is listed with what it has,
    - of one channel, or an unknown number, if every name is a channel's and all cases have the
      same.

    Args:
        folder: With the volumes; or a file, which stands for all channels of its case if these are
            complete, and else for itself.
        num_channels: Channels of an image; None if unknown.
        root: Folder that `folder` is relative to.

    Returns:
        Dictionaries with `case_id`, `image` (a path, or a list with one per channel) and, where two
        volumes have one name, `fault`: why the case cannot be predicted.

    Raises:
        InputError: If there is no volume.
    """
    place = Path(root, folder).absolute()
    if place.is_file() and place.name.endswith(ENDINGS):
        grouped, place = _group_file(place, num_channels), place.parent
    else:
        series = [place] if place.is_dir() and dicom_files(place) else []
        grouped = _group(list_volumes(place) or series, num_channels)
    expected = f"NIfTI files or DICOM series in {folder}"
    require(grouped, "input", expected, "none", "Check the path.")
    several = any(len(numbers) > 1 for numbers in grouped.values())
    return [_image_case(case_id, numbers, place, several) for case_id, numbers in grouped.items()]


def _group_file(file: Path, num_channels: int | None) -> Volumes:
    """The case of a file: with the other channels if they are complete."""
    name = case_name(file)
    case_id, number = split_channel(name) or (name, "")
    other = re.compile(rf"{re.escape(case_id)}_(?!{number})\d{{4}}" if number else "")
    others = [path for path in list_volumes(file.parent) if other.fullmatch(case_name(path))]
    grouped = _group(sorted([file, *others]), num_channels)
    return {name: grouped[name]} if name in grouped else grouped


def _group(found: Iterable[Path], num_channels: int | None) -> Volumes:
    cases: Volumes = {}
    channels: Volumes = {}
    for path in found:
        name = case_name(path)
        cases.setdefault(name, {}).setdefault("", []).append(path)
        case_id, number = split_channel(name) or (name, "")
        channels.setdefault(case_id, {}).setdefault(number, []).append(path)
    numbers = [set(one) for one in channels.values()]
    complete = {f"{n:04d}" for n in range(num_channels or max(map(len, numbers), default=0))}
    if (num_channels or 1) > 1:
        are_channels = any(one - {""} == complete for one in numbers)
    else:
        are_channels = all(one == complete for one in numbers)
    return channels if are_channels else cases


def _image_case(case_id: str, numbers: dict[str, list[Path]], folder: Path, several: bool) -> Case:
    first = [numbers[number][0] for number in sorted(numbers)]
    is_one_file = "" in numbers or not several
    case: Case = {"case_id": case_id, "image": str(first[0]) if is_one_file else [*map(str, first)]}
    same = [paths for paths in numbers.values() if len(paths) > 1]
    if "" in numbers and len(first) > 1:  # `a` beside `a_0000`: both could be case a
        same.append(first)
    if same:
        one, other = (path.name for path in same[0][:2])
        expected = f"expected one volume of this name in {folder}"
        case["fault"] = f"{expected}, got {one} and {other}. Remove one."
    return case


def list_labelled_images(
    folder: str | Path, labels: str | Path, num_channels: int | None = None, root: str | Path = ""
) -> list[Case]:
    """Call `list_images`, and add the label `<case_id>.nii.gz` or `.nii` in the folder `labels`.

    Raises:
        InputError: As `list_images`, and one line for each case without a label.
    """
    cases, place = list_images(folder, num_channels, root), Path(root, labels)
    found = {case_name(path): str(path) for path in list_volumes(place)}
    refuse(
        f"{case['case_id']}: expected its label in {place}, found none. Add it."
        for case in cases
        if case["case_id"] not in found
    )
    return [{**case, "label": found[case["case_id"]]} for case in cases]
