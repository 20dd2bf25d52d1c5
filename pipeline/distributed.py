"""The processes of one training ("ranks"), and what they tell one another.

torchrun starts them. Where it did not there is one, and everything here gives back what it is
given. What ranks say passes through a Gloo group of its own, on the CPU; tensors of training pass
through the default group: NCCL on CUDA, Gloo on a CPU.

A mistake that one rank finds inside `sync_errors` ends all of them: it takes the place of what the
rank would have said next, so that no other waits for that. Rank 0 prints it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn import SyncBatchNorm

from pipeline.errors import InputError, TrainingStopped
from pipeline.rendezvous import meet

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# How long a rank waits for another that is behind, with its share of preprocessing or prediction. A
# process that dies is noticed at once, since its connections close; a lost host is not.
PATIENCE = timedelta(hours=2)

log = logging.getLogger(__name__)

_talk: dist.ProcessGroup | None = None  # the group that objects pass through; None: the default
_store: dist.Store | None = None
_waits = 0
_alone: dist.ProcessGroup | None = None  # of this rank only
_apart = False
_over = False  # one has refused: nobody listens any more


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched() and "RANK" in os.environ


def join() -> None:
    """Meet the other ranks, where torchrun started some; a second call does nothing."""
    global _talk, _store
    if not is_launched() or dist.is_initialized() or _over:
        return
    _store, number, count = meet()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=_store, rank=number, world_size=count)
    _talk = dist.new_group(backend="gloo", timeout=PATIENCE)


def loss_of(error: RuntimeError) -> str | None:
    """One line for the user where `error` says that another rank is gone; else `None`."""
    if size() == 1 or not (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
        return None
    said = str(error).partition("\n")[0].partition(". This is")[0]
    return (
        f"rank {rank()}: expected all ranks to go on, got: {said}. Look at what the rank that "
        "ended first says; the same command goes on."
    )


def silence_other_ranks() -> None:
    """Let only rank 0 write to the console, others errors alone. Logging is set up before."""
    if is_main():
        return
    for handler in logging.root.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setLevel(logging.ERROR)
    logging.getLogger("ignite").setLevel(logging.CRITICAL)  # it tells of every exception, twice


def destroy() -> None:
    """Leave the ranks that `join` met, after the last exchange."""
    global _talk, _alone, _store
    if _talk is not None:
        dist.destroy_process_group()
    _talk = _alone = _store = None


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes and tells what is of the whole run."""
    return rank() == 0


def launch_id() -> str | None:
    """torchrun's name for the launch, the same after a restart; `None` where it has none."""
    name = os.environ["TORCHELASTIC_RUN_ID"] if is_launched() else "none"
    return None if name == "none" else name  # as torchrun calls all that are not named


def local_rank() -> int | None:
    """Number of this process among those of its host; `None` where torchrun did not start it."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else None


def local_size() -> int:
    """How many there are on this host."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if is_launched() else 1


def own_cores() -> int:
    """Of the cores that this process may use, its share among the ranks of its host."""
    return max(len(os.sched_getaffinity(0)) // local_size(), 1)


def shard(items: Sequence[T]) -> Sequence[T]:
    """Every `size`-th of some items, from the `rank`-th on: all ranks together have each once."""
    return items[rank() :: size()]


def interleave(shares: Sequence[Sequence[T]]) -> list[T]:
    """Items that were divided by `shard`, in their order."""
    longest = max(map(len, shares))
    return [part[n] for n in range(longest) for part in shares if n < len(part)]


def all_gather_object(value: T) -> list[T]:
    """What each rank says, in their order. All have to call it.

    Raises:
        InputError: If one refused instead.
        SystemExit: If one ended instead.
    """
    return [value] if size() == 1 else _exchanged(value)


def broadcast_object(value: T) -> T:
    """What rank 0 says; others say anything. All have to call it."""
    return all_gather_object(value)[0]


def run_on_main(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0; others wait without a limit. All have to call it."""
    global _waits
    if _store is None:
        return broadcast_object(work() if is_main() else None)  # type: ignore[return-value]
    _waits += 1
    key = f"by_main/{_waits}"
    value: Any = None
    try:
        if is_main():
            value = work()
        while not is_main() and not _store.check([key]):
            time.sleep(0.1)
    finally:
        if is_main():
            _store.set(key, "")
    result: T = broadcast_object(value)
    return result


@contextlib.contextmanager
def sync_errors() -> Iterator[None]:
    """Inside, a mistake or an exit of one rank becomes that of all. All have to enter it.

    Raises:
        InputError: If one refused; `is_told` is true on all ranks but the first, which prints it.
        SystemExit: If one ended.
    """
    join()
    try:
        yield
    except (InputError, SystemExit) as error:
        if size() > 1 and not _over:
            _exchanged(None, error)
        raise
    all_gather_object(None)


def _exchanged(value: Any, error: InputError | SystemExit | None = None) -> list[Any]:
    global _over
    faults = error.faults if isinstance(error, InputError) else ()
    status = int(error.code or 0) if isinstance(error, SystemExit) else None
    said: list[Any] = [None] * size()
    with _signals_held():
        try:
            dist.all_gather_object(said, (value, faults, status, socket.gethostname()), group=_talk)
        except RuntimeError as broken:
            _over = True
            reason = loss_of(broken)
            if reason is None:
                raise
            log.error("%s", reason)
            raise TrainingStopped(reason) from broken
        refusals = [(number, lines, host) for number, (_, lines, _, host) in enumerate(said)]
        refusals = [refusal for refusal in refusals if refusal[1]]
        statuses = [code for _, _, code, _ in said if code is not None]
        is_told = not is_main()
        _over = bool(refusals or statuses)
        if _over:
            destroy()
    if refusals:
        raise InputError(*_told_once(refusals), is_told=is_told)
    if statuses:
        raise SystemExit(max(statuses))
    return [one[0] for one in said]


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Inside, handlers of signals wait: one that raises would leave the others in mid-exchange."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came and not _over:
            signal.raise_signal(came[0])


def _told_once(refusals: list[tuple[int, Sequence[str], str]]) -> Iterator[str]:
    """Each line once; of those that rank 0 does not say, whose they are."""
    whose: dict[str, list[tuple[int, str]]] = {}
    for number, lines, host in refusals:
        for line in lines:
            whose.setdefault(line, []).append((number, host))
    for line, ((number, host), *others) in whose.items():
        more = f" and {len(others)} more" if others else ""
        yield f"rank {number} on {host}{more}: {line}" if number else line


def rows(vector: torch.Tensor) -> torch.Tensor:
    """`(K,)` of each rank as `(size, K)`, on the vectors' device; does not wait for it."""
    if size() == 1:
        return vector[None]
    found = vector.new_zeros(size(), len(vector))
    found[rank()] = vector
    dist.all_reduce(found)  # torch's way of gathering tensors has other names in other versions
    return found


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, whose gradient goes to this rank's own part; does not wait for the device.

    Where the ranks' gradients of parameters are summed as well, those of a value that was made of
    such sums are what one process would have.
    """
    if size() == 1 or _apart:
        return tensor
    result: torch.Tensor = _Summed.apply(tensor)
    return result


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


@contextlib.contextmanager
def local_only(network: torch.nn.Module) -> Iterator[None]:
    """Inside, this rank's forward passes of `network` and sums are of its own samples alone."""
    global _apart, _alone
    layers = [m for m in network.modules() if isinstance(m, SyncBatchNorm)]
    if layers and size() > 1 and _alone is None:
        _alone = dist.new_group([rank()], use_local_synchronization=True)
    before = [layer.process_group for layer in layers]
    _apart = True
    try:
        for layer in layers:
            layer.process_group = _alone
        yield
    finally:
        _apart = False
        for layer, group in zip(layers, before, strict=True):
            layer.process_group = group
