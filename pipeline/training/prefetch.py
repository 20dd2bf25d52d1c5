"""The next micro-batch made ready while the device works on the one before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

Batch = dict[str, Any]
Prepared = tuple[torch.Tensor, torch.Tensor]


class Prefetcher:
    """Micro-batches of a loader in their order; `fetch` makes the next one ready ahead of its turn.

    Loading and `prepare` are functions of the samples alone, so that nothing but time depends on
    when they happen. An error of loading is raised when its batch is asked for, and one of
    `prepare` by the trainer, which prepares what was not. What was fetched and is not asked for,
    since training ends before, is lost and nothing with it: the loader begins where it is told to.

    On CUDA the kernels and copies have a stream of their own, so that they run beside the backward
    pass and not after it.

    Args:
        loader: Gives that of the micro-batches, which is iterated anew for each epoch.
        prepare: What is done with a micro-batch on the device, augmentation included. What it
            makes on the device and keeps from one to the next has to be there before the first.
        device: Where that is done.
    """

    def __init__(
        self,
        loader: Callable[[], Any],
        prepare: Callable[[Batch], Prepared],
        device: torch.device,
    ) -> None:
        self._loader, self._prepare, self._device = loader, prepare, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._began: torch.cuda.Event | None = None  # the step before, on the device
        self._source: Iterator | None = None
        self._next: Batch | Exception | None = None
        self._prepared: Prepared | None = None
        self._seen: list[tuple] | None = None

    def __iter__(self) -> Iterator[Batch]:
        """One epoch; the loader's own iterator ends with it, however it ends."""
        source = self._source = iter(self._loader())
        self._forget()
        try:
            while True:
                batch = self._load() if self._next is None else self._next
                self._next = None
                if isinstance(batch, StopIteration):
                    return
                if isinstance(batch, Exception):
                    raise batch
                self._wait(batch)
                yield batch
        finally:
            if self._source is source:
                self._source = None
                self._forget()
            if hasattr(source, "close"):
                source.close()  # workers end now, not when the iterator is collected

    def fetch(self) -> None:
        """Load and prepare the micro-batch after the one that was given last, if there is one."""
        if self._source is None or self._next is not None:
            return
        with self._beside():
            self._next = self._load()
            if isinstance(self._next, Exception):
                return
            # what fails now fails again where it belongs
            with contextlib.suppress(Exception):
                self._prepared = self._prepare(self._next)
                self._seen = _state(self._next)

    def take(self, batch: Batch) -> Prepared | None:
        """What was prepared of a micro-batch; `None` if nothing was, or a handler changed it."""
        prepared, seen = self._prepared, self._seen
        self._prepared = self._seen = None
        return prepared if seen is not None and seen == _state(batch) else None

    def _load(self) -> Batch | Exception:
        assert self._source is not None
        try:
            return next(self._source)
        except Exception as error:  # StopIteration too
            return error

    def _forget(self) -> None:
        self._next = self._prepared = self._seen = None

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream for this; all that was queued before the current step is done there."""
        if self._stream is None:
            yield
            return
        if self._began is not None:
            self._stream.wait_event(self._began)
        with torch.cuda.stream(self._stream):
            yield

    def _wait(self, batch: Batch) -> None:
        """Let the device's current stream wait for what was fetched, and its memory for both."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for value in (*batch.values(), *(self._prepared or ())):
            if isinstance(value, torch.Tensor) and value.is_cuda:
                value.record_stream(current)
        self._began = current.record_event()


def _state(batch: Batch) -> list[tuple]:
    """Tells a batch from another, and from itself after a change of one of its tensors."""
    versions = ((v._version if isinstance(v, torch.Tensor) else 0) for v in batch.values())
    return [(id(batch), key, id(batch[key]), v) for key, v in zip(batch, versions, strict=True)]
