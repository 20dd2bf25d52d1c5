"""Images to predict: the volumes of a folder, or a single file, as cases without labels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline.data.cases import ENDINGS, Case, case_name, list_volumes, split_channel
from pipeline.data.issues import require
from pipeline.errors import InputError
from transforms.load import dicom_files

Volumes = dict[str, dict[str, list[Path]]]  # by case and channel number (empty: not a channel)


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
    root = Path(root, folder).absolute()
    if root.is_file() and root.name.endswith(ENDINGS):
        grouped, place = _group_file(root, num_channels), root.parent
    else:
        series = [root] if root.is_dir() and dicom_files(root) else []
        grouped, place = _group(list_volumes(root) or series, num_channels), root
    expected = f"NIfTI files or DICOM series in {folder}"
    require(grouped, "input", expected, "none", "Check the path.")
    several = any(len(numbers) > 1 for numbers in grouped.values())
    return [_make_case(case_id, numbers, place, several) for case_id, numbers in grouped.items()]


def _group_file(file: Path, num_channels: int | None) -> Volumes:
    """The case of a file: with the other channels if they are complete."""
    name = case_name(file)
    channel = split_channel(name)
    others = []
    if channel is not None:
        for path in list_volumes(file.parent):
            other = split_channel(case_name(path))
            if other is not None and other[0] == channel[0] and other[1] != channel[1]:
                others.append(path)
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
    count = num_channels or max(map(len, numbers), default=0)
    complete = {f"{n:04d}" for n in range(count)}
    if num_channels is not None and num_channels > 1:
        are_channels = any(one - {""} == complete for one in numbers)
    else:
        are_channels = all(one == complete for one in numbers)
    return channels if are_channels else cases


def _make_case(case_id: str, numbers: dict[str, list[Path]], folder: Path, several: bool) -> Case:
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
    """List the volumes of a folder, each with the label of its name in another folder.

    Args:
        folder: As for `list_images`.
        labels: Folder of the labels, `<case_id>.nii.gz` or `.nii`.
        num_channels: As for `list_images`.
        root: As for `list_images`, for both folders.

    Raises:
        InputError: As `list_images`, and one line for each case without a label.
    """
    cases, place = list_images(folder, num_channels, root), Path(root, labels)
    found = {case_name(path): str(path) for path in list_volumes(place)} if place.is_dir() else {}
    missing = [case["case_id"] for case in cases if case["case_id"] not in found]
    if missing:
        raise InputError(
            *(f"{name}: expected its label in {place}, found none. Add it." for name in missing)
        )
    return [{**case, "label": found[case["case_id"]]} for case in cases]
