"""The main job: `python -m pipeline.run configs/amp.json [more.json ...] [--key value ...]`.

`initialize`, `run` and `finalize` are evaluated as `python -m monai.bundle run` does.
Exit status: 0 done (or done before), 1 a failure, 2 a mistake in input or config.
"""

from __future__ import annotations

import contextlib
import json
import logging.config
import os
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pipeline import distributed
from pipeline.config import allowed, keys, old_names, validate
from pipeline.config.compose import Composed, Parser, Resolver, compose_located, parse_overrides
from pipeline.errors import InputError, describe_failure, innermost, print_failure

USAGE = (
    "usage: python -m pipeline.run CONFIG.json [MORE.json ...] [--key value ...] [--allow NAME] "
    "[--replay_step N] [--run_dir RUN]"
)
PATHS = ("run_dir", "ensemble", "input", "dataset_dir", "output_dir")  # of the command line
LOGGING = Path(__file__).resolve().parents[1] / "configs" / "logging.conf"


def main(words: Sequence[str] | None = None) -> int:
    """Run a config; return the exit status. By default `words` are this process's command line."""
    files, rest = split_words(list(sys.argv[1:] if words is None else words))
    try:
        with distributed.sync_errors():
            allow, rest = allowed.split_allow(rest)
            if "--help" in rest or "-h" in rest:
                print(help_text(compose_located(files or ["configs/amp.json"], {}).source))
                return 0
            if not files:
                raise InputError(f"command line: expected a config file, got none. {USAGE}")
            overrides = parse_overrides(rest)
            composed = compose_located(files, {})
            trains = is_training(composed.source)
            if not trains and "run_dir" in overrides:
                files, overrides = insert_run(files, overrides)
                composed = compose_located(files, {})
                composed.source = old_names.translate(composed.source)
            step = overrides.pop("replay_step", None) if trains else None
            if step is not None and distributed.size() > 1:
                raise InputError("--replay_step: expected one process, got several. Use python.")
            composed.override(overrides)
            validate.check_config(composed, allow, training=trains)
        if step is not None:
            with contextlib.redirect_stdout(sys.stderr):  # for what is logged
                found = replay(composed, step)
            print(json.dumps(found, indent=2))
        else:
            run_workflow(composed, trains)
    except InputError as error:
        error.tell()
        return 2
    except KeyboardInterrupt:  # of a prediction; training ends by itself
        if distributed.is_main():
            print("Interrupted.", file=sys.stderr)
        return 130
    return 0


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the config files, which come first, and the options."""
    first_key = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first_key], words[first_key:]


def is_training(source: keys.Config) -> bool:
    """Return whether a config trains; else it predicts."""
    predicts = not {"prediction", "evaluator"}.isdisjoint(source)
    return not predicts or not {"train", "lifecycle"}.isdisjoint(source)


def insert_run(files: Sequence[str], overrides: keys.Config) -> tuple[list[str], keys.Config]:
    """Give an inference config the values of the run that `--run_dir` names, or of an ensemble.

    Paths of the command line start from the working directory, those of the run from its own.
    """
    from pipeline.prediction.predictor import CONFIG, read_inference_config

    paths = {key: overrides[key] for key in PATHS if key in overrides}
    for key, value in paths.items():
        several = paths[key] = value if isinstance(value, list) else [value]
        is_one = len(several) == 1 or key in ("run_dir", "ensemble")
        if not (several and is_one and all(isinstance(path, str) for path in several)):
            raise InputError(f"--{key}: expected a path, got {json.dumps(value)}. Quote it.")
    first, *others = paths.pop("run_dir")
    read_inference_config(first)
    members = [*others, *paths.pop("ensemble", [])]
    values = {key: value for key, value in overrides.items() if key not in PATHS}
    values |= {key: os.path.abspath(path) for key, (path,) in paths.items()}
    if members:
        values["ensemble"] = [os.path.abspath(member) for member in members]
    values["bundle_root"] = os.path.abspath(first)
    return [files[0], str(Path(first, CONFIG)), *files[1:]], values


def make_parser(composed: Composed) -> Parser:
    """Make the parser that evaluates a checked config, and hand that config to its lifecycle."""
    # a logging.conf beside the config could name files to write
    if LOGGING.is_file():
        logging.config.fileConfig(LOGGING, disable_existing_loggers=False)
    parser = Parser(deepcopy(composed.source))
    parser.resolve_macro_and_relative_ids()
    if isinstance(parser.get("lifecycle"), dict):
        parser["lifecycle#config"] = Composed(deepcopy(parser.get()), composed.places)
    return parser


def build(parser: Parser, name: str) -> Any:
    """Make an object of a config; raise an `InputError` if arguments are refused."""
    try:
        return parser.get_parsed_content(name)
    except Exception as error:
        cause = innermost(error)
        if isinstance(cause, InputError):
            raise cause from None
        if isinstance(cause, (ValueError, TypeError)):
            said = " ".join(str(cause).split())
            raise InputError(said if ": expected " in said else describe_failure(error)) from error
        raise


def run_workflow(composed: Composed, trains: bool = True) -> None:
    """Initialize, run and finalize a checked config; a failure is printed and exits with 1."""
    from pipeline.signals import interruptible_at_once

    parser, lifecycle = make_parser(composed), None
    with interruptible_at_once() if trains else contextlib.nullcontext():
        try:
            with distributed.sync_errors():
                if trains:
                    lifecycle = build(parser, "lifecycle")
                parser.evaluate("initialize")
                for step in composed.source.get("run", []):
                    for name in Resolver.match_refs_pattern(step):
                        build(parser, name)
            parser.evaluate("run")
            parser.evaluate("finalize")
        except Exception as error:
            if isinstance(cause := innermost(error), InputError):
                raise cause from None
            log_file = lifecycle.directory.log_file if lifecycle and lifecycle.is_held else None
            raise SystemExit(print_failure(error, log_file)) from None
        finally:
            if lifecycle:
                lifecycle.release()


def replay(composed: Composed, step: object) -> dict[str, Any]:
    """Replay a skipped step of the run that is there; raise an `InputError` if it is not."""
    if type(step) is not int:
        raise InputError(f"--replay_step: expected the number of a skipped step, got {step!r}.")
    from pipeline.training.flight_recorder import replay_kept

    composed.override({"initialize": [], "train#handlers": []})
    parser = make_parser(composed)
    lifecycle = build(parser, "lifecycle")
    lifecycle.open_stored_run()
    return replay_kept(build(parser, "train::trainer"), lifecycle.run_dir, step)


def help_text(source: keys.Config) -> str:
    """Usage and, for each top-level key, its value in `source` and its meaning."""
    known = keys.KEYS if "train" in source else {**keys.KEYS, **keys.PREDICTION_KEYS}
    table = {key: spec for key, spec in known.items() if key in source or known is keys.KEYS}
    width = max(map(len, table))
    lines = [USAGE, "", "Top-level keys, their values here, and what they mean:", ""]
    for key, spec in table.items():
        lines.append(f"  --{key:<{width}}  {json.dumps(source.get(key)):<28.28}  {spec.meaning}")
    lines += ["", "Parts of objects are named with #: --train#trainer#max_epochs 3"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
