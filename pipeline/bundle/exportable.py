"""A run that is fit to be exported: its files agree with one another."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.bundle.contents import metadata_faults
from pipeline.bundle.parity import ON_CPU
from pipeline.config import allowed, old_names
from pipeline.config.keys import Config
from pipeline.config.parser import Parser
from pipeline.errors import InputError, innermost
from pipeline.prediction.predictor import load_weights, read_inference_config

OPTIONAL = ("evaluate.json",)
NEEDED = {
    "inference.json": ("network_def", "in_channels", "class_names", "roi_size"),
    "train.json": ("dataset_dir", "train", "validate"),
}
CONFIGS = ("train.json", "inference.json", "metadata.json", *OPTIONAL)


@dataclass(frozen=True)
class Run:
    """A run that can be exported.

    Attributes:
        directory: Its absolute path.
        configs: By file name.
        network: With the best weights, on the CPU.
    """

    directory: Path
    configs: Mapping[str, Config]
    network: torch.nn.Module

    @classmethod
    def read(cls, directory: Path, allow: Collection[str] = ()) -> Run:
        """Read a run, and see that its files agree.

        Args:
            directory: Of the run.
            allow: Names that `_target_` may hold beside the list.

        Raises:
            InputError: One line per fault.
        """
        inference = read_inference_config(directory)
        folder = directory / "configs"
        optional = {name for name in OPTIONAL if not (folder / name).exists()}
        configs = {name: read_config(folder / name) for name in CONFIGS if name not in optional}
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
            network = Parser({**inference, **ON_CPU}).get_parsed_content("network_def")
        except (RuntimeError, ValueError, LookupError) as error:
            raise InputError(str(innermost(error))) from error
        load_weights(network, weights)
        if not all(torch.isfinite(one).all() for one in network.state_dict().values()):
            raise InputError(
                f"{weights}: expected finite weights, got NaN or infinity. Train it again."
            )
        run = cls(directory, configs, network.eval())
        run.require_agreement()
        return run

    def require_agreement(self) -> None:
        """See that configs and metadata say of the network what it is.

        Raises:
            InputError: One line for each thing that it is not.
        """
        inference, folder = self.configs["inference.json"], self.directory / "configs"
        in_channels, names = inference["in_channels"], inference["class_names"]
        try:
            with torch.no_grad():
                logits = self.network(torch.zeros(1, in_channels, *inference["roi_size"]))
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
        found = metadata_faults(self.configs["metadata.json"], in_channels, names)
        if found:
            raise InputError(*(f"{folder / 'metadata.json'}: {fault}" for fault in found))


def read_config(path: Path) -> Config:
    """A JSON object in a file.

    Raises:
        InputError: If there is none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected a config of the run, got: {error}. Restore it, or name another run."
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return old_names.translate(content)
