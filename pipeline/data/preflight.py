"""Preflight: finds before training what would break or spoil it, and reports all of it at once.

Only headers and statistics are judged here, never files: the same statistics give the same issues
whenever they were measured.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.data.cases import Case
from pipeline.data.content import ContentHashes, map_threads
from pipeline.data.dataset import Cases
from pipeline.data.nifti import Headers, VolumeError, check_headers, count_channels
from pipeline.data.statistics import CaseStatistics, DatasetFingerprint, make_fingerprint, recall
from pipeline.errors import DatasetIssue, make_issue, refuse, some
from transforms.dicom import DicomError

SIDES = ("train", "validation", "test")
UNPLANNED = ("unreadable", "missing", "shape", "spacing", "singular")  # with these there is no plan
MAX_LABEL_VALUE = 254  # labels are kept in a byte
# a grey value that more cases than this have says nothing about a person
COMMON_SHARE, COMMON_CASES = 0.05, 4
MIN_VALUES, MAX_SHARED = 16, 0.5  # least number of values, and the share of them that is an issue

Issues = Iterator[DatasetIssue]


@dataclass(frozen=True)
class Preflight:
    """The findings in the files of a dataset."""

    cases: Cases
    issues: list[DatasetIssue]
    fingerprint: DatasetFingerprint | None  # of training and validation cases; None with a fault
    notes: list[str]  # how files were understood, for people

    @property
    def faults(self) -> list[DatasetIssue]:
        """Issues with which training does not start."""
        return [issue for issue in self.issues if not issue.warning]

    @property
    def warnings(self) -> list[DatasetIssue]:
        """Issues with which it does."""
        return [issue for issue in self.issues if issue.warning]

    def require_sound(self) -> None:
        """Raise an InputError with one line per fault, if there is one."""
        refuse(issue.line for issue in self.faults)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        sides = {side: getattr(self.cases, side) for side in SIDES}
        return {
            "dataset": self.cases.name,
            "layout": self.cases.kind,
            "num_cases": sum(map(len, sides.values())),
            "excluded": list(self.cases.excluded),
            "split": {name: [case["case_id"] for case in side] for name, side in sides.items()},
            "faults": [asdict(issue) for issue in self.faults],
            "warnings": [asdict(issue) for issue in self.warnings],
            "notes": self.notes,
            "fingerprint": self.fingerprint and asdict(self.fingerprint),
        }


@dataclass(frozen=True)
class Examination:
    """The statistics of one case, and its faults."""

    case_id: str
    headers: Headers | None  # None: a file has no valid one
    statistics: CaseStatistics | None  # None: voxels were not read
    issues: list[DatasetIssue]


def preflight(cases: Cases, level: str = "full", cache_dir: Path | None = None) -> Preflight:
    """Examine all cases.

    Args:
        level: `full`: headers and voxels; `fast`: headers; `off`: headers too, since the plan is
            made of them, but only what it cannot be made of is a fault.
        cache_dir: Folder where statistics of voxels are stored, by content, so that the next
            preflight is quick.
    """
    hashes = ContentHashes(cache_dir) if cache_dir else None
    found = map_threads(lambda case: _examine(case, cases, level, hashes), cases.all, "Checking")
    if hashes:
        hashes.save()
    by_id = {one.case_id: one for one in found}
    sides = {name: [by_id[c["case_id"]] for c in getattr(cases, name)] for name in SIDES}
    issues = [*cases.issues, *(issue for one in found for issue in one.issues)]
    issues += _find_unusual_channels(found, cases.num_channels)
    issues += _find_identical_images(found)
    issues += _find_shared_values(sides, {i.case_id for i in issues if i.check == "identical"})
    if level == "off":
        issues = [issue for issue in issues if issue.check in UNPLANNED and not issue.warning]
    fingerprint = None
    if all(issue.warning for issue in issues):
        known = [*sides["train"], *sides["validation"]]  # not those of the test
        headers = [one.headers for one in known if one.headers]
        statistics = [one.statistics for one in known if one.statistics]
        fingerprint = make_fingerprint(cases, headers, statistics)
        present = [str(n) for n, entry in enumerate(fingerprint.classes) if entry.num_cases]
        is_whole = len(present) == len(fingerprint.classes) > 1
        if statistics and not cases.class_names and not is_whole:
            expected = "label values 0, 1, 2, … without gaps"
            remedy = "Renumber them, or name all in a dataset.json"
            issues.append(make_issue(cases.name, "label_values", expected, some(present), remedy))
            fingerprint = None
    num_4d = sum(len(one.headers["image"][0].shape) == 4 for one in found if one.headers)
    notes = [f"The fourth axis of {num_4d} images is taken for their channels."] if num_4d else []
    return Preflight(cases, issues, fingerprint, notes)


def _examine(case: Case, cases: Cases, level: str, hashes: ContentHashes | None) -> Examination:
    headers, issues = check_headers(case, cases.num_channels)
    statistics = None
    if headers and level == "full" and all(issue.warning for issue in issues):
        try:
            statistics = recall(case, headers, cases.ignore_value, hashes)
            issues += _check_voxels(case["case_id"], statistics, cases)
        except (VolumeError, DicomError, OSError) as error:
            issues.append(DatasetIssue(case["case_id"], "unreadable", str(error)))
    return Examination(case["case_id"], headers, statistics, issues)


def _check_voxels(case_id: str, found: CaseStatistics, cases: Cases) -> Issues:
    if non_finite := sum(channel.num_non_finite for channel in found.channels):
        got = f"{non_finite} NaN or infinite voxels, as float32"
        remedy = "Replace them or exclude the case"
        yield make_issue(case_id, "finite", "finite image values", got, remedy)
    if all(channel.min == channel.max for channel in found.channels):
        got, remedy = f"{found.channels[0].min} everywhere", "Replace it or exclude the case"
        yield make_issue(case_id, "constant", "an image with contrast", got, remedy)
    yield from _check_label(case_id, found, cases)


def _check_label(case_id: str, found: CaseStatistics, cases: Cases) -> Issues:
    """The first thing that is wrong with a label; others may follow from it."""
    num_classes = min(len(cases.class_names or ()) or MAX_LABEL_VALUE + 1, MAX_LABEL_VALUE + 1)
    allowed = {*map(str, range(num_classes)), str(cases.ignore_value)}
    declared = f"label values 0 to {num_classes - 1}"
    if cases.ignore_value is not None:
        declared += f" and {cases.ignore_value} (ignored)"
    values = [*found.label_counts]
    unknown = [value for value in values if value not in allowed]
    distinct = [f"{value:g}" for value in found.channels[0].distinct or ()]
    check, remedy = "label_values", "Correct the label or exclude the case"
    if not (found.num_fractions or found.num_non_finite_labels or unknown):
        if {*values} <= {"0", str(cases.ignore_value)}:
            got, remedy = "background alone", "Exclude the case if it should have some"
            expected = "foreground in the label"
            yield make_issue(case_id, "no_foreground", expected, got, remedy, warning=True)
        return
    if distinct and {*distinct} <= allowed:
        check, remedy = "swapped", "Swap the two"
        declared = "an image under image and a label under label"
        got = f"values {some(distinct)} in the image and {some(values)} in the label"
    elif found.num_non_finite_labels:
        got = f"{found.num_non_finite_labels} NaN or infinite voxels"
    elif found.num_fractions:
        declared, got = "integer label values", f"{found.num_fractions} voxels between integers"
        remedy = "Resample the label with nearest neighbours or exclude the case"
    else:
        got, remedy = some(unknown), "Declare the value in the dataset or correct the label"
    yield make_issue(case_id, check, declared, got, remedy)


def _find_unusual_channels(found: Sequence[Examination], declared: int | None) -> Issues:
    """Cases with another number of channels than most, where the dataset declares none."""
    counts = {one.case_id: count_channels(one.headers) for one in found if one.headers}
    if declared is not None or len({*counts.values()}) < 2:
        return
    usual = Counter(counts.values()).most_common(1)[0][0]
    for case_id, count in counts.items():
        if count != usual:
            expected = f"{usual} image channels, as most cases have"
            remedy = "Correct the image or exclude the case"
            yield make_issue(case_id, "channels", expected, count, remedy)


def _find_identical_images(found: Sequence[Examination]) -> Issues:
    """Cases whose images hold the same voxels, whatever their files are called."""
    first: dict[object, str] = {}
    for one in found:
        if one.headers and one.statistics:
            digests = tuple(channel.digest for channel in one.statistics.channels)
            other = first.setdefault((one.headers["image"][0].shape, digests), one.case_id)
            if other != one.case_id:
                got, remedy = f"the voxels of {other}", "Exclude one of the two"
                yield make_issue(one.case_id, "identical", "an image of its own", got, remedy)


def _find_shared_values(sides: dict[str, list[Examination]], ignored: set[str]) -> Issues:
    """Cases that share most of their exact grey values with one on another side of the split.

    Scans of one session, or two parts of one scan, have values in common that no other person's
    have; so it shows where a person is on both sides although the case ids do not tell. Values
    that many cases have, as all have in 8-bit images, say nothing and do not count.
    """
    sketches = {
        name: {
            one.case_id: {*one.statistics.channels[0].sketch}
            for one in side
            if one.statistics and one.case_id not in ignored
        }
        for name, side in sides.items()
    }
    every = [sketch for side in sketches.values() for sketch in side.values()]
    frequency = Counter(value for sketch in every for value in sketch)
    # of a few cases, a value that half of them have is common as well
    most = max(min(COMMON_CASES, len(every) // 2), COMMON_SHARE * len(every))
    common = {value for value, count in frequency.items() if count > most}
    for left, right in itertools.combinations(sides, 2):
        for case_id, sketch in sketches[right].items():
            shares = {
                other: share
                for other, against in sketches[left].items()
                if (share := _overlap(sketch, against, common)) >= MAX_SHARED
            }
            if shares:
                side = "training" if left == "train" else left
                expected = f"a {right} case of a person who is not in the {side} cases"
                others = some(sorted(shares))
                got = f"{max(shares.values()):.0%} of its exact grey values in {others} as well"
                remedy = "Name the person with group_pattern or a group column"
                yield make_issue(case_id, "shared_values", expected, got, remedy, warning=True)


def _overlap(left: set[int], right: set[int], common: set[int]) -> float:
    """Share of the smaller set that is in both and not common, as far as both sketches reach."""
    if (left & right) <= common:
        return 0.0
    reach = min(max(left), max(right))
    a, b = ({value for value in sketch if value <= reach} for sketch in (left, right))
    least = min(len(a), len(b))
    return len((a & b) - common) / least if least >= MIN_VALUES else 0.0
