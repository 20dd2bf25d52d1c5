"""A dataset folder as training uses it: its cases, its preflight, its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, get_type_hints

from pipeline import distributed
from pipeline.data.cases import Case
from pipeline.data.dataset import Cases, given_cases, load_cases
from pipeline.data.memory import available_bytes
from pipeline.data.phantom import make_phantom
from pipeline.data.plan import AUTO, SETTINGS, Plan, make_plan
from pipeline.data.preflight import Preflight, preflight
from pipeline.data.splits import GroupPattern
from pipeline.precision import resolve_device

PHANTOM = Path("data/phantom")  # the one dataset_dir that makes itself
GPU_BUDGET_BYTES, CPU_BUDGET_BYTES = 8 * 2**30, 2 * 2**30
# of what a card has free: cases that are kept there may take a quarter, augmentation a little
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


# values of the plan, or `auto`
PLAN_TYPES = {name: hint | Auto for name, hint in get_type_hints(Plan).items() if name in SETTINGS}
PlanSettings = TypedDict("PlanSettings", PLAN_TYPES)  # type: ignore[misc]


class DataModule:
    """The dataset of a config.

    Args:
        bundle_root: Folder that relative paths start from.
        dataset_dir: Folder of the dataset; `data/phantom` is made if it is not there.
        cache_dir: Folder where results of the preflight are kept.
        split: Arguments of `load_cases` that say which cases there are and how they are split.
        preflight: How much of the files is read; see `pipeline.data.preflight.preflight`.
        settings: Values of the plan, or `auto`; see `make_plan`.
        memory_budget_bytes: Memory that a training step may take; `auto`: 8 GiB, or 70 % of what
            the card has free if that is less, and 2 GiB on a CPU.
        device, base_channels, recompute_levels: Of the run and its network; see `make_plan`.
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
    ) -> None:
        root = Path(bundle_root).resolve()
        self.dataset_dir = (root / dataset_dir).resolve()
        self.cache_dir = (root / cache_dir).resolve()
        self.is_phantom = self.dataset_dir == root / PHANTOM
        file, folders = split["split_file"], [root / folder for folder in split["data_roots"]]
        self.split: Any = {**split, "split_file": file and root / file, "data_roots": folders}
        self.level = preflight
        self.settings: Mapping[str, Any] = settings
        self.memory_budget_bytes, self.device = memory_budget_bytes, device
        self.base_channels, self.recompute_levels = base_channels, recompute_levels

    def use_plan(self, plan: Plan) -> None:
        """Decide what is `auto` as another plan did."""
        undecided = {key for key, value in self.settings.items() if value == AUTO}
        decided = {key: value for key, value in plan.as_dict().items() if key in undecided}
        self.settings = {**self.settings, **decided}

    def load(self, given: tuple[Sequence[Case], Sequence[Case]] | None = None) -> Cases:
        """List the cases, and split them; `given` are such lists in place of a dataset.

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
        """Check the files of all cases."""
        return preflight(cases, self.level, self.cache_dir)

    def plan(self, found: Preflight) -> Plan:
        """Decide what is `auto`.

        Raises:
            InputError: If the dataset has a fault, or a value does not fit it.
        """
        found.require_sound()
        assert found.fingerprint is not None  # a sound dataset has one
        return make_plan(
            found.fingerprint, self.settings, dataset=found.cases,
            budget_bytes=self._budget_bytes(), base_channels=self.base_channels,
            recompute_levels=self.recompute_levels, num_ranks=distributed.size(),
        )  # fmt: skip

    def _budget_bytes(self) -> float:
        if self.memory_budget_bytes != AUTO:
            return float(self.memory_budget_bytes)
        device = resolve_device(self.device)
        if device.type != "cuda":
            return CPU_BUDGET_BYTES
        return min(GPU_BUDGET_BYTES, SHARE_OF_CARD * available_bytes(device))
