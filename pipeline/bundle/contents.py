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
    "reinit_head": False,
    "device": "auto",
    "input": "@dataset_dir",
    "ensemble": [],
    "weights": "models/model.pt",
}
LISTS = {"train": "train", "validate": "validation"}  # parts whose dataset lists cases
OBJECTS = ("data_module", "lifecycle", "cases", "cache")  # which may hold such values themselves
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
    for part, split in LISTS.items():
        content = found.get(part)
        if isinstance(content, dict):
            found[part] = _of_nobody(content, split)
    for key, value in found.items():
        parts = re.split("#|::", key)  # an overlay's key names a part
        if parts[0] in OBJECTS:
            found[key] = _referring({parts[-1]: value})[parts[-1]]
    if output_dir is not None:
        found["output_dir"] = output_dir
    elif str(found.get("output_dir") or "").startswith(("/", "..")):
        found["output_dir"] = "predictions"
    return found


def _of_nobody(part: Config, split: str) -> Config:
    """A part without what a client put into it: cases of its own, and weights to begin with."""
    dataset, handlers = part.get("dataset"), part.get("handlers")
    if isinstance(dataset, dict) and isinstance(dataset.get("data"), list):
        part = {**part, "dataset": {**dataset, "data": f"$@cases.{split}"}}
    if isinstance(handlers, list) and split == "train":
        own = [h for h in handlers if not str(dict(h).get("_target_")).endswith("CheckpointLoader")]
        part = {**part, "handlers": own}
    return part


def absolute_paths(node: Any, path: str = "") -> Iterator[str]:
    """Keys of a config whose values are places of one machine."""
    if isinstance(node, (dict, list)):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from absolute_paths(child, f"{path}#{key}" if path else str(key))
    elif isinstance(node, str) and re.match(r"(/|~|[A-Za-z]:\\)\S", node):
        yield path


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
    data_format = _object(metadata.get("network_data_format"))
    faults = []
    for part, tensor, num_channels in (
        ("inputs", "image", in_channels),
        ("outputs", "pred", len(class_names)),
    ):
        where = f"network_data_format#{part}#{tensor}"
        stated = _object(_object(data_format.get(part)).get(tensor))
        given = {"num_channels": stated.get("num_channels")}
        names = list(_object(stated.get("channel_def")).values())
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


def _object(value: Any) -> Config:
    return value if isinstance(value, dict) else {}


def telling(case_ids: Collection[str], class_names: Collection[str]) -> set[str]:
    """Words that only a case id can be: letters and digits and no class, or a number as a name."""
    found = set()
    for name in {*case_ids} - {*class_names}:
        if len(name) >= LEAST_ID and re.search(r"\d", name) and re.search(r"[^\W\d]", name):
            found.add(name)
        elif len(re.sub(r"\D", "", name)) > LEAST_ID:  # else it could be a value
            found |= {f'"{name}"', f"/{name}", f"{name}.nii", f"{name}_"}
    return found


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
            forms = {word, json.dumps(word)[1:-1]}  # as JSON writes letters beyond ASCII
            if any(form.encode() in content and _stands_alone(form, content) for form in forms):
                yield (
                    f"{file.relative_to(bundle)}: expected nothing of where the bundle was made or "
                    f"what it was trained on, got {kind}, '{word}'. Take it out of the run's file."
                )


def _stands_alone(word: str, content: bytes) -> bool:
    before, after = (rb"(?<!\w)" if word[0].isalnum() else b""), rb"(?!\w)"
    after = after if word[-1].isalnum() else b""
    return re.search(before + re.escape(word.encode()) + after, content) is not None


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
