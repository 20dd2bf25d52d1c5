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
import math
import os
import platform
import re
import shutil
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.bundle.formats import (
    DICE_TOLERANCE,
    FORMATS,
    ON_CPU,
    Facts,
    Network,
    NetworkExporter,
    NotComparedError,
    compare_dice,
    load_run_cases,
)
from pipeline.bundle.metadata import TEMPLATES, find_contradictions
from pipeline.config import allowed, targets
from pipeline.config.keys import Config
from pipeline.config.parser import Parser
from pipeline.data.plan import Plan
from pipeline.errors import InputError, innermost
from pipeline.prediction.predictor import load_weights, read_inference_config
from pipeline.reporting.model_card import render_model_card

ROOT = TEMPLATES.parent
ROOTS = "pipeline|transforms|networks"
DOTTED = re.compile(rf"(?<![\w./])(?:{ROOTS})(?:\.\w+)+")  # not within monai.transforms.Compose
FROM_ROOT = re.compile(rf"^(\s*from )({ROOTS})(?= import )", re.MULTILINE)
PREDICTOR = "pipeline.prediction.predictor"
LIBRARIES = ("torch", "monai", "numpy", "safetensors", "onnx", "onnxscript", "onnxruntime")
NEEDED = {
    "inference.json": ("network_def", "in_channels", "class_names", "roi_size"),
    "train.json": ("dataset_dir", "train", "validate"),
    "metadata.json": (),
}
# keys, of a config or of its parts, that hold paths, cases or what depends on them
PRIVATE = {
    "bundle_root", "dataset_dir", "output_dir", "cache_dir", "data_roots", "exclude", "split_file",
    "group_pattern", "init_weights", "reinit_head", "input", "ensemble", "weights", "data",
    "case_id",
}  # fmt: skip
# parts of a training config in which a client may have put paths; the template has others
PARTS = ("data_module", "lifecycle", "cases", "cache", "train", "validate", "scoring")
PLACE = re.compile(r"""(?:^|[\s'"=(,])(?:~|\.\.?)?[\\/]|[A-Za-z]:[\\/](?!/)""")
FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # the time of all files in a zip
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
) -> Facts:
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
    _require_free(output)
    new = [folder for folder in output.parents if not folder.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    bundle, archive, zipped = work / output.name, work / "zip", Path(f"{output}.zip")
    try:
        bundle.mkdir()
        facts = _fill(bundle, run, formats)
        _write_zip(bundle, archive)
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
    configs = {name: _read_config(folder / name) for name in NEEDED}
    for name in ("train.json", "inference.json"):
        allowed.check(configs[name], allow)
    weights = directory / "models" / "model.pt"
    if not weights.is_file():
        raise InputError(
            f"{weights}: expected the best network of the run, found none. Finish the run, or "
            "name one that has it."
        )
    missing = [
        f"{folder / name}: expected {key}, got none. Restore the file."
        for name, keys in NEEDED.items()
        for key in keys
        if key not in configs[name]
    ]
    if missing:
        raise InputError(*missing)
    try:
        network = Parser({**inference, **ON_CPU}).get_parsed_content("network_def").eval()
    except (RuntimeError, ValueError, LookupError) as error:
        raise InputError(str(innermost(error))) from error
    load_weights(network, weights)
    if not all(torch.isfinite(one).all() for one in network.state_dict().values()):
        raise InputError(
            f"{weights}: expected finite weights, got NaN or infinity. Train it again."
        )
    _require_agreement(folder, configs, network)
    return TrainedRun(directory, configs, network)


def _require_agreement(
    folder: Path, configs: Mapping[str, Config], network: torch.nn.Module
) -> None:
    """Check that configs and metadata state the network's channels, size and classes."""
    inference = configs["inference.json"]
    in_channels, names = inference["in_channels"], inference["class_names"]
    try:
        with torch.no_grad():
            logits = network(torch.zeros(1, in_channels, *inference["roi_size"]))
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(
            f"{folder / 'inference.json'}: expected in_channels and roi_size of the network, "
            f"got: {' '.join(str(error).split())[:200]}"
        ) from None
    if logits.shape[1] != len(names):
        raise InputError(
            f"{folder / 'inference.json'}: class_names: expected {logits.shape[1]}, as the "
            f"weights have it, got {len(names)}. Correct it."
        )
    if found := find_contradictions(configs["metadata.json"], in_channels, names):
        raise InputError(*(f"{folder / 'metadata.json'}: {fault}" for fault in found))


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


def _require_free(output: Path) -> None:
    zipped = Path(f"{output}.zip")
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not is_free or zipped.exists():
        raise InputError(
            f"--output: expected an empty folder or none, and no zip of it, got "
            f"{zipped if is_free else output}. Choose another, or remove it."
        )


def _fill(bundle: Path, run: TrainedRun, formats: Sequence[str]) -> Facts:
    """Write all files of a bundle, `export.json` with the facts last."""
    models = bundle / "models"
    weights = _write_weights(models, run.network)
    package = make_package_name(run.directory.name, weights["sha256"])
    configs = select_configs(run, package)
    names = {name: [*find_targets(config)] for name, config in configs.items()}
    modules = find_modules([*names["inference.json"], *names["evaluate_files.json"], PREDICTOR])
    code = {"package": package, **write_modules(bundle / package, package, modules)}
    everything = {name for found in names.values() for name in found}
    foreign = {n for n in everything if not (_find_module(n, ROOT) or targets.is_allowed(n))}
    if foreign:
        code["not_packed"] = sorted(foreign)
    for name in ("inference.json", "evaluate_files.json"):
        configs[name] = rename_targets(configs[name], package, modules)
    _write_texts(bundle, run, configs, package)
    made, networks = _write_formats(models, run, configs, formats)
    facts = {
        "code": code,
        "weights": weights,
        "formats": made,
        "validation": _verify_dice(models, run, made, networks),
        "versions": {"python": platform.python_version(), **_installed_versions()},
    }
    (bundle / "export.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _write_weights(folder: Path, network: torch.nn.Module) -> Facts:
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


def _write_formats(
    folder: Path, run: TrainedRun, configs: Mapping[str, Config], formats: Sequence[str]
) -> tuple[dict[str, Facts], dict[str, Network]]:
    """Write formats; returns the facts of each, and the networks of those that could be made."""
    inference = run.configs["inference.json"]
    embedded = {name: config for name, config in configs.items() if name != "plan.json"}
    exporter = NetworkExporter(
        run.network, inference["in_channels"], inference["roi_size"], embedded
    )
    made = {name: exporter.export(name, folder) for name in formats}
    networks = {name: network for name, (_, network) in made.items() if network is not None}
    return {name: facts for name, (facts, _) in made.items()}, networks


def _verify_dice(
    folder: Path, run: TrainedRun, made: dict[str, Facts], networks: Mapping[str, Network]
) -> Facts:
    """Compare the mean Dice of the validation cases, and remove formats whose Dice differs."""
    try:
        cases = load_run_cases(run.directory, run.configs["train.json"])
        everyone: dict[str, Network] = {"": run.network, **networks}
        dices = compare_dice(run.directory, run.configs["inference.json"], cases, everyone)
        own = dices.pop("")
        if isinstance(own, str) or math.isnan(own):
            raise NotComparedError("the network itself does not score on these cases")
    except NotComparedError as error:
        return {"reason": f"{error}"}
    for name, dice in dices.items():
        difference = math.inf if isinstance(dice, str) else abs(dice - own)
        if difference <= DICE_TOLERANCE:
            made[name] |= {"mean_dice": dice, "dice_difference": difference}
            continue
        (folder / made[name]["file"]).unlink()
        got = dice if isinstance(dice, str) else f"{dice:.6f}"
        why = f"expected a mean Dice within {DICE_TOLERANCE:g} of {own:.6f}, got {got}"
        made[name] = {"made": False, "reason": why}
    return {"num_cases": len(cases.validation), "mean_dice": own}


def _installed_versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _write_zip(bundle: Path, file: Path) -> None:
    """Write a folder into a zip, which has the same bytes for the same files."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
            name = str(Path(bundle.name) / path.relative_to(bundle))
            entry = zipfile.ZipInfo(name, FIRST_DAY)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            with path.open("rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target)


# --- configs


def select_configs(run: TrainedRun, package: str) -> dict[str, Config]:
    """Return the configs of a bundle by file name, made from the repository's templates.

    Raises:
        InputError: One line for each setting of the run that the bundle needs and that has a path
            in it.
    """
    templates = {
        name: json.loads((TEMPLATES / f"{name}.json").read_text())
        for name in ("amp", "inference", "evaluate")
    }
    optional = {"process_group": None} if "process_group" in run.configs["train.json"] else {}
    overlay, schema = (
        json.loads(Path(__file__).with_name(f"{name}.json").read_text())
        for name in ("evaluate_files", "metadata_schema")
    )
    plan = _read_config(run.directory / "plan.json")
    overlay["evaluator#key_val_metric"]["mean_dice"]["ignore_value"] = plan.get("ignore_value")
    metadata = _select(dict.fromkeys(schema["properties"]), run.configs, "metadata.json")
    train = _select(templates["amp"] | optional, run.configs, "train.json")
    train |= {"dataset_dir": "dataset", "cache_dir": "../cache"}
    train["output_dir"] = f"../{package.rpartition('_')[0]}_again"
    inference = _select(templates["inference"], run.configs, "inference.json")
    inference["dataset_dir"] = "dataset"
    # all values are known, so that the packed code needs no plan
    inference = json.loads(re.sub(r'"\$@plan\.(\w+)"', r'"@\1"', json.dumps(inference)))
    del inference["plan"]
    return {
        "train.json": train,
        "inference.json": inference,
        "evaluate.json": {"output_dir": ".", **templates["evaluate"]},
        "evaluate_files.json": overlay,
        "metadata.json": {key: value for key, value in metadata.items() if value is not None},
        "plan.json": {f.name: plan[f.name] for f in fields(Plan) if f.name in plan}
        | {"reasons": {}},
    }


def _select(template: Config, configs: Mapping[str, Config], name: str) -> Config:
    """Return the template with the values of a run's config that are known and safe."""
    source, found, faults = configs[name], dict(template), []
    for key in template.keys() & source.keys() - PRIVATE - {"device"}:
        if name == "train.json" and key in PARTS:
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
    return not (isinstance(value, str) and PLACE.search(value))


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


def find_targets(config: Any) -> Iterator[str]:
    """Yield every `_target_` in a config; overlays write `part#_target_`."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        if str(key).split("#")[-1] == "_target_" and isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            yield from find_targets(value)


def rename_targets(config: Any, package: str, modules: Collection[str]) -> Any:
    """Return a config whose `_target_`s in `modules` are those of the package."""
    if isinstance(config, list):
        return [rename_targets(child, package, modules) for child in config]
    if not isinstance(config, dict):
        return config
    return {
        key: rename_modules(value, package, modules)
        if key.split("#")[-1] == "_target_" and isinstance(value, str)
        else rename_targets(value, package, modules)
        for key, value in config.items()
    }


def find_modules(names: Iterable[str], root: Path = ROOT) -> dict[str, Path]:
    """Return the modules that dotted names need: their own, what these import, and so on.

    Args:
        names: Names of modules or of what is in them; names of other packages are left out.
        root: Folder that the modules are in.

    Returns:
        File by module name, sorted; packages included.
    """
    found: dict[str, Path] = {}
    waiting = list(names)
    while waiting:
        module = _find_module(waiting.pop(), root)
        if module is None or module in found:
            continue
        found[module] = _file_of(module, root)
        waiting.append(module.rpartition(".")[0])
        for node in ast.walk(ast.parse(found[module].read_text())):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                waiting += [f"{node.module}.{alias.name}" for alias in node.names]
    return dict(sorted(found.items()))


def _file_of(module: str, root: Path) -> Path:
    path = root / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _find_module(dotted: str, root: Path) -> str | None:
    """Return the longest part of a dotted name that is a module of ours."""
    while dotted.split(".")[0] in ROOTS.split("|"):
        if _file_of(dotted, root).is_file():
            return dotted
        dotted = dotted.rpartition(".")[0]
    return None


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

    return FROM_ROOT.sub(rf"\1{package}.\2", DOTTED.sub(rename, text))


def write_modules(
    folder: Path, package: str, modules: Mapping[str, Path], root: Path = ROOT
) -> Facts:
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
