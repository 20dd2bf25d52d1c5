"""A trained run in memory: `Predictor("runs/phantom")(image)`, and how its networks are loaded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import convert_to_numpy

from pipeline.config import allowed, keys
from pipeline.config.old_names import INFERENCE, read_inference_config
from pipeline.config.parser import Parser
from pipeline.errors import InputError, innermost
from pipeline.files import load
from pipeline.precision import Precision

# what the members of an ensemble have in common: they see the same windows of the same volume
COMMON = (
    "spacing", "crop_empty_borders", "normalization", "transforms_before", "transforms_after",
    "roi_size", "in_channels", "num_classes", "class_names",
)  # fmt: skip


class Predictor:
    """Predicts volumes in memory with a trained run, or the mean probabilities of several.

    Args:
        run_dir: Of the run.
        others: Of further runs of the same plan.
        allow: Names that `_target_` may hold beside the list, as `--allow` gives them.
        values: Of keys of its `configs/inference.json`, such as `device="cpu"`.

    An `InputError` says that there is no such run, or it has no weights, or a value is none.
    """

    def __init__(
        self, run_dir: str | Path, *others: str | Path, allow: Collection[str] = (), **values: Any
    ) -> None:
        source = read_inference_config(run_dir)
        if unknown := values.keys() - source.keys():
            raise InputError(f"Predictor: expected keys of {INFERENCE}, got {', '.join(unknown)}.")
        members = [*others, *values.pop("ensemble", [])]
        source |= {**values, "ensemble": [str(Path(other).absolute()) for other in members]}
        allowed.check_names(source, allow)
        table = {**keys.KEYS, **keys.PREDICTION_KEYS}
        keys.check_values(source, {key: spec for key, spec in table.items() if key in source})
        parser = Parser(source)
        self.in_channels = source["in_channels"]
        try:
            self.preprocessing = parser.get_parsed_content("preprocessing")
            self.segmenter = parser.get_parsed_content("segmenter")
        except (RuntimeError, ValueError) as error:
            raise InputError(str(innermost(error))) from error

    def __call__(
        self, image: np.ndarray | torch.Tensor, affine: np.ndarray | None = None
    ) -> MetaTensor:
        """Predict labels `(H, W, D)` uint8 of one volume on its own grid, with its affine.

        Args:
            image: `(H, W, D)`, or `(C, H, W, D)` of several channels, intensities as in the files
                that the run was trained on; it stays as it is.
            affine: `(4, 4)` to RAS mm; of a MetaTensor it is known.

        A `ValueError` says that the image has no affine of three directions, or other channels.
        """
        if affine is None and isinstance(image, MetaTensor):
            affine = image.affine.cpu().numpy()
        affine = np.array(affine, dtype=np.float64)
        if affine.shape != (4, 4) or not abs(np.linalg.det(affine)) > 0:
            raise ValueError(
                f"affine: expected (4, 4) with three directions, got {affine.tolist()}. Give it."
            )
        # a copy, since MONAI's normalisation works in place
        voxels = torch.from_numpy(np.array(convert_to_numpy(image), dtype=np.float32, order="C"))
        voxels = voxels[None] if voxels.ndim == 3 else voxels
        if voxels.ndim != 4 or len(voxels) != self.in_channels:
            raise ValueError(
                f"image: expected {self.in_channels} channels, (C, H, W, D), got shape "
                f"{tuple(image.shape)}."
            )
        meta = {"original_affine": affine, "spatial_shape": np.array(voxels.shape[1:])}
        loaded = {"image": MetaTensor(voxels, affine=torch.as_tensor(affine), meta=meta)}
        found = self.segmenter(self.preprocessing.regularize(loaded)["image"])
        return MetaTensor(torch.as_tensor(found.labels), affine=torch.as_tensor(affine))


def load_networks(
    bundle_root: str,
    network: torch.nn.Module,
    weights: str,
    ensemble: Sequence[str],
    precision: Precision | None = None,
) -> list[torch.nn.Module]:
    """Load the weights of a run into its network, and make those of an ensemble beside it.

    Relative paths start from the run directory `bundle_root`; a relative path to `weights`, a state
    dict, is one in each run directory. `precision` places the networks of the runs in `ensemble`;
    configs of older runs have none. An `InputError` says that there are no weights, or another
    network's, or that a plan differs.
    """
    root = Path(bundle_root).resolve()
    load_weights(network, root / weights)
    networks = [network]
    own = read_inference_config(root) if ensemble else {}
    for other in ensemble:
        source = read_inference_config(root / other)
        if differing := [key for key in COMMON if source.get(key) != own[key]]:
            raise InputError(
                f"{other}: expected a run of the same plan, got another {', '.join(differing)}. "
                "An ensemble is of runs that differ in fold, seed or network alone."
            )
        targets = [value for path, value in keys.walk(own) if path[-1:] == ("_target_",)]
        allowed.check_names(source, targets)
        member = Parser(source).get_parsed_content("network_def")
        device = next(network.parameters()).device
        networks.append(precision.place(member) if precision else member.to(device))
        name = source["weights"] if Path(weights).is_absolute() else weights
        load_weights(networks[-1], root / other / name)
    return networks


def load_weights(network: torch.nn.Module, path: Path) -> None:
    """Load a state dict, executing nothing; any fault of the file is an `InputError`."""
    try:
        network.load_state_dict(load(path))
    except Exception as error:  # torch and pickle raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: expected the weights of this network, got: {reason}. Name another file, or a "
            "run that has them, or train one."
        ) from None
