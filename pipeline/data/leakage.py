"""Whether a scan, or a person, is on two sides of a split without its case ids telling."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable

from pipeline.data.dataset import Case
from pipeline.data.facts import Facts
from pipeline.data.issues import DatasetIssue, Problem, make_finding, some

# a grey value that more cases than this have says nothing about a person
COMMON_SHARE, COMMON_CASES = 0.05, 4
MIN_VALUES = 16  # of which a share means something
SHARED_MOST = 0.5


def identical_images(cases: Iterable[Case], facts: dict[str, Facts]) -> list[DatasetIssue]:
    """Cases whose images hold the same voxels, whatever their files are called."""
    seen: dict[str, str] = {}
    found = []
    for case in cases:
        voxels = facts[case["case_id"]]["voxels"]
        if not voxels or "error" in voxels:
            continue
        shape = facts[case["case_id"]]["headers"]["image"][0]["shape"]
        key = f"{shape} {[channel['digest'] for channel in voxels['channels']]}"
        if key in seen:
            got, remedy = f"the voxels of {seen[key]}", "Exclude one of the two"
            found.append(
                make_finding(case, Problem("identical", "an image of its own", got, remedy))
            )
        seen.setdefault(key, case["case_id"])
    return found


def shared_grey_values(parts: dict[str, list[Case]], facts: dict[str, Facts]) -> list[DatasetIssue]:
    """Cases that share most of their exact grey values with one on another side of the split.

    Scans of one session, or two parts of one scan, have values in common that no other person's
    have; so it shows where a person is on both sides although the case ids do not tell. Values
    that many cases have, as all have in 8-bit images, say nothing and do not count.

    Args:
        parts: Cases by the name of their side: `training`, `validation`, `test`.
        facts: By case id.
    """
    sketches = {
        case["case_id"]: set(voxels["channels"][0]["sketch"])
        for side in parts.values()
        for case in side
        if (voxels := facts[case["case_id"]]["voxels"]) and "error" not in voxels
    }
    frequency = Counter(value for sketch in sketches.values() for value in sketch)
    # of a few cases, one that half of them have is common as well
    most = max(min(COMMON_CASES, len(sketches) // 2), COMMON_SHARE * len(sketches))
    common = {value for value, count in frequency.items() if count > most}
    found = []
    for left, right in itertools.combinations(parts, 2):
        holders: dict[int, list[str]] = defaultdict(list)
        for other in parts[left]:
            for value in sketches.get(other["case_id"], set()) - common:
                holders[value].append(other["case_id"])
        for case in parts[right]:
            sketch = sketches.get(case["case_id"], set())
            met = {one for value in sketch - common for one in holders.get(value, ())}
            shares = {one: _overlap(sketch, sketches[one], common) for one in met}
            alike = {one: share for one, share in shares.items() if share >= SHARED_MOST}
            if alike:
                expected = f"a {right} case of a person who is not in the {left} cases"
                share, others = f"{max(alike.values()):.0%}", some(sorted(alike))
                got = f"{share} of its exact grey values in {others} as well"
                remedy = "Name the person with group_pattern or a group column"
                problem = Problem("shared_values", expected, got, remedy, warning=True)
                found.append(make_finding(case, problem))
    return found


def _overlap(left: set[int], right: set[int], common: set[int]) -> float:
    """Share of the smaller set that is in both and not common, as far as both sketches reach."""
    reach = min(max(left), max(right))
    a, b = ({value for value in sketch if value <= reach} for sketch in (left, right))
    if min(len(a), len(b)) < MIN_VALUES:
        return 0.0
    return len((a & b) - common) / min(len(a), len(b))
