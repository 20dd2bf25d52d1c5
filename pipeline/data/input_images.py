"""Images to predict: the volumes of a folder, or one of them, as cases without labels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline.data.listing import ENDINGS, Case, case_name, channel_of, volumes_in
from pipeline.errors import InputError
from transforms.dicom import dicom_files

Grouped = dict[str, dict[str, list[Path]]]  # case, number (empty: not a channel), paths so named


def list_images(
    folder: str | Path, num_channels: int | None = None, root: str | Path = ""
) -> list[Case]:
    """The volumes of a folder, or a single file, as cases without labels, by name.

    Volumes are NIfTI files and folders with a DICOM series; a folder of DICOM files is one case.
    Names such as `amos_0000`, `amos_0001` may be cases or channels of one. They are channels if

    - of several channels, one case or more has exactly these, counted from 0; a case that lacks
      some is listed with what it has,
    - of one channel, or an unknown number, every name is a channel's and all cases have the same.

    Args:
        folder: With the volumes; or a file, which stands for all channels of its case if these are
            complete, and else for itself.
        num_channels: Of an image; None if unknown.
        root: That its name starts from.

    Returns:
        Dictionaries with `case_id`, `image` (a path, or a list with one per channel) and, where two
        volumes are of one name, `fault`: why the case cannot be predicted.

    Raises:
        InputError: If there is none.
    """
    root = Path(root, folder).absolute()
    if root.is_file() and root.name.endswith(ENDINGS):
        grouped, place = _around(root, num_channels), root.parent
    else:
        series = [root] if root.is_dir() and dicom_files(root) else []
        grouped, place = _grouped(volumes_in(root) or series, num_channels), root
    if not grouped:
        raise InputError(
            f"input: expected NIfTI files or DICOM series in {folder}, found none. Check the path."
        )
    several = any(len(numbers) > 1 for numbers in grouped.values())
    return [_case(case_id, numbers, place, several) for case_id, numbers in grouped.items()]


def _around(file: Path, num_channels: int | None) -> Grouped:
    """The case of a file: with the others of its channels if they are complete."""
    name = case_name(file)
    channel = channel_of(name)
    others = []
    if channel is not None:
        others = [
            path
            for path in volumes_in(file.parent)
            if (other := channel_of(case_name(path))) is not None
            and other[0] == channel[0]
            and other[1] != channel[1]
        ]
    grouped = _grouped(sorted([file, *others]), num_channels)
    return {name: grouped[name]} if name in grouped else grouped


def _grouped(found: Iterable[Path], num_channels: int | None) -> Grouped:
    """Paths by case and number, as `list_images` tells channels from cases."""
    cases: Grouped = {}
    channels: Grouped = {}
    for path in found:
        name = case_name(path)
        cases.setdefault(name, {}).setdefault("", []).append(path)
        case_id, number = channel_of(name) or (name, "")
        channels.setdefault(case_id, {}).setdefault(number, []).append(path)
    numbers = [set(one) for one in channels.values()]
    if num_channels is not None and num_channels > 1:
        are_channels = any(one - {""} == _counted(num_channels) for one in numbers)
    else:
        count = num_channels or max(map(len, numbers), default=0)
        are_channels = all(one == _counted(count) for one in numbers)
    return channels if are_channels else cases


def _counted(count: int) -> set[str]:
    """Numbers of so many channels."""
    return {f"{n:04d}" for n in range(count)}


def _case(case_id: str, numbers: dict[str, list[Path]], folder: Path, several: bool) -> Case:
    """The case of some volumes; of `several` channels, perhaps, in files of their own."""
    first = [numbers[number][0] for number in sorted(numbers)]
    single = "" in numbers or not several
    case: Case = {"case_id": case_id, "image": str(first[0]) if single else [*map(str, first)]}
    same = [paths for paths in numbers.values() if len(paths) > 1]
    if "" in numbers and len(first) > 1:  # `a` beside `a_0000`: which is case a?
        same.append(first)
    if same:
        one, other = (path.name for path in same[0][:2])
        case["fault"] = (
            f"expected one volume of this name in {folder}, got {one} and {other}. Remove one."
        )
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
    found = {case_name(path): str(path) for path in volumes_in(place)} if place.is_dir() else {}
    missing = [case["case_id"] for case in cases if case["case_id"] not in found]
    if missing:
        raise InputError(
            *(f"{name}: expected its label in {place}, found none. Add it." for name in missing)
        )
    return [{**case, "label": found[case["case_id"]]} for case in cases]
