"""The processes ("ranks") of one training, and what they exchange.

torchrun starts the ranks. Without it there is one process, and every function here returns what a
single rank gets. Objects pass through a Gloo group of their own on the CPU; tensors of training
pass through the default group: NCCL on CUDA, Gloo on a CPU.

If one rank raises inside `sync_errors()`, all ranks raise: the error travels with the next exchange
of objects, so that no rank waits for one that has ended. Rank 0 prints it.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import InputError, TrainingStopped, as_bool

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Rank 0 checks the data while the others wait, and the shares of preprocessing or prediction differ
# in length. A process that dies is noticed at once, because its connections close.
PATIENCE = timedelta(hours=24)

log = logging.getLogger(__name__)

_object_group: dist.ProcessGroup | None = None  # None: the default group
_own_group: dist.ProcessGroup | None = None  # of this rank alone
_is_local = False  # inside of `local_only`
_has_ended = False  # a rank has raised, so nobody listens any more


# --- who is there


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched() and "RANK" in os.environ


def join() -> None:
    """Connect to the other ranks if torchrun started some; a second call does nothing."""
    global _object_group
    if not is_launched() or dist.is_initialized() or _has_ended:
        return
    store, number, count = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # the store of torchrun outlives a restart, and would still name the former ranks'
        # addresses (pytorch issue 135712)
        store = dist.PrefixStore(f"start_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    _object_group = dist.new_group(backend="gloo", timeout=PATIENCE)


def destroy() -> None:
    """Leave the ranks that `join` connected to, after the last exchange."""
    global _object_group, _own_group
    if _object_group is not None:
        dist.destroy_process_group()
    _object_group = _own_group = None


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, which writes and prints what belongs to the whole run."""
    return rank() == 0


def launch_id() -> str | None:
    """torchrun's name of the launch, the same after a restart; `None` if it has none."""
    name = os.environ["TORCHELASTIC_RUN_ID"] if is_launched() else "none"
    return None if name == "none" else name  # as torchrun calls every launch without a name


def local_rank() -> int | None:
    """Number of this process among those of its host; `None` if torchrun did not start it."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else None


def local_size() -> int:
    """Number of ranks on this host."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if is_launched() else 1


def own_cores() -> int:
    """This rank's share of the cores that this process may use."""
    return max(len(os.sched_getaffinity(0)) // local_size(), 1)


def silence_other_ranks() -> None:
    """Let the other ranks write only errors to the console; logging has to be set up before."""
    if is_main():
        return
    for handler in logging.root.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setLevel(logging.ERROR)
    logging.getLogger("ignite").setLevel(logging.CRITICAL)  # it logs every exception, twice


# --- exchange of objects


def shard(items: Sequence[T]) -> Sequence[T]:
    """This rank's share of some items: every `size`-th one, from the `rank`-th on."""
    return items[rank() :: size()]


def interleave(shares: Sequence[Sequence[T]]) -> list[T]:
    """Put items that `shard` divided back into their order."""
    longest = max(map(len, shares))
    return [part[n] for n in range(longest) for part in shares if n < len(part)]


def all_gather_object(value: T) -> list[T]:
    """The `value` of each rank, in their order. All ranks have to call it.

    Raises:
        InputError: If a rank raised one instead.
        SystemExit: If a rank ended instead.
    """
    return [value] if size() == 1 else _exchange(value)


def broadcast_object(value: T) -> T:
    """The `value` of rank 0. All ranks have to call it."""
    return all_gather_object(value)[0]


def run_on_main(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, while the others wait. All ranks have to call it."""
    return broadcast_object(work() if is_main() else None)  # type: ignore[return-value]


@contextlib.contextmanager
def sync_errors() -> Iterator[None]:
    """Inside, an error or an exit of one rank becomes that of all. All ranks have to enter it.

    Raises:
        InputError: If a rank raised one; `is_told` is true on all ranks but 0, which prints it.
        SystemExit: If a rank ended.
    """
    join()
    try:
        yield
    except (InputError, SystemExit) as error:
        if size() > 1 and not _has_ended:
            _exchange(None, error)
        raise
    all_gather_object(None)


def _exchange(value: Any, error: InputError | SystemExit | None = None) -> list[Any]:
    global _has_ended
    faults = error.faults if isinstance(error, InputError) else ()
    status = int(error.code or 0) if isinstance(error, SystemExit) else None
    messages: list[Any] = [None] * size()
    with _delayed_signals():
        try:
            own = value, faults, status, f"rank {rank()} on {socket.gethostname()}: "
            dist.all_gather_object(messages, own, group=_object_group)
        except RuntimeError as lost:
            _has_ended = True
            if (reason := explain_lost_rank(lost)) is None:
                raise
            log.error("%s", reason)
            raise TrainingStopped(reason) from lost
        values, all_faults, statuses, senders = zip(*messages, strict=True)
        lines: dict[str, str] = {}  # each once, with its sender unless that is rank 0
        for sender, refused in zip(("", *senders[1:]), all_faults, strict=True):
            for line in refused:
                lines.setdefault(line, sender)
        ended_with = [code for code in statuses if code is not None]
        is_told, _has_ended = not is_main(), bool(lines or ended_with)
        if _has_ended:
            destroy()
    if lines:
        raise InputError(*(sender + line for line, sender in lines.items()), is_told=is_told)
    if ended_with:
        raise SystemExit(max(ended_with))
    return [*values]


@contextlib.contextmanager
def _delayed_signals() -> Iterator[None]:
    """Inside, signals wait: a handler that raised would leave the others in the exchange."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received and not _has_ended:
            signal.raise_signal(received[0])


def explain_lost_rank(error: RuntimeError) -> str | None:
    """One line for the user if `error` means that another rank is gone; else `None`."""
    if size() == 1 or not (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
        return None
    reason = str(error).partition("\n")[0].partition(". This is")[0]
    return (
        f"rank {rank()}: expected all ranks to go on, got: {reason}. See what the rank that ended "
        "first printed; the same command continues the run."
    )


# --- exchange of tensors


def gather_rows(vector: torch.Tensor) -> torch.Tensor:
    """`(K,)` of each rank as `(size, K)`, on the vector's device; the host does not wait."""
    if size() == 1:
        return vector[None]
    rows = vector.new_zeros(size(), len(vector))
    rows[rank()] = vector
    dist.all_reduce(rows)  # gathering tensors has other names in other versions of torch
    return rows


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks whose gradient is that of this rank's own part; the host does not wait.

    Where the gradients of parameters are summed over ranks as well (`SummedDDP`), those of a loss
    that is made of such sums are what one process would have.
    """
    if size() == 1 or _is_local:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total.detach())  # in place; autograd sees the copy of this rank's own part
    return total


def mean_over_ranks(loss: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Mean loss of the samples of all ranks; its gradient is that of this rank's own samples.

    Args:
        loss: Mean of this rank's `num_samples` samples, scalar.
    """
    loss = loss.float()
    total = all_reduce_sum(torch.stack([loss, torch.ones_like(loss)]) * num_samples)
    return total[0] / total[1]


@contextlib.contextmanager
def local_only(network: nn.Module) -> Iterator[None]:
    """Inside, forward passes of `network` and sums are of this rank's own samples alone."""
    global _is_local, _own_group
    layers = [m for m in network.modules() if isinstance(m, nn.SyncBatchNorm)]
    if layers and size() > 1 and _own_group is None:
        _own_group = dist.new_group([rank()], use_local_synchronization=True)
    before = [layer.process_group for layer in layers]
    _is_local = True
    try:
        for layer in layers:
            layer.process_group = _own_group
        yield
    finally:
        _is_local = False
        for layer, group in zip(layers, before, strict=True):
            layer.process_group = group


def require_equal_ranks(network: nn.Module, step: int) -> None:
    """Refuse to train if a rank begins at another step or with other weights than rank 0.

    Raises:
        InputError: If one does.
    """
    if size() == 1:
        return
    weights = [p.detach().cpu().numpy().tobytes() for p in network.parameters()]
    own = step, hashlib.sha256(b"".join(weights)).digest()
    with sync_errors():
        if own != broadcast_object(own):
            raise InputError(
                "output_dir: expected the checkpoint and weights of rank 0, got others. Give all "
                "ranks one on a file system that their hosts share."
            )


# --- the network


class SummedDDP(DistributedDataParallel):
    """DistributedDataParallel that sums gradients over ranks instead of averaging them.

    The loss is that of the samples of all ranks, and the gradients of each rank are those of its
    own samples. Their sum is what one process has, and as large, which matters in float16.

    Args:
        network: On its device; its parameters and buffers become those of rank 0.

    Attributes:
        gradient_bytes: Bytes that a step passes through the all-reduce.
    """

    def __init__(self, network: nn.Module) -> None:
        # DDP warns if a gradient's strides differ from its bucket's. They do along axes of length
        # 1, where a stride means nothing; weights with other strides cost a tenth of a step.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        # `average_running_stats` takes care of the running statistics that DDP would broadcast
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        settings: dict[str, Any] = {"gradient_as_bucket_view": True, name: False}
        super().__init__(network, **settings)
        self.register_comm_hook(None, _sum_bucket)
        self._is_checked = False
        self.gradient_bytes = sum(p.nbytes for p in network.parameters() if p.requires_grad)
        self._statistics = [
            buffer
            for module in network.modules()
            if isinstance(module, _NormBase) and not isinstance(module, nn.SyncBatchNorm)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]

    def require_all_used(self) -> None:
        """Refuse a network of which some parameters got no gradient in the first step.

        DDP reduces a bucket only when all its gradients are there; the others of that bucket would
        stay each rank's own.

        Raises:
            InputError: Names the parameters.
        """
        if self._is_checked:
            return
        self._is_checked = True
        parameters = self.module.named_parameters()
        unused = [name for name, p in parameters if p.requires_grad and p.grad is None]
        with sync_errors():
            if unused:
                raise InputError(
                    "network: expected all parameters to take part in a step of several ranks, got "
                    f"no gradient of {', '.join(unused[:5])}. Freeze them, or train in one process."
                )

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
    """How ranks train, as `configs/multi_gpu.json` adds it to a config.

    Without torchrun there is one process, which trains as without this object.

    Args:
        device: Device that training is asked to run on.
        sync_batch_norm: Whether batch norms become SyncBatchNorm, which only CUDA has.

    Raises:
        InputError: If `sync_batch_norm` is not a boolean.
    """

    def __init__(self, device: str = "auto", sync_batch_norm: bool | str = True) -> None:
        self.device = str(device)
        self.sync_batch_norm = as_bool(sync_batch_norm, "process_group#sync_batch_norm")
        self._batch_norm = "none in the network"
        self._gradient_bytes = 0
        on_card = self.device == "auto" and torch.cuda.is_available()
        self._wants_cuda = on_card or self.device.startswith("cuda")

    def enter(self) -> None:
        """Set up this rank's console and device, inside of `sync_errors`.

        Raises:
            InputError: If there is no device for each rank.
        """
        silence_other_ranks()
        if not is_launched() or not self._wants_cuda:
            return
        if (":" in self.device and size() > 1) or local_size() > torch.cuda.device_count():
            raise InputError(
                f"--nproc_per_node: expected at most {torch.cuda.device_count()}, the CUDA devices "
                f"here, and device auto, cuda or cpu, got {local_size()} and {self.device!r}. "
                "Start fewer ranks, or use device cpu."
            )
        torch.cuda.set_device(self.device if ":" in self.device else f"cuda:{local_rank()}")

    def replica(self, network: nn.Module) -> SummedDDP | None:
        """Wrap the network for training in ranks; `None` without torchrun.

        Args:
            network: On its device. Batch norms are replaced in place; parameters and names stay.
        """
        if not is_launched():
            return None
        if any(isinstance(module, _BatchNorm) for module in network.modules()):
            if self.sync_batch_norm and next(network.parameters()).is_cuda:
                nn.SyncBatchNorm.convert_sync_batchnorm(network)
                self._batch_norm = "synchronized"
            else:
                reason = ": there is no SyncBatchNorm on a CPU" if self.sync_batch_norm else ""
                self._batch_norm = f"each rank's own{reason}"
        all_gather_object(None)  # notices a rank that has failed, for which DDP would wait
        replica = SummedDDP(network)
        self._gradient_bytes = replica.gradient_bytes
        facts = ", ".join(f"{key} {value}" for key, value in self.describe().items())
        log.info("Process group in force: %s", facts)
        return replica

    def describe(self) -> dict[str, Any]:
        """What is in force: number of ranks, backend, batch norm, bytes of gradients per step."""
        return {
            "num_ranks": size(),
            "backend": ("nccl" if self._wants_cuda else "gloo") if is_launched() else None,
            "sync_batch_norm": self.sync_batch_norm,
            "batch_norm": self._batch_norm,
            "gradient_bytes_per_step": self._gradient_bytes,
        }
