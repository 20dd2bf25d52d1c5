"""Datasets that a `dataset.json` describes: Medical Segmentation Decathlon and nnU-Net v2."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.folders import pair
from pipeline.data.issues import DatasetIssue
from pipeline.data.listing import ENDINGS, Case, DatasetLayout, case_name, channel_of, volumes_in
from pipeline.errors import InputError

NNUNET_KEYS = {"file_ending", "dataset"}
# and how they are spelled; the last counts
FREE_FACTS = {
    "description": ("description",), "reference": ("reference",), "licence": ("license", "licence"),
}  # fmt: skip


def read_described(root: Path) -> DatasetLayout:
    """The layout of a folder with `dataset.json`, paths as they are stated.

    Raises:
        InputError: One line per fault of `dataset.json`.
    """
    path = root / "dataset.json"
    source = read_json(path)
    if not isinstance(source, Mapping):
        raise InputError(
            f"{path}: expected a JSON object, got {type(source).__name__}. Correct the file."
        )
    nnunet = bool(NNUNET_KEYS & set(source)) or (
        "channel_names" in source and "training" not in source
    )
    older = "modality" in source or not nnunet
    channels = "modality" if older and "channel_names" not in source else "channel_names"
    if faults := _faults(source, channels, nnunet, path):
        raise InputError(*faults)
    class_names, ignore_value = _class_names(source["labels"], path, may_ignore=nnunet)
    channel_names = [name for _, name in _by_value(source[channels])]
    cases, findings = (
        _nnunet_cases(root, source, len(channel_names))
        if nnunet
        else ([{"case_id": case_name(e["image"]), **_pair(e)} for e in source["training"]], [])
    )
    return DatasetLayout(
        root=root.resolve(),
        kind="nnunet" if nnunet else "msd",
        name=str(source.get("name", root.resolve().name)),
        class_names=class_names,
        channel_names=channel_names,
        ignore_value=ignore_value,
        cases=cases,
        findings=findings,
        description={
            fact: str(source[key])
            for fact, keys in FREE_FACTS.items()
            for key in keys
            if source.get(key)
        },
        labels=dict(source["labels"]),
    )


def read_json(path: Path) -> Any:
    """What a JSON file holds; a byte order mark before it is passed over.

    Raises:
        InputError: If it cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got: {error}. Mend the file.") from None


def _pair(entry: Mapping[str, str]) -> dict[str, str]:
    return {key: entry[key] for key in ("image", "label")}


def _faults(source: Mapping[str, Any], channels: str, nnunet: bool, path: Path) -> list[str]:
    kinds = {"labels": Mapping, channels: Mapping} | ({} if nnunet else {"training": list})
    faults = [
        f"{path}: expected '{key}' ({kind.__name__.lower()}, not empty), got {source.get(key)!r}. "
        "Correct the file."
        for key, kind in kinds.items()
        if not isinstance(source.get(key), kind) or not source[key]
    ]
    if nnunet or faults:
        return faults
    return [
        f"{path}: expected image and label (file names) in training[{number}], got {entry!r}. "
        "Correct the entry."
        for number, entry in enumerate(source["training"])
        if not isinstance(entry, Mapping)
        or not all(isinstance(entry.get(key), str) for key in ("image", "label"))
    ]


def _class_names(
    labels: Mapping[str, Any], where: Path, *, may_ignore: bool
) -> tuple[list[str], int | None]:
    """Names in the order of the values, which must be 0, 1, 2, …, and the value to ignore.

    Labels are stated as value to name (Decathlon) or name to value (nnU-Net).
    """
    if regions := [name for name, value in labels.items() if isinstance(value, (list, Mapping))]:
        raise InputError(
            f"{where}: expected one value per label, got a region for {', '.join(regions)}. "
            "Declare its parts as labels of their own."
        )
    stated = _by_value(labels)
    values, names = [value for value, _ in stated], [name for _, name in stated]
    ignore_value = names.index("ignore") if may_ignore and "ignore" in names else None
    classes = names if ignore_value is None else names[:-1]
    if values != [str(n) for n in range(len(labels))] or len(classes) < 2:
        raise InputError(
            f"{where}: expected labels '0' (background), '1', '2', … without gaps, "
            f"got {list(labels)}. Renumber them."
        )
    if ignore_value not in (None, len(classes)):
        raise InputError(
            f"{where}: expected label 'ignore' to have the highest value, {len(classes)}, "
            f"got {ignore_value}. Renumber the labels."
        )
    return classes, ignore_value


def _by_value(stated: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of value and name by value, whichever of the two is the key."""
    pairs = [(str(key), str(value)) for key, value in stated.items()]
    numbered = all(key.isdecimal() for key in stated)
    if not numbered or any(isinstance(value, int) for value in stated.values()):
        pairs = [(value, name) for name, value in pairs]
    return sorted(pairs, key=lambda pair: int(pair[0]) if pair[0].isdecimal() else -1)


def _nnunet_cases(
    root: Path, source: Mapping[str, Any], num_channels: int
) -> tuple[list[Case], list[DatasetIssue]]:
    ending = source.get("file_ending", ".nii.gz")
    if ending not in ENDINGS:
        raise InputError(
            f"{root / 'dataset.json'}: expected file_ending .nii.gz or .nii, got {ending!r}. "
            "Convert the files."
        )
    numbers = [f"{n:04d}" for n in range(num_channels)]
    if "dataset" in source:
        return _listed(source["dataset"], root / "dataset.json", numbers)
    images: dict[str, dict[str, str]] = {}
    labels: dict[str, str] = {}
    findings = []
    for path in volumes_in(root / "imagesTr"):
        if not path.name.endswith(ending):
            continue
        case, number = channel_of(path.name.removesuffix(ending)) or (path.name, "")
        images.setdefault(case, {})[number] = f"imagesTr/{path.name}"
    for name in [name for name, channels in images.items() if "" in channels]:
        images.pop(name)
        message = f"expected a name <case>_0000{ending} in imagesTr, got {name}. Rename the file."
        findings.append(DatasetIssue(name, "unpaired", message))
    for path in volumes_in(root / "labelsTr"):
        if path.name.endswith(ending):
            labels[path.name.removesuffix(ending)] = f"labelsTr/{path.name}"
    cases, more = pair(images, labels, numbers)
    return cases, findings + more


def _listed(listed: Any, where: Path, numbers: list[str]) -> tuple[list[Case], list[DatasetIssue]]:
    """The cases of `dataset`, an object of case id to `images` and `label`."""
    if not isinstance(listed, Mapping):
        raise InputError(f"{where}: expected 'dataset' (mapping), got {listed!r}. Correct it.")
    faults = [
        f"{where}: expected images (list of file names) and label in dataset['{case_id}'], "
        f"got {entry!r}. Correct the entry."
        for case_id, entry in listed.items()
        if not isinstance(entry, Mapping)
        or not isinstance(entry.get("images"), list)
        or not all(isinstance(path, str) for path in [*entry["images"], entry.get("label")])
    ]
    if faults:
        raise InputError(*faults)
    images = {
        case_id: {f"{n:04d}": path for n, path in enumerate(entry["images"])}
        for case_id, entry in listed.items()
    }
    return pair(images, {case_id: entry["label"] for case_id, entry in listed.items()}, numbers)
