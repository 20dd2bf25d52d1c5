"""A rank's copy of the network in a training of several ranks."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from pipeline import distributed
from pipeline.errors import InputError


class SummedDDP(DistributedDataParallel):
    """DistributedDataParallel that sums gradients over ranks where torch's own takes their mean.

    The loss is that of the samples of all ranks, and each rank's gradients are those of its own
    samples: their sum is what one process has, and as large, which float16 is not indifferent to.

    Args:
        network: On its device; its parameters and buffers become those of rank 0.

    Attributes:
        gradient_bytes: That a step passes through the all-reduce.
    """

    def __init__(self, network: nn.Module) -> None:
        # DDP warns where a gradient's strides differ from its bucket's. They do along axes of
        # length 1, where a stride means nothing; weights with strides that silence it cost a tenth
        # of a step, since the layers after them then had another layout.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        # the running statistics that DDP would send around are looked after by `settle`
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        settings: dict[str, Any] = {"gradient_as_bucket_view": True, name: False}
        super().__init__(network, **settings)
        self.register_comm_hook(None, _summed)
        self._is_checked = False
        trained = [p for p in network.parameters() if p.requires_grad]
        self.gradient_bytes = sum(p.numel() * p.element_size() for p in trained)
        self._statistics = [
            buffer
            for module in network.modules()
            if isinstance(module, _NormBase) and not isinstance(module, nn.SyncBatchNorm)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]

    def require_all_used(self) -> None:
        """Refuse a network some of whose parameters got no gradient in the first step.

        DDP reduces a bucket only when all its gradients are there; the others of that bucket would
        stay each rank's own.

        Raises:
            InputError: Naming what took no part.
        """
        if self._is_checked:
            return
        self._is_checked = True
        parameters = self.module.named_parameters()
        unused = [name for name, p in parameters if p.requires_grad and p.grad is None]
        with distributed.sync_errors():
            if unused:
                raise InputError(
                    f"network: expected all parameters to take part in a step of several ranks, "
                    f"got no gradient of {', '.join(unused[:5])}. Freeze them, or train in one "
                    "process."
                )

    @torch.no_grad()
    def settle(self) -> None:
        """Make running statistics that each rank has of its own samples the mean of all ranks'."""
        if not self._statistics:
            return
        mean = torch.cat([buffer.flatten() for buffer in self._statistics]) / distributed.size()
        dist.all_reduce(mean)
        parts = mean.split([buffer.numel() for buffer in self._statistics])
        torch._foreach_copy_(
            self._statistics,
            [part.view_as(b) for part, b in zip(parts, self._statistics, strict=True)],
        )


def mean_over_ranks(loss: torch.Tensor, samples: int) -> torch.Tensor:
    """Mean loss of the samples of all ranks; its gradient is that of this rank's own.

    Args:
        loss: Mean of this rank's `samples`, scalar.
        samples: Their number.
    """
    total = distributed.all_reduce_sum(
        torch.stack([loss.float(), torch.ones_like(loss.float())]) * samples
    )
    return total[0] / total[1]


def require_equal_ranks(network: nn.Module, step: int) -> None:
    """Refuse to train where a rank begins with something else than rank 0.

    Args:
        network: Whose weights are compared, bit for bit.
        step: At which it is.

    Raises:
        InputError: If one does.
    """
    if distributed.size() == 1:
        return
    weights = hashlib.sha256()
    for parameter in network.parameters():
        weights.update(parameter.detach().cpu().numpy().tobytes())
    own = step, weights.digest()
    with distributed.sync_errors():
        if own != distributed.broadcast_object(own):
            raise InputError(
                "output_dir: expected the checkpoint and weights of rank 0, got others. Give all "
                "ranks one on a file system that their hosts share."
            )


def _summed(state, bucket):  # torch refuses annotations that are strings
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
