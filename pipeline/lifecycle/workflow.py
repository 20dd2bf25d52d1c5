"""Evaluates a config: `initialize`, `run` and `finalize`, as `python -m monai.bundle run` does."""

from __future__ import annotations

import contextlib
import logging.config
from collections.abc import Collection
from copy import deepcopy
from typing import Any

from pipeline import distributed
from pipeline.config import validate
from pipeline.config.compose import Composed
from pipeline.config.keys import CONFIGS
from pipeline.config.parser import Parser, Resolver
from pipeline.errors import InputError, describe_failure, innermost, print_failure, require
from pipeline.signals import interruptible_at_once
from pipeline.training.flight_recorder import replay_kept


def make_parser(composed: Composed) -> Parser:
    """Make the parser that evaluates a checked config, and hand that config to its lifecycle."""
    # a logging.conf beside the config could name files to write
    logging.config.fileConfig(CONFIGS / "logging.conf", disable_existing_loggers=False)
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


def run_workflow(composed: Composed, trains: bool, allow: Collection[str] = ()) -> None:
    """Check and evaluate a config; a failure is printed and exits with 1."""
    with distributed.sync_errors():
        validate.check_config(composed, allow, training=trains)
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


def replay(composed: Composed, step: int, allow: Collection[str] = ()) -> dict[str, Any]:
    """Replay a skipped step of the run that is there; raise an `InputError` if it is not."""
    with distributed.sync_errors():
        is_one = distributed.size() == 1
        require(is_one, "--replay_step", "one process", "several", "Use python.")
        validate.check_config(composed, allow)
    composed.override({"initialize": [], "train#handlers": []})
    parser = make_parser(composed)
    lifecycle = build(parser, "lifecycle")
    lifecycle.open_stored_run()
    return replay_kept(build(parser, "train::trainer"), lifecycle.run_dir, step)
