"""Predict with a run or a bundle: label maps on the grids of the images' files.

INPUT is a volume, a DICOM series, or a folder of these; RUN is a run directory or a bundle,
also as a zip file. A case that cannot be predicted is named and left out, the others are predicted,
and the exit status is 1; with --strict the first one ends the command.

The command `python -m pipeline.run configs/inference.json --run_dir RUN --input INPUT --output_dir
OUTPUT_DIR` does the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline import run
from pipeline.config import keys
from pipeline.config.command_line import CommandParser, run_parsed
from pipeline.config.old_names import INFERENCE
from pipeline.errors import InputError, require, require_path

CONFIG = keys.CONFIGS / "inference.json"  # whatever the working directory has
COMMON = (
    "output_dir", "device", "mirror", "overlap", "weights", "ensemble", "probabilities",
    "dicom_seg", "min_volume_ml", "keep_largest", "fill_holes", "strict",
)  # fmt: skip
MAX_INFLATION = 20  # of a zipped bundle; weights hardly shrink


def main(words: Sequence[str] | None = None) -> int:
    """Predict, given the words after the command or this process's; return the exit status."""
    table = {**keys.KEYS, **keys.PREDICTION_KEYS}
    table = {key: table[key] for key in json.loads(CONFIG.read_text()) if key in table}
    shown = "RUN INPUT OUTPUT_DIR [--key value ...]"
    parser = CommandParser("predict", __doc__, shown, table, COMMON, CONFIG.name)
    add = parser.add_argument
    add("run_dir", metavar="RUN", help="run directory, bundle, or zip file of a bundle")
    add(
        "images",
        metavar="INPUT",
        help="volume (.nii.gz, .nrrd, .mha, ...), DICOM series, or folder of these",
    )
    add("folder", metavar="OUTPUT_DIR", nargs="?", help="folder for the label maps")
    return run_parsed(parser, words, _predict)


def _predict(given: argparse.Namespace) -> int:
    output_dir = given.overrides.get("output_dir", given.folder)
    require(output_dir, "command line", "OUTPUT_DIR after RUN and INPUT", "none", "Name one.")
    require_path("INPUT", given.images, "images to predict")
    with _open_bundle(given.run_dir) as run_dir:
        paths = {"run_dir": run_dir, "input": given.images, "output_dir": output_dir}
        return run.run_config([str(CONFIG)], {**given.overrides, **paths}, given.allow)


@contextlib.contextmanager
def _open_bundle(path: str) -> Iterator[str]:
    """Yield the directory of a run or bundle; a zip file is unpacked, and removed afterwards."""
    require_path("RUN", path, "a run directory or a bundle")
    if Path(path).is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="bundle_") as folder:
        try:
            with zipfile.ZipFile(path) as bundle:
                num_bytes = sum(entry.file_size for entry in bundle.infolist())
                limit = MAX_INFLATION * Path(path).stat().st_size
                require(num_bytes <= limit, path, f"at most {limit} bytes", num_bytes, "Unpack it.")
                bundle.extractall(folder)
        except (OSError, zipfile.BadZipFile) as error:
            expected = f"{path}: expected a run directory, or a bundle as a zip file"
            raise InputError(f"{expected}, got: {error}. Check the path.") from None
        found = next(Path(folder).rglob(str(INFERENCE)), None)
        require(found, path, f"a bundle with {INFERENCE} in it", "none", "Name another file.")
        assert found is not None
        yield str(found.parents[1])
