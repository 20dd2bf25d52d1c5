"""Datasets that no file describes: a folder of images beside a folder of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.data.issues import DatasetIssue
from pipeline.data.listing import Case, DatasetLayout, case_name, channel_of, volumes_in

PAIRS = (("images", "labels"), ("imagesTr", "labelsTr"))


def folder_pair(root: Path) -> tuple[str, str] | None:
    """Names of the folders of images and labels, if both are there."""
    return next((pair for pair in PAIRS if all((root / name).is_dir() for name in pair)), None)


def read_folders(root: Path) -> DatasetLayout:
    """The layout of a folder with `images/` and `labels/`, paths as they are stated.

    An image is a NIfTI file or a folder with a DICOM series, and is named as its label is; where
    channels lie in files of their own they are `<case>_0000`, `<case>_0001`, …
    """
    image_folder, label_folder = folder_pair(root) or PAIRS[0]
    images, findings = _by_name(root, image_folder)
    labels, more = _by_name(root, label_folder)
    grouped = group_channels(list(images), labels)
    numbers = sorted({number for channels in grouped.values() for number in channels})
    expected = [f"{n:04d}" for n in range(len(numbers))]
    named = {
        case: {number: images[name] for number, name in channels.items()}
        for case, channels in grouped.items()
    }
    cases, unpaired = pair(named, labels, expected if numbers != [""] else [""])
    return DatasetLayout(
        root=root.resolve(),
        kind="folders",
        name=root.resolve().name,
        cases=cases,
        findings=findings + more + unpaired,
    )


def group_channels(names: Sequence[str], labels: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Channel number to name, per case; the number is empty where a case is one name.

    A name such as `amos_0001` may be a case or a channel: it is a case if a label is named so,
    and a channel if the rest of it names a label, or if no name at all is that of a label.
    """
    whole = any(name in labels for name in names)
    grouped: dict[str, dict[str, str]] = {}
    for name in names:
        split = None if name in labels else channel_of(name)
        if split is not None and (split[0] in labels or not whole):
            case, number = split
        else:
            case, number = name, ""
        grouped.setdefault(case, {})[number] = name
    return grouped


def pair(
    images: Mapping[str, Mapping[str, str]], labels: Mapping[str, str], numbers: Sequence[str]
) -> tuple[list[Case], list[DatasetIssue]]:
    """Cases of which image and label are there, and a finding for each of which not all is.

    Args:
        images: Per case, channel number to path.
        labels: Per case.
        numbers: Channels that each case has.
    """
    cases, findings = [], []
    for case in sorted({*images, *labels}):
        channels = images.get(case, {})
        missing = [number for number in numbers if number not in channels]
        if case not in images:
            message = f"expected an image of label {labels[case]}, found none. Add it or move the "
            findings.append(DatasetIssue(case, "unpaired", message + "label away."))
        elif case not in labels:
            first = channels[min(channels)]
            message = f"expected a label of image {first}, found none. Add it or move the "
            findings.append(DatasetIssue(case, "unpaired", message + "image away."))
        elif missing:
            message = f"expected channels {_words(numbers)}, found no {_words(missing)}. Add it."
            findings.append(DatasetIssue(case, "missing", message))
        elif len(channels) > len(numbers):
            message = f"expected channels {_words(numbers)}, got {_words(sorted(channels))}. "
            findings.append(DatasetIssue(case, "unpaired", message + "Move the others away."))
        else:
            paths = [channels[number] for number in numbers]
            image = paths if len(paths) > 1 else paths[0]
            cases.append({"case_id": case, "image": image, "label": labels[case]})
    return cases, findings


def _words(numbers: Sequence[str]) -> str:
    return ", ".join(number or "in one file" for number in numbers)


def _by_name(root: Path, folder: str) -> tuple[dict[str, str], list[DatasetIssue]]:
    """Path by name of case or channel, and a finding for each name that there is twice."""
    found: dict[str, str] = {}
    findings = []
    for path in volumes_in(root / folder):
        name = case_name(path)
        if name in found:
            message = (
                f"expected one volume of this name in {folder}, got two. Rename or remove one."
            )
            findings.append(DatasetIssue(name, "duplicate_id", message))
        found[name] = f"{folder}/{path.name}"
    return found, findings
