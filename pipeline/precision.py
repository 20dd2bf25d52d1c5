"""The one owner of numerical precision: device, autocast, loss scaling, clipping, finite check.

Nothing else opens an autocast region, makes a scaler or decides whether a step is applied.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
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
    """The device that `auto` or a name stands for; for a rank, that of its number on the host.

    Raises `InputError` if the name is unknown or the device is not there.
    """
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

    Attributes:
        device: The device in force.
        dtype, mode: The dtype of autocast in force, and its name; float32 means no autocast.
        scaler: The `torch.amp.GradScaler`, or `None` where none is used.

    Raises:
        InputError: If a value is not one of those named above, or the card has no bfloat16.
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
        modes = MODES[self.device.type]
        require_choice(amp_dtype, modes, "amp_dtype")
        require_choice(memory_format, MEMORY_FORMATS, "memory_format")
        self.amp, self.memory_format = self.requested["amp"], MEMORY_FORMATS[memory_format]
        self.dtype, is_scaled = modes[amp_dtype] if self.amp else FLOAT32  # of autocast
        self.mode = str(self.dtype).removeprefix("torch.")
        self.scaler = None
        if is_scaled:
            self.scaler = torch.amp.GradScaler(
                self.device.type, init_scale=init_scale, growth_interval=growth_interval
            )
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

    def place(self, network: torch.nn.Module) -> torch.nn.Module:
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
            optimizer: Holds the parameters with their scaled, accumulated gradients.
            loss: Mean loss of the accumulation group, scalar on the device.
            max_abs_logit: Its largest |logit|, float32 scalar on the device, for the log.
            buffers_norm: A norm of the network's buffers, float32 scalar on the device: an input of
                1e20 leaves loss and gradients finite, but not BatchNorm's running variance.
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
                _back_off(self.scaler, loss_scale)
        max_logit, sums = rows[:, 3].max().item(), rows[:, 5:].sum(0).tolist()
        return StepStats(applied, mean_loss, grad_norm, loss_scale, max_logit, sums)


def _back_off(scaler: torch.amp.GradScaler, loss_scale: float) -> None:
    factor, growth = scaler.get_backoff_factor(), scaler.get_growth_factor()
    state = {"scale": loss_scale * factor, "backoff_factor": factor, "growth_factor": growth}
    state |= {"growth_interval": scaler.get_growth_interval(), "_growth_tracker": 0}
    scaler.load_state_dict(state)  # scaler.state_dict() would wait for the device


def require_float32(network: torch.nn.Module) -> None:
    """Raise `ValueError` if a weight or a floating-point buffer is not float32."""
    dtypes = {t.dtype for t in (*network.parameters(), *network.buffers()) if t.is_floating_point()}
    if dtypes - {torch.float32}:
        raise ValueError(
            f"network: expected float32 weights, got {', '.join(sorted(map(str, dtypes)))}. "
            "Autocast lowers the precision by itself; call neither half() nor double()."
        )
