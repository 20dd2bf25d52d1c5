"""The next micro-batch, loaded and augmented while the device works on the one before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

Batch = dict[str, Any]
Prepared = tuple[torch.Tensor, torch.Tensor]


class PrefetchingLoader:
    """Micro-batches of a loader in their order; `prefetch` gets the next one ready before its turn.

    Loading and `prepare` depend on the samples alone, so that only the time changes. An error of
    loading is raised when its batch is asked for. On CUDA, `prepare` has a stream of its own, and
    so runs beside the backward pass; what it keeps on the device has to be there before.
    The loader is iterated anew for each epoch.
    """

    def __init__(self, loader: Iterable[Batch], prepare: Callable, device: torch.device) -> None:
        self.loader, self._prepare, self._device = loader, prepare, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._step_began: torch.cuda.Event | None = None  # of the batch given last
        self._source: Any = None
        self._next: Batch | Exception | None = None
        self._prepared: tuple[Prepared, list[tuple]] | None = None  # with the version of its batch

    def __iter__(self) -> Iterator[Batch]:
        """One epoch; the loader's own iterator is closed with it, however it ends."""
        source = self._source = iter(self.loader)
        self._next = self._prepared = None
        try:
            while True:
                batch, self._next = self._next or self._load(), None
                if isinstance(batch, StopIteration):
                    return
                if isinstance(batch, Exception):
                    raise batch
                self._wait_for_stream(batch)
                yield batch
        finally:
            if self._source is source:
                self._source = self._next = self._prepared = None
            if hasattr(source, "close"):
                source.close()  # workers end now, not when the iterator is collected

    def prefetch(self) -> None:
        """Load and prepare the micro-batch after the one that was given last, if there is one."""
        if self._source is None or self._next is not None:
            return
        if self._stream is not None and self._step_began is not None:
            self._stream.wait_event(self._step_began)  # after all that was queued before the step
        with torch.cuda.stream(self._stream):  # on a CPU it is None, and does nothing
            self._next = self._load()
            if not isinstance(self._next, Exception):
                with contextlib.suppress(Exception):  # `take` prepares it again, and raises
                    self._prepared = self._prepare(self._next), _version(self._next)

    def take(self, batch: Batch) -> Prepared:
        """Image and label of a micro-batch, prepared now if it was not, or a handler changed it."""
        ready, self._prepared = self._prepared, None
        if ready is not None and ready[1] == _version(batch):
            return ready[0]
        return self._prepare(batch)

    def _load(self) -> Batch | Exception:
        try:
            return next(self._source)
        except Exception as error:  # StopIteration too
            return error

    def _wait_for_stream(self, batch: Batch) -> None:
        """Let the device's current stream wait for what was prefetched, and own its memory."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for value in (*batch.values(), *(self._prepared[0] if self._prepared else ())):
            if isinstance(value, torch.Tensor) and value.is_cuda:
                value.record_stream(current)
        self._step_began = current.record_event()


def _version(batch: Batch) -> list[tuple]:
    """Differs for another batch, and for the same one after a change of one of its tensors."""
    return [(id(batch), key, id(v), getattr(v, "_version", 0)) for key, v in batch.items()]
