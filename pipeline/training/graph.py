"""Forward pass, loss and backward pass of a micro-batch as one CUDA graph.

With small patches the host takes longer to launch the kernels of a step than the card to run them.
Replayed, they are one launch of the same kernels in the same order: the bits are the same.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.errors import InputError

log = logging.getLogger(__name__)

GRAPH_MODES = ("auto", "cuda_graphs", "none")
WARM_UP = 3  # calls without a graph, in which cuDNN and Triton choose and load their kernels
MOST_CAPTURES = 3  # a graph does not pay for shapes that keep changing
EXPECTED = "cuda_graph: expected a step that can be captured in a CUDA graph, got"

Output = tuple[Any, torch.Tensor]


class _Captured(NamedTuple):
    kind: Any  # layouts of the tensors
    graph: torch.cuda.CUDAGraph
    images: torch.Tensor
    labels: torch.Tensor
    output: Output
    gradients: list[Any]


class StepGraph:
    """Runs `work` as a CUDA graph after it was called with tensors of the same kind a few times.

    What `work` decides on the host, a graph decides once and for all.

    Args:
        work: `(images, labels) -> (pred, loss)`, detached; adds to the gradients of `network`. It
            is not captured if it waits for the device or replaces a buffer by another tensor.
        accumulates: Whether the gradients of several calls are added up.
        required: Whether it is an error if `work` cannot be captured.

    Attributes:
        captures: Number of graphs made so far.
    """

    def __init__(
        self,
        work: Callable[[torch.Tensor, torch.Tensor], Output],
        network: nn.Module,
        *,
        accumulates: bool = False,
        required: bool = False,
    ) -> None:
        self.work, self.network, self.parameters = work, network, list(network.parameters())
        self.accumulates, self.required = accumulates, required
        self.captures, self._has_failed = 0, False
        self._latest: Any = None  # kind of the latest tensors
        self._count = 0  # how often it was seen
        self.end()

    def end(self) -> None:
        """Free the graph's memory, which is that of all activations; calls may go on."""
        self._captured: _Captured | None = None
        self._captures_left = MOST_CAPTURES

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> Output:
        """What `work` returns; `pred` of a graph is overwritten by the next call.

        Raises:
            InputError: If a graph is `required` and cannot be made, or torch fails to make one.
        """
        kind = (_layout(images), _layout(labels), tuple(p.requires_grad for p in self.parameters))
        if self._captured is None or kind != self._captured.kind:
            self._count = self._count + 1 if kind == self._latest else 1
            self._latest = kind
            if self._count == WARM_UP:
                return self._rehearse(images, labels)
            if self._count < WARM_UP or self._has_failed or self._captures_left == 0:
                return self.work(images, labels)
            self._captured = None  # frees the memory of an earlier one
            self._captured = self._capture(kind, images, labels)
        self._captured.images.copy_(images, non_blocking=True)
        self._captured.labels.copy_(labels, non_blocking=True)
        self._captured.graph.replay()
        self._assign_gradients(self._captured.gradients)
        pred, loss = self._captured.output
        return pred, loss.clone()

    def _rehearse(self, images: torch.Tensor, labels: torch.Tensor) -> Output:
        """Call `work` and find out whether it can be captured.

        A capture that fails leaves torch's allocator in the middle of it.
        """
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
        if waits or replaces:
            reason = "it waits for the device" if waits else "it replaces a buffer of the network"
            if self.required:
                raise InputError(f"{EXPECTED} one that cannot: {reason}. Use none.")
            log.warning("Steps are not replayed as a CUDA graph: %s", reason)
            self._has_failed = True
        return output

    def _capture(self, kind: Any, images: torch.Tensor, labels: torch.Tensor) -> _Captured:
        self.captures += 1
        self._captures_left -= 1
        images, labels = images.clone(), labels.clone()
        earlier = self._exchange_gradients([None] * len(self.parameters))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = self.work(images, labels)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise InputError(f"{EXPECTED}: {str(error).splitlines()[0]} Use none.") from None
        gradients = self._exchange_gradients(earlier)
        log.info("Steps are replayed as a CUDA graph from here on")
        return _Captured(kind, graph, images, labels, output, gradients)

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

    def _exchange_gradients(self, gradients: Sequence[torch.Tensor | None]) -> list[Any]:
        earlier = [p.grad for p in self.parameters]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return earlier


def has_hooks(network: nn.Module) -> bool:
    """Whether a module or a parameter has a hook, which a replay would not call."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    of_parameters = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return any(getattr(m, kind) for m in network.modules() for kind in kinds) or any(
        getattr(p, kind, None) for p in network.parameters() for kind in of_parameters
    )


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
