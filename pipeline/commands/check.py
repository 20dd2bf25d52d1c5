"""Preflight alone: `python -m pipeline check DATASET_DIR [--plan] [--json FILE] [--key value ...]`.

Reads every case of a dataset, as training would before its first step, and reports all that is
wrong with it: a table for people, JSON for programs. `--plan` shows what training would choose for
the values that are `auto`, and why. Keys are those of the config: `--fold 1`, `--exclude '["x"]'`,
`--preflight fast`; `--config FILE` names another config than configs/amp.json.

Exit status: 0 sound (warnings apart), 2 a fault in the data or a mistake on the command line.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pipeline.commands.command import run_command
from pipeline.config import allowed, validate
from pipeline.config.compose import compose_located, parse_overrides
from pipeline.config.parser import Parser
from pipeline.errors import InputError

USAGE = "usage: python -m pipeline check DATASET_DIR [--plan] [--json FILE] [--key value ...]"
CONFIG = "configs/amp.json"


def main(words: Sequence[str] | None = None) -> int:
    """Check a dataset; returns the exit status.

    Args:
        words: The command line after the command, by default this process's.
    """
    return run_command(__doc__, words, _main)


def _main(words: list[str]) -> int:
    wants_plan = "--plan" in words
    allow, rest = allowed.split_allow([word for word in words if word != "--plan"])
    if not rest or rest[0].startswith("-"):
        raise InputError(f"command line: expected a dataset first, got none. {USAGE}")
    overrides = parse_overrides(rest[1:])
    file = overrides.pop("json", None)
    if file is not None and not Path(str(file)).parent.is_dir():
        raise InputError(f"--json: expected a file in a folder that is there, got {file}.")
    config_file = str(overrides.pop("config", CONFIG))
    overrides["dataset_dir"] = str(Path(rest[0]).resolve())
    composed = compose_located([config_file], overrides, allow)
    validate.check(composed, allow, training=True)
    return check(composed.source, wants_plan, None if file is None else Path(str(file)))


def check(source: dict[str, Any], wants_plan: bool, file: Path | None) -> int:
    """Check the dataset of a config, and print what was found.

    Args:
        source: The merged config.
        wants_plan: Whether to print the plan as well.
        file: Gets the report as JSON, if given.

    Raises:
        InputError: If there is no dataset, it cannot be split as asked, or `file` not be written.
    """
    data_module = Parser(source).get_parsed_content("data_module")
    found = data_module.run_preflight(data_module.load())
    report = found.as_dict()
    print("\n".join(table(found)))
    refusal: InputError | None = None
    if not found.faults:
        try:
            plan = data_module.plan(found)
            report["plan"] = plan.as_dict()
            if wants_plan:
                print("\nPlan:\n" + "\n".join(f"  {line}" for line in plan.lines()))
        except InputError as error:
            refusal, report["plan_faults"] = error, list(error.faults)
    if file is not None:
        try:
            file.write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            raise InputError(
                f"--json: expected a file that can be written, got: {error}."
            ) from None
    if refusal is not None:
        raise refusal
    return 2 if found.faults else 0


def table(found: Any) -> list[str]:
    """The report for people: a line per finding, faults first, and one that counts them.

    Args:
        found: A `Preflight`.
    """
    cases = found.cases
    counts = {side: len(getattr(cases, side)) for side in ("train", "validation", "test")}
    sides = ", ".join(f"{count} {side}" for side, count in counts.items())
    lines = [f"{cases.name} ({cases.layout}): {sides}"]
    if cases.excluded:
        lines.append(f"Excluded: {', '.join(cases.excluded)}")
    lines += found.notes
    if found.num_rounded:  # training says so where it reads them
        lines.append(f"Label values of {_count(range(found.num_rounded), 'case')} are rounded.")
    ordered = [*found.faults, *found.warnings]
    width = max((len(finding.case_id) for finding in ordered), default=0)
    for finding in ordered:
        kind = "warning" if finding.warning else "fault  "
        lines.append(f"{kind}  {finding.case_id:<{width}}  {finding.check:<13}  {finding.message}")
    unsound = {finding.case_id for finding in found.faults}
    lines.append(
        f"{_count(found.faults, 'fault')} in {_count(unsound, 'case')}, "
        f"{_count(found.warnings, 'warning')}; {sum(counts.values())} cases were looked at"
    )
    return lines


def _count(things: Collection[Any], word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"
