"""A micro-batch's forward, loss and backward as one CUDA graph.

With small patches the host takes longer to launch a step's hundreds of kernels than the card to run
them. Captured once and replayed, they are one launch: the same kernels, in the same order, on the
same memory, so that a replay gives the bits of the step that it stands for.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipeline.errors import InputError

log = logging.getLogger(__name__)

MODES = ("auto", "cuda_graphs", "none")
WARM_UP = 3  # calls without a graph: cuDNN and Triton choose and load their kernels in them
MOST_CAPTURES = 3  # shapes that keep changing are not worth a graph

Work = Callable[[torch.Tensor, torch.Tensor], tuple[Any, torch.Tensor]]


class StepGraph:
    """Runs `work` as a CUDA graph, once it was called with tensors of the same kind a few times.

    What `work` decides on the host, by Python's numbers or a counter, a graph decides once.

    Args:
        work: `(images, labels) -> (pred, loss)`, detached; it adds to the gradients of `network`.
            One that waits for the device, or puts another tensor in the place of a buffer, is not
            captured.
        network: Whose gradients it makes.
        accumulates: Whether gradients of several calls are added up.
        required: Whether a `work` that cannot be captured is an error.

    Attributes:
        captures: Graphs made so far.
        failed: Whether `work` could not be captured.
    """

    def __init__(
        self,
        work: Work,
        network: torch.nn.Module,
        *,
        accumulates: bool = False,
        required: bool = False,
    ) -> None:
        self.work, self.network, self.parameters = work, network, list(network.parameters())
        self.accumulates, self.required = accumulates, required
        self.captures, self.failed = 0, False
        self._seen: tuple[Any, int] = (None, 0)  # the latest kind of tensors, and how often
        self.end()

    def end(self) -> None:
        """Give back the graph's memory, which is that of all activations; calls may go on."""
        self._left = MOST_CAPTURES
        self._release()

    def _release(self) -> None:
        self._captured: Any = None  # the kind of tensors that the graph is for
        self._graph: Any = None
        self._output: tuple[Any, torch.Tensor] | None = None
        self._gradients: list[Any] = []
        self._images = self._labels = torch.empty(0)

    @property
    def is_used(self) -> bool:
        """Whether steps were replayed."""
        return self.captures > 0 and not self.failed

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """What `work` returns; of a graph it is overwritten by the next call.

        Raises:
            InputError: If a graph is `required` and cannot be made, or torch fails to make one.
        """
        kind = (_layout(images), _layout(labels), tuple(p.requires_grad for p in self.parameters))
        if kind != self._captured:
            last, count = self._seen
            self._seen = kind, count + 1 if kind == last else 1
            if self._seen[1] == WARM_UP:
                return self._watched(images, labels)
            due = self._seen[1] > WARM_UP and self._left > 0 and not self.failed
            if not due or not self._capture(images, labels):
                return self.work(images, labels)
            self._captured = kind
        self._images.copy_(images, non_blocking=True)
        self._labels.copy_(labels, non_blocking=True)
        self._graph.replay()
        self._hand_over()
        assert self._output is not None
        return self._output

    def _watched(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """A call of `work` that tells whether it waits for the device.

        In a capture that would be too late: one that fails leaves torch's allocator in the middle.
        """
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = self.work(images, labels)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        if any("called a synchronizing" in str(warning.message) for warning in told):
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
        """Make the graph; the memory of an earlier one is given back first."""
        self._release()
        self.captures += 1
        self._left -= 1
        self._images, self._labels = images.clone(), labels.clone()
        earlier = self._put([None] * len(self.parameters))
        owners = [
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
        self._gradients = self._put(earlier)
        moved = [owner for owner in owners if owner[0]._buffers[owner[1]] is not owner[2]]
        for module, name, buffer in moved:  # the graph would go on with the tensor of its capture
            module._buffers[name] = buffer
        if moved:
            self._release()
            self._fail("a buffer of the network is replaced in it")
            return False
        self._graph = graph
        log.info("Steps are replayed as a CUDA graph from here on")
        return True

    def _hand_over(self) -> None:
        """Give the parameters the graph's gradients, or add them to what is there."""
        made = [
            (p, g) for p, g in zip(self.parameters, self._gradients, strict=True) if g is not None
        ]
        if all(p.grad is None for p, _ in made):
            for parameter, gradient in made:
                parameter.grad = gradient.clone() if self.accumulates else gradient
        else:
            earlier: list[Any] = [p.grad for p, _ in made]
            torch._foreach_add_(earlier, [g for _, g in made])

    def _put(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Put gradients in the place of those that are there, which are returned."""
        earlier = [p.grad for p in self.parameters]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return earlier


def has_hooks(network: torch.nn.Module) -> bool:
    """Whether a module or a parameter has a hook, which a replay would not call."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    of_parameters = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return any(getattr(m, kind) for m in network.modules() for kind in kinds) or any(
        getattr(p, kind, None) for p in network.parameters() for kind in of_parameters
    )


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
