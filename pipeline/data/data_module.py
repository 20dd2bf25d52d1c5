"""A dataset folder as training uses it: its cases, its preflight, its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, get_type_hints

from pipeline import distributed
from pipeline.config.keys import PHANTOM
from pipeline.data.cases import Case
from pipeline.data.dataset import Cases, given_cases, load_cases
from pipeline.data.memory import available_bytes
from pipeline.data.phantom import make_phantom
from pipeline.data.plan import AUTO, SETTINGS, Plan, Planner
from pipeline.data.preflight import Preflight, preflight
from pipeline.precision import resolve_device

GPU_BUDGET_BYTES, CPU_BUDGET_BYTES = 8 * 2**30, 2 * 2**30
# of what a card has free: cases that are kept there may take a quarter, augmentation a little
SHARE_OF_CARD = 0.7

# arguments of `load_cases` but the first; values of the plan, or `auto`
SPLIT_TYPES = {
    k: v for k, v in get_type_hints(load_cases).items() if k not in ("dataset_dir", "return")
}
PLAN_TYPES = {k: v | Literal["auto"] for k, v in get_type_hints(Plan).items() if k in SETTINGS}
SplitSettings = TypedDict("SplitSettings", SPLIT_TYPES, total=False)  # type: ignore[misc]
PlanSettings = TypedDict("PlanSettings", PLAN_TYPES, total=False)  # type: ignore[misc]


class DataModule:
    """The dataset of a config.

    Args:
        bundle_root: Folder that relative paths start from.
        dataset_dir: Folder of the dataset; `data/phantom` is made if it is not there.
        cache_dir: Folder where results of the preflight are kept.
        split: Arguments of `load_cases` that say which cases there are and how they are split.
        preflight: How much of the files is read; see `pipeline.data.preflight.preflight`.
        settings: Values of the plan, or `auto`; see `Planner`.
        memory_budget_bytes: Memory that a training step may take; `auto`: 8 GiB, or 70 % of what
            the card has free if that is less, and 2 GiB on a CPU.
        device, recompute_levels, accumulation_steps: Of the run; see `Planner`.
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
        recompute_levels: int = 0,
        accumulation_steps: int = 1,
    ) -> None:
        root = Path(bundle_root).resolve()
        self.dataset_dir = (root / dataset_dir).resolve()
        self.cache_dir = (root / cache_dir).resolve()
        self.is_phantom = self.dataset_dir == root / PHANTOM
        self.split: dict[str, Any] = {**split}
        self.split["split_file"] = (file := self.split["split_file"]) and root / file
        self.split["data_roots"] = [root / folder for folder in self.split["data_roots"]]
        self.level = preflight
        self.settings: Mapping[str, Any] = settings
        self.memory_budget_bytes, self.device = memory_budget_bytes, device
        self.recompute_levels, self.accumulation_steps = recompute_levels, accumulation_steps

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

    def plan(self, found: Preflight, **given: Any) -> Plan:
        """Decide what is `auto`, with values `given` in the place of the settings.

        Raises:
            InputError: If the dataset or a value has a fault.
        """
        found.require_sound()
        assert found.fingerprint is not None  # a sound dataset has one
        how = self.recompute_levels, distributed.size(), self.accumulation_steps
        # wherever a copy of it lies
        is_phantom = found.cases.description.get("reference") == "pipeline/data/phantom.py"
        dataset = found.fingerprint, found.cases
        planner = Planner(*dataset, self._budget_bytes(), *how, is_phantom)
        return planner.make_plan({**dict.fromkeys(SETTINGS, AUTO), **self.settings, **given})

    def _budget_bytes(self) -> float:
        if self.memory_budget_bytes != AUTO:
            return float(self.memory_budget_bytes)
        device = resolve_device(self.device)
        if device.type != "cuda":
            return CPU_BUDGET_BYTES
        return min(GPU_BUDGET_BYTES, SHARE_OF_CARD * available_bytes(device))
