"""What stands beside the predictions of a folder, so that they can be looked at as they are.

`index.html` shows slices, volumes and warnings of every case; `volumes.csv` and `predictions.json`
have the same for programs; `labels.json` and `labels.ctbl`, a colour table of 3D Slicer, name the
classes. Cases that were predicted into the folder earlier stay in all of them.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nibabel as nib
import numpy as np
import torch
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from monai.data import MetaTensor

from pipeline.drawing import PLANES, CaseVolumes, class_color, draw_plane
from pipeline.errors import printable
from pipeline.files import replace_file, write_csv, write_durably, write_json

FILES = ("predictions.json", "volumes.csv", "labels.json", "labels.ctbl", "index.html")
PICTURES = "pictures"  # folder of the slices
LONG_SIDE = 360  # pixels of a slice
QUALITY = 80  # of WebP
MOST_EMBEDDED = 200  # cases whose slices are in the page itself; more are read from PICTURES


@dataclass
class CaseResult:
    """The result for one case, or why there is none."""

    case_id: str
    image: str = ""  # path of its first file from the folder of predictions
    model: str = ""  # name of what predicted it
    fault: str | None = None  # why it was not predicted
    warnings: list[str] = field(default_factory=list)
    voxel_ml: float = 0.0
    voxels: dict[str, int] = field(default_factory=dict)  # of each foreground class

    @property
    def volumes_ml(self) -> dict[str, float]:
        """Return the volume of each foreground class."""
        return {name: count * self.voxel_ml for name, count in self.voxels.items()}


def count_voxels(labels: torch.Tensor, class_names: Sequence[str]) -> dict[str, int]:
    """Count the voxels of each foreground class in a label map of unsigned bytes."""
    counts = torch.bincount(labels.flatten(), minlength=len(class_names)).tolist()
    return dict(zip(class_names[1:], counts[1:], strict=True))


def draw_pictures(folder: Path, case_id: str, image: MetaTensor, labels: np.ndarray) -> None:
    """Write the three slices of a case with most of its prediction, outlined, as WebP.

    Args:
        folder: Of the predictions.
        image: `(C, H, W, D)`, of which the first channel is shown.
        labels: `(H, W, D)` uint8.
    """
    affine = np.asarray(image.affine)
    turn = nib.io_orientation(affine)
    grey, found = (
        nib.apply_orientation(one, turn) for one in (image.as_tensor()[0].cpu().numpy(), labels)
    )
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)[np.argsort(turn[:, 0])]
    case = CaseVolumes(grey, found, np.zeros(grey.shape, np.uint8), spacing_mm)
    (folder / PICTURES).mkdir(exist_ok=True)
    for path, name in zip(_pictures(folder, case_id), PLANES, strict=True):
        with replace_file(path) as temporary:
            draw_plane(case, name, LONG_SIDE).save(temporary, "webp", quality=QUALITY)


def _pictures(folder: Path, case_id: str) -> list[Path]:
    return [folder / PICTURES / f"{case_id}_{name}.webp" for name in PLANES]


def write_results(folder: Path, results: Iterable[CaseResult], class_names: Sequence[str]) -> None:
    """Write the files beside the predictions of a folder.

    Args:
        folder: Of the predictions, with the pictures that `draw_pictures` made.
        results: Of the cases that were predicted now, or could not be.
        class_names: Background first.

    Raises:
        WriteError: If the system refuses; a file is then as it was.
    """
    found = _read_earlier(folder, class_names) | {one.case_id: one for one in results}
    cases = [found[case_id] for case_id in sorted(found)]
    listed = {case.case_id: {**asdict(case), "volumes_ml": case.volumes_ml} for case in cases}
    content = {"class_names": [*class_names], "cases": listed}
    write_json(folder / FILES[0], content)
    rows = [
        {"case": case.case_id, "class": name, "ml": round(ml, 4), "voxels": case.voxels[name]}
        for case in cases
        for name, ml in case.volumes_ml.items()
    ]
    write_csv(folder / "volumes.csv", ("case", "class", "ml", "voxels"), rows)
    write_json(folder / "labels.json", {str(n): name for n, name in enumerate(class_names)})
    write_durably(folder / "labels.ctbl", make_color_table(class_names).encode())
    write_durably(folder / "index.html", _render(folder, cases, class_names).encode())


def find_foreign_files(folder: Path, class_names: Sequence[str]) -> list[str]:
    """Return the files of a folder that are not to be replaced by `write_results`.

    Others made them, or they tell of predictions of other classes.
    """
    is_ours = _read_content(folder).get("class_names") == [*class_names]
    pictures = folder / PICTURES
    found = [name for name in FILES if (folder / name).exists()]
    if pictures.exists() and not (
        pictures.is_dir() and all(path.suffix == ".webp" for path in pictures.iterdir())
    ):
        found.append(PICTURES)
    return [] if is_ours else found


def _read_content(folder: Path) -> dict[str, Any]:
    """Read `predictions.json` as it was written; empty if it is not there or is another file."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        content = json.loads((folder / FILES[0]).read_text())
        if content.keys() == {"class_names", "cases"}:
            return dict(content)
    return {}


def _read_earlier(folder: Path, class_names: Sequence[str]) -> dict[str, CaseResult]:
    """Read results of the same classes whose predictions are still there; none if damaged."""
    content, earlier = _read_content(folder), {}
    with contextlib.suppress(TypeError, KeyError, AttributeError, ValueError, OSError):
        for case_id, values in content["cases"].items():
            del values["volumes_ml"]
            case = CaseResult(**values)
            is_there = (folder / f"{case_id}.nii.gz").is_file() and case.fault is None
            texts = [case.image, case.model, *case.warnings]
            numbers = [case.voxel_ml, *case.voxels.values()]
            is_whole = case.case_id == case_id and all(isinstance(one, str) for one in texts)
            is_there &= is_whole and all(isinstance(one, int | float) for one in numbers)
            if is_there and [*case.voxels] == [*class_names[1:]]:
                earlier[case_id] = case
        return earlier
    return {}


def make_color_table(class_names: Sequence[str]) -> str:
    """Return names and colours in the form of 3D Slicer, in which names have no spaces."""
    lines = ["# Color table file labels.ctbl", f"# {len(class_names)} values"]
    for value, name in enumerate(class_names):
        color = (*class_color(value), 255) if value else (0, 0, 0, 0)
        lines.append(" ".join(map(str, (value, "_".join(printable(name).split()), *color))))
    return "\n".join(lines) + "\n"


def _render(folder: Path, cases: Sequence[CaseResult], class_names: Sequence[str]) -> str:
    num_predicted = sum(case.fault is None for case in cases)

    def find_pictures(case: CaseResult) -> Mapping[str, str]:
        """Return addresses by plane; none if a picture is missing."""
        paths = _pictures(folder, case.case_id)
        if not all(path.is_file() for path in paths):
            return {}
        if num_predicted > MOST_EMBEDDED:
            return dict(
                zip(PLANES, (f"{PICTURES}/{quote(path.name)}" for path in paths), strict=True)
            )
        codes = (base64.b64encode(path.read_bytes()).decode() for path in paths)
        return dict(zip(PLANES, (f"data:image/webp;base64,{one}" for one in codes), strict=True))

    colors = {name: f"rgb{class_color(value)}" for value, name in enumerate(class_names[1:], 1)}
    models = list(dict.fromkeys(case.model for case in cases if case.fault is None))
    anchors = {case.case_id: f"case-{number}" for number, case in enumerate(cases)}
    values = {"cases": cases, "colors": colors, "models": models, "anchors": anchors}
    template = make_environment("pipeline.prediction").get_template("predictions.html")
    return template.render(values, name=folder.name, find_pictures=find_pictures)


def make_environment(package: str) -> Environment:
    """Return the environment of a package's HTML templates; what they print is `printable`."""
    loader = PackageLoader(package)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.finalize = lambda text: text if isinstance(text, Markup) else printable(text)
    return environment
