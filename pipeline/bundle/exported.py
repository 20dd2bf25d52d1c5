"""The files that an exported bundle is made of."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline.bundle.contents import absolute_paths, leaks, neutral, telling
from pipeline.bundle.exportable import Run, read_config
from pipeline.bundle.formats import Facts, Formats, Network
from pipeline.bundle.package import (
    ROOT,
    needed_modules,
    package_name,
    targets_of,
    write_package,
)
from pipeline.bundle.parity import TOLERANCE, NotComparedError, cases_of, mean_dices
from pipeline.bundle.renaming import renamed_config, renamed_text
from pipeline.config import allowed
from pipeline.data.dataset import Cases
from pipeline.data.listing import named, paths_of
from pipeline.errors import InputError
from pipeline.files import load
from pipeline.lifecycle.clients import given_data
from pipeline.lifecycle.stored_configs import TEMPLATES
from pipeline.reporting import model_card

COMMAND = "pipeline.run"  # which says mistakes in a line each
LIBRARIES = ("torch", "monai", "numpy", "safetensors", "onnx", "onnxscript", "onnxruntime")
USAGE = """\
In this directory, which is a MONAI bundle and has the code that it needs:

    # predict files
    python -m monai.bundle run --config_file configs/inference.json --input FILE_OR_FOLDER \\
        --output_dir OUT
    # the mean Dice of the validation cases of a dataset; nothing here changes
    python -m monai.bundle run --config_file "['configs/train.json','configs/evaluate.json']" \\
        --dataset_dir DATASET
    # train anew, beside this directory
    python -m monai.bundle run --config_file configs/train.json --dataset_dir DATASET

In memory, with this directory on `sys.path`:

    from PACKAGE.pipeline.predictor import Predictor
    labels = Predictor("BUNDLE")(array, affine)
"""


def fill(bundle: Path, run: Run, formats: Sequence[str]) -> Facts:
    """Write all files of a bundle, `export.json` with what is known of them last.

    Args:
        bundle: An empty folder.
        run: To be exported.
        formats: Keys of `FORMATS`.

    Raises:
        InputError: If one of them would say something of the data or of where they were.
    """
    weights = write_weights(bundle / "models", run.network)
    code = write_code(bundle, run, weights["sha256"])
    configs = {path.name: read_config(path) for path in sorted((bundle / "configs").glob("*.json"))}
    made, networks = write_formats(bundle / "models", run, configs, formats)
    validation, cases = compare_dice(bundle / "models", run, made, networks)
    facts = {
        "code": code,
        "weights": weights,
        "formats": made,
        "validation": validation,
        "versions": {"python": platform.python_version(), **_versions()},
    }
    (bundle / "export.json").write_text(json.dumps(facts, indent=2) + "\n")
    found = list(leaks(bundle, *private(run, cases)))
    if found:
        raise InputError(*found)
    return facts


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_weights(folder: Path, network: torch.nn.Module) -> Facts:
    """Write `model.pt`, a plain state_dict, and the same tensors as `model.safetensors`.

    Raises:
        RuntimeError: If one of them is read back with another bit.
    """
    folder.mkdir()
    state = {name: one.detach().contiguous().clone() for name, one in network.state_dict().items()}
    first, second = folder / "model.pt", folder / "model.safetensors"
    torch.save(state, first)
    save_file(state, second, {"format": "pt"})
    for read in (load(first), load_file(second)):
        if read.keys() != state.keys() or not all(_same(state[n], read[n]) for n in state):
            raise RuntimeError(f"{folder}: expected to read the weights as written, got others.")
    digest = hashlib.sha256(second.read_bytes()).hexdigest()
    sizes = {file.name: file.stat().st_size for file in (first, second)}
    return {"sha256": digest, "bytes": sizes, "safetensors_equal": True}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))


def write_code(bundle: Path, run: Run, digest: str) -> Facts:
    """Write configs, documents and the package of the modules that they need.

    Args:
        bundle: Its folder.
        run: To be exported.
        digest: Hash of the weights.
    """
    names = [name for config in run.configs.values() for name in targets_of(config)]
    modules = needed_modules([*names, COMMAND])
    package = package_name(run.directory.name, digest)
    num_lines = write_package(bundle, package, modules)
    (bundle / "configs").mkdir()
    again = f"../{package.rpartition('_')[0]}_again"
    for name, config in run.configs.items():
        said = neutral(config, again if name == "train.json" else None)
        absolute = "expected no absolute path, got one. Take it out."
        if found := [f"{name}: {key}: {absolute}" for key in absolute_paths(said)]:
            raise InputError(*found)
        text = json.dumps(renamed_config(said, package, modules), indent=2) + "\n"
        (bundle / "configs" / name).write_text(text)
    shutil.copyfile(TEMPLATES / "logging.conf", bundle / "configs" / "logging.conf")
    plan = run.directory / "plan.json"
    if plan.is_file():  # which evaluate.json takes
        (bundle / plan.name).write_text(json.dumps({**read_config(plan), "reasons": {}}) + "\n")
    shutil.copyfile(TEMPLATES.parent / "LICENSE", bundle / "LICENSE")
    readme = run.directory / "docs" / "README.md"  # which somebody may have added to
    text = readme.read_text() if readme.is_file() else model_card.model_card(run.directory)
    text = text.replace(model_card.USAGE, USAGE.replace("PACKAGE", package))
    (bundle / "docs").mkdir()
    (bundle / "docs" / "README.md").write_text(renamed_text(text, package, modules))
    foreign = {name for name in names if not allowed.is_allowed(name)}
    facts = {"package": package, "num_modules": len(modules), "num_lines": num_lines}
    return facts | ({"not_packed": sorted(foreign)} if foreign else {})


def write_formats(
    folder: Path, run: Run, configs: Mapping[str, object], formats: Sequence[str]
) -> tuple[dict[str, Facts], dict[str, Network]]:
    """Write formats.

    Args:
        folder: Gets their files.
        run: To be exported.
        configs: By file name, for formats that hold them.
        formats: Keys of `FORMATS`.

    Returns:
        What there is to say of each, and the networks of those that could be made.
    """
    inference = run.configs["inference.json"]
    maker = Formats(run.network, inference["in_channels"], inference["roi_size"], configs)
    made: dict[str, Facts] = {}
    networks: dict[str, Network] = {}
    for name in formats:
        made[name], network = maker.make(name, folder)
        if network is not None:
            networks[name] = network
    return made, networks


def compare_dice(
    folder: Path, run: Run, made: dict[str, Facts], networks: Mapping[str, Network]
) -> tuple[Facts, Cases | None]:
    """Compare the mean Dice of the validation cases, and take away formats of which it differs.

    Args:
        folder: Has their files.
        run: To be exported.
        made: Of each format; is told the difference.
        networks: Of the formats that were made.

    Returns:
        What the PyTorch network scores, or the reason why nothing was compared; the run's cases.
    """
    cases = None
    try:
        cases = cases_of(run.directory, run.configs["train.json"])
        everyone: dict[str, Network] = {"": run.network, **networks}
        dices = mean_dices(run.directory, run.configs["inference.json"], cases, everyone)
        own = dices.pop("")
        if isinstance(own, str) or math.isnan(own):
            raise NotComparedError("the network itself does not score on these cases")
    except NotComparedError as error:
        return {"reason": f"{error}"}, cases
    for name, dice in dices.items():
        difference = math.inf if isinstance(dice, str) else abs(dice - own)
        if difference <= TOLERANCE:
            made[name] |= {"mean_dice": dice, "dice_difference": difference}
            continue
        (folder / made[name]["file"]).unlink()
        got = dice if isinstance(dice, str) else f"{dice:.6f}"
        why = f"expected a mean Dice within {TOLERANCE:g} of {own:.6f}, got {got}"
        made[name] = {"made": False, "reason": why}
    return {"num_cases": len(cases.validation), "mean_dice": own}, cases


def private(run: Run, cases: Cases | None) -> tuple[set[str], dict[str, str]]:
    """What must not leave: case ids, and places with what each of them is."""
    directory, train = run.directory, run.configs["train.json"]
    ids = {
        case["case_id"]
        for part in ([cases.train, cases.validation, cases.test] if cases else [])
        for case in part
    }
    for path in [*directory.glob("scores/*/cases.json"), directory / "validation.json"]:
        if path.is_file():
            found = read_config(path)
            ids |= set(found.get("cases", found))
    given = [named(case) for part in given_data(train) or () for case in part]
    ids |= {case["case_id"] for case in given}
    stated = str(train["dataset_dir"])
    places = {
        str(directory): "the run's path",
        os.path.realpath(directory): "the run's path",
        stated: "the data's path",
        os.path.realpath(directory / stated): "the data's path",
        str(Path.home()): "a home directory",
        str(ROOT): "the repository's path",
    }
    places |= {os.path.dirname(path): "the data's path" for c in given for path in paths_of(c)}
    places = {path: kind for path, kind in places.items() if path.count("/") > 1}
    host = {name: "this machine's name" for name in telling([platform.node()], ())}
    return telling(ids, run.configs["inference.json"]["class_names"]), places | host
