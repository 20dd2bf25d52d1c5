"""Check a dataset as training would before its first step, and report every fault.

Prints a table; `--json FILE` writes the same for programs. Keys are those of the config:
`--fold 1`, `--exclude '["case_7"]'`, `--preflight fast`, ...

Exit status: 0 sound (warnings apart), 2 a fault in the data or a mistake on the command line.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pipeline import run
from pipeline.config.command_line import CommandParser, loading, run_parsed
from pipeline.config.keys import KEYS, Config
from pipeline.errors import InputError, require, require_path

COMMON = ("fold", "group_pattern", "exclude", "split_file", "preflight", "cache_dir", "device")


def main(words: Sequence[str] | None = None) -> int:
    """Check a dataset; returns the exit status."""
    parser = CommandParser("check", __doc__, "DATASET_DIR [--plan]", KEYS, COMMON, "amp.json")
    parser.add_argument("folder", metavar="DATASET_DIR", nargs="?", help="folder or table")
    parser.add_argument("--plan", action="store_true", help="show values that are auto, and why")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON, too")
    more = f"merged over {run.AMP}, or instead of it"
    parser.add_argument("--config", metavar="FILE", action="append", default=[], help=more)
    return run_parsed(parser, words, _check)


def _check(given: argparse.Namespace) -> int:
    dataset_dir = given.overrides.pop("dataset_dir", given.folder)
    require(dataset_dir, "command line", "DATASET_DIR", "none", "Name a folder or a table.")
    require_path("DATASET_DIR", dataset_dir, "a dataset")
    given.overrides["dataset_dir"] = str(Path(dataset_dir).resolve())
    composed = run.compose_run(given.config, given.overrides)
    with loading():
        from pipeline.config import validate
    validate.check_config(composed, given.allow)
    return _check_dataset(composed.source, given.plan, given.json)


def _check_dataset(source: Config, wants_plan: bool, file: Path | None) -> int:
    from pipeline.config.parser import Parser
    from pipeline.files import write_json

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
    from pipeline.config.parser import Parser
    from pipeline.training.trial import time_step

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
