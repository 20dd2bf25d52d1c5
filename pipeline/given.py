"""What MONAI's clients put into the config of a bundle: lists of files, and a name for the run."""

from __future__ import annotations

from pipeline.config import CLIENT_KEYS, Config
from pipeline.data.listing import Case


def given_data(source: Config) -> tuple[list[Case], list[Case]] | None:
    """Training and validation cases that a config lists itself; `None` where it does not.

    Args:
        source: The config, unevaluated.
    """
    train, validation = (source[part]["dataset"]["data"] for part in ("train", "validate"))
    if not isinstance(train, list):
        return None
    return train, validation if isinstance(validation, list) else []


def is_clients(source: Config) -> bool:
    """Whether a client goes on with the network of a bundle, on data of its own.

    Args:
        source: The config, unevaluated.
    """
    return given_data(source) is not None or not source.keys().isdisjoint(CLIENT_KEYS)
