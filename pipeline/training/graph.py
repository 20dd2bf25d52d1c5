"""Forward pass, loss and backward pass of a micro-batch as one CUDA graph.

With small patches the host takes longer to launch the kernels of a step than the card to run them.
Replayed, they are one launch of the same kernels in the same order: the bits are the same.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.errors import InputError

log = logging.getLogger(__name__)

GRAPH_MODES = ("auto", "cuda_graphs", "none")
WARM_UP = 3  # calls without a graph, in which cuDNN and Triton choose and load their kernels
MOST_CAPTURES = 3  # a graph does not pay for shapes that keep changing

Work = Callable[[torch.Tensor, torch.Tensor], tuple[Any, torch.Tensor]]


class StepGraph:
    """Runs `work` as a CUDA graph after it was called with tensors of the same kind a few times.

    What `work` decides on the host, a graph decides once and for all.

    Args:
        work: `(images, labels) -> (pred, loss)`, detached; adds to the gradients of `network`. It
            is not captured if it waits for the device or replaces a buffer by another tensor.
        network: Whose gradients it computes.
        accumulates: Whether the gradients of several calls are added up.
        required: Whether it is an error if `work` cannot be captured.

    Attributes:
        captures: Number of graphs made so far.
    """

    def __init__(
        self, work: Work, network: nn.Module, *, accumulates: bool = False, required: bool = False
    ) -> None:
        self.work, self.network, self.parameters = work, network, list(network.parameters())
        self.accumulates, self.required = accumulates, required
        self.captures, self.failed = 0, False
        self._seen: tuple[Any, int] = (None, 0)  # latest kind of tensors, how often
        self.end()

    def end(self) -> None:
        """Free the graph's memory, which is that of all activations; calls may go on."""
        self._captures_left = MOST_CAPTURES
        self._release()

    def _release(self) -> None:
        self._captured_kind: Any = None
        self._graph: Any = None
        self._output: Any = None
        self._gradients: list[Any] = []
        self._images = self._labels = torch.empty(0)

    @property
    def is_used(self) -> bool:
        """Whether steps were replayed."""
        return self.captures > 0 and not self.failed

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """What `work` returns; `pred` of a graph is overwritten by the next call.

        Raises:
            InputError: If a graph is `required` and cannot be made, or torch fails to make one.
        """
        kind = (_layout(images), _layout(labels), tuple(p.requires_grad for p in self.parameters))
        if kind != self._captured_kind:
            last, count = self._seen
            self._seen = kind, count + 1 if kind == last else 1
            if self._seen[1] == WARM_UP:
                return self._run_watched(images, labels)
            due = self._seen[1] > WARM_UP and self._captures_left > 0 and not self.failed
            if not due or not self._capture(images, labels):
                return self.work(images, labels)
            self._captured_kind = kind
        self._images.copy_(images, non_blocking=True)
        self._labels.copy_(labels, non_blocking=True)
        self._graph.replay()
        self._assign_gradients()
        pred, loss = self._output
        return pred, loss.clone()

    def _run_watched(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Call `work` and find out whether it waits for the device.

        A capture that fails for that leaves torch's allocator in the middle of it.
        """
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = self.work(images, labels)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        if any("called a synchronizing" in str(warning.message) for warning in caught):
            self._fail("it waits for the device")
        return result

    def _fail(self, reason: str) -> None:
        self.failed = True
        if self.required:
            raise InputError(
                "cuda_graph: expected a step that can be captured in a CUDA graph, got one that "
                f"cannot: {reason}. Use none."
            )
        log.warning("Steps are not replayed as a CUDA graph: %s", reason)

    def _capture(self, images: torch.Tensor, labels: torch.Tensor) -> bool:
        """Make the graph, after the memory of an earlier one was freed; whether it can be used."""
        self._release()
        self.captures += 1
        self._captures_left -= 1
        self._images, self._labels = images.clone(), labels.clone()
        earlier = self._exchange_gradients([None] * len(self.parameters))
        buffers = [
            (module, name, buffer)
            for module in self.network.modules()
            for name, buffer in module._buffers.items()
        ]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._output = self.work(self._images, self._labels)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise InputError(
                "cuda_graph: expected a step that can be captured in a CUDA graph, got: "
                f"{str(error).splitlines()[0]} Use none."
            ) from None
        self._gradients = self._exchange_gradients(earlier)
        replaced = [entry for entry in buffers if entry[0]._buffers[entry[1]] is not entry[2]]
        for module, name, buffer in replaced:  # the graph would keep the tensor of its capture
            module._buffers[name] = buffer
        if replaced:
            self._release()
            self._fail("a buffer of the network is replaced in it")
            return False
        self._graph = graph
        log.info("Steps are replayed as a CUDA graph from here on")
        return True

    def _assign_gradients(self) -> None:
        """Give the parameters the graph's gradients, or add them to those that are there."""
        pairs = zip(self.parameters, self._gradients, strict=True)
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
