"""The report of a run: `report/index.html` in its directory, for people, in one file.

It is made from the run directory alone, and whatever is missing there is said in a sentence.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import replace_file
from pipeline.reporting import figures, page
from pipeline.reporting.run_files import SPLITS, Run, read_run
from pipeline.reporting.score_figures import overview, split_section

MOST_SKIPPED = 20  # lines of the table; overflow.jsonl has all of them
NONE = "\N{EN DASH}"  # where nothing is known
LINKS = {
    "scores": "Scores",
    "training": "Training",
    "precision": "Precision and hardware",
    "skipped": "Skipped steps",
    "plan": "Plan",
    "reproduce": "Reproduce",
}


def write_report(run_dir: str | Path) -> Path:
    """Write the report of a run, whole or not at all.

    Args:
        run_dir: Of a run, finished or not.

    Returns:
        Path of the page.

    Raises:
        InputError: If it is no run directory.
        OSError: If the page cannot be written; one that was there is then as it was.
    """
    content = render(read_run(run_dir))
    path = Path(run_dir) / "report" / "index.html"
    path.parent.mkdir(exist_ok=True)
    with replace_file(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return path


def render(run: Run) -> str:
    """The page as HTML."""
    splits = [scores for split in SPLITS if (scores := run.best_scores(split))]
    none = "There are no scores: the run has not ended, or its folder scores/ is not there."
    sections = [
        page.section("scores", "Scores", overview(run) if splits else page.missing(none)),
        *(split_section(run, scores) for scores in splits),
        training_section(run),
        precision_section(run),
        skipped_section(run),
        plan_section(run),
        command_section(run),
    ]
    name = run.directory.resolve().name
    footer = "<footer>Research software; not a medical device.</footer>"
    return page.page(f"Report of {name}", "\n".join([_header(run, name), *sections, footer]))


def _header(run: Run, name: str) -> str:
    summary = run.summary
    facts = {
        "Best mean Dice": _number(summary.get("best_mean_dice"), ".3f"),
        "at epoch": _number(summary.get("best_epoch"), "d"),
        "Optimizer steps": _number(summary.get("steps"), ",d"),
        "Skipped steps": _number(summary.get("skipped_steps"), ",d"),
        "Precision in force": summary.get("effective", {}).get("dtype", NONE),
        "Training time": _duration(summary.get("wall_time_s")),
    }
    key = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(str(value))}</dd></div>"
        for what, value in facts.items()
    )
    nav = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in LINKS.items())
    unfinished = "" if summary else page.missing("This run has not ended: it has no summary.json.")
    dataset = Path(str(run.config.get("dataset_dir", ""))).name
    return (
        f'<header>\n<h1>{escape(name)}</h1>\n<p class="muted">Training run on the dataset '
        f'{escape(dataset)}</p>\n{unfinished}<dl class="key">{key}</dl>\n'
        f'<nav aria-label="Parts of this report">{nav}</nav>\n</header>'
    )


def training_section(run: Run) -> str:
    """Curves over optimizer steps."""
    curves, skipped = run.curves, run.skipped_steps
    if not curves:
        nothing = page.missing("There are no curves: the run has no event files in tensorboard/.")
        return page.section("training", "Training", nothing)
    drawn = [(figures.loss(curves, skipped), "Training loss, as logged and smoothed")]
    said = []
    if "val/mean_dice" in curves:
        title = "Dice at each validation during training, by class"
        drawn.append((figures.dice(curves, run.class_names), title))
    else:
        said.append(page.missing("There was no validation during training, hence no Dice."))
    if (curves.get("AMP/loss_scale", np.ones((1, 2)))[:, 1] != 1).any():
        title = "Loss scale, which is halved at each skipped step"
        drawn.append((figures.loss_scale(curves, skipped), title))
    else:
        mode = run.summary.get("effective", {}).get("dtype", "this precision")
        said.append(page.missing(f"There is no curve of the loss scale: {mode} needs none."))
    drawn.append((figures.learning_rate(curves), "Learning rate"))
    shown = "".join(page.drawing(figure, f"{title}.", f"{title}.") for figure, title in drawn)
    return page.section("training", "Training", f'<div class="figures">{shown}</div>', *said)


def precision_section(run: Run) -> str:
    """What was asked for, what is in force, and on what."""
    summary, title = run.summary, LINKS["precision"]
    requested, effective = summary.get("requested", {}), summary.get("effective", {})
    if not summary:
        nothing = page.missing("Not known: the run has no summary.json.")
        return page.section("precision", title, nothing)
    asked = f"mixed, {requested.get('amp_dtype')}" if requested.get("amp") else "float32"
    sentence = ""
    if requested.get("amp") and effective.get("dtype") == "float32":
        sentence = page.text(
            f"Mixed precision was asked for; on {effective.get('device')} this is float32, without "
            "autocast and loss scaling."
        )
    timed = [_word(settings.get("cudnn_benchmark")) for settings in (requested, effective)]
    rows = [
        ["Device", requested.get("device", NONE), effective.get("device", NONE)],
        ["Precision", asked, effective.get("dtype", NONE)],
        ["Loss scaling", "as the precision needs", _word(effective.get("loss_scaling"))],
        ["TF32", _word(requested.get("tf32")), _word(effective.get("tf32"))],
        ["cuDNN times its algorithms", *timed],
        ["Compiled", requested.get("cuda_graph", NONE), effective.get("cuda_graph", NONE)],
        ["Loss", requested.get("loss_backend", NONE), effective.get("loss_backend", NONE)],
        [
            "Memory layout",
            requested.get("memory_format", NONE),
            effective.get("memory_format", NONE),
        ],
    ]
    in_force = page.table(["Setting", "Asked for", "In force"], rows)
    return page.section("precision", title, sentence, in_force, _facts(summary))


def _facts(summary: Mapping[str, Any]) -> str:
    peak = summary.get("peak_memory_bytes")
    facts = {
        "Hardware": summary.get("device_name", NONE),
        "Peak memory of the device": f"{peak / 2**30:.2f} GiB" if peak else "not measured",
        "Parameters of the network": _number(summary.get("num_parameters"), ",d"),
        **{f"Version of {name}": v for name, v in summary.get("versions", {}).items()},
        "Hash of the dataset": summary.get("dataset_hash", NONE),
        "Hash of the config": summary.get("config_hash", NONE),
    }
    return page.table(["Fact", "Value"], facts.items())


def skipped_section(run: Run) -> str:
    """Steps that were not applied, and what the flight recorder found."""
    records, summary = run.skipped, run.summary
    count = summary.get("skipped_steps", len(records))
    steps = f" of {summary['steps']:,}" if "steps" in summary else ""
    if not count and not records:
        return page.section("skipped", "Skipped steps", page.text("No step was skipped."))
    sentence = page.text(
        f"{count:,}{steps} steps were skipped, since a number in them was not finite; weights, "
        "optimizer and learning rate stayed as they were."
    )
    rows = [
        [
            record["step"],
            record.get("epoch", NONE),
            figures.shown_scale(record.get("loss_scale", 1)),
            record.get("first_module") or NONE,
            record.get("stage") or NONE,
            ", ".join(map(str, record.get("non_finite_cases") or [])) or NONE,
        ]
        for record in records[:MOST_SKIPPED]
    ]
    head = ["Step", "Epoch", "Loss scale", "First not finite in", "Stage", "Cases not finite"]
    more = len(records) - len(rows)
    rest = page.text(f"{more:,} more stand in overflow.jsonl.") if more > 0 else ""
    return page.section(
        "skipped", "Skipped steps", sentence, page.table(head, rows, numbers=(1, 2)), rest
    )


def plan_section(run: Run) -> str:
    """Values that were decided from the dataset, and why."""
    reasons = run.plan.get("reasons", {})
    if not reasons:
        return page.section("plan", "Plan", page.missing("The run has no plan.json."))
    rows = [[key, _value(run.plan.get(key)), reason] for key, reason in reasons.items()]
    return page.section("plan", "Plan", page.table(["Key", "Value", "Reason"], rows))


def command_section(run: Run) -> str:
    """Commands that make the run again."""
    parts = []
    if command := run.summary.get("command"):
        words = command if isinstance(command, str) else shlex.join(command)
        parts += [page.text("As it was typed:"), f"<pre><code>{escape(words)}</code></pre>"]
    here = shlex.quote(str(run.directory))
    again = f"cd {here} && PYTHONPATH=<repo> python -m pipeline.run configs/train.json"
    parts += [
        page.text(
            "From this directory alone, into a new one beside it (<repo> stands for the folder of "
            "the code, and the dataset must lie where it lay):"
        ),
        f"<pre><code>{escape(again)}</code></pre>",
    ]
    return page.section("reproduce", "Reproduce", *parts)


def _word(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, NONE)


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else NONE


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _value(value: Any) -> str:
    """JSON with numbers as people read them."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return f"{value:.5g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
