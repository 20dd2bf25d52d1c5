"""The processes ("ranks") of one training, and what they exchange.

torchrun starts the ranks; without it there is one. Objects pass through a Gloo group on the CPU,
tensors of training through the default group: NCCL on CUDA, Gloo on a CPU. If one rank raises
inside `sync_errors()`, all do: the error travels with the next exchange of objects.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import InputError, as_bool, require
from pipeline.progress_bar import details

T = TypeVar("T")
PATIENCE = timedelta(hours=24)  # for data checks of rank 0; a death is noticed at once

_object_group: dist.ProcessGroup | None = None  # None: the default group
_is_local = False  # inside of `local_only`
_has_ended = False  # a rank has raised, so that none listens any more


def is_launched() -> bool:
    """Return whether torchrun started this process."""
    return dist.is_torchelastic_launched() and "RANK" in os.environ


def join() -> None:
    """Connect to the other ranks if torchrun started some; a second call does nothing."""
    global _object_group
    if not is_launched() or dist.is_initialized() or _has_ended:
        return
    store, number, count = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # after a restart, torchrun's store still has the former addresses (pytorch issue 135712)
        store = dist.PrefixStore(f"start_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    _object_group = dist.new_group(backend="gloo", timeout=PATIENCE)


def destroy() -> None:
    """Leave the ranks that `join` connected to, after the last exchange."""
    global _object_group
    if _object_group is not None:
        dist.destroy_process_group()
    _object_group = None


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is rank 0, which writes and prints what belongs to the whole run."""
    return rank() == 0


def local_rank() -> int | None:
    """Number of this process among those of its host; `None` if torchrun did not start it."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else None


def local_size() -> int:
    """Number of ranks on this host."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if is_launched() else 1


def own_cores() -> int:
    """This rank's share of the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # of Linux
    return max((len(affinity(0)) if affinity else os.cpu_count() or 1) // local_size(), 1)


def silence_other_ranks() -> None:
    """Let the other ranks write only errors to the console; logging has to be set up before."""
    if is_main():
        return
    for handler in logging.root.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setLevel(logging.ERROR)
    logging.getLogger("ignite").setLevel(logging.CRITICAL)  # it logs every exception, twice


def shard(items: Sequence[T]) -> Sequence[T]:
    """This rank's share of some items: every `size`-th one, from the `rank`-th on."""
    return items[rank() :: size()]


def interleave(shares: Sequence[Sequence[T]]) -> list[T]:
    """Put items that `shard` divided back into their order."""
    longest = max(map(len, shares))
    return [part[n] for n in range(longest) for part in shares if n < len(part)]


def all_gather_object(value: T, failure: tuple[str, ...] | int | None = None) -> list[T]:
    """Return the `value` of each rank, by rank. All ranks have to call it.

    Raises:
        InputError, SystemExit: On all ranks, if one has a `failure`: its faults or exit status.
    """
    global _has_ended
    if size() == 1:
        return [value]
    messages: list[Any] = [None] * size()
    dist.all_gather_object(messages, (value, failure), group=_object_group)
    if failures := [failure for _, failure in messages if failure is not None]:
        _has_ended, is_told = True, not is_main()
        destroy()
        if faults := next((one for one in failures if isinstance(one, tuple)), ()):
            raise InputError(*faults, is_told=is_told)
        raise SystemExit(max(failures))
    return [value for value, _ in messages]


def broadcast_object(value: T) -> T:
    """Return the `value` of rank 0. All ranks have to call it."""
    return all_gather_object(value)[0]


def run_on_main(work: Callable[[], T]) -> T:
    """Return what `work` returns on rank 0, while the others wait. All have to call it."""
    return broadcast_object(work() if is_main() else None)  # type: ignore[return-value]


@contextlib.contextmanager
def sync_errors() -> Iterator[None]:
    """Inside, an `InputError` or `SystemExit` of one rank becomes that of all, which enter it.

    `is_told` of the error is true on all ranks but 0, which prints it.
    """
    join()
    try:
        yield
    except (InputError, SystemExit) as error:
        if size() > 1 and not _has_ended:
            sender = "" if is_main() else f"rank {rank()} on {socket.gethostname()}: "
            faults = error.faults if isinstance(error, InputError) else ()
            status = int(error.code or 0) if isinstance(error, SystemExit) else None
            all_gather_object(None, tuple(sender + fault for fault in faults) or status)
        raise
    all_gather_object(None)


def explain_lost_rank(error: RuntimeError) -> str | None:
    """Return one line for the user if an error means that another rank is gone, else `None`."""
    if size() == 1 or not (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
        return None
    reason = str(error).partition("\n")[0].partition(". This is")[0]
    return (
        f"rank {rank()}: expected all ranks to go on, got: {reason}. See what the rank that ended "
        "first printed; the same command continues the run."
    )


def gather_rows(vector: torch.Tensor) -> torch.Tensor:
    """`(K,)` of each rank as `(size, K)`, on the vector's device; the host does not wait."""
    if size() == 1:
        return vector[None]
    rows = vector.new_zeros(size(), len(vector))
    rows[rank()] = vector
    dist.all_reduce(rows)
    return rows


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, with the gradient of this rank's own part; the host does not wait.

    As `SummedDDP` sums the gradients of parameters, they are those of one process.
    """
    if size() == 1 or _is_local:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total.detach())  # in place; autograd sees the copy of this rank's own part
    return total


def mean_over_ranks(loss: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Mean loss of all ranks' samples, from the mean (scalar) of this rank's `num_samples`."""
    loss = loss.float()
    total = all_reduce_sum(torch.stack([loss, torch.ones_like(loss)]) * num_samples)
    return total[0] / total[1]


@contextlib.contextmanager
def local_only(network: nn.Module) -> Iterator[None]:
    """Inside, forward passes of `network` and sums are of this rank's own samples alone."""
    global _is_local
    layers = [m for m in network.modules() if isinstance(m, nn.SyncBatchNorm)]
    _is_local = True
    try:
        for layer in layers:
            layer.forward = partial(_BatchNorm.forward, layer)  # type: ignore[method-assign]
        yield
    finally:
        _is_local = False
        for layer in layers:
            del layer.forward


class SummedDDP(DistributedDataParallel):
    """DistributedDataParallel that sums gradients over ranks instead of averaging them.

    Each rank's gradients are those of its own samples in the loss of all. Their sum is that of one
    process, and as large, which matters in float16. Parameters become those of rank 0.
    """

    def __init__(self, network: nn.Module) -> None:
        # strides differ along axes of length 1, where they mean nothing; others cost 10 % of a step
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        super().__init__(network, gradient_as_bucket_view=True)
        self.broadcast_buffers = False  # `average_running_stats` takes care of them
        self.register_comm_hook(None, _sum_bucket)
        self._statistics = [
            buffer
            for module in network.modules()
            if isinstance(module, _NormBase) and not isinstance(module, nn.SyncBatchNorm)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]

    @torch.no_grad()
    def average_running_stats(self) -> None:
        """Set the running statistics that each rank has of its own samples to their mean."""
        if self._statistics:
            mean = torch.cat(self._statistics) / size()
            dist.all_reduce(mean)
            parts = mean.split([len(buffer) for buffer in self._statistics])
            torch._foreach_copy_(self._statistics, list(parts))


def _sum_bucket(state, bucket):  # torch refuses annotations that are strings
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class DistributedSettings:
    """Settings of several ranks, from `configs/multi_gpu.json`; one process ignores them.

    Args:
        device: Device that training is asked to run on.
        sync_batch_norm: Whether batch norms become SyncBatchNorm, which only CUDA has.
    """

    def __init__(self, device: str = "auto", sync_batch_norm: bool | str = True) -> None:
        self.device = str(device)
        self.sync_batch_norm = as_bool(sync_batch_norm, "process_group#sync_batch_norm")
        self._batch_norm = "none in the network"
        prefixes = ("cuda", "auto") if torch.cuda.is_available() else "cuda"
        self._wants_cuda = self.device.startswith(prefixes)

    def enter(self) -> None:
        """Set up console and device in `sync_errors`; `InputError` if a rank has no device."""
        silence_other_ranks()
        if not is_launched() or not self._wants_cuda:
            return
        found = torch.cuda.device_count()
        fits = local_size() <= found and not (":" in self.device and size() > 1)
        expected = f"at most {found}, the CUDA devices here, and device auto, cuda or cpu"
        got, remedy = f"{local_size()} and {self.device!r}", "Start fewer ranks, or use device cpu."
        require(fits, "--nproc_per_node", expected, got, remedy)
        torch.cuda.set_device(self.device if ":" in self.device else f"cuda:{local_rank()}")

    def replica(self, network: nn.Module) -> SummedDDP | None:
        """Wrap the network on its device, its batch norms replaced; `None` without torchrun."""
        if not is_launched():
            return None
        if any(isinstance(module, _BatchNorm) for module in network.modules()):
            self._batch_norm = "each rank's own"
            if self.sync_batch_norm and next(network.parameters()).is_cuda:
                nn.SyncBatchNorm.convert_sync_batchnorm(network)
                self._batch_norm = "synchronized"
        all_gather_object(None)  # DDP would wait for a rank that has failed
        details.info("Process group in force: %s", self.describe())
        return SummedDDP(network)

    def describe(self) -> dict[str, Any]:
        """Return what is in force: number of ranks, backend, batch norm."""
        return {
            "num_ranks": size(),
            "backend": ("nccl" if self._wants_cuda else "gloo") if is_launched() else None,
            "sync_batch_norm": self.sync_batch_norm,
            "batch_norm": self._batch_norm,
        }
