"""What MONAI's clients put into the config of a bundle: lists of files, and a name for the run."""

from __future__ import annotations

from typing import Any

from pipeline.config import CLIENT_KEYS, Config
from pipeline.data.listing import Case


def given_data(source: Config) -> tuple[list[Case], list[Case]] | None:
    """Training and validation cases that a config lists itself; `None` where it does not.

    Args:
        source: The config, unevaluated.
    """
    train, validation = (_listed(source.get(part)) for part in ("train", "validate"))
    return None if train is None else (train, validation or [])


def _listed(part: Any) -> list[Case] | None:
    """The cases that a part's dataset lists itself; it may be a reference."""
    dataset = part.get("dataset") if isinstance(part, dict) else None
    data = dataset.get("data") if isinstance(dataset, dict) else None
    return data if isinstance(data, list) else None


def is_clients(source: Config) -> bool:
    """Whether a client goes on with the network of a bundle, on data of its own.

    Args:
        source: The config, unevaluated.
    """
    return given_data(source) is not None or not source.keys().isdisjoint(CLIENT_KEYS)
