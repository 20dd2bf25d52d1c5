"""Preflight: finds before training what would break or spoil it, and reports all of it at once.

Only headers and statistics are judged here, never files: the same statistics give the same issues
whenever they were measured.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.data.cases import Case
from pipeline.data.content import map_threads
from pipeline.data.dataset import Cases
from pipeline.data.nifti import Headers, VolumeError, check_headers, count_channels
from pipeline.data.statistics import (
    CaseStatistics,
    DatasetFingerprint,
    StatisticsStore,
    make_fingerprint,
    measure_case,
)
from pipeline.errors import DatasetIssue, make_issue, refuse, some
from transforms.load import DicomError

SIDES = ("train", "validation", "test")
UNPLANNED = ("unreadable", "missing", "shape", "spacing", "singular")  # with these there is no plan
MAX_LABEL_VALUE = 254  # labels are kept in a byte
# a grey value that more cases than this have says nothing about a person
COMMON_SHARE, COMMON_CASES = 0.05, 4
MIN_VALUES, MAX_SHARED = 16, 0.5  # least number of values, and the share of them that is an issue


@dataclass(frozen=True)
class Preflight:
    """What was found in the files of a dataset."""

    cases: Cases
    issues: list[DatasetIssue]
    fingerprint: DatasetFingerprint | None  # of training and validation cases; None with a fault
    notes: list[str]  # how files were understood, for people
    num_rounded: int = 0  # cases of which label values are rounded to whole numbers nearby

    @property
    def faults(self) -> list[DatasetIssue]:
        """Issues with which training does not start."""
        return [issue for issue in self.issues if not issue.warning]

    @property
    def warnings(self) -> list[DatasetIssue]:
        """Issues with which it does."""
        return [issue for issue in self.issues if issue.warning]

    def require_sound(self) -> None:
        """Refuse a dataset that has a fault.

        Raises:
            InputError: One line per fault.
        """
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
            "num_rounded": self.num_rounded,
            "fingerprint": self.fingerprint and asdict(self.fingerprint),
        }


@dataclass(frozen=True)
class Examination:
    """What was read of one case, and what is wrong with it."""

    case: Case
    headers: Headers | None  # None: a file has no valid one
    statistics: CaseStatistics | None  # None: voxels were not read
    issues: list[DatasetIssue]


def preflight(cases: Cases, level: str = "full", cache_dir: Path | None = None) -> Preflight:
    """Examine all cases.

    Args:
        cases: The cases of a dataset.
        level: `full`: headers and voxels; `fast`: headers; `off`: headers too, since the plan is
            made of them, but only what it cannot be made of is a fault.
        cache_dir: Folder where statistics of voxels are stored, by content, so that the next
            preflight is quick.
    """
    store = StatisticsStore(cache_dir) if cache_dir and level == "full" else None
    measure = None
    if level == "full":
        measure = store.measure_case if store else measure_case
    found = map_threads(lambda case: _examine(case, cases, measure), cases.all, "Checking")
    if store:
        store.hashes.save()
    by_id = {one.case["case_id"]: one for one in found}
    sides = {name: [by_id[c["case_id"]] for c in getattr(cases, name)] for name in SIDES}
    issues = [*cases.issues, *(issue for one in found for issue in one.issues)]
    issues += _find_unusual_channels(found, cases.num_channels)
    issues += _find_identical_images(found)
    issues += _find_shared_values(sides, {i.case_id for i in issues if i.check == "identical"})
    if level == "off":
        issues = [issue for issue in issues if issue.check in UNPLANNED and not issue.warning]
    fingerprint = None
    if all(issue.warning for issue in issues):
        fingerprint = _make_fingerprint(cases, [*sides["train"], *sides["validation"]])
        if level == "full" and not cases.class_names:
            issues += (gaps := _find_gaps(cases.name, fingerprint))
            fingerprint = None if gaps else fingerprint
    num_4d = sum(len(one.headers["image"][0].shape) == 4 for one in found if one.headers)
    notes = [f"The fourth axis of {num_4d} images is taken for their channels."] if num_4d else []
    num_rounded = sum(bool(one.statistics and one.statistics.num_rounded) for one in found)
    return Preflight(cases, issues, fingerprint, notes, num_rounded)


def _examine(
    case: Case, cases: Cases, measure: Callable[..., CaseStatistics] | None
) -> Examination:
    headers, issues = check_headers(case, cases.num_channels)
    statistics = None
    if headers and measure and all(issue.warning for issue in issues):
        try:
            statistics = measure(case, headers, cases.ignore_value)
            issues += _check_voxels(case["case_id"], statistics, cases)
        except (VolumeError, DicomError, OSError) as error:
            issues.append(DatasetIssue(case["case_id"], "unreadable", str(error)))
    return Examination(case, headers, statistics, issues)


def _make_fingerprint(cases: Cases, known: Sequence[Examination]) -> DatasetFingerprint:
    """Fingerprint of the cases that training may know, which are not those of the test."""
    headers = [one.headers for one in known if one.headers]
    statistics = [one.statistics for one in known if one.statistics]
    values = {int(value) for case in statistics for value in case.label_counts}
    num_classes = max(values - {cases.ignore_value}, default=0) + 1
    classes = ["background", *(f"class_{n}" for n in range(1, num_classes))]
    channels = [f"channel_{n}" for n in range(count_channels(headers[0]))]
    return make_fingerprint(
        [one["image"][0] for one in headers],
        statistics,
        cases.class_names or classes,
        cases.channel_names or channels,
    )


# ---- one case


def _check_voxels(case_id: str, found: CaseStatistics, cases: Cases) -> Iterator[DatasetIssue]:
    if non_finite := sum(channel.num_non_finite for channel in found.channels):
        got = f"{non_finite} NaN or infinite voxels, as float32"
        remedy = "Replace them or exclude the case"
        yield make_issue(case_id, "finite", "finite image values", got, remedy)
    if all(channel.min == channel.max for channel in found.channels):
        got, remedy = f"{found.channels[0].min} everywhere", "Replace it or exclude the case"
        yield make_issue(case_id, "constant", "an image with contrast", got, remedy)
    yield from _check_label(case_id, found, cases)


def _check_label(case_id: str, found: CaseStatistics, cases: Cases) -> Iterator[DatasetIssue]:
    """The first thing that is wrong with a label; others may follow from it."""
    num_classes = min(len(cases.class_names or ()) or MAX_LABEL_VALUE + 1, MAX_LABEL_VALUE + 1)
    allowed = {f"{n}" for n in range(num_classes)} | {str(cases.ignore_value)}
    declared = f"label values 0 to {num_classes - 1}"
    if cases.ignore_value is not None:
        declared += f" and {cases.ignore_value} (ignored)"
    values = list(found.label_counts)
    unknown = [value for value in values if value not in allowed]
    distinct = [f"{value:g}" for value in found.channels[0].distinct or ()]
    is_wrong = found.num_fractions or found.num_non_finite_labels or unknown
    if is_wrong and distinct and {*distinct} <= allowed:
        expected = "an image under image and a label under label"
        got = f"values {some(distinct)} in the image and {some(values)} in the label"
        yield make_issue(case_id, "swapped", expected, got, "Swap the two")
    elif found.num_non_finite_labels:
        got = f"{found.num_non_finite_labels} NaN or infinite voxels"
        remedy = "Correct the label or exclude the case"
        yield make_issue(case_id, "label_values", declared, got, remedy)
    elif found.num_fractions:
        got = f"{found.num_fractions} voxels between integers"
        remedy = "Resample the label with nearest neighbours or exclude the case"
        yield make_issue(case_id, "label_values", "integer label values", got, remedy)
    elif unknown:
        remedy = "Declare the value in the dataset or correct the label"
        yield make_issue(case_id, "label_values", declared, some(unknown), remedy)
    elif {*values} <= {"0", str(cases.ignore_value)}:
        expected, remedy = "foreground in the label", "Exclude the case if it should have some"
        yield make_issue(
            case_id, "no_foreground", expected, "background alone", remedy, warning=True
        )


# ---- all cases


def _find_unusual_channels(
    found: Sequence[Examination], declared: int | None
) -> Iterator[DatasetIssue]:
    """Cases with another number of channels than most, where the dataset declares none."""
    counts = {one.case["case_id"]: count_channels(one.headers) for one in found if one.headers}
    if declared is not None or len({*counts.values()}) < 2:
        return
    usual = Counter(counts.values()).most_common(1)[0][0]
    for case_id, count in counts.items():
        if count != usual:
            expected = f"{usual} image channels, as most cases have"
            remedy = "Correct the image or exclude the case"
            yield make_issue(case_id, "channels", expected, count, remedy)


def _find_identical_images(found: Sequence[Examination]) -> Iterator[DatasetIssue]:
    """Cases whose images hold the same voxels, whatever their files are called."""
    first: dict[object, str] = {}
    for one in found:
        if one.headers and one.statistics:
            digests = tuple(channel.digest for channel in one.statistics.channels)
            case_id = one.case["case_id"]
            other = first.setdefault((one.headers["image"][0].shape, digests), case_id)
            if other != case_id:
                got, remedy = f"the voxels of {other}", "Exclude one of the two"
                yield make_issue(case_id, "identical", "an image of its own", got, remedy)


def _find_shared_values(
    sides: Mapping[str, Sequence[Examination]], ignored: Collection[str]
) -> Iterator[DatasetIssue]:
    """Cases that share most of their exact grey values with one on another side of the split.

    Scans of one session, or two parts of one scan, have values in common that no other person's
    have; so it shows where a person is on both sides although the case ids do not tell. Values
    that many cases have, as all have in 8-bit images, say nothing and do not count.
    """
    sketches = {
        name: {
            one.case["case_id"]: {*one.statistics.channels[0].sketch}
            for one in side
            if one.statistics and one.case["case_id"] not in ignored
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
                other: _overlap(sketch, against, common)
                for other, against in sketches[left].items()
                if not sketch & against <= common
            }
            alike = {other: share for other, share in shares.items() if share >= MAX_SHARED}
            if alike:
                side = "training" if left == "train" else left
                expected = f"a {right} case of a person who is not in the {side} cases"
                others = some(sorted(alike))
                got = f"{max(alike.values()):.0%} of its exact grey values in {others} as well"
                remedy = "Name the person with group_pattern or a group column"
                yield make_issue(case_id, "shared_values", expected, got, remedy, warning=True)


def _overlap(left: set[int], right: set[int], common: set[int]) -> float:
    """Share of the smaller set that is in both and not common, as far as both sketches reach."""
    reach = min(max(left), max(right))
    a, b = ({value for value in sketch if value <= reach} for sketch in (left, right))
    if min(len(a), len(b)) < MIN_VALUES:
        return 0.0
    return len((a & b) - common) / min(len(a), len(b))


def _find_gaps(name: str, fingerprint: DatasetFingerprint) -> list[DatasetIssue]:
    """Undeclared label values must count from 0 all the same."""
    found = [str(n) for n, entry in enumerate(fingerprint.classes) if entry.num_cases]
    if len(found) == len(fingerprint.classes) > 1:
        return []
    expected = "label values 0, 1, 2, … without gaps"
    remedy = "Renumber them, or name all in a dataset.json"
    return [make_issue(name, "label_values", expected, some(found), remedy)]
