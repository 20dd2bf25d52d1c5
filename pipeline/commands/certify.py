"""A certificate that mixed precision costs no accuracy, for a dataset and a config of your own.

    python -m pipeline certify CONFIG.json [MORE.json ...] [--key value ...]
        [--dtypes float32 tf32 float16 bfloat16] [--seeds 3] [--margin 0.005] [--jobs 1]
        [--allow NAME]

Trains the config with the same seeds, hence on the same batches, in each precision, and in float32
with as many other seeds, as a control. `output_dir` (`runs/<name of dataset_dir>_certificate`) gets
a run directory for each, `certificate.json` and `certificate.md`. The same command goes on where it
was interrupted; further dtypes and another margin cost only what is new.

Exit status: 0 if no class is worse, 1 if one is (a precision in which training stops is worse) or a
run failed, 2 a mistake in input or config, 130 interrupted.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.commands.trials import OWN_KEYS, PRECISIONS, Plan, RunFailed, train
from pipeline.config import allowed, keys, validate
from pipeline.config.compose import compose_located, parse_overrides
from pipeline.errors import InputError, nearest
from pipeline.run import open_run, split_words


def main(words: Sequence[str] | None = None) -> int:
    """Certify; returns the exit status.

    Args:
        words: The command line after the command, by default this process's.
    """
    words = list(sys.argv[1:] if words is None else words)
    if not words or "--help" in words or "-h" in words:
        print(__doc__)
        return 0 if words else 2
    try:
        plan = make_plan(words)
        train(plan)
        certificate = certify(
            plan, shlex.join(["python", "-m", "pipeline.commands.certify", *words])
        )
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        return 130
    from pipeline.evaluation.bootstrap import WORSE
    from pipeline.evaluation.certificate import CONTROL, markdown
    from pipeline.files import write_json

    write_json(plan.out / "certificate.json", certificate)
    page = markdown(certificate)
    (plan.out / "certificate.md").write_text(page)
    print(f"\n{page}\n  {plan.out}/certificate.json\n  {plan.out}/certificate.md")
    judged = {name: found for name, found in certificate["classes"].items() if name != CONTROL}
    verdicts = [entry["verdict"] for found in judged.values() for entry in found.values()]
    return 1 if WORSE in verdicts else 0


def make_plan(words: list[str]) -> Plan:
    """Read the command line, and refuse a folder that another config's certificate was begun in.

    Raises:
        InputError: For a mistake in options or config.
    """
    files, rest = split_words(words)
    allow, rest = allowed.split_allow(rest)
    overrides = parse_overrides(_join_dtypes(rest))
    dtypes = overrides.pop("dtypes", list(PRECISIONS))
    seeds, jobs = overrides.pop("seeds", 3), overrides.pop("jobs", 1)
    margin = overrides.pop("margin", 0.005)
    dtypes = dtypes if isinstance(dtypes, list) else [dtypes]
    faults = [
        f"--dtypes: expected some of {', '.join(PRECISIONS)}, got {name!r}. "
        + nearest(str(name), PRECISIONS)
        for name in dtypes
        if name not in PRECISIONS
    ]
    faults += [
        f"--{key}: expected no value, since a certificate sets it itself. Leave it out."
        for key in OWN_KEYS
        if key in overrides
    ]
    if type(seeds) is not int or seeds < 2:
        faults.append(f"--seeds: expected at least 2, to see how seeds differ, got {seeds!r}.")
    if type(jobs) is not int or jobs < 1:
        faults.append(f"--jobs: expected at least 1, got {jobs!r}.")
    if type(margin) not in (int, float) or not 0 < margin < 1:
        faults.append(f"--margin: expected a difference of Dice between 0 and 1, got {margin!r}.")
    if not files:
        faults.append("command line: expected a config file, got none. See --help.")
    if faults:
        raise InputError(*faults)
    composed = compose_located(files, overrides, allow)
    validate.check(composed, allow, training=True)
    source = composed.source
    if source["fold"] == "all":
        raise InputError("fold: expected one of the folds, to compare on, got 'all'. Change it.")
    name = Path(source["bundle_root"], source["dataset_dir"]).resolve().name
    out = Path(source["bundle_root"], source["output_dir"] or f"runs/{name}_certificate").resolve()
    overrides.pop("output_dir", None)
    epochs = source["train"]["trainer"]["max_epochs"]
    overrides["val_interval"] = source["max_epochs"] if epochs == "@max_epochs" else epochs
    dtypes = _possible(dict.fromkeys(dtypes), source["device"])
    _check_folder(out, source)
    first = source["seed"]
    middle, end = first + seeds, first + 2 * seeds
    return Plan(
        files, overrides, out, dtypes, list(range(first, middle)), list(range(middle, end)),
        margin, jobs, allow,
    )  # fmt: skip


def _join_dtypes(words: list[str]) -> list[str]:
    """`--dtypes a b` as one JSON value, as the other options are given."""
    if "--dtypes" not in words:
        return words
    start = words.index("--dtypes") + 1
    named, rest = split_words(words[start:])
    return [*words[:start], json.dumps(named), *rest]


def _possible(dtypes: Sequence[str] | dict[str, None], device: str) -> list[str]:
    """Precisions to compare with float32; TF32 is only on CUDA another one."""
    from pipeline.precision import resolve_device

    compared = [name for name in dtypes if name != "float32"]
    if resolve_device(device).type != "cuda" and "tf32" in compared:
        print("tf32 is left out: it exists on CUDA only.")
        compared.remove("tf32")
    if not compared:
        raise InputError("--dtypes: expected one to compare with float32, got none.")
    return compared


def _check_folder(out: Path, source: keys.Config) -> None:
    """A certificate is of one config: the first command's is kept and compared with."""
    from pipeline.files import write_json

    stored = out / "config.json"
    source = {key: value for key, value in source.items() if key != "output_dir"}
    if not any(out.glob("*_seed*/checkpoints/*")):  # there is nothing yet to be true to
        out.mkdir(parents=True, exist_ok=True)
        write_json(stored, source)
        return
    changed = keys.changes(json.loads(stored.read_text()), source)
    named = changed[keys.IDENTITY] + changed[keys.CONTINUABLE]
    if named:
        raise InputError(
            f"{out}: expected the config of the certificate there, got other values of "
            f"{', '.join(named)}. Choose another output_dir, or leave them as they were."
        )


def certify(plan: Plan, command: str) -> dict[str, Any]:
    """The certificate of runs that are all trained.

    Args:
        plan: Of the runs.
        command: The command line, for the record.
    """
    from pipeline.data.splits import persons_of
    from pipeline.evaluation.certificate import CONTROL, compare, stopped
    from pipeline.evaluation.fixed_batch import measure
    from pipeline.lifecycle.summary import device_name

    overrides = plan.run_overrides("float32", plan.seeds[0])
    lifecycle, trainer = open_run(compose_located(plan.files, overrides, plan.allow))
    pattern = lifecycle.data_module.split["group_pattern"]
    persons = persons_of(lifecycle.cases.validation, pattern)

    def scores(dtype: str, seeds: list[int]) -> list[dict[str, Any]] | None:
        found = [plan.read(dtype, seed, "validation.json") for seed in seeds]
        ended = all(plan.read(dtype, seed, "summary.json") for seed in seeds)
        return [one["cases"] for one in found] if ended else None

    names = ["float32", *plan.dtypes]
    last = plan.run_dir("float32", plan.seeds[0]) / "models" / "last.pt"
    reference = scores("float32", plan.seeds)
    assert reference is not None
    compared = {dtype: scores(dtype, plan.seeds) for dtype in plan.dtypes}
    compared[CONTROL] = scores("float32", plan.control_seeds)
    summary = plan.read("float32", plan.seeds[0], "summary.json")
    runs: dict[str, dict[str, Any]] = {}
    for dtype, seed in plan.runs():
        runs.setdefault(dtype, {})[str(seed)] = _facts(plan, dtype, seed)
    return {
        "dataset": lifecycle.cases.name,
        "command": command,
        "device_name": device_name(trainer.precision.device),
        "versions": summary["versions"],
        "steps": summary["steps"],
        "margin": plan.margin,
        "seeds": plan.seeds,
        "control_seeds": plan.control_seeds,
        "num_cases": len(persons),
        "num_persons": len(set(persons.values())),
        "classes": {
            name: compare(variant, reference, persons, plan.margin)
            if variant
            else stopped(reference)
            for name, variant in compared.items()
        },
        "fixed_batch": measure(trainer, {name: PRECISIONS[name] for name in names}, last),
        "runs": runs,
    }


def _facts(plan: Plan, dtype: str, seed: int) -> dict[str, Any]:
    """Of one run, for the record."""
    summary = plan.read(dtype, seed, "summary.json")
    if summary is None:
        reason = plan.read(dtype, seed, "stopped.json")["reason"]
        return {"skipped_steps": "stopped", "stopped": reason}
    return {key: summary[key] for key in ("last_mean_dice", "skipped_steps", "wall_time_s")}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no run is left behind
    sys.exit(main())
