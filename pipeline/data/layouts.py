"""Dataset layouts: readers that list the cases of a folder or a table.

msd      dataset.json with labels and training pairs (Medical Segmentation Decathlon)
nnunet   dataset.json with channel_names, imagesTr/<case>_0000.nii.gz (nnU-Net v2 raw)
table    a CSV or JSON list of image and label, or a folder with cases.csv or cases.json
folders  images/ and labels/ (or imagesTr/ and labelsTr/) with equal names
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.cases import (
    ENDINGS,
    Case,
    DatasetLayout,
    case_name,
    list_volumes,
    resolve_paths,
    split_channel,
)
from pipeline.errors import DatasetIssue, InputError, make_issue, nearest, refuse, require, some

TABLES = ("cases.csv", "cases.json")
FOLDERS = (("images", "labels"), ("imagesTr", "labelsTr"))
# keys of `dataset.json` with facts about the dataset, and their names here
FACTS = {"description": "description", "reference": "reference"}
FACTS |= {"license": "licence", "licence": "licence"}
Listed = tuple[list[Case], list[DatasetIssue]]


def read_layout(dataset_dir: str | Path, *, data_roots: Sequence[str | Path] = ()) -> DatasetLayout:
    """Recognise a dataset's layout and read it.

    Args:
        dataset_dir: A folder, or a `.csv` or `.json` file that lists cases.
        data_roots: Other folders that files may lie in; a path that leads elsewhere, by `..` or
            through a link, is a fault.

    Returns:
        The cases that can be used; faults of single cases are its `issues`.

    Raises:
        InputError: One line per fault of the dataset as a whole: an unknown layout, a description
            that cannot be read, no case at all.
    """
    path = Path(dataset_dir)
    try:
        if not path.is_file():
            layout, where = _read_folder(path)
            return resolve_paths(layout, path, data_roots, str(where))
        is_table = path.suffix.lower() in (".csv", ".json")
        form = "a folder, or a .csv or .json file that lists cases"
        require(is_table, "dataset_dir", form, path, "Name one of these.")
        return resolve_paths(_read_table(path), path.parent, data_roots, str(path))
    except OSError as error:  # a folder without read permission
        message = f"{path}: expected files that can be read, got: {error}. Change the permissions."
        raise InputError(message) from error


def _read_folder(path: Path) -> tuple[DatasetLayout, Path]:
    """The layout of a folder, and what lists its cases."""
    expected = "dataset_dir: expected a folder with dataset.json (Medical Segmentation Decathlon "
    expected += "or nnU-Net), cases.csv, cases.json, or folders images and labels, found"
    if not path.is_dir():
        raise InputError(f"{expected} no {path}. Check the path.")
    if (path / "dataset.json").is_file():
        return read_dataset_json(path), path / "dataset.json"
    tables = [path / name for name in TABLES if (path / name).is_file()]
    remedy = "Name the file that is meant as dataset_dir."
    require(len(tables) < 2, path, "one of cases.csv and cases.json", "both", remedy)
    if tables:
        return _read_table(tables[0]), tables[0]
    for names in FOLDERS:
        if all((path / name).is_dir() for name in names):
            cases, issues = _pair_folders(path, *names)
            name = path.resolve().name
            return DatasetLayout(kind="folders", name=name, cases=cases, issues=issues), path
    found = sorted(child.name for child in path.iterdir() if not child.name.startswith("."))
    raise InputError(f"{expected} {some(found) or 'nothing'} in {path}. Check the path.")


def load_json(path: Path) -> Any:
    """Read a JSON file, with or without a byte order mark.

    Raises:
        InputError: If it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got: {error}. Correct the file.") from None


# ---- dataset.json


def read_dataset_json(root: Path) -> DatasetLayout:
    """Read `root/dataset.json` of the Medical Segmentation Decathlon or nnU-Net; paths as stated.

    Raises:
        InputError: One line per fault of `dataset.json`.
    """
    path = root / "dataset.json"
    source = load_json(path)
    got = type(source).__name__
    require(isinstance(source, Mapping), path, "a JSON object", got, "Correct the file.")
    is_named = "channel_names" in source and "training" not in source
    is_nnunet = is_named or not {"file_ending", "dataset"}.isdisjoint(source)
    has_names = "channel_names" in source or (is_nnunet and "modality" not in source)
    channels = "channel_names" if has_names else "modality"
    kinds: dict[str, Any] = {"labels": Mapping, channels: Mapping}
    if not is_nnunet:
        kinds["training"] = list
    elif "dataset" in source:
        kinds["dataset"] = Mapping
    refuse(
        f"{path}: expected '{key}' ({kind.__name__.lower()}, not empty), got {source.get(key)!r}. "
        "Correct the file."
        for key, kind in kinds.items()
        if not isinstance(source.get(key), kind) or not source[key]
    )
    class_names, ignore_value = _read_labels(source["labels"], path, may_ignore=is_nnunet)
    channel_names = [name for _, name in _sort_by_value(source[channels])]
    cases, issues = _list_cases(root, source, is_nnunet, len(channel_names))
    return DatasetLayout(
        kind="nnunet" if is_nnunet else "msd",
        name=str(source.get("name", root.resolve().name)),
        class_names=class_names,
        channel_names=channel_names,
        ignore_value=ignore_value,
        cases=cases,
        issues=issues,
        description={fact: str(source[key]) for key, fact in FACTS.items() if source.get(key)},
        labels=dict(source["labels"]),
    )


def _list_cases(
    root: Path, source: Mapping[str, Any], is_nnunet: bool, num_channels: int
) -> Listed:
    path = root / "dataset.json"
    if is_nnunet and "dataset" not in source:
        ending = source.get("file_ending", ".nii.gz")
        expected = "file_ending .nii.gz or .nii"
        require(ending in ENDINGS, path, expected, repr(ending), "Convert the files.")
        return _pair_folders(root, *FOLDERS[1], ending, num_channels)
    if not is_nnunet:
        entries = {f"training[{n}]": entry for n, entry in enumerate(source["training"])}
    else:
        entries = {f"dataset['{case_id}']": entry for case_id, entry in source["dataset"].items()}
        for case_id, (name, entry) in zip(source["dataset"], entries.items(), strict=True):
            if isinstance(entry, Mapping):
                entries[name] = {**entry, "case_id": case_id, "image": entry.get("images")}
    _check_entries(entries, path, required=("image", "label"))
    return [_make_case(entry) for entry in entries.values()], []


def _read_labels(
    labels: Mapping[str, Any], where: Path, *, may_ignore: bool
) -> tuple[list[str], int | None]:
    """Names in the order of the values, which must be 0, 1, 2, …, and the value to ignore."""
    regions = [name for name, value in labels.items() if isinstance(value, (list, Mapping))]
    got, remedy = f"a region for {', '.join(regions)}", "Declare its parts as labels of their own."
    require(not regions, where, "one value per label", got, remedy)
    stated = _sort_by_value(labels)
    names = [name for _, name in stated]
    ignored = names.index("ignore") if may_ignore and "ignore" in names else None
    count = len(names) - (ignored is not None)
    is_dense = [value for value, _ in stated] == [str(n) for n in range(len(names))]
    expected = "labels '0' (background), '1', '2', … without gaps"
    require(is_dense and count > 1, where, expected, list(labels), "Renumber them.")
    expected = f"label 'ignore' to have the highest value, {count}"
    require(ignored in (None, count), where, expected, ignored, "Renumber the labels.")
    return names[:count], ignored


def _sort_by_value(stated: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of value and name by value: Decathlon states value to name, nnU-Net name to value."""
    pairs = [(str(key), str(value)) for key, value in stated.items()]
    numbered = all(key.isdecimal() for key in stated)
    if not numbered or any(isinstance(value, int) for value in stated.values()):
        pairs = [(value, name) for name, value in pairs]
    return sorted(pairs, key=lambda pair: int(pair[0]) if pair[0].isdecimal() else -1)


# ---- folders


def _pair_folders(
    root: Path, image_folder: str, label_folder: str, ending: str = "", num_channels: int = 0
) -> Listed:
    """Cases of a folder of images, NIfTI files or DICOM series, and one of labels of equal names.

    With `num_channels`, every image is a channel, such as `amos_0001`. Without, such a name may be
    a case or a channel: it is a case if a label is named so, and a channel if the rest of it names
    a label, or if no name at all is that of a label.
    """
    images, issues = _volumes_by_name(root, image_folder, ending)
    labels, more = _volumes_by_name(root, label_folder, ending)
    whole = {} if num_channels else images.keys() & labels.keys()
    grouped: dict[str, dict[str, str]] = {}
    for name, path in images.items():
        channel = None if name in whole else split_channel(name)
        if channel is None or (whole and channel[0] not in labels):
            channel = name, ""
        grouped.setdefault(channel[0], {})[channel[1]] = path
    found = {number for channels in grouped.values() for number in channels}
    numbers = [f"{n:04d}" for n in range(num_channels or len(found))]
    is_plain = found == {""} and not num_channels
    cases, unpaired = _pair(grouped, labels, [""] if is_plain else numbers)
    return cases, issues + more + unpaired


def _volumes_by_name(
    root: Path, folder: str, ending: str
) -> tuple[dict[str, str], list[DatasetIssue]]:
    found: dict[str, str] = {}
    issues = []
    expected, remedy = f"one volume of this name in {folder}", "Rename or remove one"
    for path in list_volumes(root / folder):
        if path.name.endswith(ending):
            name = case_name(path)
            if name in found:
                issues.append(make_issue(name, "duplicate_id", expected, "two", remedy))
            found[name] = f"{folder}/{path.name}"
    return found, issues


def _pair(
    images: Mapping[str, Mapping[str, str]], labels: Mapping[str, str], numbers: Sequence[str]
) -> Listed:
    """Cases that have all channels in `numbers` and a label, and an issue for each other."""

    def words(channels: Iterable[str]) -> str:
        return ", ".join(number or "in one file" for number in sorted(channels))

    cases, issues = [], []
    for case in sorted({*images, *labels}):
        channels = images.get(case, {})
        missing = {*numbers} - {*channels}
        check, message = "unpaired", f"expected channels {words(numbers)}"
        if case not in images or case not in labels:
            wanted, there, path = "an image", "label", labels.get(case)
            if case in images:
                wanted, there, path = "a label", "image", channels[min(channels)]
            message = f"expected {wanted} of {there} {path}, found none. "
            message += f"Add it or move the {there} away."
        elif missing:
            check, message = "missing", f"{message}, found no {words(missing)}. Add it."
        elif len(channels) > len(numbers):
            message += f", got {words(channels)}. Move the others away."
        else:
            image = [channels[number] for number in numbers]
            cases.append(_make_case({"case_id": case, "image": image, "label": labels[case]}))
            continue
        issues.append(DatasetIssue(case, check, message))
    return cases, issues


# ---- lists of cases


def _make_case(entry: Mapping[str, Any], image_keys: Sequence[str] = ("image",)) -> Case:
    """The case of an entry, named after its image unless it has a name."""
    image: Any = [path for key in image_keys for path in _as_list(entry.get(key, ""))]
    case = {key: str(entry[key]) for key in ("case_id", "label", "group") if entry.get(key)}
    case["image"] = image if len(image) > 1 else image[0]
    if image[0]:
        name = case_name(image[0])
        channel = split_channel(name) if len(image) > 1 else None
        case.setdefault("case_id", channel[0] if channel else name)
    return case


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_entries(entries: Mapping[str, Any], where: Path, required: Collection[str]) -> None:
    """Refuse JSON values that are no objects with file names."""

    def is_valid(key: str, value: Any) -> bool:
        if value is None or not re.fullmatch(r"image|image_\d+|label|case_id|group", key):
            return value is not None or key not in required
        if key in ("case_id", "group"):
            return isinstance(value, str | int)
        paths = _as_list(value) if key == "image" else [value]
        return bool(paths) and all(isinstance(path, str) for path in paths)

    expected = f"{where}: expected image and label (file names)"
    refuse(
        f"{expected} in {name}, got {entry!r}. Correct the entry."
        for name, entry in entries.items()
        if not isinstance(entry, Mapping)
        or not all(is_valid(key, entry.get(key)) for key in {*entry, *required})
    )


def _read_table(path: Path) -> DatasetLayout:
    """A CSV file, or a JSON list of objects, with one case each.

    Columns are `image` (or `image_0`, `image_1`, … for channels), `label`, and `case_id` and
    `group` (the person) if wanted; in JSON `image` may be a list. Other columns are ignored.
    """
    if path.suffix.lower() == ".csv":
        rows = _read_csv(path)
    else:
        rows = load_json(path)
        got = type(rows).__name__
        require(isinstance(rows, list), path, "a JSON list of cases", got, "Correct it.")
        _check_entries({f"entry {n}": row for n, row in enumerate(rows, start=1)}, path, ())
        rows = [{key: row[key] for key in row if row[key] is not None} for row in rows]
    require(rows, path, "cases", "none", "List one or more.")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    images = _image_columns(columns, path)
    wanted = [*images, "label", *(name for name in ("case_id", "group") if name in columns)]
    cases, issues = [], []
    for number, row in enumerate(rows, start=1):
        case = _make_case(row, images)
        if empty := [name for name in wanted if not row.get(name)]:
            expected = f"{' and '.join(empty)} in row {number} of {path}"
            case_id = case.get("case_id") or f"row {number}"
            issues.append(make_issue(case_id, "missing", expected, "an empty cell", "Fill it in"))
        else:
            cases.append(case)
    name = path.resolve().parent.name if path.name in TABLES else path.stem
    return DatasetLayout(kind="table", name=name, cases=cases, issues=issues)


def _image_columns(columns: list[str], path: Path) -> list[str]:
    """`image`, or `image_0`, `image_1`, …, once it is sure that no column is missing."""
    numbered = [name for name in columns if re.fullmatch(r"image_\d+", name)]
    expected = "either a column image or image_0, image_1, …"
    require(not numbered or "image" not in columns, path, expected, "both", "Remove one.")
    names = [f"image_{n}" for n in range(len(numbered))] or ["image"]
    refuse(
        f"{path}: expected a column {name}, got {', '.join(columns)}. {nearest(name, columns)}"
        for name in ("label", *names)
        if name not in columns
    )
    return names


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file in UTF-8, separated by the most frequent of `,`, `;`, tab in line 1."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
        lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: expected CSV in UTF-8, got: {error}. Correct it.") from None
    (_, columns), *rows = [line for line in lines if any(line[1])] or [(0, [])]
    expected = "columns of different names"
    require(len({*columns}) == len(columns), path, expected, columns, "Rename one.")
    refuse(
        f"{path}: expected {len(columns)} cells in line {number}, got {len(cells)}. Quote a cell "
        "that has the separator in it."
        for number, cells in rows
        if len(cells) != len(columns)
    )
    return [dict(zip(columns, cells, strict=True)) for _, cells in rows]
