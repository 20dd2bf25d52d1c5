"""A trained run in memory: `Predictor("runs/phantom")(image)`, and how its networks are loaded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import convert_to_numpy
from nibabel.spatialimages import SpatialImage

from pipeline.config import allowed, keys
from pipeline.config.old_names import INFERENCE, read_inference_config
from pipeline.config.parser import Parser
from pipeline.data.cases import list_images
from pipeline.errors import InputError, innermost, nearest, refuse, require, require_path
from pipeline.files import load
from pipeline.precision import Precision
from pipeline.prediction.predict_files import load_image
from pipeline.prediction.results import count_voxels

# what the members of an ensemble have in common: they see the same windows of the same volume
COMMON = (
    "spacing", "crop_empty_borders", "normalization", "transforms_before", "transforms_after",
    "roi_size", "in_channels", "num_classes", "class_names",
)  # fmt: skip


class LabelMap(MetaTensor):
    """Labels `(H, W, D)` uint8 with the affine of their image, and names of classes in `meta`."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Operate on label maps as on MetaTensors: an exported bundle has a class of its own."""
        types = tuple(MetaTensor if issubclass(one, MetaTensor) else one for one in types)
        return super().__torch_function__(func, types, args, kwargs)

    def volumes(self) -> dict[str, float]:
        """Return the volume in ml of each foreground class by name."""
        voxel_ml = float(self.affine[:3, :3].det().abs()) / 1000
        counts = count_voxels(self.as_tensor(), self.meta["class_names"])
        return {name: count * voxel_ml for name, count in counts.items()}


class Predictor:
    """Predicts volumes in memory with a trained run, or the mean probabilities of several.

    Args:
        run_dir: Of the run.
        others: Of further runs of the same plan.
        allow: Names that `_target_` may hold beside the list, as `--allow` gives them.
        values: Of keys of its `configs/inference.json`, such as `device="cpu"`.

    Attributes:
        class_names: Of the label values, background first.
        in_channels: Channels of an image.

    Raises:
        InputError: If there is no such run, or it has no weights, or a value is none.
    """

    def __init__(
        self, run_dir: str | Path, *others: str | Path, allow: Collection[str] = (), **values: Any
    ) -> None:
        require_path("run_dir", run_dir, "the directory of a run")
        source = read_inference_config(run_dir)
        refuse(
            f"Predictor: expected keys of {INFERENCE}, got {key}. {nearest(key, source)}"
            for key in values.keys() - source.keys()
        )
        members = [*others, *values.pop("ensemble", [])]
        source |= {**values, "ensemble": [str(Path(other).absolute()) for other in members]}
        allowed.check_names(source, allow)
        table = {**keys.KEYS, **keys.PREDICTION_KEYS}
        keys.check_values(source, {key: spec for key, spec in table.items() if key in source})
        parser = Parser(source)
        self.in_channels: int = source["in_channels"]
        self.class_names: list[str] = source["class_names"]
        try:
            self.preprocessing = parser.get_parsed_content("preprocessing")
            self.segmenter = parser.get_parsed_content("segmenter")
        except (RuntimeError, ValueError) as error:
            raise InputError(str(innermost(error))) from error

    def __call__(
        self,
        image: str | Path | SpatialImage | np.ndarray | torch.Tensor,
        affine: np.ndarray | None = None,
    ) -> LabelMap:
        """Predict labels `(H, W, D)` uint8 of one volume on its own grid, with its affine.

        Args:
            image: A file or the folder of a DICOM series, with its other channels beside it; an
                image of nibabel; or an array `(H, W, D)`, of several channels `(C, H, W, D)`,
                with intensities as in the files that the run was trained on. It stays as it is.
            affine: `(4, 4)` to RAS mm of an array; of anything else it is known.

        Raises:
            InputError: If there is no image at a path, or there are several.
            ValueError: If the image has no affine of three directions, or other channels.
        """
        if isinstance(image, str | Path):
            cases = list_images(image, self.in_channels)
            require(len(cases) == 1, image, "one image", len(cases), "Predict each by itself.")
            loaded, _ = load_image(cases[0], self.preprocessing, self.in_channels)
        else:
            loaded = {"image": self._make_image(image, affine)}
        affine = np.asarray(loaded["image"].affine)
        found = self.segmenter(self.preprocessing.regularize(loaded)["image"])
        meta = {"class_names": self.class_names}
        return LabelMap(torch.as_tensor(found.labels), affine=torch.as_tensor(affine), meta=meta)

    def _make_image(self, image: Any, affine: Any) -> MetaTensor:
        """Return a copy of an array, or of nibabel's or MONAI's image, as loading would."""
        if isinstance(image, SpatialImage):
            voxels, affine = np.asanyarray(image.dataobj), image.affine
            image = np.moveaxis(voxels, 3, 0) if voxels.ndim == 4 else voxels
        elif affine is None and isinstance(image, MetaTensor):
            affine = image.affine.cpu().numpy()
        affine = np.array(affine, dtype=np.float64)
        if affine.shape != (4, 4) or not abs(np.linalg.det(affine)) > 0:
            raise ValueError(
                f"affine: expected (4, 4) with three directions, got {affine.tolist()}. Give it."
            )
        # a copy, since MONAI's normalisation works in place
        copied = torch.from_numpy(np.array(convert_to_numpy(image), dtype=np.float32, order="C"))
        copied = copied[None] if copied.ndim == 3 else copied
        if copied.ndim != 4 or len(copied) != self.in_channels:
            raise ValueError(
                f"image: expected {self.in_channels} channels, (C, H, W, D), got shape "
                f"{tuple(image.shape)}."
            )
        meta = {"original_affine": affine, "spatial_shape": np.array(copied.shape[1:])}
        return MetaTensor(copied, affine=torch.as_tensor(affine), meta=meta)


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
