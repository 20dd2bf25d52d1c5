"""A run as a bundle that needs nothing of this repository:

    python -m pipeline export RUN [--output DIR] [--formats torchscript onnx torch_export]
        [--allow NAME]

`DIR` (`<RUN>_bundle`) gets configs, weights (also as safetensors), the formats, the model card, and
the code that they need as a package of its own; `DIR.zip` the same. Each format is read back and
compared with the PyTorch network: logits of three random inputs, and the mean Dice of the run's
validation cases if they are still there; `export.json` has the figures. No case ids, voxels, dates
of the data or paths are in it: what the data were is reset in the configs, and every file is
searched. `onnx` needs the packages of the extra `export`.

Exit status: 0 done, 1 a format could not be made (the rest is there), 2 a mistake in the input.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.bundle.contents import write_zip
from pipeline.bundle.exportable import Run
from pipeline.bundle.exported import fill
from pipeline.bundle.formats import FORMATS, Facts
from pipeline.commands.command import run_command
from pipeline.config import allowed
from pipeline.errors import InputError, nearest

USAGE = (
    "usage: python -m pipeline export RUN [--output DIR] "
    "[--formats torchscript onnx torch_export] [--allow NAME]"
)


def main(words: Sequence[str] | None = None) -> int:
    """Export a run; returns the exit status.

    Args:
        words: The command line after the command, by default this process's.
    """
    return run_command(__doc__, words, _main)


def _main(words: list[str]) -> int:
    allow, rest = allowed.split_allow(words)
    run_dir, output, formats = read_command(rest)
    try:
        facts = export(run_dir, output, formats, allow)
    except OSError as error:
        print(f"--output: expected a folder that can be written, got: {error}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; nothing was written.", file=sys.stderr)
        return 130
    print("\n".join(table(facts)))
    size = Path(f"{output}.zip").stat().st_size
    print(f"Written: {output} and {output}.zip, {size:,} bytes", flush=True)
    lost = {name: of["reason"] for name, of in facts["formats"].items() if not of["made"]}
    for name, why in lost.items():
        print(f"{name}: not made: {why}", file=sys.stderr)
    return 1 if lost else 0


def read_command(words: Sequence[str]) -> tuple[Path, Path, list[str]]:
    """The run, the output directory, and the formats.

    Raises:
        InputError: One line per mistake.
    """
    given = _by_option(words)
    runs = given.pop("")
    known = ("--output", "--formats", "--allow")
    faults = [
        f"{key}: expected a known option, got '{key}'. {nearest(key, known)}"
        for key in given
        if key not in known
    ]
    if len(runs) != 1:
        faults.append(f"command line: expected one run, got {len(runs)}. {USAGE}")
    outputs, formats = given.get("--output"), given.get("--formats", list(FORMATS))
    if outputs is not None and len(outputs) != 1:
        faults.append(f"--output: expected one folder, got {len(outputs)}. {USAGE}")
    faults += [
        f"--formats: expected a known format, got '{name}'. {nearest(name, FORMATS)}"
        for name in formats
        if name not in FORMATS
    ]
    if not formats:
        faults.append(f"--formats: expected at least one, got none. {nearest('', FORMATS)}")
    if faults:
        raise InputError(*faults)
    run_dir = Path(os.path.abspath(runs[0]))
    default = run_dir.with_name(f"{run_dir.name}_bundle")
    output = Path(os.path.abspath(outputs[0])) if outputs else default
    return run_dir, output, list(dict.fromkeys(formats))


def _by_option(words: Sequence[str]) -> dict[str, list[str]]:
    """The words after each option, those before the first under an empty name."""
    values: list[str] = []
    given = {"": values}
    for word in words:
        if word.startswith("--"):
            key, equals, value = word.partition("=")
            values = given.setdefault(key, [])
            word = value if equals else ""
        if word:
            values.append(word)
    return given


def export(run_dir: Path, output: Path, formats: Sequence[str], allow: Sequence[str] = ()) -> Facts:
    """Make a bundle of a run, and a zip of it beside it.

    Both are made under another name, in a folder beside them, and are there whole or not at all.

    Args:
        run_dir: Of the run.
        output: Of the bundle; empty or not there.
        formats: Keys of `FORMATS`.
        allow: Names that `_target_` may hold beside the list.

    Returns:
        What `export.json` says.

    Raises:
        InputError: If the run has no best network, or one that its configs or metadata contradict,
            or something of the data would leave with it, or there are files where it should go.
        OSError: If it cannot be written.
    """
    run = Run.read(run_dir, allow)
    require_free(output)
    new = [folder for folder in output.parents if not folder.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    bundle, archive, zipped = work / output.name, work / "zip", Path(f"{output}.zip")
    try:
        bundle.mkdir()
        facts = fill(bundle, run, formats)
        write_zip(bundle, archive)
        os.replace(archive, zipped)
        try:
            os.replace(bundle, output)
        except OSError:
            zipped.unlink()
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for folder in new if not output.exists() else ():
            folder.rmdir()
    return facts


def require_free(output: Path) -> None:
    """Refuse a place where something is.

    Raises:
        InputError: If the directory is not empty, or there is a zip beside it.
    """
    zipped = Path(f"{output}.zip")
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if is_free and not zipped.exists():
        return
    raise InputError(
        f"--output: expected an empty folder or none, and no zip of it, got "
        f"{zipped if is_free else output}. Choose another, or remove it."
    )


def table(facts: Facts) -> list[str]:
    """The export for people.

    Args:
        facts: As `export` returns them.
    """
    code, validation = facts["code"], facts["validation"]
    lines = [
        f"Package {code['package']}: {code['num_modules']} modules, {code['num_lines']:,} lines",
        f"{'':<14}{'max |Δ logit|':>14}{'Δ Dice':>10}{'seconds':>9}{'bytes':>13}",
    ]
    for name, of in facts["formats"].items():
        if of["made"]:
            dice = f"{of['dice_difference']:.1e}" if "dice_difference" in of else "-"
            lines.append(
                f"{name:<14}{of['max_abs_difference']:>14.1e}{dice:>10}{of['seconds']:>9.1f}"
                f"{of['bytes']:>13,}"
            )
    if "not_packed" in code:
        lines.append(f"Needed from elsewhere: {', '.join(code['not_packed'])}")
    if "reason" in validation:
        return [*lines, f"Dice was not compared: {validation['reason']}"]
    return [
        *lines,
        f"Mean Dice of {validation['num_cases']} validation cases {validation['mean_dice']:.4f}",
    ]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left behind
    sys.exit(main())
