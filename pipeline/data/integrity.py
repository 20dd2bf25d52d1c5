"""Preflight: what would break or spoil training is found before it starts, and all of it at once.

Facts are judged here, never files: the same facts give the same findings whenever they were read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.data.dataset import Case, Cases
from pipeline.data.facts import Facts
from pipeline.data.issues import DatasetIssue, Problem, make_finding, some
from transforms.grid import TOLERANCE_MM, align, compare

SPACING_RANGE_MM = (0.001, 100.0)
MAX_LABEL_VALUE = 254  # labels are kept in a byte


def header_findings(case: Case, headers: Facts, num_channels: int | None) -> list[DatasetIssue]:
    """What the headers of one case tell; it may have no label."""
    named = [(key, n, entry) for key in headers for n, entry in enumerate(headers[key])]
    unreadable = [
        _unreadable(case, key, number, entry) for key, number, entry in named if "error" in entry
    ]
    if unreadable:
        return unreadable
    problems = list(_shape_problems(headers, num_channels))
    if not any(problem.check == "shape" for problem in problems):
        # else nothing is known of axes that are not there
        first, *others = named
        for key, number, entry in named:
            problems += _geometry_problems(_name(case, key, number), entry)
        if all(problem.warning for problem in problems):  # else there may be no grid to compare
            for key, _, entry in others:
                what = "label" if key == "label" else "channel"
                problems += _grid_problems(what, first[2], entry)
    return [make_finding(case, problem) for problem in problems]


def voxel_findings(case: Case, voxels: Facts, cases: Cases) -> list[DatasetIssue]:
    """What the voxels of one case tell."""
    if "error" in voxels:
        return [_unreadable(case, voxels["key"], voxels["number"], voxels)]
    problems = [*_image_problems(voxels["channels"]), *_label_problems(voxels, cases)]
    return [make_finding(case, problem) for problem in problems]


def _image_problems(channels: Sequence[Facts]) -> Iterator[Problem]:
    if non_finite := sum(channel["non_finite"] for channel in channels):
        got = f"{non_finite} NaN or infinite voxels, as float32"
        remedy = "Replace them or exclude the case"
        yield Problem("finite", "finite image values", got, remedy)
    if all(channel["min"] == channel["max"] for channel in channels):
        got = f"{channels[0]['min']} everywhere"
        yield Problem("constant", "an image with contrast", got, "Replace it or exclude the case")


def _unreadable(case: Case, key: str, number: int, entry: Facts) -> DatasetIssue:
    if entry["is_dicom"]:
        return DatasetIssue(case["case_id"], "unreadable", entry["error"])
    expected = f"a readable NIfTI file {_name(case, key, number)}"
    return make_finding(case, Problem("unreadable", expected, entry["error"], "Replace the file"))


def _label_problems(voxels: Facts, cases: Cases) -> Iterator[Problem]:
    """The first that applies: what follows from it is not told."""
    num_classes = min(len(cases.class_names or ()) or MAX_LABEL_VALUE + 1, MAX_LABEL_VALUE + 1)
    allowed = {f"{n}" for n in range(num_classes)} | {str(cases.ignore_value)}
    declared = f"label values 0 to {num_classes - 1}"
    if cases.ignore_value is not None:
        declared += f" and {cases.ignore_value} (ignored)"
    unknown = [value for value in voxels["values"] if value not in allowed]
    between, non_finite = voxels["non_integer"], voxels["non_finite_label"]
    distinct = [f"{value:g}" for value in voxels["channels"][0]["distinct"] or ()]
    if (between or non_finite or unknown) and distinct and {*distinct} <= allowed:
        expected = "an image under image and a label under label"
        label = some(list(voxels["values"]))
        got = f"values {some(distinct)} in the image and {label} in the label"
        yield Problem("swapped", expected, got, "Swap the two")
    elif non_finite:
        remedy = "Correct the label or exclude the case"
        yield Problem("label_values", declared, f"{non_finite} NaN or infinite voxels", remedy)
    elif between:
        remedy = "Resample the label with nearest neighbours or exclude the case"
        got = f"{between} voxels between integers"
        yield Problem("label_values", "integer label values", got, remedy)
    elif unknown:
        remedy = "Declare the value in the dataset or correct the label"
        yield Problem("label_values", declared, some(unknown), remedy)
    elif set(voxels["values"]) <= {"0", str(cases.ignore_value)}:
        remedy = "Exclude the case if it should have some"
        expected = "foreground in the label"
        yield Problem("no_foreground", expected, "background alone", remedy, warning=True)


def _geometry_problems(name: str, entry: Facts) -> Iterator[Problem]:
    """Whether one file's grid is one of a volume in space; the first that applies."""
    affine = np.array(entry["affine"])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = SPACING_RANGE_MM
    shown = "x".join(f"{s:g}" for s in spacing)
    if not np.isfinite(affine).all():
        expected = f"an affine of finite numbers in {name}"
        yield Problem("spacing", expected, f"{affine[:3].tolist()}", "Correct the header")
    elif (spacing < low).any() or (spacing > high).any():
        expected = f"a spacing of {low:g} to {high:g} mm in {name}"
        yield Problem("spacing", expected, f"{shown} mm", "Correct the header")
    elif abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        expected = f"an affine with three directions in {name}"
        yield Problem("singular", expected, "a singular one", "Correct the header")
    elif not entry["is_oriented"]:
        expected = f"an orientation in the header of {name}"
        remedy = "Which side is left is a guess; set one of the two"
        got = "none (sform and qform codes are 0)"
        yield Problem("orientation", expected, got, remedy, warning=True)
    elif not np.allclose(spacing, entry["zooms_mm"], rtol=0.01):
        zooms = "x".join(f"{z:g}" for z in entry["zooms_mm"])
        got = f"{shown} mm by the affine, which is used, and {zooms} mm by pixdim"
        expected = f"one spacing in the header of {name}"
        yield Problem("spacing", expected, got, "See which is right", warning=True)


def _shape_problems(headers: Facts, num_channels: int | None) -> Iterator[Problem]:
    images = headers["image"]
    of_image = "an image of shape (H, W, D)"
    most = 3
    if len(images) == 1:  # a file per channel has no channels in it
        of_image, most = f"{of_image} or (H, W, D, channels)", 4
    named = [(entry, most, of_image) for entry in images]
    named += [(entry, 3, "a label of shape (H, W, D)") for entry in headers.get("label", ())]
    misshapen = False
    for entry, axes, form in named:
        shape = tuple(entry["shape"])
        if not 3 <= len(shape) <= axes or min(shape[:3]) < 2:
            misshapen = True
            expected = f"{form}, each axis of 2 voxels or more"
            yield Problem("shape", expected, f"{shape}", "Convert it or exclude the case")
    channels = count_channels(headers)
    if not misshapen and num_channels not in (None, channels):
        remedy = "Correct the dataset's description or the image"
        yield Problem("channels", f"{num_channels} image channels", f"{channels}", remedy)


def count_channels(headers: Facts) -> int | None:
    """Channels of an image, by its headers; `None` if they are not readable."""
    images = headers["image"]
    if any("error" in image for image in images):
        return None
    shape = images[0]["shape"]
    return shape[3] if len(images) == 1 and len(shape) == 4 else len(images)


def _grid_problems(what: str, image: Facts, other: Facts) -> Iterator[Problem]:
    """Whether two files lie on one grid: an image and its label, or another channel."""
    shape, affine = tuple(image["shape"][:3]), np.array(image["affine"])
    # a label is put into the image's order of axes when it is loaded, a channel is not
    look = align if what == "label" else compare
    found = look(other["shape"][:3], np.array(other["affine"]), shape, affine)
    remedy = f"Resample the {what} or exclude the case"
    if found.shape != shape:
        both = "image and label" if what == "label" else "the image's channels"
        got = f"{shape} and {tuple(other['shape'][:3])}"
        yield Problem("shape", f"{both} of one shape", got, remedy)
    elif not found.distance_mm <= TOLERANCE_MM:
        expected = f"{what} affine to match image within {TOLERANCE_MM} mm"
        yield Problem("affine", expected, f"{found.distance_mm:.3f} mm", remedy)


def _name(case: Case, key: str, number: int) -> str:
    value = case[key]
    return (value if isinstance(value, str) else value[number]).rsplit("/", 1)[-1]
