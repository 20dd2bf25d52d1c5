"""The one owner of numerical precision: device, autocast, loss scaling, clipping, finite check.

Nothing else opens an autocast region, makes a scaler or decides whether a step is applied.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from pipeline import distributed
from pipeline.errors import InputError, as_bool, require_choice

FLOAT32, FLOAT16, BFLOAT16 = (torch.float32, False), (torch.float16, True), (torch.bfloat16, False)

# device type -> requested dtype -> (effective dtype, loss scaling)
MODES: dict[str, dict[str, tuple[torch.dtype, bool]]] = {
    "cuda": {"auto": FLOAT16, "float16": FLOAT16, "bfloat16": BFLOAT16},
    # float16 is some 40 times slower than float32 on a CPU
    "cpu": {"auto": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16},
}

MEMORY_FORMATS = {
    "auto": torch.channels_last_3d,  # faster in every precision, on cards and on processors
    "channels_last_3d": torch.channels_last_3d,
    "contiguous": torch.contiguous_format,
}


@dataclass(frozen=True)
class StepStats:
    """The result of one optimizer step, on the host."""

    applied: bool  # whether loss, gradients and buffers were finite on all ranks
    loss: float  # mean over the accumulation group
    grad_norm: float  # global 2-norm of the unscaled gradients, before clipping
    loss_scale: float  # 1 without a scaler
    max_abs_logit: float  # in the accumulation group; NaN if there was one
    sums: Sequence[float] = ()  # of the `counts` of all ranks


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that `auto` or a name means, for a rank its own; `InputError` if there is none."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(device)):
        raise InputError(f"device: expected auto, cpu or cuda[:N], got '{device}'.")
    resolved = torch.device(device)
    local_rank, found = distributed.local_rank(), torch.cuda.device_count()
    if resolved.type == "cuda" and resolved.index is None and local_rank is not None:
        resolved = torch.device("cuda", local_rank)
    if resolved.type == "cuda" and (resolved.index or 0) >= found:
        expected = f"expected one of the {found} CUDA devices here, got '{resolved}'"
        raise InputError(f"device: {expected}. Use auto, or start fewer ranks.")
    return resolved


class Precision:
    """Resolves device and dtype, and takes backward and optimizer steps in that precision.

    Raises `InputError` if a value is not one of those named here, or the card has no bfloat16.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        amp: Whether mixed precision is asked for; `False` is plain float32 with no scaler.
        amp_dtype: `auto`, `float16` or `bfloat16`; see `MODES` for what each resolves to.
        tf32: Whether float32 matrix products and convolutions may use TF32 on CUDA.
        cudnn_benchmark: Whether cuDNN on CUDA times its algorithms and takes the fastest: faster
            where shapes repeat, and the choice may differ from run to run.
        memory_format: Of the weights, which images and activations follow; see `MEMORY_FORMATS`.
        init_scale: Loss scale at the start.
        growth_interval: Finite steps in a row after which the loss scale doubles.
    """

    def __init__(
        self,
        device: str | torch.device = "auto",
        amp: bool | str = True,
        amp_dtype: str = "auto",
        tf32: bool | str = False,
        cudnn_benchmark: bool | str = False,
        memory_format: str = "auto",
        init_scale: float = 65536.0,
        growth_interval: int = 2000,
    ) -> None:
        self.device = resolve_device(device)
        self.requested: dict[str, Any] = {
            "device": str(device),
            "amp": as_bool(amp, "amp"),
            "amp_dtype": amp_dtype,
            "tf32": as_bool(tf32, "tf32"),
            "cudnn_benchmark": as_bool(cudnn_benchmark, "cudnn_benchmark"),
            "memory_format": memory_format,
        }
        kind, modes = self.device.type, MODES[self.device.type]
        require_choice(amp_dtype, modes, "amp_dtype")
        require_choice(memory_format, MEMORY_FORMATS, "memory_format")
        if not 0 < init_scale < math.inf:
            expected = "expected a finite number above 0"
            raise InputError(f"init_scale: {expected}, got {init_scale}. Leave it out.")
        self.amp, self.memory_format = self.requested["amp"], MEMORY_FORMATS[memory_format]
        self.dtype, is_scaled = modes[amp_dtype] if self.amp else FLOAT32  # float32: no autocast
        self.mode = str(self.dtype).removeprefix("torch.")
        self.scaler = None
        if is_scaled:
            self.scaler = torch.amp.GradScaler(kind, init_scale, growth_interval=growth_interval)
        self._set_up_cuda()

    def _set_up_cuda(self) -> None:
        if self.device.type != "cuda":
            return
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        if self.dtype == torch.bfloat16 and not is_native:
            name = torch.cuda.get_device_name(self.device)
            raise InputError(f"amp_dtype: expected a card with bfloat16, got {name}. Use float16.")
        if self.device.index is not None:  # Triton and CUDA graphs go to the current device
            torch.cuda.set_device(self.device)
        torch.backends.cuda.matmul.allow_tf32 = self.requested["tf32"]
        torch.backends.cudnn.allow_tf32 = self.requested["tf32"]
        torch.backends.cudnn.benchmark = self.requested["cudnn_benchmark"]

    def place(self, network: nn.Module) -> nn.Module:
        """Move `network` to the device, its weights (float32, or `ValueError`) in its format."""
        require_float32(network)
        self._set_up_cuda()  # another precision may have been made since
        # the stubs of Module.to do not know that device and memory_format go together
        return network.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return the settings that were `requested`, and those that are `effective`."""
        is_cuda = self.device.type == "cuda"
        effective = {
            "device": str(self.device),
            "dtype": self.mode,
            "loss_scaling": self.scaler is not None,
            "tf32": self.requested["tf32"] and is_cuda,
            "cudnn_benchmark": self.requested["cudnn_benchmark"] and is_cuda,
            "memory_format": str(self.memory_format).removeprefix("torch."),
        }
        return {"requested": dict(self.requested), "effective": effective}

    def __str__(self) -> str:
        requested, effective = (
            ", ".join(f"{key} {value}" for key, value in settings.items())
            for settings in self.describe().values()
        )
        return f"Precision in force: {effective}; asked for: {requested}"

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context for forward pass and loss; does nothing where float32 is in force."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate `loss` (scalar, float32), multiplied by the loss scale if there is one."""
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(
        self,
        optimizer: Optimizer,
        loss: torch.Tensor,
        max_abs_logit: torch.Tensor,
        buffers_norm: torch.Tensor,
        *,
        grad_clip: float,
        counts: Sequence[float] = (),
    ) -> StepStats:
        """Unscale, clip and step unless something is not finite; update the loss scale.

        The host decides from the loss and two norms of all ranks, which come over with what the log
        wants: the only host synchronisation of a step.

        Args:
            optimizer: Its parameters have scaled, accumulated gradients.
            loss: Mean loss of the accumulation group, scalar on the device, as are the next two.
            max_abs_logit: Its largest |logit|, float32, for the log.
            buffers_norm: A norm of the network's buffers, float32: an input of 1e20 leaves loss and
                gradients finite, but not BatchNorm's running variance.
            grad_clip: Largest global 2-norm of the gradients; 0 turns clipping off.
            counts: Numbers of this rank to sum over ranks.
        """
        if self.scaler:
            self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        one = torch.ones((), device=self.device)
        scale = self.scaler.scale(one) if self.scaler else one
        own = [norm, loss.float(), buffers_norm, max_abs_logit, scale]
        own += [torch.full_like(one, number) for number in counts]
        rows = distributed.gather_rows(torch.stack(own)).cpu()  # the host waits here
        grad_norm, mean_loss, _, _, loss_scale, *_ = rows[0].tolist()
        applied = bool(rows[:, :3].isfinite().all())
        if applied:
            if grad_clip > 0:
                clip_grads_with_norm_(parameters, grad_clip, norm)
            optimizer.step()
        if self.scaler:
            self.scaler.update()
            if not applied:  # the scaler has seen nothing if only the loss or a norm overflowed
                factor, growth = self.scaler.get_backoff_factor(), self.scaler.get_growth_factor()
                state = {"scale": loss_scale * factor, "backoff_factor": factor}
                state |= {"growth_factor": growth, "_growth_tracker": 0}
                state |= {"growth_interval": self.scaler.get_growth_interval()}
                self.scaler.load_state_dict(state)  # `state_dict` would wait for the device
        max_logit, sums = rows[:, 3].max().item(), rows[:, 5:].sum(0).tolist()
        return StepStats(applied, mean_loss, grad_norm, loss_scale, max_logit, sums)


def require_float32(network: nn.Module) -> None:
    """Raise `ValueError` if a weight or a floating-point buffer is not float32."""
    dtypes = {t.dtype for t in (*network.parameters(), *network.buffers()) if t.is_floating_point()}
    if dtypes - {torch.float32}:
        raise ValueError(
            f"network: expected float32 weights, got {', '.join(sorted(map(str, dtypes)))}. "
            "Autocast lowers the precision by itself; call neither half() nor double()."
        )


class BufferSnapshot:
    """Copy of a network's buffers, such as BatchNorm's running statistics.

    A forward pass in train mode changes them before it is known whether the step is applied. They
    are copied now and at each `take`, without waiting for the device. A module may replace a buffer
    by another tensor of the same shape and dtype.
    """

    def __init__(self, network: nn.Module) -> None:
        by_dtype = defaultdict(list)  # tensors of one dtype take one kernel
        for module in network.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    by_dtype[buffer.dtype].append((module._buffers, name, buffer.clone()))
        self._groups = list(by_dtype.values())
        floating = [group for dtype, group in by_dtype.items() if dtype.is_floating_point]
        # a buffer that is infinite from the beginning, such as a mask, is meant to be
        self._finite = [[one for one in group if one[2].isfinite().all()] for group in floating]

    @torch.no_grad()
    def take(self) -> None:
        """Copy the buffers as they are now."""
        for group in self._groups:
            torch._foreach_copy_([copy for *_, copy in group], _present(group))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copies back."""
        for group in self._groups:
            torch._foreach_copy_(_present(group), [copy for *_, copy in group])

    @torch.no_grad()
    def norm(self, device: torch.device) -> torch.Tensor:
        """Sum of |value| over the buffers that were finite at first: finite if all still are."""
        total = torch.zeros((), device=device)
        for group in filter(None, self._finite):
            total = total + torch.stack(torch._foreach_norm(_present(group), 1)).sum()
        return total.float()


def _present(group: list[tuple[dict, str, torch.Tensor]]) -> list[torch.Tensor]:
    return [buffers[name] for buffers, name, _ in group]


@contextlib.contextmanager
def buffers_kept(network: nn.Module) -> Iterator[None]:
    """Restore the network's buffers afterwards, whatever forward passes inside do to them."""
    snapshot = BufferSnapshot(network)
    try:
        yield
    finally:
        snapshot.restore()
