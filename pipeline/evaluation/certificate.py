"""What a precision certificate says: differences of Dice, verdicts, and the table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.evaluation.bootstrap import EQUIVALENT, UNDECIDED, WORSE, paired_interval, verdict

Scores = Mapping[str, Mapping[str, float | None]]  # case id -> class name -> Dice

CONTROL = "float32, other seeds"


def compare(
    variant: Sequence[Scores],
    reference: Sequence[Scores],
    persons: Mapping[str, str],
    margin: float,
) -> dict[str, Any]:
    """Difference of Dice between two trainings, class by class.

    Args:
        variant: Dice of every case and class, one entry per seed; `None` where a class is in
            neither label nor prediction. Where that is so on one side only, its score is 1.
        reference: The same of the other training, in the same order of seeds.
        persons: Case id to person.
        margin: Largest difference of Dice that does not matter.

    Returns:
        For each class name `reference` (mean Dice there), `delta` (mean of variant minus
        reference over seeds and cases), `interval` (95 %, over seeds and persons), `verdict`, and
        under `cases` the differences of each case by seed. `None` where either has no score.
        Scores of one person are not enough evidence; nor is equivalence in a class that the
        reference has not learnt (mean Dice below ten margins).
    """
    case_ids = sorted(reference[0])
    result = {}
    for name in reference[0][case_ids[0]]:
        tables = [
            np.array([[scores[case][name] for case in case_ids] for scores in side], dtype=float)
            for side in (variant, reference)
        ]
        scored = tables[1][~np.isnan(tables[1])]
        absent = np.isnan(tables[0]) & np.isnan(tables[1])
        # where one side alone has no score it found nothing of a class that is not there: right
        first, second = (np.where(np.isnan(table) & ~absent, 1.0, table) for table in tables)
        delta = first - second  # (seeds, cases)
        interval = paired_interval(delta, [persons[case] for case in case_ids])
        learnt = scored.size > 0 and scored.mean() >= 10 * margin
        found = verdict(interval, margin)
        judged = {
            persons[case]
            for case, column in zip(case_ids, delta.T, strict=True)
            if not np.isnan(column).all()
        }
        if len(judged) < 2 or (found == EQUIVALENT and not learnt):
            found = UNDECIDED
        result[name] = {
            "reference": _plain(scored.mean() if scored.size else np.nan),
            "delta": _plain(interval.mean),
            "interval": [_plain(interval.low), _plain(interval.high)],
            "verdict": found,
            "cases": {
                case: [_plain(value) for value in column]
                for case, column in zip(case_ids, delta.T, strict=True)
            },
        }
    return result


def stopped(reference: Sequence[Scores]) -> dict[str, Any]:
    """What `compare` returns, for a variant that could not be trained to its end: worse."""
    found = compare(reference, reference, dict.fromkeys(reference[0], ""), 1.0)
    for entry in found.values():
        entry |= {"delta": None, "interval": [None, None], "verdict": WORSE, "cases": {}}
    return found


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else float(value)


def markdown(certificate: Mapping[str, Any]) -> str:
    """The certificate as a page: what was compared, the verdicts, and the cost of each precision.

    Args:
        certificate: As `pipeline.commands.certify` writes it.
    """
    margin, seeds = certificate["margin"], certificate["seeds"]
    persons, cases = certificate["num_persons"], certificate["num_cases"]
    lines = [
        f"# Precision certificate: {certificate['dataset']}",
        "",
        f"{certificate['device_name']}, torch {certificate['versions']['torch']}, MONAI "
        f"{certificate['versions']['monai']}; {certificate['steps']} steps per run, seeds "
        f"{', '.join(map(str, seeds))}, {cases} validation cases of {persons} persons, last "
        "weights.",
        "",
        f"    {certificate['command']}",
        "",
        "Difference of Dice to float32 with the same seed on the same batches, with a 95 % "
        f"interval from a bootstrap over persons and seeds (with {len(seeds)} seeds too narrow "
        f"where they differ much). Equivalent: the interval lies within ±{margin:g}; worse: below "
        f"-{margin:g}, or training stopped; a class with less than {10 * margin:g} Dice in float32 "
        "is not called equivalent. The last rows compare float32 with itself, seeds "
        f"{', '.join(map(str, certificate['control_seeds']))} with "
        f"{', '.join(map(str, seeds))}: the noise that any comparison stands in.",
        "",
        "| precision | class | Dice in float32 | difference | 95 % interval | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for precision, classes in certificate["classes"].items():
        for name, found in classes.items():
            low, high = (_signed(end) for end in found["interval"])
            lines.append(
                f"| {precision} | {name} | {_shown(found['reference'])} | "
                f"{_signed(found['delta'])} | {low} to {high} | {found['verdict']} |"
            )
    lines += [
        "",
        "On one batch of the training data, with the first and the last weights of float32; a step "
        "is forward, loss, backward, unscale, clip and optimizer.",
        "",
        "| precision | gradient cosine, first / last | relative error, first / last "
        "| ms per step | peak GB | skipped steps |",
        "|---|---|---|---|---|---|",
    ]
    for precision, found in certificate["fixed_batch"].items():
        first, last = found["gradient"]["first"], found["gradient"]["last"]
        skipped = [str(run["skipped_steps"]) for run in certificate["runs"][precision].values()]
        peak = found["peak_memory_bytes"]
        lines.append(
            f"| {precision} | {_shown(first['cosine'], '.6f')} / {_shown(last['cosine'], '.6f')} | "
            f"{_shown(first['relative_error'], '.1e')} / {_shown(last['relative_error'], '.1e')} | "
            f"{found['step_ms']:.1f} | {'-' if peak is None else f'{peak / 1e9:.2f}'} | "
            f"{', '.join(skipped)} |"
        )
    lines += [
        f"\n{precision} seed {seed} stopped: {run['stopped']}"
        for precision, runs in certificate["runs"].items()
        for seed, run in runs.items()
        if "stopped" in run
    ]
    return "\n".join(lines) + "\n"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _shown(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)
