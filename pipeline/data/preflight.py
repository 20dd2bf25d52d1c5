"""The one look at a dataset before training: what is wrong with it, and what it is like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.data.dataset import Case, Cases
from pipeline.data.facts import Facts
from pipeline.data.fingerprint import Fingerprint, make_fingerprint
from pipeline.data.integrity import count_channels, header_findings, voxel_findings
from pipeline.data.issues import DatasetIssue
from pipeline.data.leakage import identical_images, shared_grey_values
from pipeline.data.survey import survey
from pipeline.errors import InputError

UNPLANNED = ("unreadable", "missing", "shape", "spacing", "singular")  # with these there is no plan
SIDES = ("training", "validation", "test")


@dataclass(frozen=True)
class Preflight:
    """What was found.

    Attributes:
        cases: That were looked at.
        findings: Faults and warnings of all of them.
        fingerprint: Of training and validation cases; `None` where there is a fault.
        notes: What was taken for what, for people.
        num_rounded: Cases of which label values are rounded to whole numbers nearby.
    """

    cases: Cases
    findings: list[DatasetIssue]
    fingerprint: Fingerprint | None
    notes: list[str]
    num_rounded: int = 0

    @property
    def faults(self) -> list[DatasetIssue]:
        """Findings with which training does not start."""
        return [finding for finding in self.findings if not finding.warning]

    @property
    def warnings(self) -> list[DatasetIssue]:
        """Findings with which it does."""
        return [finding for finding in self.findings if finding.warning]

    def require_sound(self) -> None:
        """Refuse a dataset that has a fault.

        Raises:
            InputError: One line per fault.
        """
        if self.faults:
            raise InputError(*(finding.line for finding in self.faults))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        cases = self.cases
        return {
            "dataset": cases.name,
            "layout": cases.layout,
            "num_cases": len(cases.train) + len(cases.validation) + len(cases.test),
            "excluded": list(cases.excluded),
            "split": {
                side: [case["case_id"] for case in getattr(cases, side)]
                for side in ("train", "validation", "test")
            },
            "faults": [asdict(finding) for finding in self.faults],
            "warnings": [asdict(finding) for finding in self.warnings],
            "notes": self.notes,
            "num_rounded": self.num_rounded,
            "fingerprint": self.fingerprint,
        }


def preflight(cases: Cases, level: str = "full", cache_dir: Path | None = None) -> Preflight:
    """Look at all cases.

    Args:
        cases: Of a dataset.
        level: `full`: headers and voxels; `fast`: headers; `off`: headers too, since the plan is
            made of them, but only what it cannot be made of is a fault.
        cache_dir: Where facts of voxels are kept, by content, so that the next look is quick.
    """
    every = cases.all

    def of_headers(case: Case, headers: Facts) -> list[DatasetIssue]:
        return header_findings(case, headers, cases.num_channels)

    by_id = {case["case_id"]: case for case in every}
    facts = survey(
        every,
        is_sound=lambda case, headers: all(f.warning for f in of_headers(case, headers)),
        read_voxels=level == "full",
        ignore_value=cases.ignore_value,
        cache_dir=cache_dir,
    )
    findings = list(cases.findings)
    for case_id, measured in facts.items():
        findings += of_headers(by_id[case_id], measured["headers"])
        if level == "full" and measured["voxels"]:
            findings += voxel_findings(by_id[case_id], measured["voxels"], cases)
    findings += _channel_findings(every, facts, cases.num_channels)
    if level == "full":
        findings += (copies := identical_images(every, facts))
        known = {finding.case_id for finding in copies}  # to share everything
        sides = {
            name: [case for case in side if case["case_id"] not in known]
            for name, side in zip(SIDES, (cases.train, cases.validation, cases.test), strict=True)
        }
        findings += shared_grey_values(sides, facts)
    if level == "off":
        findings = [f for f in findings if f.check in UNPLANNED and not f.warning]
    is_sound = all(finding.warning for finding in findings)
    fingerprint = _fingerprint(cases, facts) if is_sound else None
    if fingerprint and not cases.class_names and level == "full":
        findings += (gaps := _gaps(cases, fingerprint))
        fingerprint = None if gaps else fingerprint
    num_rounded = sum(bool((of["voxels"] or {}).get("rounded")) for of in facts.values())
    return Preflight(cases, findings, fingerprint, _notes(facts), num_rounded)


def _fingerprint(cases: Cases, facts: dict[str, Facts]) -> Fingerprint:
    """Of the cases that training may know; the test share is not among them."""
    known = [*cases.train, *cases.validation]
    measured = [facts[case["case_id"]] for case in known]
    channels = count_channels(measured[0]["headers"]) or 1
    values = [int(v) for facts in measured for v in (facts["voxels"] or {"values": []})["values"]]
    found = [value for value in values if value != cases.ignore_value]
    names = cases.class_names or _numbered("class", max(found, default=0) + 1)
    return make_fingerprint(
        known, facts, names, cases.channel_names or _numbered("channel", channels)
    )


def _numbered(word: str, count: int) -> list[str]:
    if word == "class":
        return ["background", *(f"class_{n}" for n in range(1, count))]
    return [f"{word}_{n}" for n in range(count)]


def _channel_findings(
    cases: Sequence[Case], facts: dict[str, Facts], declared: int | None
) -> list[DatasetIssue]:
    """Where the dataset does not say how many channels there are: not what most cases have."""
    counts = {c["case_id"]: count_channels(facts[c["case_id"]]["headers"]) for c in cases}
    known = Counter(count for count in counts.values() if count is not None)
    if declared is not None or len(known) < 2:
        return []
    usual = known.most_common(1)[0][0]
    return [
        DatasetIssue(
            case_id,
            "channels",
            f"expected {usual} image channels, as most cases have, got {count}. "
            "Correct the image or exclude the case.",
        )
        for case_id, count in counts.items()
        if count not in (None, usual)
    ]


def _gaps(cases: Cases, fingerprint: Fingerprint) -> list[DatasetIssue]:
    """Undeclared label values must count from 0 all the same."""
    missing = [n for n, entry in enumerate(fingerprint["classes"]) if not entry["num_cases"]]
    if not missing and len(fingerprint["classes"]) > 1:
        return []
    found = [n for n in range(len(fingerprint["classes"])) if n not in missing]
    return [
        DatasetIssue(
            cases.name,
            "label_values",
            f"expected label values 0, 1, 2, … without gaps, got {', '.join(map(str, found[:9]))}"
            f"{' …' if len(found) > 9 else ''}. Renumber them, or name all in a dataset.json.",
        )
    ]


def _notes(facts: dict[str, Facts]) -> list[str]:
    with_channels = [
        case_id
        for case_id, measured in facts.items()
        if len(measured["headers"]["image"][0].get("shape", ())) == 4
    ]
    if not with_channels:
        return []
    return [f"The fourth axis of {len(with_channels)} images is taken for their channels."]
