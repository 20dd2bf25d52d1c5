"""Reads the layouts of datasets.

`msd` (Medical Segmentation Decathlon) and `nnunet` have a dataset.json, a `table` is a CSV or JSON
list of image and label, and `folders` hold images and labels of equal names.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.data.cases import (
    ENDINGS,
    Case,
    Channels,
    DatasetLayout,
    case_name,
    find_twins,
    group_volumes,
    list_labels,
    list_volumes,
    resolve_paths,
    split_channel,
)
from pipeline.errors import (
    DatasetIssue,
    InputError,
    make_issue,
    nearest,
    printable,
    refuse,
    require,
    some,
)
from transforms.dicom import DicomError, is_dicom
from transforms.segmentation import read_segment_names

TABLES = ("cases.csv", "cases.json")
FOLDERS = (("images", "labels"), ("imagesTr", "labelsTr"))
# keys of `dataset.json` with facts about the dataset, and their names here
FACTS = {name: name for name in ("description", "reference", "licence")} | {"license": "licence"}
Listed = tuple[list[Case], list[DatasetIssue]]


def read_layout(dataset_dir: str | Path, *, data_roots: Sequence[str | Path] = ()) -> DatasetLayout:
    """Recognise the layout of a folder, or of a `.csv` or `.json` file that lists cases; read it.

    Files that lie, by `..` or through a link, neither in the dataset's folder nor in `data_roots`
    are a fault. Faults of single cases are `issues` of the layout; other cases can be used.

    Raises:
        InputError: One line per fault of the dataset as a whole: an unknown layout, a description
            that cannot be read, no case at all.
    """
    try:
        layout, where = _read(Path(dataset_dir))
        root = where if where.is_dir() else where.parent
        return name_segments(resolve_paths(layout, root, data_roots, str(where)))
    except OSError as error:  # a folder without read permission
        got = f"{error}. Change the permissions."
        raise InputError(f"{dataset_dir}: expected files that can be read, got: {got}") from error


def _read(path: Path) -> tuple[DatasetLayout, Path]:
    """The layout of a folder or a table, and what lists its cases."""
    if path.is_file():
        is_table = path.suffix.lower() in (".csv", ".json")
        form = "a folder, or a .csv or .json file that lists cases"
        require(is_table, "dataset_dir", form, path, "Name one of these.")
        return _read_table(path), path
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
    found = f"no {path}"
    if path.is_dir():
        listed = sorted(child.name for child in path.iterdir() if not child.name.startswith("."))
        found = f"{some(listed) or 'nothing'} in {path}"
    expected = "dataset_dir: expected a folder with dataset.json (Medical Segmentation Decathlon "
    expected += "or nnU-Net), cases.csv, cases.json, or folders images and labels"
    raise InputError(f"{expected}, found {found}. Check the path.")


def name_segments(layout: DatasetLayout) -> DatasetLayout:
    """Give classes that are not declared the names of segments in labels that are DICOM.

    A case is left out, with a fault, if it names a segment otherwise than the dataset or an earlier
    case does: its numbers mean something else.
    """
    known = {n: (name, "the dataset") for n, name in enumerate(layout.class_names or ())}
    issues, names = [], list(layout.class_names or ())
    for case in layout.cases:
        for number, name in _read_segment_names(case["label"]).items():
            first, where = known.setdefault(number, (name, case["case_id"]))
            if _simplify(first) != _simplify(name):
                expected = f"segment {number} to be {first!r}, as in {where}"
                remedy = "Give the segments one order in all cases, or exclude the case"
                issues.append(make_issue(case["case_id"], "segment", expected, repr(name), remedy))
                break
    if known and not names:
        names = ["background"]
        names += [known.get(n, (f"class_{n}",))[0] for n in range(1, max(known) + 1)]
        names = [f"{one} {n}" if names.count(one) > 1 else one for n, one in enumerate(names)]
    bad = {issue.case_id for issue in issues}
    cases = [case for case in layout.cases if case["case_id"] not in bad]
    return replace(layout, class_names=names or None, cases=cases, issues=layout.issues + issues)


def _simplify(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def _read_segment_names(label: str) -> dict[int, str]:
    try:
        names = read_segment_names(label) if is_dicom(label) else {}
        return {number: printable(name, keep="") for number, name in names.items()}
    except DicomError:
        return {}  # the preflight says why


def load_json(path: Path) -> Any:
    """Read a JSON file, with or without a byte order mark; else raise an InputError."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got: {error}. Correct the file.") from None


def read_dataset_json(root: Path) -> DatasetLayout:
    """Read `root/dataset.json` of the Decathlon or nnU-Net; an InputError has a line per fault."""
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
    class_names, ignore_value = _read_labels(source["labels"], path, is_nnunet)
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
        expected = f"a file_ending of {', '.join(ENDINGS)}"
        is_known = str(ending).lower() in ENDINGS
        require(is_known, path, expected, repr(ending), "Convert the files.")
        return _pair_folders(root, *FOLDERS[1], ending, num_channels)
    entries: dict[str, Any] = {}
    for case_id, entry in source["dataset"].items() if is_nnunet else ():
        named = {**entry, "case_id": case_id} if isinstance(entry, Mapping) else {}
        entries[f"dataset['{case_id}']"] = {**named, "image": named.get("images")}
    for number, entry in enumerate(() if is_nnunet else source["training"]):
        entries[f"training[{number}]"] = entry
    _check_entries(entries, path, required=("image", "label"))
    return [_make_case(entry) for entry in entries.values()], []


def _read_labels(
    labels: Mapping[str, Any], where: Path, may_ignore: bool
) -> tuple[list[str], int | None]:
    """Names in the order of the values, which must be 0, 1, 2, …, and the value to ignore."""
    stated = _sort_by_value(labels)
    names = [name for _, name in stated]
    ignored = names.index("ignore") if may_ignore and "ignore" in names else None
    count = len(names) - (ignored is not None)
    is_dense = [value for value, _ in stated] == [str(n) for n in range(len(names))]
    expected = "labels '0' (background), '1', '2', … without gaps or regions, 'ignore' the last"
    is_valid = is_dense and count > 1 and ignored in (None, count)
    require(is_valid, where, expected, dict(labels), "Renumber them.")
    return names[:count], ignored


def _sort_by_value(stated: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of value and name by value: Decathlon states value to name, nnU-Net name to value."""
    pairs = [(str(key), str(value)) for key, value in stated.items()]
    numbered = all(key.isdecimal() for key in stated)
    if not numbered or any(isinstance(value, int) for value in stated.values()):
        pairs = [(value, name) for name, value in pairs]
    return sorted(pairs, key=lambda pair: int(pair[0]) if pair[0].isdecimal() else -1)


def _pair_folders(
    root: Path, image_folder: str, label_folder: str, ending: str = "", num_channels: int = 0
) -> Listed:
    """Cases of a folder of images, files or DICOM series, and one of labels of equal names.

    With `num_channels`, every image is a channel, such as `amos_0001`. Without, such a name may be
    a case or a channel: it is a case if a label is named so, and a channel if the rest of it names
    a label, or if no name at all is that of a label.
    """
    paths = [
        {
            path.relative_to(root): name
            for path, name in found.items()
            if path.name.lower().endswith(ending.lower())
        }
        for found in (list_volumes(root / image_folder), list_labels(root / label_folder))
    ]
    labels = group_volumes(paths[1], lambda name: True)
    whole = set() if num_channels else {*paths[0].values()} & labels.keys()

    def is_case(name: str) -> bool:
        return name in whole or (bool(whole) and split_channel(name)[0] not in labels)

    images = group_volumes(paths[0], is_case)
    found = {number for channels in images.values() for number in channels}
    numbers = [f"{n:04d}" for n in range(num_channels or len(found))]
    numbers = [""] if found == {""} and not num_channels else numbers
    cases, issues = [], []
    for case_id in sorted({*images, *labels}):
        image, label = images.get(case_id, {}), labels.get(case_id, {})
        if fault := _find_fault(image, label, numbers):
            issues.append(DatasetIssue(case_id, *fault))
        else:
            files = [str(image[number][0]) for number in numbers]
            entry = {"case_id": case_id, "image": files, "label": label[""][0]}
            cases.append(_make_case(entry))
    return cases, issues


def _find_fault(image: Channels, label: Channels, numbers: list[str]) -> tuple[str, str] | None:
    """Check and message of a case that lacks a label or one of the channels, or has too many."""
    missing, expected = sorted({*numbers} - {*image}), f"expected channels {', '.join(numbers)}"
    if twins := find_twins(image) or find_twins(label):
        return "duplicate_id", twins
    if not image or not label:
        wanted, kind = ("a label", "image") if image else ("an image", "label")
        path = min((image or label).values())[0]
        remedy = f"Add it or move the {kind} away."
        return "unpaired", f"expected {wanted} of {kind} {path}, found none. {remedy}"
    if missing:
        return "missing", f"{expected}, found no {', '.join(missing)}. Add it."
    if len(image) > len(numbers):
        return "unpaired", f"{expected}, got {', '.join(sorted(image))}. Move the others away."
    return None


def _make_case(entry: Mapping[str, Any], image_keys: Sequence[str] = ("image",)) -> Case:
    """The case of an entry, named after its image unless it has a name."""
    stated = [entry.get(key) or "" for key in image_keys]
    image = [str(p) for value in stated for p in (value if isinstance(value, list) else [value])]
    case: Case = {key: str(entry[key]) for key in ("case_id", "label", "group") if entry.get(key)}
    case["image"] = image if len(image) > 1 else image[0]
    if image[0]:
        name = case_name(image[0])
        case.setdefault("case_id", split_channel(name)[0] if len(image) > 1 else name)
    return case


def _check_entries(entries: Mapping[str, Any], where: Path, required: Collection[str]) -> None:
    refuse(
        f"{where}: expected image and label (file names) in {name}, got {entry!r}. "
        "Correct the entry."
        for name, entry in entries.items()
        if not isinstance(entry, Mapping) or not all(entry.get(key) for key in required)
    )


def _read_table(path: Path) -> DatasetLayout:
    """A CSV file, or a JSON list of objects, with one case each.

    Columns are `image` (or `image_0`, `image_1`, … for channels), `label`, and `case_id` and
    `group` (the person) if wanted; in JSON `image` may be a list. Other columns are ignored.
    """
    if path.suffix.lower() == ".csv":
        rows: list[dict[str, Any]] = [{**cells} for _, cells in read_csv(path)]
    else:
        rows = load_json(path)
        got = type(rows).__name__
        require(isinstance(rows, list), path, "a JSON list of cases", got, "Correct it.")
        _check_entries({f"entry {n}": row for n, row in enumerate(rows, start=1)}, path, ())
    require(rows, path, "cases", "none", "List one or more.")
    columns = list(dict.fromkeys(key for row in rows for key in row if row[key] is not None))
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


def read_csv(path: str | Path) -> list[tuple[int, dict[str, str]]]:
    """Read a CSV file in UTF-8; see `parse_csv`. An InputError says that it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected CSV in UTF-8, got: {error}. Correct it.") from None
    return parse_csv(text, path)


def parse_csv(text: str, path: str | Path) -> list[tuple[int, dict[str, str]]]:
    """Parse the text of the CSV file `path`, separated by the most frequent of `,`, `;` and tab.

    Returns:
        The number of the line, and the cells by column, for each row that is not empty.

    Raises:
        InputError: If it is no CSV, or names a column twice; with a line for each torn row.
    """
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
    except csv.Error as error:
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
    return [(number, dict(zip(columns, cells, strict=True))) for number, cells in rows]
