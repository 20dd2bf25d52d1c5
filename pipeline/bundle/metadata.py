"""What a run directory says about its model: metadata and inference config of the bundle."""

from __future__ import annotations

import platform
from collections.abc import Sequence
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
    def description(self) -> dict[str, str]: ...  # noqa: D102
    def image_dir(self, dataset_dir: str) -> str: ...  # noqa: D102


class PlannedValues(Protocol):
    """What is taken from the plan; `pipeline.data.plan.Plan` has it."""

    @property
    def class_names(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def in_channels(self) -> int: ...  # noqa: D102
    @property
    def roi_size(self) -> Sequence[int]: ...  # noqa: D102
    def as_dict(self) -> dict[str, Any]: ...  # noqa: D102


def run_metadata(template: Config, cases: DatasetFacts, plan: PlannedValues) -> Config:
    """`configs/metadata.json` of a run.

    Args:
        template: The repository's metadata, of the phantom.
        cases: Facts of its dataset.
        plan: Its values that fit the dataset.
    """
    metadata = deepcopy(template)
    metadata["name"] = f"Dense U-Net, {cases.name}"
    metadata["task"] = f"Segmentation of {', '.join(plan.class_names[1:])}"
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
    image["num_channels"] = plan.in_channels
    image["spatial_shape"] = list(plan.roi_size)
    image["channel_def"] = {str(n): "image" for n in range(plan.in_channels)}
    pred = metadata["network_data_format"]["outputs"]["pred"]
    pred["num_channels"] = len(plan.class_names)
    pred["spatial_shape"] = list(plan.roi_size)
    pred["channel_def"] = {str(n): name for n, name in enumerate(plan.class_names)}
    return metadata


def run_inference_config(
    template: Config,
    source: Config,
    cases: DatasetFacts,
    plan: PlannedValues,
    trained_on: Config | None,
) -> Config:
    """`configs/inference.json` of a run: the repository's, with the run's own values.

    Args:
        template: The repository's inference config.
        source: The run's config; keys that both have are taken from here.
        cases: Facts of its dataset.
        plan: The values that fit the dataset; keys that both have are taken from here.
        trained_on: What the training images are like, to warn of others.
    """
    inference = deepcopy(template)
    own = ("initialize", "run", "finalize", "device", "output_dir", "dataset_dir", "plan", "cases")
    values = {**source, **plan.as_dict()}
    inference.update({k: values[k] for k in template if k in values and k not in own})
    inference["trained_on"] = trained_on
    inference["dataset_dir"] = cases.image_dir(source["dataset_dir"])
    return inference
