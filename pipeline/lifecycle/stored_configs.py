"""The configs, plan and data that a run directory states, to continue the run and to share it.

MONAI's clients (MONAI Label, federated learning) train the network of such a bundle on their own
data: they name the run with `run_name`, or list their cases in the place of a dataset folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from pipeline.bundle.metadata import read_license, run_inference_config, run_metadata
from pipeline.config import keys, old_names
from pipeline.data.cases import Case
from pipeline.data.dataset import Cases
from pipeline.data.plan import AUTO, Plan
from pipeline.data.statistics import DatasetFingerprint, training_range
from pipeline.errors import InputError, require
from pipeline.files import make_directory, write_durably, write_json
from pipeline.reporting.model_card import render_model_card

RECIPE = ("base_channels", "learning_rate", "steps_per_epoch", "max_epochs", "warmup_steps")
CARD = Path("docs", "README.md")  # of the model
# that start from bundle_root, or null
PATHS = ("cache_dir", "split_file", "data_roots", "init_weights")


def portable(
    source: keys.Config, bundle_root: Path, dataset_dir: Path, run_dir: Path
) -> keys.Config:
    """Return a config as a bundle in the run directory states it: paths relative to that root."""

    def relative(path: Any) -> Any:
        if isinstance(path, list):
            return [relative(one) for one in path]
        return path and os.path.relpath(bundle_root / path, run_dir)

    kept = {key: value for key, value in source.items() if key not in ("_meta_", *keys.CLIENT_KEYS)}
    if "accept_changed_data" in kept:
        kept["accept_changed_data"] = False
    return (
        kept
        | {key: relative(source[key]) for key in PATHS}
        | {
            "bundle_root": ".",
            "dataset_dir": os.path.relpath(dataset_dir, run_dir),
            # without `#`, which monai.bundle replaces
            "output_dir": f"../{run_dir.name}_again".replace("#", ""),
        }
    )


def write_configs(
    run_dir: Path,
    source: keys.Config,
    cases: Cases,
    plan: Plan,
    fingerprint: DatasetFingerprint | None,
    **record: Any,
) -> None:
    """Make the run directory a bundle.

    Args:
        source: The config of the run, `portable`.
        record: Other entries of `run.json`: `init_weights` that the run began with, and `contents`
            of the files of its cases (see `contents_of`).
    """
    target = run_dir / "configs"
    make_directory(target)
    inference, metadata, evaluate = (
        json.loads((keys.CONFIGS / f"{name}.json").read_text())
        for name in ("inference", "metadata", "evaluate")
    )
    trained_on = training_range(fingerprint) if fingerprint else None
    for path, content in {  # run.json first: without it there is no run
        run_dir / "run.json": {"fingerprint": cases.fingerprint, **record},
        run_dir / "plan.json": plan.as_dict(),
        target / "train.json": source,
        target / "inference.json": run_inference_config(inference, source, cases, plan, trained_on),
        target / "evaluate.json": {"output_dir": ".", **evaluate},
        target / "metadata.json": run_metadata(metadata, source, cases, plan),
    }.items():
        write_json(path, content)
    shutil.copyfile(keys.CONFIGS / "logging.conf", target / "logging.conf")


def write_docs(run_dir: Path) -> None:
    """Write the licence of the code and, last, the model card of a run that ended."""
    card = run_dir / CARD
    make_directory(card.parent)
    write_durably(run_dir / "LICENSE", read_license())
    write_durably(card, render_model_card(run_dir).encode())


def _read(path: Path, make: Callable[..., Any] = dict) -> Any:
    try:
        return make(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: expected the {path.stem} of the run there, got: {error}. Restore it, or "
            "choose another output_dir."
        ) from error


def stored_plan(run_dir: Path) -> Plan:
    """Read the plan of the run there; raise an `InputError` if there is none."""
    config = run_dir / "configs" / "train.json"
    stored = _read(config) if config.is_file() else {}
    # which the config of a run of an earlier version states, and not its plan
    former = {key: stored[key] for key in RECIPE if stored.get(key, AUTO) != AUTO}
    return _read(run_dir / "plan.json", lambda **plan: Plan(**{**former, **plan}))


def stored_record(run_dir: Path) -> dict[str, Any]:
    """Read `run.json` of the run there; raise an `InputError` if there is none."""
    return _read(run_dir / "run.json")


def changed_cases(run_dir: Path, cases: Cases, contents: Mapping[str, str]) -> list[str]:
    """Return ids of cases whose files (`contents_of`) changed since the run there last started.

    The list is empty where the dataset has other cases now: `changes_since` refuses them.
    """
    known = stored_record(run_dir).get("contents")
    if not known or known.keys() != {case["case_id"] for case in cases.all}:
        return []
    return [case_id for case_id in contents if contents[case_id] != known[case_id]]


def changes_since(run_dir: Path, source: keys.Config, fingerprint: str | None) -> list[str]:
    """Return keys of a run's config that have other values in `source`, which is `portable`.

    The dataset must have the same fingerprint as then, unless it is `None`.

    Raises:
        InputError: If it would be another run, or what there was cannot be read.
    """
    stored = _read(run_dir / "configs" / "train.json")
    if old_names.translate(stored) != stored:  # an earlier version's, which no run continues
        return []
    former = {"init_weights": None, "reinit_head": False, **stored}
    known = fingerprint and stored_record(run_dir)["fingerprint"]
    planned = stored_plan(run_dir).as_dict()
    # what was `auto` is what it was decided to be, and has not changed where it is given now
    decided = [
        {key: planned.get(key, value) if value == AUTO else value for key, value in one.items()}
        for one in (former, source)
    ]
    changed = keys.changes(*decided)
    if known != fingerprint:
        changed[keys.IDENTITY].append("dataset_dir (other cases)")
    got = f"other values of {', '.join(changed[keys.IDENTITY])}"
    remedy = "Choose another output_dir, or leave them as they were."
    require(not changed[keys.IDENTITY], run_dir, "the config of the run there", got, remedy)
    return changed[keys.CONTINUABLE]


def given_data(source: keys.Config) -> tuple[list[Case], list[Case]] | None:
    """Return the training and validation cases that an unevaluated config lists, if it does."""
    parser = ConfigParser(source)
    train, validation = (parser.get(f"{part}#dataset#data") for part in ("train", "validate"))
    listed = validation if isinstance(validation, list) else []
    return (train, listed) if isinstance(train, list) else None


def is_clients(source: keys.Config) -> bool:
    """Return whether a client made this unevaluated config."""
    return given_data(source) is not None or not source.keys().isdisjoint(keys.CLIENT_KEYS)


def require_same_classes(source: keys.Config, cases: Cases, plan: Plan) -> None:
    """Refuse data with other classes, or channels, than a plan that was made for other data."""
    names, channels = cases.class_names, cases.num_channels
    if source["class_names"] == AUTO and names and [*names] != [*plan.class_names]:
        raise InputError(
            f"{cases.name}: expected the classes {', '.join(plan.class_names)}, in the order "
            f"of their label values, got {', '.join(names)}. Relabel the data, or state "
            "class_names if they mean the same."
        )
    fits, expected = channels in (None, plan.in_channels), f"{plan.in_channels} image channels"
    require(fits, cases.name, expected, channels, "Choose other data.")
