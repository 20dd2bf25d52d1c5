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

from pipeline.config.command_line import CommandParser, loading, run_parsed
from pipeline.config.old_names import read_inference_config
from pipeline.errors import InputError, require_path

FORMATS = ("torchscript", "onnx", "torch_export")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; `words` are those after it, or this process's."""
    parser = CommandParser("export", __doc__, "RUN [--output_dir DIR]")
    add = parser.add_argument
    add("run_dir", metavar="RUN", type=Path, help="run directory")
    add("--output_dir", "--output", metavar="DIR", type=Path, help="default: <RUN>_bundle")
    add("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    allowed = "class that configs may name"
    add("--allow", action="append", default=[], metavar="NAME", help=allowed)
    return run_parsed(parser, words, _run)


def _run(options: argparse.Namespace) -> int:
    read_inference_config(options.run_dir)
    require_path("RUN", options.run_dir / "models" / "model.pt", "the best network of a run")
    with loading():
        from pipeline.bundle.package import export_run
        from pipeline.reporting.model_card import render_model_card

    run_dir = options.run_dir.absolute()
    output = options.output_dir or run_dir.with_name(f"{run_dir.name}_bundle")
    try:
        facts = export_run(run_dir, output, render_model_card, options.formats, options.allow)
    except OSError as error:
        expected = "--output_dir: expected a folder that can be written"
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
