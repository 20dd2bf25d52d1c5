"""Which layout a dataset has, found out by looking at it.

msd      dataset.json with labels and training pairs (Medical Segmentation Decathlon)
nnunet   dataset.json with channel_names, imagesTr/<case>_0000.nii.gz (nnU-Net v2 raw)
table    a CSV or JSON list of image and label, or a folder with cases.csv or cases.json
folders  images/ and labels/ (or imagesTr/ and labelsTr/) with equal names
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.data.described import read_described
from pipeline.data.folders import folder_pair, read_folders
from pipeline.data.listing import DatasetLayout, resolved
from pipeline.data.tables import TABLES, read_table
from pipeline.errors import InputError

KNOWN = (
    "dataset.json (Medical Segmentation Decathlon or nnU-Net), cases.csv, cases.json, "
    "or folders images and labels"
)


def read_layout(dataset_dir: str | Path, *, data_roots: Sequence[str | Path] = ()) -> DatasetLayout:
    """Recognise a dataset's layout and read it.

    Args:
        dataset_dir: A folder, or a `.csv` or `.json` file that lists cases.
        data_roots: Folders outside of it that files may lie in; a path that leads elsewhere, by
            `..` or through a link, is a fault.

    Returns:
        What is there. Faults of single cases are `findings`, and such cases are left out.

    Raises:
        InputError: One line per fault of the dataset as a whole: no layout that is known, a
            description that cannot be read, no case at all.
    """
    path = Path(dataset_dir)
    try:
        return _recognised(path, data_roots)
    except OSError as error:  # of a folder that may not be looked into
        raise InputError(
            f"{path}: expected files that can be read, got: {error}. Change their permissions."
        ) from error


def _recognised(path: Path, data_roots: Sequence[str | Path]) -> DatasetLayout:
    if path.is_file():
        if path.suffix.lower() not in (".csv", ".json"):
            raise InputError(
                f"dataset_dir: expected a folder, or a .csv or .json file that lists cases, "
                f"got {path}. Name one of these."
            )
        return resolved(read_table(path), path.parent, data_roots, str(path))
    if not path.is_dir():
        raise InputError(
            f"dataset_dir: expected a folder with {KNOWN}, found no {path}. Check the path."
        )
    tables = [path / name for name in TABLES if (path / name).is_file()]
    if (path / "dataset.json").is_file():
        return resolved(read_described(path), path, data_roots, str(path / "dataset.json"))
    if len(tables) > 1:
        raise InputError(
            f"{path}: expected one of cases.csv and cases.json, got both. Name the file that is "
            "meant as dataset_dir."
        )
    if tables:
        return resolved(read_table(tables[0]), path, data_roots, str(tables[0]))
    if folder_pair(path):
        return resolved(read_folders(path), path, data_roots, str(path))
    raise InputError(
        f"dataset_dir: expected a folder with {KNOWN}, found {_contents(path)} in {path}. "
        "Check the path."
    )


def _contents(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "nothing"
