"""Makes metadata and inference config of a run directory, which is a MONAI bundle."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, distribution, version

import monai
import numpy as np
import torch

from pipeline.config.keys import CONFIGS, Config
from pipeline.data.dataset import Cases
from pipeline.data.plan import Plan

NETWORKS = {"networks.dense_unet.DenseUNet": "Dense U-Net"}
# DICOM's name of a modality, and the names that datasets use
MODALITIES = {
    "CT": "CT CTA CBCT",
    "MR": "MR MRI T1 T1N T1W T1C T1CE T1GD T2 T2W T2F FLAIR T2FLAIR ADC DWI SWI PD PDW",
    "PT": "PT PET",
    "US": "US ULTRASOUND",
}
SCALINGS = ("NONORM", "ZSCORE", "RESCALE_TO_0_1", "RGB_TO_0_1")  # channel names of nnU-Net


def read_license() -> bytes:
    """Read the licence of the code, in the repository or of the installed package."""
    file = CONFIGS.parent / "LICENSE"
    if file.is_file():
        return file.read_bytes()
    return (distribution("ampseg").read_text("licenses/LICENSE") or "").encode()


def run_metadata(template: Config, source: Config, cases: Cases, plan: Plan) -> Config:
    """Return `configs/metadata.json` of a run, made from the repository's of the phantom.

    Source: docs.monai.io, MONAI Bundle Specification, `metadata.json`.
    """
    metadata = deepcopy(template)
    packages = metadata["required_packages_version"]
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            packages[package] = version(package)
    network = source["network_def"]["_target_"]
    name = NETWORKS.get(network, network.rpartition(".")[2])
    classes = ", ".join(plan.class_names[1:])
    metadata |= {
        "changelog": {metadata["version"]: f"Trained on {cases.name}"},
        "name": f"{name}, {cases.name}",
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "task": f"Segmentation of {classes}",
        "description": f"A {name}, trained on {cases.name} to segment {classes}.",
        "data_source": cases.description.get("reference", cases.name).lstrip("$@%"),
        "data_license": cases.description.get("licence", "not stated by the dataset").lstrip("$@%"),
    }
    tensors = metadata["network_data_format"]
    image, pred = tensors["inputs"]["image"], tensors["outputs"]["pred"]
    names = cases.channel_names or ["image"] * plan.in_channels
    image |= {
        "spatial_shape": list(plan.roi_size),
        "modality": modality_of(cases.channel_names),
        "num_channels": plan.in_channels,
        "channel_def": {str(n): name for n, name in enumerate(names)},
    }
    pred |= {
        "spatial_shape": list(plan.roi_size),
        "num_channels": len(plan.class_names),
        "channel_def": {str(n): name for n, name in enumerate(plan.class_names)},
    }
    return metadata


def modality_of(channel_names: Sequence[str] | None) -> str:
    """Return the DICOM code of a modality; an unknown name stays as it is declared."""
    codes = {word: code for code, words in MODALITIES.items() for word in words.split()}
    declared = [name for name in channel_names or () if name.upper() not in SCALINGS]
    return ", ".join(dict.fromkeys(codes.get(n.upper(), n) for n in declared)) or "n/a"


def run_inference_config(
    template: Config, source: Config, cases: Cases, plan: Plan, trained_on: Config | None
) -> Config:
    """Return `configs/inference.json` of a run: the repository's, with the run's own values.

    Values of the run's config `source` and of its plan are taken for known keys; `trained_on` has
    the ranges of the training images, to warn of others.
    """
    own = ("initialize", "run", "finalize", "device", "output_dir", "dataset_dir", "plan", "cases")
    values = {**source, **plan.as_dict()}
    return {
        **deepcopy(template),
        **{key: values[key] for key in template if key in values and key not in own},
        "trained_on": trained_on,
        "dataset_dir": cases.image_dir(source["dataset_dir"]),
    }
