"""Exports a run as a bundle that predicts and evaluates without this repository.

Two bundles in one process whose code has the same name would get one another's modules, since
Python keeps one module per name. So the modules that the configs of prediction and evaluation need
are copied to `<package>/pipeline/…`, `<package>/transforms/…` and `<package>/networks/…`, and
`<package>.` is put before their names in imports, in texts and in the `_target_`s of these configs.
`train.json` and `evaluate.json` keep their names: training needs this package itself.

Nothing of the data or of the machine leaves. A config is the repository's template with those
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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.bundle.formats import FORMATS, ExportFacts, NetworkExporter
from pipeline.bundle.metadata import TEMPLATES
from pipeline.config import allowed, old_names
from pipeline.config.compose import Parser
from pipeline.config.keys import Config
from pipeline.data.plan import Plan
from pipeline.errors import InputError, innermost
from pipeline.prediction.predictor import load_weights, read_inference_config
from pipeline.reporting.model_card import render_model_card

ROOT = TEMPLATES.parent
ROOTS = ("pipeline", "transforms", "networks")
# not within monai.transforms.Compose
OWN_NAME = re.compile(rf"(?<![\w./])(?:{'|'.join(ROOTS)})(?:\.\w+)+")
FROM_ROOT = re.compile(rf"^(\s*from )({'|'.join(ROOTS)})(?= import )", re.MULTILINE)
TARGET = r'_target_": "([^"]+)"'
PREDICTOR = "pipeline.prediction.predictor"
CONFIGS = ("train.json", "inference.json", "metadata.json")
PACKED = ("inference.json", "evaluate_files.json")  # configs whose code the bundle has
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
INIT = '''"""The code of this bundle for prediction and evaluation.

The bundle's root must be on `sys.path`. `python -m monai.bundle run` started there has it; a client
that initializes the workflow in its own process does `sys.path.insert(0, bundle_root)` first. The
name is this bundle's alone, so that another bundle can be used in the same process.
"""
'''


@dataclass(frozen=True)
class TrainedRun:
    """A run whose configs, metadata and best weights agree.

    Attributes:
        directory: Absolute path of the run.
        configs: Configs by file name.
        network: Network with the best weights, on the CPU.
    """

    directory: Path
    configs: Mapping[str, Config]
    network: torch.nn.Module


def export_run(
    run_dir: Path, output: Path, formats: Sequence[str] = (*FORMATS,), allow: Sequence[str] = ()
) -> ExportFacts:
    """Make a bundle of a run, and a zip of it beside it, both completely or not at all.

    Args:
        run_dir: Run directory.
        output: Folder of the bundle; empty or missing.
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
    _require_free(output, zipped)
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    bundle = work / output.name
    try:
        bundle.mkdir()
        facts = _fill(bundle, run, formats)
        archive = shutil.make_archive(str(work / "zip"), "zip", work, bundle.name)
        os.replace(archive, zipped)
        try:
            os.replace(bundle, output)
        except OSError:
            zipped.unlink()
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return facts


def _require_free(output: Path, zipped: Path) -> None:
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not is_free or zipped.exists():
        raise InputError(
            f"--output: expected an empty folder or none, and no zip of it, got "
            f"{zipped if is_free else output}. Choose another, or remove it."
        )


def load_trained_run(directory: Path, allow: Collection[str] = ()) -> TrainedRun:
    """Read a run, and check that its files agree.

    Args:
        directory: Run directory.
        allow: Names that `_target_` may hold besides the list.

    Raises:
        InputError: One line per fault.
    """
    inference = read_inference_config(directory)
    folder = directory / "configs"
    configs = {name: old_names.translate(_read_config(folder / name)) for name in CONFIGS}
    for name in ("train.json", "inference.json"):
        allowed.check_names(configs[name], allow)
    weights = directory / "models" / "model.pt"
    if not weights.is_file():
        raise InputError(
            f"{weights}: expected the best network of the run, found none. Finish the run, or "
            "name one that has it."
        )
    network = _load_network(inference, weights, folder / "inference.json")
    if not _describes(configs["metadata.json"], inference):
        raise InputError(
            f"{folder / 'metadata.json'}: network_data_format: expected {inference['in_channels']} "
            f"image channels and the classes {', '.join(inference['class_names'])}, as the weights "
            "have it, got others. Correct it."
        )
    return TrainedRun(directory, configs, network)


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


def _describes(metadata: Config, inference: Config) -> bool:
    """Whether metadata state the channels and classes of an inference config."""
    classes = {str(n): name for n, name in enumerate(inference["class_names"])}
    try:
        data_format = metadata["network_data_format"]
        image, pred = data_format["inputs"]["image"], data_format["outputs"]["pred"]
        is_image = image["num_channels"] == inference["in_channels"] == len(image["channel_def"])
        return is_image and pred["num_channels"] == len(classes) and pred["channel_def"] == classes
    except (LookupError, TypeError):
        return False


def _read_config(path: Path) -> Config:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected a config of the run, got: {error}. Restore it, or name another run."
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content


def _fill(bundle: Path, run: TrainedRun, formats: Sequence[str]) -> ExportFacts:
    """Write all files of a bundle, `export.json` with the facts last."""
    models = bundle / "models"
    weights = _write_weights(models, run.network)
    package = make_package_name(run.directory.name, weights["sha256"])
    configs = select_configs(run, package)
    names = {name: re.findall(TARGET, json.dumps(config)) for name, config in configs.items()}
    modules = find_modules([PREDICTOR, *(name for file in PACKED for name in names[file])])
    code = {"package": package, **write_modules(bundle / package, package, modules)}
    everything = {name for found in names.values() for name in found}
    foreign = {n for n in everything if n.split(".")[0] not in ROOTS and not allowed.is_allowed(n)}
    if foreign:
        code["not_packed"] = sorted(foreign)
    for name in PACKED:
        configs[name] = json.loads(rename_modules(json.dumps(configs[name]), package, modules))
    _write_texts(bundle, run, configs, package)
    inference = configs["inference.json"]
    embedded = {name: config for name, config in configs.items() if name != "plan.json"}
    sizes = inference["in_channels"], inference["roi_size"]
    exporter = NetworkExporter(run.network, *sizes, embedded)
    facts = {
        "code": code,
        "weights": weights,
        "formats": {name: exporter.export(name, models)[0] for name in formats},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in STATED_LIBRARIES if find_spec(name)},
    }
    (bundle / "export.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _write_weights(folder: Path, network: torch.nn.Module) -> ExportFacts:
    """Write `model.pt`, a plain state dict, and the same tensors as `model.safetensors`."""
    folder.mkdir()
    state = {name: one.detach().contiguous().clone() for name, one in network.state_dict().items()}
    plain, safe = folder / "model.pt", folder / "model.safetensors"
    torch.save(state, plain)
    save_file(state, safe, {"format": "pt"})
    digest = hashlib.sha256(safe.read_bytes()).hexdigest()
    return {"sha256": digest, "bytes": {file.name: file.stat().st_size for file in (plain, safe)}}


def _write_texts(
    bundle: Path, run: TrainedRun, configs: Mapping[str, Config], package: str
) -> None:
    """Write configs, plan, licence and model card."""
    for folder in ("configs", "docs"):
        (bundle / folder).mkdir()
    for name, config in configs.items():
        path = bundle / ("" if name == "plan.json" else "configs") / name
        path.write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(TEMPLATES / "logging.conf", bundle / "configs" / "logging.conf")
    shutil.copyfile(ROOT / "LICENSE", bundle / "LICENSE")
    (bundle / "docs" / "README.md").write_text(render_model_card(run.directory, package))


# --- configs


def select_configs(run: TrainedRun, package: str) -> dict[str, Config]:
    """Return the configs of a bundle by file name, made from the repository's templates.

    Raises:
        InputError: One line for each setting of the run that the bundle needs and that has a path
            in it.
    """
    amp, inference, evaluate = (
        json.loads((TEMPLATES / f"{name}.json").read_text())
        for name in ("amp", "inference", "evaluate")
    )
    overlay, schema = (
        json.loads(Path(__file__).with_name(f"{name}.json").read_text())
        for name in ("evaluate_files", "metadata_schema")
    )
    optional = {"process_group": None} if "process_group" in run.configs["train.json"] else {}
    path = run.directory / "plan.json"
    plan = _read_config(path) if path.is_file() else {}  # runs of older versions have none
    overlay["evaluator#key_val_metric"]["mean_dice"]["ignore_value"] = plan.get("ignore_value")
    metadata = _select(dict.fromkeys(schema["properties"]), run.configs, "metadata.json")
    train = _select(amp | optional, run.configs, "train.json")
    train |= {"dataset_dir": "dataset", "cache_dir": "../cache"}
    train["output_dir"] = f"../{package.rpartition('_')[0]}_again"
    inference = _select(inference, run.configs, "inference.json")
    inference["dataset_dir"] = "dataset"
    # all values are known, so that the packed code needs no plan
    inference = json.loads(re.sub(r'"\$@plan\.(\w+)"', r'"@\1"', json.dumps(inference)))
    del inference["plan"]
    return {
        "train.json": train,
        "inference.json": inference,
        "evaluate.json": {"output_dir": ".", **evaluate},
        "evaluate_files.json": overlay,
        "metadata.json": {key: value for key, value in metadata.items() if value is not None},
        "plan.json": {f.name: plan[f.name] for f in fields(Plan) if f.name in plan}
        | {"reasons": {}},
    }


def _select(template: Config, configs: Mapping[str, Config], name: str) -> Config:
    """Return the template with the values of a run's config that are known and safe."""
    source, found, faults = configs[name], dict(template), []
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
        key: _select_part(child, default.get(key))
        if key not in PRIVATE
        else default.get(key, f"@{key}")
        for key, child in value.items()
    }


def is_safe(value: Any) -> bool:
    """Whether a value of a config has neither a path in it nor a private key with a value."""
    if isinstance(value, dict):
        return all(
            is_safe(child) and (key not in PRIVATE or str(child)[:1] in ("@", "$"))
            for key, child in value.items()
        )
    if isinstance(value, list):
        return all(map(is_safe, value))
    return not (isinstance(value, str) and PATH_IN_TEXT.search(value))


# --- code


def make_package_name(name: str, digest: str) -> str:
    """Return the name of a module that no other bundle has.

    Args:
        name: Name of the run.
        digest: Hash of its weights.
    """
    slug = re.sub(r"\W+", "_", name.lower(), flags=re.ASCII).strip("_")
    slug = f"bundle_{slug}".strip("_") if not slug or slug[0].isdigit() else slug
    return f"{slug}_{digest[:8]}"


def find_modules(names: Iterable[str], root: Path = ROOT) -> dict[str, Path]:
    """Return the modules that dotted names need: their own, what these import, and so on.

    Args:
        names: Names of modules or of what is in them; names of other packages are left out.
        root: Folder that the modules are in.

    Returns:
        File by module name, sorted; packages included.
    """
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in ROOTS
        for path in (root / folder).rglob("*.py")
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


def rename_modules(text: str, package: str, modules: Collection[str]) -> str:
    """Put `package.` before the names of modules, and of what is in them.

    Args:
        text: Source code or a dotted name.
        package: Name of the package.
        modules: Modules that the package has; other names stay.
    """

    def rename(match: re.Match[str]) -> str:
        parts = match[0].split(".")
        is_packed = any(".".join(parts[:n]) in modules for n in range(2, len(parts) + 1))
        return f"{package}.{match[0]}" if is_packed else match[0]

    return FROM_ROOT.sub(rf"\1{package}.\2", OWN_NAME.sub(rename, text))


def write_modules(
    folder: Path, package: str, modules: Mapping[str, Path], root: Path = ROOT
) -> ExportFacts:
    """Write modules as a package; returns the number of modules, `__init__` apart, and lines.

    Args:
        folder: Folder of the package, which is made.
        package: Its name.
        modules: As `find_modules` returns them.
        root: Folder that they are in.
    """
    folder.mkdir()
    (folder / "__init__.py").write_text(INIT)
    num_lines = 0
    for file in modules.values():
        source = file.read_text()
        num_lines += source.count("\n")
        target = folder / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(rename_modules(source, package, modules))
    num_modules = sum(file.name != "__init__.py" for file in modules.values())
    return {"num_modules": num_modules, "num_lines": num_lines}
