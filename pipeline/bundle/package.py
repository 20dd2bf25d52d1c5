"""Exports a run as a bundle that predicts and evaluates without this repository.

The modules that prediction and evaluation need are copied to a package that no other bundle has, so
that two bundles can be used in one process. `train.json` and `evaluate.json` need this package.
Nothing of the data or of the machine leaves: a config is the repository's template with those
values of the run that are known and safe; paths and lists of cases are never taken.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from pipeline.bundle.formats import FORMATS, ExportFacts, NetworkExporter
from pipeline.bundle.metadata import TEMPLATES
from pipeline.config import allowed, old_names
from pipeline.config.compose import Parser
from pipeline.config.keys import Config
from pipeline.errors import InputError, innermost
from pipeline.prediction.predictor import load_weights, read_inference_config

ROOT = TEMPLATES.parent
ROOTS = ("pipeline", "transforms", "networks")
TARGET = r'_target_": "([^"]+)"'
PACKED = ("inference.json", "evaluate_files.json")  # configs whose code the bundle has
STATED_SIZES = ("inputs#image#num_channels", "outputs#pred#channel_def")  # by the metadata
STATED_LIBRARIES = ("torch", "monai", "numpy", "safetensors", "onnx", "onnxscript", "onnxruntime")
# keys, of a config or of its parts, that hold paths, cases or what depends on them
PRIVATE = {
    "bundle_root", "dataset_dir", "output_dir", "cache_dir", "data_roots", "exclude", "split_file",
    "group_pattern", "init_weights", "reinit_head", "input", "ensemble", "weights", "data",
    "case_id",
}  # fmt: skip
# parts of a training config in which a client may have put paths; the template has others
TRAIN_PARTS = ("data_module", "lifecycle", "cases", "cache", "train", "validate", "scoring")
PATH_IN_TEXT = re.compile(r"""(?:^|[\s'"=(,])(?:~|\.\.?)?[\\/]|[A-Za-z]:[\\/](?!/)""")
INIT = '"""Code for prediction and evaluation; the bundle\'s root must be on `sys.path`."""\n'


class TrainedRun(NamedTuple):
    """A run whose configs, metadata and best weights agree."""

    directory: Path
    configs: dict[str, Config]  # by file name
    network: torch.nn.Module  # with the best weights, on the CPU


def export_run(
    run_dir: Path,
    output: Path,
    render_card: Callable[[Path, str], str],
    formats: Sequence[str] = tuple(FORMATS),
    allow: Sequence[str] = (),
) -> ExportFacts:
    """Make a bundle of a run, and a zip of it beside it, both completely or not at all.

    Args:
        run_dir: Run directory.
        output: Folder of the bundle; empty or missing.
        render_card: Returns the model card for a run directory and the name of a package.
        formats: Keys of `FORMATS`.
        allow: Names that `_target_` may hold besides the list.

    Returns:
        The content of `export.json`.

    Raises:
        InputError: If the run has no best network or contradicts itself, or a setting that the
            bundle needs has a path in it, or there are files at `output`.
        OSError: If it cannot be written.
    """
    run = load_trained_run(run_dir, allow)
    zipped = Path(f"{output}.zip")
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not is_free or zipped.exists():
        raise InputError(
            f"--output: expected an empty folder or none, and no zip of it, got "
            f"{zipped if is_free else output}. Choose another, or remove it."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        bundle = Path(folder, output.name)
        facts = _write_bundle(bundle, run, render_card, formats)
        archive = shutil.make_archive(f"{folder}/zip", "zip", folder, bundle.name)
        os.replace(bundle, output)
        os.replace(archive, zipped)
    return facts


def load_trained_run(directory: Path, allow: Collection[str] = ()) -> TrainedRun:
    """Read a run directory, and check that its files agree; see `export_run`."""
    folder = directory / "configs"
    sources = {"inference.json": read_inference_config(directory)}
    sources |= {name: _read_config(folder / name) for name in ("train.json", "metadata.json")}
    configs = {name: old_names.translate(source) for name, source in sources.items()}
    inference = configs["inference.json"]
    for name in ("train.json", "inference.json"):
        allowed.check_names(configs[name], allow)
    weights = directory / "models" / "model.pt"
    if not weights.is_file():
        raise InputError(
            f"{weights}: expected the best network of the run, found none. Finish the run, or "
            "name one that has it."
        )
    network = _load_network(inference, weights, folder / "inference.json")
    in_channels, class_names = inference["in_channels"], inference["class_names"]
    metadata = Parser(configs["metadata.json"])
    stated = [metadata.get(f"network_data_format#{key}") for key in STATED_SIZES]
    if stated != [in_channels, {str(n): name for n, name in enumerate(class_names)}]:
        raise InputError(
            f"{folder / 'metadata.json'}: network_data_format: expected {in_channels} image "
            f"channels and the classes {', '.join(class_names)}, as the weights have it, got "
            "others. Correct it."
        )
    return TrainedRun(directory, configs, network)


def _read_config(path: Path) -> Config:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: expected a config of the run, got: {error}. Restore it, or name another run."
        ) from None


def _load_network(inference: Config, weights: Path, where: Path) -> torch.nn.Module:
    """Load the network, and check that the config states its channels, size and classes."""
    try:
        parser = Parser({**inference, "device": "cpu", "amp": False})
        network = parser.get_parsed_content("network_def").eval()
        load_weights(network, weights)
        with torch.no_grad():
            logits = network(torch.zeros(1, inference["in_channels"], *inference["roi_size"]))
        if logits.shape[1] != len(inference["class_names"]):
            raise ValueError(f"{logits.shape[1]} classes of the weights")
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        if isinstance(cause := innermost(error), InputError):
            raise cause from error
        raise InputError(
            f"{where}: expected network_def, in_channels, roi_size and class_names of one network, "
            f"got: {' '.join(str(cause).split())[:200]}. Correct it."
        ) from error
    if not all(torch.isfinite(one).all() for one in network.state_dict().values()):
        raise InputError(
            f"{weights}: expected finite weights, got NaN or infinity. Train it again."
        )
    return network


def _write_bundle(
    bundle: Path, run: TrainedRun, render_card: Callable[[Path, str], str], formats: Sequence[str]
) -> ExportFacts:
    """Write all files of a bundle, `export.json` with the facts last."""
    models = bundle / "models"
    for folder in (models, bundle / "configs", bundle / "docs"):
        folder.mkdir(parents=True)
    weights = _write_weights(models, run.network)
    package = make_package_name(run.directory.name, weights["sha256"])
    configs = select_configs(run, package)
    names = {name: re.findall(TARGET, json.dumps(config)) for name, config in configs.items()}
    packed = [target for name in PACKED for target in names[name]]
    modules = find_modules(["pipeline.prediction.predictor", *packed])
    code = {"package": package, **write_modules(bundle / package, package, modules)}
    for name in PACKED:
        configs[name] = json.loads(rename_modules(json.dumps(configs[name]), package, modules))
    unlisted = {n for found in names.values() for n in found if not allowed.is_allowed(n)}
    if foreign := sorted(n for n in unlisted if n.split(".")[0] not in ROOTS):
        code["not_packed"] = foreign
    for name, config in configs.items():
        path = bundle / ("" if name == "plan.json" else "configs") / name
        path.write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(TEMPLATES / "logging.conf", bundle / "configs" / "logging.conf")
    shutil.copyfile(ROOT / "LICENSE", bundle / "LICENSE")
    (bundle / "docs" / "README.md").write_text(render_card(run.directory, package))
    del configs["plan.json"]
    in_channels, roi_size = (configs["inference.json"][key] for key in ("in_channels", "roi_size"))
    exporter = NetworkExporter(run.network, in_channels, roi_size, embedded=configs)
    libraries = {name: version(name) for name in STATED_LIBRARIES if find_spec(name)}
    facts = {
        "code": code,
        "weights": weights,
        "formats": {name: exporter.export(name, models)[0] for name in formats},
        "versions": {"python": platform.python_version(), **libraries},
    }
    (bundle / "export.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _write_weights(folder: Path, network: torch.nn.Module) -> ExportFacts:
    """Write `model.pt`, a plain state dict, and the same tensors as `model.safetensors`."""
    state = {name: one.detach().contiguous().clone() for name, one in network.state_dict().items()}
    plain, safe = folder / "model.pt", folder / "model.safetensors"
    torch.save(state, plain)
    save_file(state, safe, {"format": "pt"})
    digest = hashlib.sha256(safe.read_bytes()).hexdigest()
    return {"sha256": digest, "bytes": {file.name: file.stat().st_size for file in (plain, safe)}}


def select_configs(run: TrainedRun, package: str) -> dict[str, Config]:
    """Return the configs of a bundle by file name, made from the repository's templates.

    Raises:
        InputError: One line for each setting of the run that the bundle needs and that has a path
            in it.
    """
    own, source = Path(__file__).with_name, run.configs
    files = [TEMPLATES / f"{name}.json" for name in ("amp", "inference", "evaluate")]
    files += [own("evaluate_files.json"), own("metadata_schema.json")]
    amp, inference, evaluate, overlay, schema = (json.loads(file.read_text()) for file in files)
    optional = {"process_group": None} if "process_group" in source["train.json"] else {}
    metadata = {k: v for k, v in source["metadata.json"].items() if k in schema["properties"]}
    path = run.directory / "plan.json"
    plan = _read_config(path) if path.is_file() else {}  # runs of older versions have none
    overlay["evaluator#key_val_metric"]["mean_dice"]["ignore_value"] = plan.get("ignore_value")
    train = _select(amp | optional, source["train.json"], "train.json")
    train |= {"dataset_dir": "dataset", "cache_dir": "../cache"}
    train["output_dir"] = f"../{package.rpartition('_')[0]}_again"
    inference = _select(inference, source["inference.json"], "inference.json")
    inference["dataset_dir"] = "dataset"
    # all values are known, so that the packed code needs no plan
    inference = json.loads(re.sub(r'"\$@plan\.(\w+)"', r'"@\1"', json.dumps(inference)))
    del inference["plan"]
    return {
        "train.json": train,
        "inference.json": inference,
        "evaluate.json": {"output_dir": ".", **evaluate},
        "evaluate_files.json": overlay,
        "metadata.json": _select(metadata, source["metadata.json"], "metadata.json"),
        "plan.json": {**plan, "reasons": {}},
    }


def _select(template: Config, source: Config, name: str) -> Config:
    """Return the template with the values of a run's config that are known and safe."""
    found, faults = dict(template), []
    for key in template.keys() & source.keys() - PRIVATE - {"device"}:
        if name == "train.json" and key in TRAIN_PARTS:
            found[key] = _select_part(source[key], template[key])
        elif is_safe(source[key]):
            found[key] = source[key]
        else:
            faults.append(f"{name}: {key}: expected no path, got one. Take it out.")
    if faults:
        raise InputError(*sorted(faults))
    return found


def _select_part(value: Any, default: Any) -> Any:
    """Return a part of a training config, with the template's values for what is not safe."""
    if is_safe(value):
        return value
    if not (isinstance(value, dict) and isinstance(default, dict)):
        return default
    return {
        key: default.get(key, f"@{key}")
        if key in PRIVATE
        else _select_part(child, default.get(key))
        for key, child in value.items()
    }


def is_safe(value: Any) -> bool:
    """Whether a value of a config has neither a path in it nor a private key with a value."""
    if isinstance(value, dict):
        are_references = (str(value[key]).startswith(("@", "$")) for key in value.keys() & PRIVATE)
        return all(are_references) and all(map(is_safe, value.values()))
    if isinstance(value, list):
        return all(map(is_safe, value))
    return not (isinstance(value, str) and PATH_IN_TEXT.search(value))


def make_package_name(name: str, digest: str) -> str:
    """Return a name of a package for the name of a run and the hash of its weights."""
    slug = re.sub(r"\W+", "_", name.lower(), flags=re.ASCII).strip("_")
    return f"{slug if slug[:1].isalpha() else f'bundle_{slug}'.strip('_')}_{digest[:8]}"


def find_modules(names: Iterable[str]) -> dict[str, Path]:
    """Return the modules that dotted names need: their own, what these import, and so on.

    Names of other packages are left out. The result is sorted: a file by module name, for packages
    `__init__.py`.
    """
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in ROOTS
        for path in (ROOT / folder).rglob("*.py")
    }
    found: dict[str, Path] = {}
    waiting = list(names)
    while waiting:
        module = waiting.pop()
        while module and module not in files:  # a class, a function, or another package
            module = module.rpartition(".")[0]
        if not module or module in found:
            continue
        found[module] = files[module]
        waiting.append(module.rpartition(".")[0])
        for node in ast.walk(ast.parse(files[module].read_text())):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                waiting += [f"{node.module}.{alias.name}" for alias in node.names]
    return dict(sorted(found.items()))


def rename_modules(text: str, package: str, modules: Iterable[str]) -> str:
    """Put `package.` before the names of its modules, and of what is in them, in a text."""
    packed = "|".join(re.escape(name) for name in modules if "." in name)
    from_root = rf"(?<=from )(?:{'|'.join(ROOTS)}) import "
    # what follows a dot or a slash is of another package, or an attribute
    return re.sub(rf"(?<![\w./])(?=(?:{packed})\b|{from_root})", f"{package}.", text)


def write_modules(folder: Path, package: str, modules: Mapping[str, Path]) -> ExportFacts:
    """Write modules as a package; return their number, `__init__` apart, and that of lines."""
    folder.mkdir()
    (folder / "__init__.py").write_text(INIT)
    sources = {file.relative_to(ROOT): file.read_text() for file in modules.values()}
    for path, source in sources.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(rename_modules(source, package, modules))
    num_lines = sum(source.count("\n") for source in sources.values())
    num_modules = sum(path.name != "__init__.py" for path in sources)
    return {"num_modules": num_modules, "num_lines": num_lines}
