"""The main job: `python -m pipeline.run configs/amp.json [more.json ...] [--key value ...]`.

Checks the config, then hands the same files and overrides to MONAI's bundle workflow, so that it
does exactly what `python -m monai.bundle run` does. With `--replay_step N` it trains nothing, but
looks again for what was not finite in a skipped step of the run that is there. `--allow NAME` lets
`_target_` hold a name that is not on the list; see `pipeline.trust`.

Exit status: 0 done (or done before), 1 a failure, 2 a mistake in input or config.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pipeline import config, trust
from pipeline.compose import compose, parse_overrides
from pipeline.doctor import diagnosis
from pipeline.errors import InputError

USAGE = (
    "usage: python -m pipeline.run CONFIG.json [MORE.json ...] [--key value ...] [--allow NAME] "
    "[--replay_step N]"
)
LOGGING = Path(__file__).resolve().parents[1] / "configs" / "logging.conf"


def main(words: Sequence[str] | None = None) -> int:
    """Run a config; returns the exit status.

    Args:
        words: The command line after the command, by default this process's.
    """
    files, rest = split_words(list(sys.argv[1:] if words is None else words))
    try:
        allow, rest = trust.split_allow(rest)
        if "--help" in rest or "-h" in rest:
            print(help_text(compose(files or ["configs/amp.json"], {}, allow)))
            return 0
        if not files:
            raise InputError(f"command line: expected a config file, got none. {USAGE}")
        overrides = parse_overrides(rest)
        replaying, step = "replay_step" in overrides, overrides.pop("replay_step", None)
        diagnosis.check(files, overrides, allow, training=True)
        if replaying:
            print(json.dumps(replay(files, overrides, step, allow), indent=2))
        else:
            run_workflow(files, overrides, allow)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Config files, which come first, and the options after them."""
    first_key = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first_key], words[first_key:]


def run_workflow(
    files: Sequence[str], overrides: config.Config, allow: Collection[str] = ()
) -> None:
    """Initialize, run and finalize the config as a MONAI bundle workflow.

    Raises:
        InputError: If the config says what configs may not say, or an object of it refuses its
            arguments.
    """
    from pipeline.training.signals import interruptible_at_once

    with interruptible_at_once():
        workflow = _workflow(files, overrides, allow)
        try:
            workflow.initialize()
            _trainer(workflow)
            workflow.run()
            workflow.finalize()
        finally:
            workflow.parser.get_parsed_content("lifecycle").release()


def open_run(
    files: Sequence[str], overrides: config.Config, allow: Collection[str] = ()
) -> tuple[Any, Any]:
    """Lifecycle and trainer of a run that is there, without handlers: nothing is written.

    Raises:
        InputError: If the run is not there or is another one, or an object refuses its arguments.
    """
    workflow = _workflow(files, {**overrides, "initialize": [], "train#handlers": []}, allow)
    workflow.initialize()
    lifecycle = workflow.parser.get_parsed_content("lifecycle")
    lifecycle.look()
    return lifecycle, _trainer(workflow)


def replay(
    files: Sequence[str], overrides: config.Config, step: object, allow: Collection[str] = ()
) -> dict[str, Any]:
    """Replay a skipped step of the run that the config names; see `recorder.replay_kept`.

    Raises:
        InputError: If there is no such run or step.
    """
    if type(step) is not int:
        raise InputError(f"--replay_step: expected the number of a skipped step, got {step!r}.")
    from pipeline.training.recorder import replay_kept

    lifecycle, trainer = open_run(files, overrides, allow)
    return replay_kept(trainer, lifecycle.run_dir, step)


def _workflow(files: Sequence[str], overrides: config.Config, allow: Collection[str]) -> Any:
    # imported here, so that a mistake on the command line is answered at once
    from monai.bundle import ConfigWorkflow

    # it warns of files in more than one folder, which is how an overlay of one's own is meant
    logging.getLogger(ConfigWorkflow.__module__).setLevel(logging.ERROR)
    # a logging.conf beside the config could name files to write, and modules there would come
    # before Python's own: neither is data
    logs = str(LOGGING) if LOGGING.is_file() else False
    workflow = ConfigWorkflow(list(files), logging_file=logs, workflow_type="train", **overrides)
    workflow.config_root_path = Path()
    trust.check(workflow.parser.get(), allow)  # what MONAI has read, metadata.json included
    return workflow


def _trainer(workflow: Any) -> Any:
    """The config's trainer; what one of its objects refuses is a mistake of the user's."""
    try:
        return workflow.parser.get_parsed_content("train::trainer")
    except (RuntimeError, ValueError) as error:
        raise InputError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """What the innermost exception says, without the config system's wrapping."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def help_text(source: config.Config) -> str:
    """Usage and, for each top-level key, its value in `source` and its meaning."""
    width = max(map(len, config.KEYS))
    lines = [USAGE, "", "Top-level keys, their values here, and what they mean:", ""]
    for key, spec in config.KEYS.items():
        value = source.get(key)
        plain = not isinstance(value, (dict, list)) or len(json.dumps(value)) < 30
        shown = json.dumps(value) if plain else "{...}" if isinstance(value, dict) else "[...]"
        lines.append(f"  --{key:<{width}}  {shown:<28}  {spec.meaning}")
    lines += ["", "Parts of objects are named with #: --train#trainer#max_epochs 3"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
