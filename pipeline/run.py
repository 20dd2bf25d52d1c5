"""The main job: `python -m pipeline.run configs/amp.json [more.json ...] [--key value ...]`.

An inference config predicts, with the values of the run that `--run_dir RUN` names.

Checks the config, then hands the same files and overrides to MONAI's bundle workflow, so that it
does exactly what `python -m monai.bundle run` does. With `--replay_step N` it trains nothing, but
looks again for what was not finite in a skipped step of the run that is there. `--allow NAME` lets
`_target_` hold a name that is not on the list; see `pipeline.config.allowed`.

Exit status: 0 done (or done before), 1 a failure, 2 a mistake in input or config.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pipeline import distributed
from pipeline.config import allowed, keys, old_names, validate
from pipeline.config.compose import compose, compose_located, parse_overrides
from pipeline.config.parser import Parser
from pipeline.errors import InputError, innermost

USAGE = (
    "usage: python -m pipeline.run CONFIG.json [MORE.json ...] [--key value ...] [--allow NAME] "
    "[--replay_step N] [--run_dir RUN]"
)
PATHS = ("run_dir", "ensemble", "input", "dataset_dir", "output_dir")  # of the command line
LOGGING = Path(__file__).resolve().parents[1] / "configs" / "logging.conf"


def main(words: Sequence[str] | None = None) -> int:
    """Run a config; returns the exit status.

    Args:
        words: The command line after the command, by default this process's.
    """
    files, rest = split_words(list(sys.argv[1:] if words is None else words))
    try:
        with distributed.sync_errors():
            allow, rest = allowed.split_allow(rest)
            if "--help" in rest or "-h" in rest:
                source = compose(files or ["configs/amp.json"], {}, allow)
                print(help_text(source))
                return 0
            if not files:
                raise InputError(f"command line: expected a config file, got none. {USAGE}")
            overrides = parse_overrides(rest)
            trains = is_training(files)
            if not trains:
                files, overrides = in_run(files, overrides)
            replaying = trains and "replay_step" in overrides
            step = overrides.pop("replay_step") if replaying else None
            composed = compose_located(files, overrides, allow)
            validate.check(composed, allow, training=trains)
            if replaying and distributed.size() > 1:
                raise InputError("--replay_step: expected one process, got several. Use python.")
        if not trains:
            predict(files, overrides, allow)
        elif replaying:
            print(json.dumps(replay(files, overrides, step, allow), indent=2))
        else:
            run_workflow(files, overrides, allow)
    except InputError as error:
        error.tell()
        return 2
    except KeyboardInterrupt:  # of a prediction; training ends by itself
        if distributed.is_main():
            print("Interrupted.", file=sys.stderr)
        return 130
    return 0


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Config files, which come first, and the options after them."""
    first_key = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first_key], words[first_key:]


def run_workflow(files: Sequence[str], overrides: keys.Config, allow: Collection[str] = ()) -> None:
    """Initialize, run and finalize the config as a MONAI bundle workflow.

    Raises:
        InputError: If the config says what configs may not say, or an object of it refuses its
            arguments.
    """
    from pipeline.training.signals import interruptible_at_once

    with interruptible_at_once():
        workflow = _workflow(files, overrides, allow)
        try:
            with distributed.sync_errors():
                workflow.initialize()
                evaluates = "@validate::evaluator.run(" in str(workflow.parser.get("run"))
                _content(workflow, "validate::evaluator" if evaluates else "train::trainer")
            workflow.run()
            workflow.finalize()
        finally:
            workflow.parser.get_parsed_content("lifecycle").release()


def is_training(files: Sequence[str]) -> bool:
    """Whether a config trains; else it predicts.

    Raises:
        InputError: If a file cannot be read.
    """
    source = compose_located(files, {}).source
    return not {"train", "lifecycle"}.isdisjoint(source) or not {"prediction", "evaluator"} & {
        *source
    }


def in_run(files: Sequence[str], overrides: keys.Config) -> tuple[list[str], keys.Config]:
    """An inference config with the values of the run that `--run_dir` names.

    Args:
        files: An inference config, and files that are merged over it.
        overrides: Of the command line; `run_dir` may be a list, of an ensemble.

    Returns:
        The files, that of the run after the first, and the overrides for it. Paths of the command
        line start from the working directory, those of the run from its own.

    Raises:
        InputError: If there is no run.
    """
    if "run_dir" not in overrides:
        return [*files], overrides
    from pipeline.prediction.predictor import CONFIG, read_inference_config

    paths = {key: _words(key, overrides[key]) for key in PATHS if key in overrides}
    first, *others = paths.pop("run_dir")
    read_inference_config(first)
    values = {key: value for key, value in overrides.items() if key not in PATHS}
    values |= {key: os.path.abspath(path) for key, (path, *_) in paths.items() if key != "ensemble"}
    if members := [*others, *paths.get("ensemble", [])]:
        values["ensemble"] = [os.path.abspath(other) for other in members]
    own = str(Path(first, CONFIG))
    return [files[0], own, *files[1:]], {**values, "bundle_root": os.path.abspath(first)}


def _words(key: str, value: Any) -> list[str]:
    """One path, or several where there may be."""
    several = value if isinstance(value, list) and key in ("run_dir", "ensemble") else [value]
    if not several or not all(isinstance(one, str) for one in several):
        raise InputError(f"--{key}: expected a path, got {json.dumps(value)}. Quote it.")
    return several


def predict(files: Sequence[str], overrides: keys.Config, allow: Collection[str] = ()) -> None:
    """Run an inference config as a MONAI bundle workflow.

    Raises:
        InputError: If there is a mistake in the config, or an object of it refuses its arguments.
    """
    with distributed.sync_errors():
        workflow = _workflow(files, overrides, allow, "inference")
        workflow.initialize()
        _content(workflow, "prediction")
    workflow.run()
    workflow.finalize()


def open_run(
    files: Sequence[str], overrides: keys.Config, allow: Collection[str] = ()
) -> tuple[Any, Any]:
    """Lifecycle and trainer of a run that is there, without handlers: nothing is written.

    Raises:
        InputError: If the run is not there or is another one, or an object refuses its arguments.
    """
    workflow = _workflow(files, {**overrides, "initialize": [], "train#handlers": []}, allow)
    workflow.initialize()
    lifecycle = workflow.parser.get_parsed_content("lifecycle")
    lifecycle.look()
    return lifecycle, _content(workflow, "train::trainer")


def replay(
    files: Sequence[str], overrides: keys.Config, step: object, allow: Collection[str] = ()
) -> dict[str, Any]:
    """Replay a skipped step of the run that the config names; see `recorder.replay_kept`.

    Raises:
        InputError: If there is no such run or step.
    """
    if type(step) is not int:
        raise InputError(f"--replay_step: expected the number of a skipped step, got {step!r}.")
    from pipeline.training.flight_recorder import replay_kept

    lifecycle, trainer = open_run(files, overrides, allow)
    return replay_kept(trainer, lifecycle.run_dir, step)


def _workflow(
    files: Sequence[str], overrides: keys.Config, allow: Collection[str], kind: str = "train"
) -> Any:
    # imported here, so that a mistake on the command line is answered at once
    from monai.bundle import ConfigWorkflow

    # it warns of files in more than one folder, which is how an overlay of one's own is meant
    logging.getLogger(ConfigWorkflow.__module__).setLevel(logging.ERROR)
    # a logging.conf beside the config could name files to write, and modules there would come
    # before Python's own: neither is data
    logs = str(LOGGING) if LOGGING.is_file() else False
    workflow = ConfigWorkflow(list(files), logging_file=logs, workflow_type=kind, **overrides)
    workflow.config_root_path = Path()
    workflow.parser = Parser(old_names.translate(workflow.parser.get()))  # of a stored run
    allowed.check(workflow.parser.get(), allow)  # what MONAI has read, metadata.json included
    return workflow


def _content(workflow: Any, name: str) -> Any:
    """An object of the config; what it or one that it needs refuses is a mistake of the user's."""
    try:
        return workflow.parser.get_parsed_content(name)
    except (RuntimeError, ValueError) as error:
        cause = innermost(error)
        if isinstance(cause, InputError):
            raise cause from None
        raise InputError(str(cause)) from error


def help_text(source: keys.Config) -> str:
    """Usage and, for each top-level key, its value in `source` and its meaning."""
    known = keys.KEYS if "train" in source else {**keys.KEYS, **keys.PREDICTION_KEYS}
    table = {key: spec for key, spec in known.items() if key in source or known is keys.KEYS}
    width = max(map(len, table))
    lines = [USAGE, "", "Top-level keys, their values here, and what they mean:", ""]
    for key, spec in table.items():
        value = source.get(key)
        plain = not isinstance(value, (dict, list)) or len(json.dumps(value)) < 30
        shown = json.dumps(value) if plain else "{...}" if isinstance(value, dict) else "[...]"
        lines.append(f"  --{key:<{width}}  {shown:<28}  {spec.meaning}")
    lines += ["", "Parts of objects are named with #: --train#trainer#max_epochs 3"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
