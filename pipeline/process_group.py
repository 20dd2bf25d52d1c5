"""What `configs/multi_gpu.json` adds to a config: training in the ranks that torchrun starts."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline import distributed
from pipeline.errors import InputError, as_bool
from pipeline.precision import resolve_device
from pipeline.training.replica import SummedDDP

log = logging.getLogger(__name__)

SYNCHRONIZED = "synchronized"
OWN = "each rank's own"
OWN_ON_CPU = f"{OWN}: there is no SyncBatchNorm on a CPU"


class ProcessGroup:
    """The ranks of a run; where torchrun started none, one process that trains as without it.

    Args:
        device: That training is asked to run on.
        sync_batch_norm: Whether batch norms become SyncBatchNorm, on CUDA.

    Raises:
        InputError: If `sync_batch_norm` is not a boolean.
    """

    def __init__(self, device: str = "auto", sync_batch_norm: bool | str = True) -> None:
        self.device = device
        self.sync_batch_norm = as_bool(sync_batch_norm, "process_group#sync_batch_norm")
        self._batch_norm = "none in the network"
        self._gradient_bytes = 0

    def enter(self) -> None:
        """Set this rank up, inside of `distributed.sync_errors`: its console, and its device.

        Raises:
            InputError: If there is not a device for each.
        """
        distributed.silence_other_ranks()
        if distributed.is_launched():
            self._require_devices()

    def _require_devices(self) -> None:
        num_ranks = distributed.local_size()
        named = str(self.device)
        wants_cuda = named.startswith("cuda") or (named == "auto" and torch.cuda.is_available())
        found = torch.cuda.device_count()
        if wants_cuda and ":" in named and num_ranks > 1:
            raise InputError(
                f"device: expected auto, cuda or cpu for {num_ranks} ranks, got {named!r}. "
                "Each takes the card of its number."
            )
        if wants_cuda and num_ranks > found:
            raise InputError(
                f"--nproc_per_node: expected at most {found}, the CUDA devices here, got "
                f"{num_ranks}. Start fewer ranks, or use device cpu."
            )
        device = resolve_device(self.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def replica(self, network: nn.Module) -> SummedDDP | None:
        """The network as the ranks train it, its batch norms synchronized where the device can.

        Args:
            network: On its device. Its layers are replaced in place; parameters and names stay.
        """
        if not distributed.is_launched():
            return None
        if any(isinstance(module, _BatchNorm) for module in network.modules()):
            if self.sync_batch_norm and next(network.parameters()).is_cuda:
                nn.SyncBatchNorm.convert_sync_batchnorm(network)
                self._batch_norm = SYNCHRONIZED
            else:
                self._batch_norm = OWN_ON_CPU if self.sync_batch_norm else OWN
        distributed.all_gather_object(None)  # one that has failed is not waited for, as DDP would
        replica = SummedDDP(network)
        self._gradient_bytes = replica.gradient_bytes
        facts = ", ".join(f"{key} {value}" for key, value in self.describe().items())
        log.info("Process group in force: %s", facts)
        return replica

    def describe(self) -> dict[str, Any]:
        """What is in force: number of ranks, backend, batch norm, bytes of gradients per step."""
        cuda = resolve_device(self.device).type == "cuda"
        return {
            "num_ranks": distributed.size(),
            "backend": None if not distributed.is_launched() else "nccl" if cuda else "gloo",
            "sync_batch_norm": self.sync_batch_norm,
            "batch_norm": self._batch_norm,
            "gradient_bytes_per_step": self._gradient_bytes,
        }
