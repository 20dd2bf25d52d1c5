"""What is in a bundle that leaves: configs without places or cases, and nothing of a patient.

Ranges and means over the training images stay, since a prediction compares an image with them.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Config = dict[str, Any]

# what would say where the data or the run were, or name their cases, and what stands there instead
NEUTRAL: Config = {
    "bundle_root": ".",
    "dataset_dir": "dataset",
    "cache_dir": "../cache",
    "data_roots": [],
    "exclude": [],
    "split_file": None,
    "group_pattern": None,
    "init_weights": None,
    "init_head": False,
    "device": "auto",
    "input": "@dataset_dir",
    "ensemble": [],
    "weights": "models/model.pt",
}
LISTS = {"train": "train", "validate": "validation"}  # parts whose dataset lists cases
OBJECTS = ("intake", "lifecycle", "cases", "cache")  # which may hold such values themselves
TEXTS = (".json", ".md", ".conf", "")  # endings of files that hold words, LICENSE among them
LEAST_ID = 5  # characters of a case id that is no ordinary word or number
FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # of all files in a zip


def neutral(config: Config, output_dir: str | None = None) -> Config:
    """A config that says nothing of where it was made, nor of single cases.

    Args:
        config: Of a run.
        output_dir: In place of its own; `None`: its own stays if it is within the bundle.
    """
    found = {key: NEUTRAL.get(key, value) for key, value in config.items() if key != "_meta_"}
    if isinstance(config.get("device"), dict):  # what makes one of `auto`, for clients
        found["device"] = config["device"]
    for part, split in LISTS.items():  # a client may have put its own cases there
        dataset = found.get(part, {}).get("dataset")
        if isinstance(dataset, dict) and isinstance(dataset.get("data"), list):
            found[part] = {**found[part], "dataset": {**dataset, "data": f"$@cases.{split}"}}
    for key, value in found.items():
        parts = re.split("#|::", key)  # an overlay's key names a part
        if parts[0] in OBJECTS:
            found[key] = _referring({parts[-1]: value})[parts[-1]]
    if output_dir is not None:
        found["output_dir"] = output_dir
    elif str(found.get("output_dir") or "").startswith(("/", "..")):
        found["output_dir"] = "predictions"
    return found


def _referring(node: Any) -> Any:
    """The node with references in place of values that are to be neutral."""
    if isinstance(node, list):
        return [_referring(child) for child in node]
    if not isinstance(node, dict):
        return node
    return {
        key: f"@{key}" if key in NEUTRAL and not _is_reference(value) else _referring(value)
        for key, value in node.items()
    }


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value[:1] in ("@", "$")


def metadata_faults(metadata: Config, in_channels: int, class_names: Sequence[str]) -> list[str]:
    """In what a bundle's metadata contradict its network.

    Args:
        metadata: `configs/metadata.json`.
        in_channels: Of an image, as the network takes it.
        class_names: Of the channels of its output, background first.
    """
    data_format = metadata.get("network_data_format", {})
    faults = []
    for part, tensor, num_channels in (
        ("inputs", "image", in_channels),
        ("outputs", "pred", len(class_names)),
    ):
        where = f"network_data_format#{part}#{tensor}"
        stated = data_format.get(part, {}).get(tensor, {})
        given = {"num_channels": stated.get("num_channels")}
        names = list(stated.get("channel_def", {}).values())
        wanted: Config = {"num_channels": num_channels}
        if tensor == "pred":
            given["channel_def"], wanted["channel_def"] = names, [*class_names]
        else:
            given["channel_def"], wanted["channel_def"] = len(names), num_channels
        faults += [
            f"{where}#{key}: expected {json.dumps(wanted[key])}, as the weights have it, got "
            f"{json.dumps(value)}. Correct it."
            for key, value in given.items()
            if value != wanted[key]
        ]
    return faults


def telling(case_ids: Collection[str], class_names: Collection[str]) -> set[str]:
    """The case ids that cannot be taken for something else: letters and digits, and no class."""
    return {
        name
        for name in case_ids
        if len(name) >= LEAST_ID and re.search(r"\d", name) and re.search(r"[^\W\d]", name)
    } - {*class_names}


def leaks(bundle: Path, case_ids: Collection[str], places: Mapping[str, str]) -> Iterator[str]:
    """Where a bundle names a case, or a place or person of the machine that it was made on.

    Args:
        bundle: Folder with its files; Python files, which are the repository's, are not looked at.
        case_ids: To be found nowhere in its texts.
        places: To be found in no file, each with what it is.
    """
    ids = {name: "a case id" for name in case_ids}
    for file in sorted(bundle.rglob("*")):
        if not file.is_file() or file.suffix == ".py":
            continue
        content = file.read_bytes()
        words = {**places, **ids} if file.suffix in TEXTS else places
        for word, kind in words.items():
            if word.encode() in content and _stands_alone(word, content):
                yield (
                    f"{file.relative_to(bundle)}: expected nothing of where the bundle was made or "
                    f"what it was trained on, got {kind}, '{word}'. Take it out of the run's file."
                )


def _stands_alone(word: str, content: bytes) -> bool:
    return re.search(rb"(?<![\w])" + re.escape(word.encode()) + rb"(?![\w])", content) is not None


def write_zip(bundle: Path, file: Path) -> None:
    """A zip of a bundle: its folder, files in order of their names, all of one time.

    Args:
        bundle: Folder with its files.
        file: The zip to be written.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
            name = str(Path(bundle.name) / path.relative_to(bundle))
            entry = zipfile.ZipInfo(name, FIRST_DAY)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            with path.open("rb") as source, archive.open(entry, "w") as target:
                while chunk := source.read(2**20):
                    target.write(chunk)
