"""Cases: dictionaries of one person's image and label files; and folders of volumes as cases."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pipeline.errors import DatasetIssue, InputError, make_issue, printable, refuse, require
from transforms.dicom import Series, dicom_files, find_series, is_dicom
from transforms.formats import FORMATS, find_ending, list_files
from transforms.segmentation import find_dicom

Case = dict[str, Any]
Pair = tuple[str, Path, Path]  # case id, prediction, label
Channels = dict[str, list[Path]]  # volumes by channel number, which is empty for no channel

ENDINGS = tuple(FORMATS)
CASE_ID = r"[^/\\\0\n]*[^/\\\0\n.][^/\\\0\n]*"


@dataclass(frozen=True)
class DatasetLayout:
    """A dataset as it is stored.

    A case is a dictionary with `case_id`, `image` (a path, or a list with one per channel), `label`
    and, where declared, `group`, which names the person. A path is the absolute name of a file, of
    a folder that holds a DICOM series or, for a label, a DICOM Segmentation, or of a file of a
    series; links in it are kept.
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
    """File name without folder and the ending of a volume; `_` stands for unsafe characters."""
    endings = "|".join(map(re.escape, (*ENDINGS, ".dcm")))
    name = re.sub(rf"({endings})$", "", Path(path).name, flags=re.IGNORECASE)
    return "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in name)


def split_channel(name: str) -> tuple[str, str]:
    """Case and number of a channel that has a file of its own, `<case>_0000`; else no number."""
    match = re.fullmatch(r"(.+)_(\d{4})", name)
    return (match[1], match[2]) if match else (name, "")


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
    """List all volumes of a case: the channels of its image, then its label if it has one."""
    return [path for paths in files_of(case).values() for path in paths]


def list_volumes(folder: Path) -> dict[Path, str]:
    """List files of a folder, and DICOM series in and below it, by path, with their names.

    Hidden ones are left out. The path of a series is its folder, or its first file where others
    lie in or below that. Its name is that of the topmost folder below `folder`; where that has
    several, names of folders and Series Numbers that tell them apart follow.
    """
    if not folder.is_dir():
        return {}
    found = {path: case_name(path) for path in _volume_files(folder)}
    found |= _name_series(folder, find_series(folder))
    if not found and dicom_files(folder):
        found[folder] = case_name(folder)  # DICOM without an image; reading says what it is
    return dict(sorted(found.items()))


def _volume_files(folder: Path) -> list[Path]:
    paths = (path for path in folder.iterdir() if find_ending(path))
    return sorted(path for path in paths if path.name[0] != "." and not path.is_dir())


def _name_series(folder: Path, series: Sequence[Series]) -> dict[Path, str]:
    homes = [one.files[0].parent for one in series]
    tops = [Path(folder, *home.relative_to(folder).parts[:1]) for home in homes]
    within = Counter(path for home in homes for path in (home, *home.parents))
    named: dict[Path, str] = {}
    counts: Counter[str] = Counter()
    for one, home, top in zip(series, homes, tops, strict=True):
        beside = [h.relative_to(top).parts for h, t in zip(homes, tops, strict=True) if t == top]
        levels = zip(home.relative_to(top).parts, zip_longest(*beside), strict=False)
        words = [top.name, *(part for part, names in levels if len({*names}) > 1)]
        words += [f"series{one.number}"] if homes.count(home) > 1 else []
        name = case_name("_".join(words))
        counts[name] += 1
        name += f"_{counts[name]}" if counts[name] > 1 else ""
        named[home if within[home] == 1 else one.files[0]] = name
    return named


def list_labels(folder: Path) -> dict[Path, str]:
    """List labels of a folder: files, DICOM files, and folders with these; by path, with names."""
    found = (path for path in sorted(folder.glob("[!.]*")) if find_ending(path) or is_dicom(path))
    return {path: case_name(path) for path in found if path.is_file() or find_dicom(path)}


def group_volumes(
    paths: Mapping[Path, str], is_case: Callable[[str], bool] = lambda name: False
) -> dict[str, Channels]:
    """Volumes by case and channel; a name for which `is_case` holds is no channel's."""
    grouped: dict[str, Channels] = {}
    for path, name in paths.items():
        case_id, number = (name, "") if is_case(name) else split_channel(name)
        grouped.setdefault(case_id, {}).setdefault(number, []).append(path)
    return grouped


def find_twins(channels: Channels) -> str:
    """Report volumes that could be the same of one case, such as `a` and `a_0000`."""
    twins = [paths for paths in channels.values() if len(paths) > 1]
    if "" in channels and len(channels) > 1:
        twins.append([channels[number][0] for number in sorted(channels)])
    if not twins:
        return ""
    folder, (one, other) = twins[0][0].parent, (path.name for path in twins[0][:2])
    return f"expected one volume of this name in {folder}, got {one} and {other}. Remove one."


def resolve_paths(
    layout: DatasetLayout, root: Path, data_roots: Sequence[str | Path], where: str
) -> DatasetLayout:
    """Make the paths of a layout, from `root`, absolute, and leave out cases that have a fault.

    Files may also lie in `data_roots`. In messages, `where` names what lists the cases.

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
    refuse(
        f"{where}: expected names without control characters, got {name!a}. Rename it."
        for name in (*(layout.class_names or ()), *(layout.channel_names or ()), *ids)
        if printable(name, keep="") != name
    )
    expected, remedy = f"one case of this name in {where}", "Rename or remove one"
    twice = {case_id: count for case_id, count in ids.items() if count > 1}
    issues = [make_issue(name, "duplicate_id", expected, twice[name], remedy) for name in twice]
    issues = layout.issues + issues
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
        files = dicom_files(path) if key == "image" else find_dicom(path)
        if not path.is_file() and not files:
            message = f"expected {key} file {name} of {where}, found none. Put it there or take "
            message += f"the case out of {Path(where).name}."
            yield DatasetIssue(case["case_id"], "missing", message)
            continue
        real = [os.path.realpath(file) for file in (*list_files(path), *files)]
        outside = [p for p in real if not any(os.path.commonpath([p, a]) == a for a in allowed)]
        if outside:
            expected = f"{key} {name} within the dataset's folder"
            remedy = "Put it there or name its folder in data_roots"
            yield make_issue(case["case_id"], "outside", expected, outside[0], remedy)


def list_images(
    folder: str | Path,
    num_channels: int | None = None,
    root: str | Path = "",
    labels: str | Path | None = None,
) -> list[Case]:
    """List the volumes of a folder, or a single file, as cases, by name.

    Volumes are those of `list_volumes`; a DICOM file stands for its series. Names such as
    `amos_0000` are channels of one case, counted from 0, where one case or more has exactly
    `num_channels`; where these are 1 or None, all cases must have the same ones. A case that lacks
    a channel is listed with what it has.

    Args:
        folder: With the volumes; or a file, which stands for all channels of its case if these are
            complete, and else for itself.
        num_channels: Channels of an image; None if unknown.
        root: Folder that `folder` and `labels` are relative to.
        labels: Folder with the label of each case, such as `<case_id>.nii.gz`.

    Returns:
        Cases; one has a `fault`, why it cannot be predicted, where two volumes have its name.

    Raises:
        InputError: If there is no volume; one line for each case without a label.
    """
    place = Path(root, folder).absolute()
    if place.is_file() and find_ending(place):
        cases = _group_file(place, num_channels)
    elif place.is_file() and is_dicom(place):
        numbers = [f"_series{one.number}" for one in find_series(place)]
        cases = _group({place: case_name("".join([place.parent.name, *numbers]))}, num_channels)
    else:
        cases = _group(list_volumes(place), num_channels)
    expected = f"volumes ({', '.join(ENDINGS)} or DICOM series) in {folder}"
    require(cases, "input", expected, "none", "Check the path.")
    several = any(len(channels) > 1 for channels in cases.values())
    listed = [_image_case(case_id, channels, several) for case_id, channels in cases.items()]
    if labels is None:
        return listed
    found = {name: str(path) for path, name in list_labels(Path(root, labels)).items()}
    refuse(
        f"{case_id}: expected its label in {Path(root, labels)}, found none. Add it."
        for case_id in cases
        if case_id not in found
    )
    return [{**case, "label": found[case["case_id"]]} for case in listed]


def _group_file(file: Path, num_channels: int | None) -> dict[str, Channels]:
    """The case of a file: with the other channels if they are complete."""
    name = case_name(file)
    case_id, number = split_channel(name)
    other = re.compile(rf"{re.escape(case_id)}_(?!{number})\d{{4}}" if number else "")
    others = [path for path in _volume_files(file.parent) if other.fullmatch(case_name(path))]
    grouped = _group({path: case_name(path) for path in sorted([file, *others])}, num_channels)
    return {name: grouped[name]} if name in grouped else grouped


def _group(found: Mapping[Path, str], num_channels: int | None) -> dict[str, Channels]:
    grouped = group_volumes(found)
    numbers = [set(channels) for channels in grouped.values()]
    complete = {f"{n:04d}" for n in range(num_channels or max(map(len, numbers), default=0))}
    if (num_channels or 1) > 1:
        are_channels = any(one - {""} == complete for one in numbers)
    else:
        are_channels = all(one == complete for one in numbers)
    return grouped if are_channels else group_volumes(found, lambda name: True)


def _image_case(case_id: str, channels: Channels, several: bool) -> Case:
    first = [str(channels[number][0]) for number in sorted(channels)]
    image = first[0] if "" in channels or not several else first
    fault = find_twins(channels)
    return {"case_id": case_id, "image": image} | ({"fault": fault} if fault else {})


def match(pred_dir: Path, label_dir: Path) -> tuple[list[Pair], dict[str, str], list[str]]:
    """Match the label maps of two folders by case id.

    Returns:
        Pairs; the reasons for predictions without one; case ids of labels without a prediction.

    Raises:
        InputError: If a folder does not exist, or the two have no case in common.
    """
    preds, labels = _files(pred_dir, "predictions"), _files(label_dir, "labels")
    expected = f"label maps named as those of {label_dir}"
    got = f"{len(preds)} and {len(labels)} cases, none in common"
    require(preds.keys() & labels.keys(), pred_dir, expected, got, "Check the paths.")
    pairs, refused = [], {}
    for case_id, pred in sorted(preds.items()):
        label = labels.get(case_id, [])
        for kind, folder, paths in ("prediction", pred_dir, pred), ("label", label_dir, label):
            if not paths:
                remedy = "Add it or take the prediction away."
                refused[case_id] = f"expected a {kind} in {folder}, found none. {remedy}"
            elif len(paths) > 1:
                got = " and ".join(path.name for path in paths)
                refused[case_id] = f"expected one {kind} in {folder}, got {got}. Remove one."
        if case_id not in refused:
            pairs.append((case_id, pred[0], label[0]))
    return pairs, refused, sorted(labels.keys() - preds.keys())


def _files(folder: Path, what: str) -> dict[str, list[Path]]:
    """Label maps by case id, without predicted probabilities."""
    try:
        os.listdir(folder)
    except OSError as error:
        expected = f"{folder}: expected a folder of {what}"
        raise InputError(f"{expected}, got: {error.strerror}. Check the path.") from None
    files = {path: case_name(path) for path in _volume_files(folder)}
    files = list_labels(folder) if what == "labels" else files
    found = {name: one[""] for name, one in group_volumes(files, lambda name: True).items()}
    others = {f"{name}_probabilities" for name in found}
    return {name: paths for name, paths in found.items() if name not in others}
