"""Exports a run as a bundle that predicts and evaluates without this repository.

The modules that prediction and evaluation need are copied to a package that no other bundle has, so
that two bundles can be used in one process. A config is the repository's template with those values
of the run that are known and have no path in them, so that nothing of data or machine leaves.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from pipeline.bundle.formats import FORMATS, ExportFacts, NetworkExporter
from pipeline.bundle.metadata import read_license
from pipeline.config import allowed, old_names
from pipeline.config.keys import CONFIGS, Config
from pipeline.config.old_names import read_inference_config
from pipeline.errors import InputError, refuse, require
from pipeline.prediction.predictor import Predictor

ROOT = Path(__file__).resolve().parents[2]
ROOTS = ("pipeline", "transforms", "networks")
OVERLAY = Path(__file__).with_name("evaluate_files.json")
TARGET = r'_target_": "([^"]+)"'
PACKED = ("inference.json", "evaluate_files.json")  # the bundle has the code of these configs
# These keys, of a config or of its parts, hold paths, cases or values that depend on them.
PRIVATE = {
    "bundle_root", "dataset_dir", "output_dir", "cache_dir", "data_roots", "exclude", "split_file",
    "group_pattern", "init_weights", "reinit_head", "input", "ensemble", "weights", "data",
    "case_id",
}  # fmt: skip
# A client may have put paths into these parts of a training config: the template's are taken then.
TRAIN_PARTS = {"data_module", "lifecycle", "cases", "cache", "train", "validate", "scoring"}
PATH_IN_TEXT = re.compile(r"""(?:^|[\s'"=(,])(?:~|\.\.?)?[\\/]|[A-Za-z]:[\\/](?!/)""")
INIT = '"""Code for prediction and evaluation; the bundle\'s root must be on `sys.path`."""\n'


class TrainedRun(NamedTuple):
    """It holds a run directory, its configs by file name, and its best network on the CPU."""

    directory: Path
    configs: dict[str, Config]
    network: torch.nn.Module


def export_run(
    run_dir: Path,
    output: Path,
    render_card: Callable[[Path, str], str],
    formats: Sequence[str] = tuple(FORMATS),
    allow: Sequence[str] = (),
) -> ExportFacts:
    """Make a bundle of a run, and a zip of it beside it, both completely or not at all.

    Args:
        output: Folder of the bundle; empty or missing.
        render_card: Returns the model card for a run directory and the name of a package.
        formats: Keys of `FORMATS`.
        allow: Names that `_target_` may hold besides the list.

    Returns:
        The content of `export.json`.

    Raises:
        InputError: If the run has no best network or a path in its settings, or `output` is used.
        OSError: If it cannot be written.
    """
    run = _load_run(run_dir, allow)
    zipped = Path(f"{output}.zip")
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    expected, got = "an empty folder or none, and no zip of it", zipped if is_free else output
    remedy = "Choose another, or remove it."
    require(is_free and not zipped.exists(), "--output_dir", expected, got, remedy)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        bundle = Path(temporary, output.name)
        facts = _write_bundle(bundle, run, render_card, formats)
        archive = shutil.make_archive(f"{temporary}/zip", "zip", temporary, bundle.name)
        os.replace(bundle, output)
        os.replace(archive, zipped)
    return facts


def _load_run(directory: Path, allow: Sequence[str]) -> TrainedRun:
    sources = {"inference.json": read_inference_config(directory)}
    for name in ("train.json", "metadata.json"):
        sources[name] = _read_config(directory / "configs" / name)
    configs = {name: old_names.translate(source) for name, source in sources.items()}
    allowed.check_names(configs["train.json"], allow)
    best = {"weights": "models/model.pt", "device": "cpu", "memory_format": "contiguous"}
    predictor = Predictor(directory, allow=allow, ensemble=[], **best)
    return TrainedRun(directory, configs, predictor.segmenter.networks[0])


def _read_config(path: Path) -> Config:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: expected a config of the run, got: {error}. Restore it, or name another run."
        ) from None


def _write_bundle(
    bundle: Path, run: TrainedRun, render_card: Callable[[Path, str], str], formats: Sequence[str]
) -> ExportFacts:
    """Write all files of a bundle, `export.json` with the facts last."""
    models = bundle / "models"
    for folder in (models, bundle / "configs", bundle / "docs"):
        folder.mkdir(parents=True)
    digest = _write_weights(models, run.network)
    package = make_package_name(run.directory.name, digest)
    configs = select_configs(run, package)
    texts = {name: json.dumps(configs[name]) for name in PACKED}
    targets = re.findall(TARGET, "".join(texts.values()))
    modules = find_modules(["pipeline.prediction.predictor", *targets])
    num_modules = write_modules(bundle / package, package, modules)
    code = {"package": package, "num_modules": num_modules}
    for name, text in texts.items():
        configs[name] = json.loads(rename_modules(text, package, modules))
    for name, config in configs.items():
        path = bundle / ("" if name == "plan.json" else "configs") / name
        path.write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(CONFIGS / "logging.conf", bundle / "configs" / "logging.conf")
    (bundle / "LICENSE").write_bytes(read_license())
    (bundle / "docs" / "README.md").write_text(render_card(run.directory, package))
    del configs["plan.json"]
    in_channels, roi_size = (configs["inference.json"][key] for key in ("in_channels", "roi_size"))
    exporter = NetworkExporter(run.network, in_channels, roi_size, embedded=configs)
    made = {name: exporter.export(name, models)[0] for name in formats}
    facts = {"code": code, "weights": {"sha256": digest}, "formats": made}
    (bundle / "export.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _write_weights(folder: Path, network: torch.nn.Module) -> str:
    """Write `model.pt`, a plain state dict, and `model.safetensors`; return the latter's hash."""
    state = {name: one.detach().contiguous().clone() for name, one in network.state_dict().items()}
    torch.save(state, folder / "model.pt")
    save_file(state, safe := folder / "model.safetensors", {"format": "pt"})
    return hashlib.sha256(safe.read_bytes()).hexdigest()


def select_configs(run: TrainedRun, package: str) -> dict[str, Config]:
    """Return the configs of a bundle by file name, made from the repository's templates."""
    names, source = ("amp", "inference", "evaluate", "metadata"), run.configs
    files = [*(CONFIGS / f"{name}.json" for name in names), OVERLAY]
    amp, inference, evaluate, metadata, overlay = (json.loads(f.read_text()) for f in files)
    optional = {"process_group": None} if "process_group" in source["train.json"] else {}
    path = run.directory / "plan.json"
    plan = _read_config(path) if path.is_file() else {}  # runs of older versions have none
    train = _select(amp | optional, source["train.json"], "train.json")
    train |= {"dataset_dir": "dataset", "cache_dir": "../cache"}
    train["output_dir"] = f"../{package.rpartition('_')[0]}_again"
    inference = _select(inference, source["inference.json"], "inference.json")
    inference["dataset_dir"] = "dataset"
    # all values are known, so that the packed code needs no plan
    text = re.sub(r'"\$@plan\.(\w+)"', r'"@\1"', json.dumps([inference, amp["validate"]]))
    inference, validate = json.loads(text)
    del inference["plan"]
    validate["key_metric"]["mean_dice"]["ignore_value"] = plan.get("ignore_value")
    overlay |= {
        "dataset#transform": validate["preprocessing"],
        "evaluator#inferer": validate["inferer"],
        "evaluator#postprocessing": validate["postprocessing"],
        "evaluator#key_val_metric": validate["key_metric"],
    }
    return {
        "train.json": train,
        "inference.json": inference,
        "evaluate.json": {"output_dir": ".", **evaluate},
        "evaluate_files.json": overlay,
        "metadata.json": _select(metadata, source["metadata.json"], "metadata.json"),
        "plan.json": {**plan, "reasons": {}},
    }


def _select(template: Config, source: Config, name: str) -> Config:
    """Return the template with the values of a run's config that are known and safe.

    Raises:
        InputError: One line for each setting that has a path in it and no substitute.
    """
    known = template.keys() & source.keys() - PRIVATE - {"device"}
    safe = {key for key in known if is_safe(source[key])}
    unsafe = sorted(known - safe - TRAIN_PARTS)
    refuse(f"{name}: {key}: expected no path, got one. Take it out." for key in unsafe)
    return template | {key: source[key] for key in safe}


def is_safe(value: Any) -> bool:
    """Return whether a value of a config has neither a path nor a private key with a value."""
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
        while module and module not in files:  # it is a class, a function, or another package
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
    """Put `package.` before names of its modules, and of their members, in a text."""
    packed = "|".join(re.escape(name) for name in modules if "." in name)
    from_root = rf"(?<=from )(?:{'|'.join(ROOTS)}) import "
    # a name after a dot or a slash is of another package, or an attribute
    return re.sub(rf"(?<![\w./])(?=(?:{packed})\b|{from_root})", f"{package}.", text)


def write_modules(folder: Path, package: str, modules: Mapping[str, Path]) -> int:
    """Write modules as a package, with templates; return their number, `__init__` apart."""
    folder.mkdir()
    (folder / "__init__.py").write_text(INIT)
    for file in modules.values():
        target = folder / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(rename_modules(file.read_text(), package, modules))
        templates = file.with_name("templates")
        if file.name == "__init__.py" and templates.is_dir():
            shutil.copytree(templates, target.with_name("templates"))
    return sum(file.name != "__init__.py" for file in modules.values())
