"""Check a dataset as training would before its first step, and report every fault.

Prints a table; `--json FILE` writes the same for programs. Keys are those of the config:
`--fold 1`, `--exclude '["case_7"]'`, `--preflight fast`, ...

Exit status: 0 sound (warnings apart), 2 a fault in the data or a mistake on the command line.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pipeline.commands.command import CommandParser
from pipeline.config import allowed, validate
from pipeline.config.compose import Parser, compose_located, parse_overrides
from pipeline.errors import InputError
from pipeline.files import write_json

CONFIG = "configs/amp.json"


def main(words: Sequence[str] | None = None) -> int:
    """Check a dataset; returns the exit status."""
    parser = CommandParser("check", __doc__)
    parser.add_argument("dataset_dir", metavar="DATASET_DIR", help="the dataset")
    parser.add_argument("--plan", action="store_true", help="show values that are auto, and why")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON, too")
    parser.add_argument("--config", metavar="FILE", default=CONFIG, help=f"instead of {CONFIG}")
    try:
        allow, words = allowed.split_allow(sys.argv[1:] if words is None else words)
        options, rest = parser.parse_known_args(words)
        dataset = str(Path(options.dataset_dir).resolve())
        overrides = {**parse_overrides(rest), "dataset_dir": dataset}
        composed = compose_located([options.config], overrides)
        validate.check_config(composed, allow)
        return _check_dataset(composed.source, options.plan, options.json)
    except InputError as error:
        error.tell()
        return 2


def _check_dataset(source: dict[str, Any], wants_plan: bool, file: Path | None) -> int:
    data_module = Parser(source).get_parsed_content("data_module")
    found = data_module.run_preflight(data_module.load())
    report = found.as_dict()
    print("\n".join(make_table(found)))
    status = 2 if found.faults else 0
    if not found.faults:
        try:
            plan = data_module.plan(found)
            report["plan"] = plan.as_dict()
            if wants_plan:
                lines = [*plan.lines(), *describe_costs(source, plan)]
                print("\nPlan:\n" + "\n".join(f"  {line}" for line in lines))
        except InputError as error:
            error.tell()
            status, report["plan_faults"] = 2, list(error.faults)
    if file is not None:
        try:
            write_json(file, report)
        except OSError as error:
            raise InputError(f"--json: {error}") from None
    return status


def describe_costs(source: dict[str, Any], plan: Any) -> list[str]:
    """Lines on the steps of a `Plan`, their time on the device that is used, and their memory."""
    from pipeline.training.trial import time_step  # its imports take seconds

    parser = Parser({**source, "plan": plan})
    names = ("network", "loss_function", "optimizer", "precision")
    objects = {name: parser.get_parsed_content(name) for name in names}
    step_s = source["accumulation_steps"] * time_step(objects, plan)
    steps, mode = plan.max_epochs * plan.steps_per_epoch, objects["precision"].mode
    in_force = [] if mode == "float32" else [mode]
    needed = (
        f"{plan.estimate_bytes(name, source['recompute_levels']) / 2**30:.3g} GiB in {name}"
        for name in ("float32", *in_force)
    )
    total, where = steps * step_s / 60, objects["precision"].device
    total, unit = (total / 60, "h") if total > 90 else (total, "min")
    values = {
        "steps": f"{plan.max_epochs} epochs x {plan.steps_per_epoch} = {steps:,}",
        "time here": f"about {total:.2g} {unit}, in steps of {step_s:.2g} s on {where}",
        "memory": f"{', '.join(needed)}, estimated for a card; {mode} is in force here",
    }
    return [f"{name:<18} {value}" for name, value in values.items()]


def make_table(found: Any) -> list[str]:
    """The lines of a `Preflight`: faults, warnings, and one line that counts them."""
    cases = found.cases
    counts = {side: len(getattr(cases, side)) for side in ("train", "validation", "test")}
    sides = ", ".join(f"{count} {side}" for side, count in counts.items())
    lines = [f"{cases.name} ({cases.kind}): {sides}"]
    if cases.excluded:
        lines.append(f"Excluded: {', '.join(cases.excluded)}")
    lines += found.notes
    issues = [*found.faults, *found.warnings]
    width = max((len(issue.case_id) for issue in issues), default=0)
    for issue in issues:
        kind = "warning" if issue.warning else "fault  "
        lines.append(f"{kind}  {issue.case_id:<{width}}  {issue.check:<13}  {issue.message}")
    faulty = _count({issue.case_id for issue in found.faults}, "case")
    total = f"{_count(found.faults, 'fault')} in {faulty}, {_count(found.warnings, 'warning')}"
    return [*lines, f"{total}; {sum(counts.values())} cases were looked at"]


def _count(things: Collection[Any], word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"
