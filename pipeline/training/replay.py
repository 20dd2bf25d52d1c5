"""A micro-batch run again, to see what a training step does not look at.

The trainer's forward pass is a function of batch and weights, so a step that failed can be
repeated under observation, and one that succeeds pays nothing. Nothing here changes the trainer:
buffers and gradients are left as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import nn

from pipeline import distributed
from pipeline.training.snapshot import buffers_kept
from pipeline.training.trainer import MixedPrecisionTrainer

Batch = dict[str, Any]


class Stage(StrEnum):
    """Where in a step a tensor is met, in the order of time."""

    WEIGHTS = "weights"
    INPUT = "input"
    FORWARD = "forward"
    STATISTICS = "statistics"
    LOSS = "loss"
    BACKWARD = "backward"
    NOT_REPLAYED = "not replayed"


def gradients(
    trainer: MixedPrecisionTrainer,
    batches: Sequence[Batch],
    autocast: Callable[[], contextlib.AbstractContextManager],
    loss_scale: float = 1.0,
    probe: NonFiniteProbe | None = None,
) -> list[torch.Tensor]:
    """Gradients of an accumulation group's mean loss, beside those that the parameters hold.

    Of several ranks each has its own share of the group's loss, as far as that can be told apart.

    Args:
        trainer: Its network, loss and augmentation are used.
        batches: The group's micro-batches.
        autocast: Makes the context of a forward pass.
        loss_scale: Factor on the loss before the backward pass, divided out afterwards.
        probe: Looks at every tensor on the way.

    Returns:
        One float32 tensor per trained parameter of the network, zero where it takes no part.
    """
    parameters = trained_parameters(trainer.network)
    total = [torch.zeros_like(p) for p in parameters]
    network, parts_of_loss = trainer.network, len(batches) * distributed.size()
    with buffers_kept(network), distributed.local_only(network), probe or contextlib.nullcontext():
        for batch in batches:
            if probe:
                probe.batch = batch
            loss = trainer.forward(batch, autocast(), {})
            if probe:
                probe.see(Stage.LOSS, "loss_function", loss.detach())
            scaled = loss * (loss_scale / parts_of_loss)
            parts = torch.autograd.grad(scaled, parameters, allow_unused=True)
            for whole, part in zip(total, parts, strict=True):
                if part is not None:
                    whole += part
    torch._foreach_div_(total, loss_scale)
    return total


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [p for p in network.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Finding:
    """Where numbers stopped being finite when a group was run again.

    Attributes:
        stage: `weights`, `input`, `forward`, `loss` or `backward`; `not replayed` for lack of
            memory; `None` if everything was finite.
        module: Name of the first module whose output (in `backward`: the gradient of whose output
            or weights; in `weights` and `statistics`: a weight or buffer of which) was not finite;
            `image` for the input,
            `loss_function` for the loss.
        case_ids: Cases of the micro-batch whose part of that tensor was not finite.
        max_abs_activation: Name of each module without children to its output's largest finite
            |activation|, `None` where there was none.
    """

    stage: Stage | None = None
    module: str | None = None
    case_ids: list[str] = field(default_factory=list)
    max_abs_activation: dict[str, float | None] = field(default_factory=dict)


def first_non_finite(
    trainer: MixedPrecisionTrainer, batches: Sequence[Batch], loss_scale: float
) -> Finding:
    """Run a group once more, forward and backward, and find the first tensor that is not finite.

    Args:
        trainer: With the weights of the step in question.
        batches: The group's micro-batches.
        loss_scale: That the step was taken with.
    """
    probe = NonFiniteProbe(trainer.network)
    gradients(trainer, batches, trainer.precision.autocast, loss_scale, probe)
    return probe.finding()


def underflow_fraction(trainer: MixedPrecisionTrainer) -> float:
    """Share of all gradient elements that are zero now and are not in a float32 backward pass.

    Call it between backward pass and optimizer step. TF32 follows the run's setting.
    """
    exact = gradients(trainer, trainer.group, contextlib.nullcontext)
    lowered = [parameter.grad for parameter in trained_parameters(trainer.network)]
    if distributed.size() > 1:  # those are the sums of all ranks
        scale = trainer.scaler.get_scale() if trainer.scaler else 1.0
        lowered = list(gradients(trainer, trainer.group, trainer.precision.autocast, scale))
    lost, elements = torch.zeros((), device=trainer.state.device), 0
    for gradient, reference in zip(lowered, exact, strict=True):
        if gradient is not None:
            lost += ((gradient == 0) & (reference != 0)).sum()
            elements += reference.numel()
    return lost.item() / max(elements, 1)


class NonFiniteProbe:
    """Hooks on a network that note, in order of time, which tensors are not finite.

    The notes stay on the device until `finding` asks for them.

    Args:
        network: To look at, in a `with` block; itself is called `network`.

    Attributes:
        batch: The micro-batch that is being looked at.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.batch: Batch = {}
        self._notes: list[tuple[Stage, str, Batch, torch.Tensor]] = []
        self._largest: dict[str, torch.Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> NonFiniteProbe:
        self._handles.append(self.network.register_forward_pre_hook(self._input))
        for name, module in self.network.named_modules():
            look = partial(self._output, name or "network")
            self._handles.append(module.register_forward_hook(look))
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    continue
                look = partial(self.see, Stage.BACKWARD, name or "network")
                self._handles.append(parameter.register_hook(look))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _input(self, network: nn.Module, args: tuple) -> None:
        for name, module in network.named_modules():
            for parameter in module.parameters(recurse=False):
                self.see(Stage.WEIGHTS, name or "network", parameter.detach())
        for image in _floating(args):
            self.see(Stage.INPUT, "image", image, by_sample=True)

    def _output(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        for tensor in _floating(output if isinstance(output, list | tuple) else [output]):
            self._activation(name, module, tensor)
        for buffer in _floating(module.buffers(recurse=False)):
            self.see(Stage.STATISTICS, name, buffer)

    def _activation(self, name: str, module: nn.Module, output: torch.Tensor) -> None:
        activation = output.detach()
        self.see(Stage.FORWARD, name, activation, by_sample=True)
        if next(module.children(), None) is None:  # others repeat their last child
            largest = activation.abs().where(activation.isfinite(), -1).amax().float()
            before = self._largest.get(name, largest)
            self._largest[name] = torch.maximum(before, largest)
        if output.requires_grad:  # before a ReLU in place, whose own tensor it then is
            output.register_hook(partial(self.see, Stage.BACKWARD, name, by_sample=True))

    def see(
        self, stage: Stage, name: str, tensor: torch.Tensor, *, by_sample: bool = False
    ) -> None:
        """Note which samples of `tensor` are not finite; all of them if it has no batch axis."""
        bad, samples = ~tensor.isfinite(), len(self.batch["seed"])
        by_sample = by_sample and tensor.dim() > 0 and len(tensor) == samples
        flags = bad.reshape(samples, -1).any(1) if by_sample else bad.any().expand(samples)
        self._notes.append((stage, name, self.batch, flags))

    def finding(self) -> Finding:
        """The first note of something not finite. Waits for the device."""
        values = {name: value.item() for name, value in self._largest.items()}
        largest = {name: value if value >= 0 else None for name, value in values.items()}
        for stage, name, batch, flags in self._notes:
            if flags.any():
                cases = zip(batch.get("case_id", []), flags.tolist(), strict=False)
                return Finding(stage, name, [case for case, bad in cases if bad], largest)
        return Finding(max_abs_activation=largest)


def _floating(values: Iterable[Any]) -> list[torch.Tensor]:
    """The floating-point tensors among `values` that have an element."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
