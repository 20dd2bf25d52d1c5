"""Forward pass, loss and backward pass of a micro-batch as one CUDA graph.

With small patches the host takes longer to launch the kernels of a step than the card to run them.
Replayed, they are one launch of the same kernels in the same order: the bits are the same.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from networks.dense_unet import DenseUNet
from networks.kernels import self_check
from pipeline.errors import InputError
from pipeline.progress_bar import details

log = logging.getLogger(__name__)

GRAPH_MODES = ("auto", "cuda_graphs", "none")
WARM_UP = 3  # calls without a graph, in which cuDNN and Triton choose and load their kernels
REPLAY_TOLERANCE = 1e-2  # of the largest value: cuDNN may choose other algorithms, in TF32
EXPECTED = "cuda_graph: expected a step that can be captured in a CUDA graph, got"

Output = tuple[Any, torch.Tensor]
Work = Callable[[torch.Tensor, torch.Tensor], Output]


class StepGraph:
    """Runs `work` as a CUDA graph after it was called with tensors of the same kind a few times.

    What `work` decides on the host, a graph decides once and for all.

    Args:
        work: `(images, labels) -> (pred, loss)`, detached; adds to the gradients of `network`. It
            is not captured if it waits for the device or replaces a buffer by another tensor.
        accumulates: Whether the gradients of several calls are added up.
        required: Whether it is an error if `work` cannot be captured.
    """

    def __init__(
        self, work: Work, network: nn.Module, *, accumulates: bool = False, required: bool = False
    ) -> None:
        self.work, self.network, self.parameters = work, network, list(network.parameters())
        self.accumulates, self.required = accumulates, required
        self.captures, self._has_failed = 0, False  # graphs made so far
        self._latest: Any = None  # kind of the latest tensors
        self._count = 0  # how often it was seen
        self.end()

    def end(self) -> None:
        """Free the graph's memory, which is that of all activations; calls may go on."""
        self._kind: Any = None  # of the tensors that `_replay` is for
        self._replay: Work | None = None

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> Output:
        """Return the result of `work`, valid until the next call; `InputError` without a graph."""
        kind = (_layout(images), _layout(labels), tuple(p.requires_grad for p in self.parameters))
        if self._replay is None or kind != self._kind:
            self._count = self._count + 1 if kind == self._latest else 1
            self._latest = kind
            if self._count == WARM_UP:
                return self._rehearse(images, labels)
            if self._count < WARM_UP or self._has_failed:
                return self.work(images, labels)
            self._replay = None  # frees the memory of an earlier graph
            self._replay, self._kind = self._capture(images.clone(), labels.clone()), kind
            details.info("Steps are replayed as a CUDA graph from here on")
        return self._replay(images, labels)

    def _rehearse(self, images: torch.Tensor, labels: torch.Tensor) -> Output:
        """Find out whether `work` can be captured; a failed capture spoils torch's allocator."""
        fault = self_check.find_fault(compare_replay, images.device)
        buffers, mode = list(self.network.buffers()), torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                output = self.work(images, labels)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = any("called a synchronizing" in str(warning.message) for warning in caught)
        replaces = any(a is not b for a, b in zip(buffers, self.network.buffers(), strict=False))
        if fault or waits or replaces:
            reason = "it waits for the device" if waits else "it replaces a buffer of the network"
            reason = fault or reason
            if self.required:
                raise InputError(f"{EXPECTED} one that cannot: {reason}. Use none.")
            log.warning("Steps are not replayed as a CUDA graph: %s", reason)
            self._has_failed = True
        return output

    def _capture(self, own_images: torch.Tensor, own_labels: torch.Tensor) -> Work:
        self.captures += 1
        earlier = [parameter.grad for parameter in self.parameters]
        self.network.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                pred, loss = self.work(own_images, own_labels)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise InputError(f"{EXPECTED}: {str(error).splitlines()[0]} Use none.") from None
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, earlier, strict=True):
            parameter.grad = gradient

        def replay(images: torch.Tensor, labels: torch.Tensor) -> Output:
            own_images.copy_(images, non_blocking=True)
            own_labels.copy_(labels, non_blocking=True)
            graph.replay()
            self._assign_gradients(gradients)
            return pred, loss.clone()

        return replay

    def _assign_gradients(self, gradients: list[Any]) -> None:
        """Give the parameters the graph's gradients, or add them to those that are there."""
        pairs = zip(self.parameters, gradients, strict=True)
        made = [(parameter, gradient) for parameter, gradient in pairs if gradient is not None]
        if all(parameter.grad is None for parameter, _ in made):
            for parameter, gradient in made:
                parameter.grad = gradient.clone() if self.accumulates else gradient
        else:
            earlier: list[Any] = [parameter.grad for parameter, _ in made]
            torch._foreach_add_(earlier, [gradient for _, gradient in made])


def compare_replay(device: torch.device) -> None:
    """Compare steps of a tiny network with their replay; raise an exception if they differ."""
    network = DenseUNet(1, 2, 8, (2,), norm="instance", num_dense_layers=1, growth_rate=8, seed=0)
    network.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def work(images: torch.Tensor, labels: torch.Tensor) -> Output:
        pred = network(images)
        loss = (pred - labels).square().mean()
        loss.backward()
        return pred.detach(), loss.detach()

    def take(step: Work, seed: int) -> list[torch.Tensor]:
        network.zero_grad(set_to_none=True)
        images, labels = self_check.noise(4, 1, 10, 8, 8, seed=seed).to(device).split(2)
        pred, loss = step(images, labels)
        gradients: list[Any] = [parameter.grad for parameter in network.parameters()]
        return [t.clone() for t in (pred, loss, *gradients)]

    for seed in range(WARM_UP):
        take(work, seed)
    replay = StepGraph(work, network)._capture(*torch.zeros(2, 2, 1, 10, 8, 8, device=device))
    for seed in range(2):
        found, true = take(replay, seed), take(work, seed)
        self_check.require_close("a replayed step", found, true, REPLAY_TOLERANCE)
        torch._foreach_mul_([p.data for p in network.parameters()], 0.9)  # as an optimizer does


def has_hooks(network: nn.Module) -> bool:
    """Return whether a module or a parameter has a hook, which a replay would not call."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    of_parameters = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return any(getattr(m, kind) for m in network.modules() for kind in kinds) or any(
        getattr(p, kind, None) for p in network.parameters() for kind in of_parameters
    )


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
