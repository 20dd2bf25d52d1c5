"""Parts that an overlay puts into a config in place of the real ones, to break a run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.evaluation.metrics import MeanDice
from pipeline.training.trainer import StepEvents
from transforms.augment import Augment


class PoisonedAugment(Augment):
    """Puts `value` into the first voxel of the samples with the given seeds; None: of all."""

    def __init__(
        self,
        *args: Any,
        seeds: Sequence[int] | None = None,
        value: float | str = "inf",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.seeds, self.value = seeds, float(value)

    def __call__(self, batch, *args: Any, **kwargs: Any):
        image, label = super().__call__(batch, *args, **kwargs)
        for n, seed in enumerate(batch["seed"].tolist()):
            if self.seeds is None or seed in self.seeds:
                image[n, 0, 0, 0, 0] = self.value
        return image, label


class CacheDeletingAugment(Augment):
    """Deletes the cache's folder at each batch."""

    def __init__(self, *args: Any, cache_dir: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cache_dir = cache_dir

    def __call__(self, batch, *args: Any, **kwargs: Any):
        shutil.rmtree(self.cache_dir, ignore_errors=True)
        return super().__call__(batch, *args, **kwargs)


class UndefinedDice(MeanDice):
    """Mean Dice that is NaN at the validations of the given numbers, the first being 1."""

    def __init__(
        self, class_names: Sequence[str], undefined_at: Sequence[int], ignore_value: int | None
    ) -> None:
        self.undefined_at, self.validations = list(undefined_at), 0
        super().__init__(class_names, ignore_value)

    def compute(self) -> float:
        self.validations += 1
        return float("nan") if self.validations in self.undefined_at else super().compute()


class BreakWeights:
    """A handler that puts a NaN into the first weight after optimizer step number `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def attach(self, trainer) -> None:
        trainer.add_event_handler(StepEvents.STEP_COMPLETED, self.after_step)

    @torch.no_grad()
    def after_step(self, trainer) -> None:
        if trainer.progress.step == self.step:
            next(trainer.network.parameters()).view(-1)[0] = torch.nan


class BreakingLoss(torch.nn.Module):
    """A loss that raises at its call number `at`."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, logits: Any, label: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("this loss is broken")
        return logits.float().mean()


class BreakingTransform:
    """A transform that raises where the brightest voxel of the image is at least so bright."""

    def __init__(self, brightest: float) -> None:
        self.brightest = brightest

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        if data["image"].max() >= self.brightest:
            raise ZeroDivisionError("this transform is broken")
        return data
