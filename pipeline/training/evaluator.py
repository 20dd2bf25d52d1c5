"""MONAI's SupervisedEvaluator with one owner of precision, and access to its metric."""

from __future__ import annotations

import logging
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import Evaluator, SupervisedEvaluator
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys

from pipeline import distributed
from pipeline.precision import Precision, require_float32

log = logging.getLogger(__name__)


class MixedPrecisionEvaluator(SupervisedEvaluator):
    """SupervisedEvaluator that predicts in the precision the trainer trains in.

    The network is on the precision's device, with float32 weights; `ValueError` for others.
    """

    def __init__(self, precision: Precision, network: torch.nn.Module, **kwargs: Any) -> None:
        require_float32(network)
        self.precision = precision
        amp, device = precision.amp, precision.device
        super().__init__(network=network, device=device, amp=amp, non_blocking=True, **kwargs)

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]  # as MONAI does
        """Predict all cases, each rank its own; all ranks have to call it, also without cases."""
        loader, length = self.data_loader, self.state.epoch_length
        if not any(distributed.all_gather_object(length != 0)):
            return
        if length == 0:  # ignite refuses this length, but takes an iterator that turns out empty
            self.data_loader, self.state.epoch_length = iter(()), None
        try:
            super().run(global_epoch)
        finally:
            self.data_loader, self.state.epoch_length = loader, length

    def _iteration(self, engine: Any, batchdata: dict[str, Any]) -> dict[str, torch.Tensor]:
        images, labels = self.prepare_batch(batchdata, self.state.device, self.non_blocking)
        output = self.state.output = {Keys.IMAGE: images, Keys.LABEL: labels}
        with self.mode(self.network), self.precision.autocast():
            output[Keys.PRED] = self.inferer(images, self.network)
        self.fire_event(IterationEvents.FORWARD_COMPLETED)
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return self.state.output  # not `output`: handlers have put the decollated one in its place


class EvaluationLog:
    """Logs the mean Dice of an evaluation, and that of each class."""

    def attach(self, evaluator: Evaluator) -> None:
        """Listen to the end of `evaluator`."""
        evaluator.add_event_handler(Events.COMPLETED, self._after_all)

    def _after_all(self, evaluator: Evaluator) -> None:
        state: Any = evaluator.state
        for name, details in state.metric_details.items():
            log.info("%s %.4f", name, state.metrics[name])
            for label, value in details["classes"].items():
                log.info("  %-20s %.4f", label, value)


def metric_at_end_of(epoch: int, validator: Evaluator) -> float | None:
    """The validator's key metric; `None` if it did not run at the end of the trainer's `epoch`."""
    state = validator.state
    return state.metrics.get(state.key_metric_name) if state.epoch == epoch else None
