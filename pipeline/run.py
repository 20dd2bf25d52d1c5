"""Train, or go on training; `python -m pipeline.run` is the same command.

Configs are merged in order, over configs/amp.json where they are only a part of one. A config that
predicts or evaluates is run as well. Without a dataset, one is made: data/phantom.

Exit status: 0 done (or done before), 1 a failure, 2 a mistake in input or config, 75 interrupted by
a signal, to be continued by the same command.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from pipeline.config import command_line, keys, old_names
from pipeline.config.command_line import CommandParser
from pipeline.config.compose import Composed, compose_located, find_config
from pipeline.config.old_names import INFERENCE, read_inference_config
from pipeline.errors import InputError, find_path_fault, refuse, require_path

AMP = "configs/amp.json"
PATHS = ("run_dir", "ensemble", "input", "dataset_dir", "output_dir")  # of the command line
COMMON = (
    "dataset_dir", "output_dir", "time_budget", "max_epochs", "steps_per_epoch", "batch_size",
    "roi_size", "base_channels", "learning_rate", "fold", "group_pattern", "seed", "device",
    "num_workers", "resume", "init_weights",
)  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Run a config; return the exit status. By default `words` are this process's command line."""
    table = {**keys.KEYS, **keys.PREDICTION_KEYS, **keys.KEYS}  # first those of training
    table["run_dir"] = keys.Key("path list[path]", keys.FREE, "run or bundle to predict with")
    words_shown = "[CONFIG.json ...] [--dataset_dir DATASET_DIR] [--key value ...]"
    parser = CommandParser("train", __doc__, words_shown, table, COMMON, "amp.json")
    parser.add_argument("configs", metavar="CONFIG.json", nargs="*", help=f"none: {AMP}")
    step = "look again at step N, which was skipped, of the run that is there"
    parser.add_argument("--replay_step", type=int, metavar="N", help=step)
    return command_line.run_parsed(
        parser, words, lambda o: run_config(o.configs, o.overrides, o.allow, o.replay_step)
    )


def run_config(
    files: Sequence[str],
    overrides: keys.Config,
    allow: Collection[str] = (),
    replayed_step: int | None = None,
) -> int:
    """Compose, check and run a config; an `InputError` is a mistake of the user.

    What can be found without torch is found first, but by one of several ranks only together.
    """
    with _sync_errors():
        composed = compose_run(files, overrides)
        trains = is_training(composed.source)
    with command_line.loading():
        from pipeline.lifecycle import workflow
    if replayed_step is None:
        workflow.run_workflow(composed, trains, allow)
        return 0
    with contextlib.redirect_stdout(sys.stderr):  # for what is logged
        found = workflow.replay(composed, replayed_step, allow)
    print(json.dumps(found, indent=2))
    return 0


def _sync_errors() -> contextlib.AbstractContextManager:
    if "RANK" not in os.environ:
        return contextlib.nullcontext()
    from pipeline import distributed

    return distributed.sync_errors()


def compose_run(files: Sequence[str], overrides: keys.Config) -> Composed:
    """Compose a config that trains or predicts; raise an `InputError` for keys and paths."""
    composed = compose_located(files if _is_whole(files) else [AMP, *files], {})
    trains = is_training(composed.source)
    if not trains and "run_dir" in overrides:
        files, overrides = insert_run(files, overrides)
        composed = compose_located(files, {})
        composed.source = old_names.translate(composed.source)
    composed.override(overrides)
    composed.check_keys(trains)
    source = composed.source
    root, dataset_dir = Path(str(source.get("bundle_root", "."))), source.get("dataset_dir")
    wanted = {} if not trains or dataset_dir == keys.PHANTOM else {"dataset_dir": "a dataset"}
    wanted |= {"init_weights": "a file of weights", "split_file": "a JSON file"} if trains else {}
    wanted |= {} if trains else {"input": "images to predict"}
    faults = []
    for key, what in wanted.items():
        value = source.get(key)
        if isinstance(value, str) and value[:1] not in keys.MARKS:
            faults.append(find_path_fault(composed.place((key,)) or key, root / value, what))
    refuse(filter(None, faults))
    return composed


def _is_whole(files: Sequence[str]) -> bool:
    """Return whether the first file is a whole config, and not only a part of one."""
    with contextlib.suppress(OSError, ValueError):
        source = json.loads(find_config(files[0]).read_text()) if files else {}
        return "lifecycle" in source or not is_training(source)
    return bool(files)  # `compose_located` says what is wrong with it


def is_training(source: keys.Config) -> bool:
    """Return whether a config trains; else it predicts."""
    predicts = not {"prediction", "evaluator"}.isdisjoint(source)
    return not predicts or not {"train", "lifecycle"}.isdisjoint(source)


def insert_run(files: Sequence[str], overrides: keys.Config) -> tuple[list[str], keys.Config]:
    """Give an inference config the values of the run that `--run_dir` names, or of an ensemble.

    Paths of the command line start from the working directory, those of the run from its own.
    """
    paths = {key: overrides[key] for key in PATHS if key in overrides}
    for key, value in paths.items():
        several = paths[key] = value if isinstance(value, list) else [value]
        is_one = len(several) == 1 or key in ("run_dir", "ensemble")
        if not (several and is_one and all(isinstance(path, str) for path in several)):
            raise InputError(f"--{key}: expected a path, got {json.dumps(value)}. Quote it.")
    first, *others = paths.pop("run_dir")
    weights = overrides.get("weights") or read_inference_config(first).get("weights", "")
    where, expected = "--weights" if "weights" in overrides else "run_dir", "trained weights"
    require_path(where, Path(first, str(weights)), expected)
    members = [*others, *paths.pop("ensemble", [])]
    values = {key: value for key, value in overrides.items() if key not in PATHS}
    values |= {key: os.path.abspath(path) for key, (path,) in paths.items()}
    if members:
        values["ensemble"] = [os.path.abspath(member) for member in members]
    values["bundle_root"] = os.path.abspath(first)
    return [files[0], str(Path(first, INFERENCE)), *files[1:]], values


if __name__ == "__main__":
    sys.exit(main())
