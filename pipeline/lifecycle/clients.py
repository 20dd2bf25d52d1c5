"""Config changes made by MONAI clients (MONAI Label, federated learning).

Such a client trains the network of a bundle on its own data: it names the run with `run_name`, or
lists its cases in the config in the place of a dataset folder.
"""

from __future__ import annotations

from pipeline.config.keys import CLIENT_KEYS, Config
from pipeline.data.cases import Case
from pipeline.data.dataset import Cases
from pipeline.data.plan import AUTO, Plan
from pipeline.errors import InputError


def given_data(source: Config) -> tuple[list[Case], list[Case]] | None:
    """Return the training and validation cases that an unevaluated config lists, if it does."""
    parts = (source.get(name) for name in ("train", "validate"))
    datasets = [part.get("dataset") if isinstance(part, dict) else None for part in parts]
    found = [one.get("data") if isinstance(one, dict) else None for one in datasets]
    train, validation = (one if isinstance(one, list) else None for one in found)
    return None if train is None else (train, validation or [])


def is_clients(source: Config) -> bool:
    """Whether a client made this unevaluated config."""
    return given_data(source) is not None or not source.keys().isdisjoint(CLIENT_KEYS)


def require_same_classes(source: Config, cases: Cases, plan: Plan) -> None:
    """Refuse data with other classes or channels than the plan, which was made for other data.

    Raises:
        InputError: If the dataset declares other classes, and the config none, or other channels.
    """
    names, channels = cases.class_names, cases.num_channels
    if source["class_names"] == AUTO and names and [*names] != [*plan.class_names]:
        raise InputError(
            f"{cases.name}: expected the classes {', '.join(plan.class_names)}, in the order "
            f"of their label values, got {', '.join(names)}. Relabel the data, or state "
            "class_names if they mean the same."
        )
    if channels not in (None, plan.in_channels):
        raise InputError(
            f"{cases.name}: expected {plan.in_channels} image channels, got {channels}. "
            "Choose other data."
        )
