"""What a run directory says about its model: metadata and inference config of the bundle."""

from __future__ import annotations

import platform
from copy import deepcopy
from typing import Any, Protocol

import monai
import numpy as np
import torch

Config = dict[str, Any]


class DatasetFacts(Protocol):
    """What is taken from the dataset; `pipeline.data.datasets.Cases` has it."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def class_names(self) -> list[str]: ...  # noqa: D102
    @property
    def num_channels(self) -> int: ...  # noqa: D102
    @property
    def normalization(self) -> str: ...  # noqa: D102
    @property
    def description(self) -> dict[str, str]: ...  # noqa: D102


def run_metadata(template: Config, source: Config, cases: DatasetFacts) -> Config:
    """`configs/metadata.json` of a run.

    Args:
        template: The repository's metadata, of the phantom.
        source: The run's config.
        cases: Facts of its dataset.
    """
    metadata = deepcopy(template)
    metadata["name"] = f"Dense U-Net, {cases.name}"
    metadata["task"] = f"Segmentation of {', '.join(cases.class_names[1:])}"
    metadata["description"] = (
        f"A 3D U-Net with a dense bottleneck, trained in mixed precision on {cases.name}."
    )
    metadata["data_source"] = cases.description.get("reference", cases.name)
    metadata["data_license"] = cases.description.get("licence", "not stated by the dataset")
    metadata["monai_version"] = monai.__version__
    metadata["pytorch_version"] = torch.__version__.split("+")[0]
    metadata["numpy_version"] = np.__version__
    metadata["python_version"] = platform.python_version()
    image = metadata["network_data_format"]["inputs"]["image"]
    image["num_channels"] = cases.num_channels
    image["spatial_shape"] = source["roi_size"]
    image["channel_def"] = {str(n): "image" for n in range(cases.num_channels)}
    pred = metadata["network_data_format"]["outputs"]["pred"]
    pred["num_channels"] = len(cases.class_names)
    pred["spatial_shape"] = source["roi_size"]
    pred["channel_def"] = {str(n): name for n, name in enumerate(cases.class_names)}
    return metadata


def run_inference_config(template: Config, source: Config, cases: DatasetFacts) -> Config:
    """`configs/inference.json` of a run: the repository's, with the run's own values.

    Args:
        template: The repository's inference config.
        source: The run's config; keys that both have are taken from here.
        cases: Facts of the dataset, in the place of references to it.
    """
    inference = deepcopy(template)
    own = ("initialize", "run", "finalize", "device", "output_dir", "dataset_dir")
    inference.update({k: source[k] for k in template if k in source and k not in own})
    inference["dataset_dir"] = source["dataset_dir"] + "/imagesTr"
    facts = {
        "in_channels": cases.num_channels,
        "num_classes": len(cases.class_names),
        "normalization": cases.normalization,
    }
    for key, value in facts.items():
        if isinstance(inference[key], str) and inference[key].startswith("$"):
            inference[key] = value
    return inference
