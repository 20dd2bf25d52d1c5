"""The main job: `python -m pipeline.run configs/amp.json [more.json ...] [--key value ...]`.

Checks the config, then hands the same files and overrides to MONAI's bundle workflow, so that it
does exactly what `python -m monai.bundle run` does.

Exit status: 0 done (or done before), 1 a failure, 2 a mistake in input or config.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from pipeline import config
from pipeline.errors import InputError

USAGE = "usage: python -m pipeline.run CONFIG.json [MORE.json ...] [--key value ...]"


def main(words: Sequence[str] | None = None) -> int:
    """Run a config; returns the exit status.

    Args:
        words: The command line after the command, by default this process's.
    """
    words = list(sys.argv[1:] if words is None else words)
    first_key = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
    files, rest = words[:first_key], words[first_key:]
    try:
        if "--help" in rest or "-h" in rest:
            print(help_text(config.compose(files or ["configs/amp.json"], {})))
            return 0
        if not files:
            raise InputError(f"command line: expected a config file, got none. {USAGE}")
        overrides = config.parse_overrides(rest)
        config.check(config.compose(files, overrides))
        run_workflow(files, overrides)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run_workflow(files: Sequence[str], overrides: config.Config) -> None:
    """Initialize, run and finalize the config as a MONAI bundle workflow.

    Raises:
        InputError: If an object of the config refuses its arguments.
    """
    # imported here, so that a mistake on the command line is answered at once
    from monai.bundle import ConfigWorkflow

    workflow = ConfigWorkflow(list(files), workflow_type="train", **overrides)
    try:
        workflow.initialize()
        try:
            workflow.parser.get_parsed_content("train::trainer")
        except (RuntimeError, ValueError) as error:
            raise InputError(_reason(error)) from error
        workflow.run()
        workflow.finalize()
    finally:
        workflow.parser.get_parsed_content("lifecycle").release()


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
