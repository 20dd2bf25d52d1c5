"""Export a run as a MONAI bundle that predicts and evaluates without this repository.

The folder, and a zip beside it, gets configs, weights, the formats, the model card and the packed
code, without paths and case ids. The logits of each format are compared with the network's;
`export.json` has the figures. `onnx` needs the packages of the extra `export`.

Exit status: 0 done, 1 a format could not be made (the rest is there), 2 a mistake in the input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.commands.command import CommandParser, run_parsed
from pipeline.errors import InputError


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; `words` are those after it, or this process's."""
    parser = CommandParser("export", __doc__)
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--output", metavar="DIR", type=Path, help="default: <RUN>_bundle")
    formats = ("torchscript", "onnx", "torch_export")
    parser.add_argument("--formats", nargs="+", choices=formats, default=formats)
    allowed = "class that configs may name"
    parser.add_argument("--allow", action="append", default=[], metavar="NAME", help=allowed)
    return run_parsed(parser, words, _run)


def _run(options: argparse.Namespace) -> int:
    from pipeline.bundle.package import export_run
    from pipeline.config import allowed
    from pipeline.reporting.model_card import render_model_card

    allow, _ = allowed.split_allow([f"--allow={name}" for name in options.allow])
    run_dir = options.run_dir.absolute()
    output = options.output or run_dir.with_name(f"{run_dir.name}_bundle")
    try:
        facts = export_run(run_dir, output, render_model_card, options.formats, allow)
    except OSError as error:
        expected = "--output: expected a folder that can be written"
        raise InputError(f"{expected}, got: {error}. Choose another.") from None
    code, formats = facts["code"], facts["formats"]
    print(f"Package {code['package']}: {code['num_modules']} modules")
    for name, of in formats.items():
        if of["made"]:
            print(f"{name}: {of['bytes']:,} bytes, logits differ by {of['max_abs_difference']:.1e}")
        else:
            print(f"{name}: not made: {of['reason']}", file=sys.stderr)
    print(f"Written: {output} and {output}.zip", flush=True)
    return 0 if all(of["made"] for of in formats.values()) else 1
