"""From a dataset folder to what training needs of it: its cases, its soundness, its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch

from pipeline import distributed
from pipeline.data.dataset import Case, Cases, given_cases, load_cases
from pipeline.data.forecast import Forecast, available_bytes
from pipeline.data.memory import run_bytes, triples
from pipeline.data.phantom import make_phantom
from pipeline.data.plan import AUTO, Plan, make_plan
from pipeline.data.preflight import Preflight, preflight
from pipeline.data.splits import GroupPattern
from pipeline.data.step_memory import Net
from pipeline.data.window_memory import Windows
from pipeline.errors import as_bool
from pipeline.precision import MODES, resolve_device

PHANTOM = Path("data/phantom")  # the one dataset_dir that makes itself
GPU_BUDGET_BYTES, CPU_BUDGET_BYTES = 8 * 2**30, 2 * 2**30
# of what a card has free: resident cases may take a quarter, augmentation and cuDNN a little
SHARE_OF_CARD = 0.7


Auto = Literal["auto"]


class SplitSettings(TypedDict, total=False):
    """Which cases there are and how they are split; see `load_cases`."""

    fold: int | str
    num_folds: int
    split_seed: int
    split_file: str | None
    test_fraction: float
    group_pattern: GroupPattern
    exclude: Sequence[str]
    data_roots: Sequence[str]


class PlanSettings(TypedDict):
    """Values of the plan; see `Plan`."""

    spacing: Sequence[float] | Auto
    crop_empty_borders: bool | Auto
    normalization: str | Mapping[str, Any] | Sequence[Any]
    roi_size: Sequence[int] | Auto
    strides: Sequence[Any] | Auto
    class_names: Sequence[str] | Auto
    in_channels: int | Auto
    num_classes: int | Auto
    batch_size: int | Auto
    foreground_ratio: float | Auto
    flip_axes: Sequence[int] | Auto


class DataModule:
    """How a config looks at its dataset.

    Args:
        bundle_root: Folder that relative paths start from.
        dataset_dir: The dataset; `data/phantom` is made if it is not there.
        cache_dir: Where what was read of it is kept.
        split: Arguments of `load_cases` that say which cases there are and how they are split.
        preflight: How much of the files is read; see `pipeline.data.preflight.preflight`.
        settings: Values of the plan, or `auto`; see `make_plan`.
        memory_budget_bytes: What a training step may take; `auto`: 8 GiB, or 70 % of what the card
            has free if that is less, and 2 GiB on a CPU.
        device: That it trains on.
        base_channels: Of the network.
        recompute_levels: Of the network.
        amp: Whether it trains in mixed precision.
        amp_dtype: Of that; see `Precision`.
        windows: How it validates: `at_once` and `overlap`; see `Windows`.
    """

    def __init__(
        self,
        bundle_root: str,
        dataset_dir: str,
        cache_dir: str,
        split: SplitSettings,
        preflight: str,
        settings: PlanSettings,
        memory_budget_bytes: float | str,
        device: str,
        base_channels: int,
        recompute_levels: int = 0,
        amp: bool | str = True,
        amp_dtype: str = AUTO,
        windows: Mapping[str, Any] | None = None,
    ) -> None:
        root = Path(bundle_root).resolve()
        self.dataset_dir = (root / dataset_dir).resolve()
        self.cache_dir = (root / cache_dir).resolve()
        self.is_phantom = self.dataset_dir == root / PHANTOM
        file, folders = split["split_file"], split["data_roots"]
        self.split: dict[str, Any] = {
            **split,
            "split_file": file and root / file,
            "data_roots": [root / folder for folder in folders],
        }
        self.level = preflight
        self.settings: Mapping[str, Any] = settings
        self.memory_budget_bytes, self.device = memory_budget_bytes, device
        self.base_channels, self.recompute_levels = base_channels, recompute_levels
        self.amp, self.amp_dtype, self.windows = as_bool(amp, "amp"), amp_dtype, windows or {}

    def use_plan(self, plan: Plan) -> None:
        """Decide what is `auto` as it was decided for another plan."""
        decided = plan.as_dict()
        self.settings = {
            key: decided.get(key, value) if value == AUTO else value
            for key, value in self.settings.items()
        }

    def load(self, given: tuple[Sequence[Case], Sequence[Case]] | None = None) -> Cases:
        """Read what cases there are.

        Args:
            given: Training and validation cases in place of a dataset.

        Raises:
            InputError: If there is no dataset, or it cannot be split as asked.
        """
        if given is not None:
            names = self.settings["class_names"]
            return given_cases(*given, None if names == AUTO else names)
        if self.is_phantom:
            make_phantom(self.dataset_dir)
        return load_cases(self.dataset_dir, **self.split)

    def run_preflight(self, cases: Cases) -> Preflight:
        """Look at the files of all cases."""
        return preflight(cases, self.level, self.cache_dir)

    def plan(self, found: Preflight) -> Plan:
        """Decide what is `auto`.

        Raises:
            InputError: If the dataset has a fault, or a value does not fit it.
        """
        found.require_sound()
        assert found.fingerprint is not None  # of what is sound there is one
        return make_plan(
            found.fingerprint,
            self.settings,
            dataset=found.cases,
            budget_bytes=self._budget_bytes(),
            base_channels=self.base_channels,
            recompute_levels=self.recompute_levels,
            num_ranks=distributed.size(),
        )

    def forecast(self, plan: Plan, found: Preflight) -> Forecast | None:
        """What training and validation are going to take of the card; `None` on a CPU.

        Args:
            plan: Of the run.
            found: The largest of its volumes is what validation is predicted for.
        """
        device = resolve_device(self.device)
        if device.type != "cuda" or found.fingerprint is None:
            return None
        dtype, _ = MODES["cuda"].get(self.amp_dtype, MODES["cuda"][AUTO])
        mode = str(dtype if self.amp else torch.float32).removeprefix("torch.")
        strides = triples(plan.strides)
        levels = min(self.recompute_levels, len(strides))
        sizes = self.base_channels, plan.num_classes, plan.in_channels
        windows = Windows(plan.roi_size, plan.num_classes, **self.windows)
        shapes = np.array(found.fingerprint["shapes"]["cases"], float)
        shapes *= np.array(found.fingerprint["spacings_mm"]["cases"]) / np.array(plan.spacing)
        largest = np.maximum(np.rint(shapes[shapes.prod(axis=1).argmax()]), 1).astype(int)
        batch = -(-plan.batch_size // distributed.size())
        peaks = run_bytes(Net(strides, *sizes, levels, mode), batch, windows, largest.tolist())
        return Forecast(**peaks, available=available_bytes(device), device=str(device))

    def _budget_bytes(self) -> float:
        if self.memory_budget_bytes != AUTO:
            return float(self.memory_budget_bytes)
        device = resolve_device(self.device)
        if device.type != "cuda":
            return CPU_BUDGET_BYTES
        return min(GPU_BUDGET_BYTES, SHARE_OF_CARD * available_bytes(device))
