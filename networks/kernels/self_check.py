"""Whether kernels compute what torch's operations compute here: looked at once, and remembered.

A kernel that is compiled wrongly for a card, or by a new version of Triton, would train a wrong
network without a word. Each group of kernels is therefore compared with torch in float64 before its
first use. `ampseg/kernel_checks.json` in the user's cache directory keeps the result, for this
card, these versions of torch and Triton, this C compiler and this code.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

# Largest error, as a share of the largest value. Kernels compute in float32 and round once: in
# float16 by half of 2^-10, taken twice. In float32 sums of some hundred values differ in order.
TOLERANCES = {torch.float16: 2.0**-10, torch.float32: 2e-5}

Compare = Callable[[torch.device], None]
Tensors = Sequence[torch.Tensor]


@cache
def find_fault(compare: Compare, device: torch.device) -> str | None:
    """Return why what `compare` tries is not used on `device`; `None` if it is.

    `compare` raises an exception if something fails or is wrong. It runs in a thread of its own,
    whose autograd is in no mode and has no hooks, since a first use may be anywhere. A card that is
    full raises `torch.OutOfMemoryError`, and nothing is remembered.
    """
    place = torch.empty(0, device=device)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    file = Path(tempfile.gettempdir(), home, "ampseg", "kernel_checks.json")  # `home` is absolute
    known, key = dict[str, Any](), _key(compare, place.device)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there is none, or not ours
        known = dict(json.loads(file.read_text()).items())
    if isinstance(fault := known.get(key, 0), str | None):
        return fault and f"{fault} (found earlier; {file} remembers it)"

    def work() -> None:
        with torch.cuda.device_of(place):
            compare(place.device)

    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(work).exception()
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    fault = None if error is None else " ".join(str(error).split())[-300:]
    with contextlib.suppress(OSError):  # the next process looks again
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({**known, key: fault}, indent=1))
        os.replace(temporary, file)
    return fault


def compare_operations(
    name: str, fused: Callable, torchs: Callable, inputs: Tensors, module: nn.Module
) -> None:
    """Compare outputs, gradients and buffers of two functions of `(module, *inputs)`.

    `torchs` computes on the CPU in float64, `fused` where and as the inputs `(B, C, H, W, D)` are.
    Raises `ArithmeticError` if a value is off by more than rounding, or the card is too old.
    """
    device = inputs[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ArithmeticError(f"{torch.cuda.get_device_name(device)} is too old for Triton")
    found = _run(fused, module.to(device), inputs)
    true = _run(torchs, module.double().cpu(), [x.double().cpu() for x in inputs])
    require_close(name, found, true, TOLERANCES[inputs[0].dtype])


def require_close(name: str, found: Tensors, true: Tensors, tolerance: float) -> None:
    """Raise `ArithmeticError` if a value is off by more than a share of the tensor's largest."""
    for one, other in zip(found, true, strict=True):
        error = (one.cpu().double() - other.cpu().double()).abs().max().item()
        largest = other.abs().max().item()
        if not error <= tolerance * largest:  # nor if it is NaN
            text = f"{name} is off by {error:.2g} in {one.dtype}, with values up to {largest:.2g}"
            raise ArithmeticError(text)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draw normal random numbers on the CPU; torch's own generator is left alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _run(operation: Callable, module: nn.Module, inputs: Tensors) -> list[torch.Tensor]:
    module, leaves = copy.deepcopy(module), [x.detach().requires_grad_() for x in inputs]
    outputs = operation(module, *leaves)
    gradients = [noise(*y.shape, seed=n).half().to(y) for n, y in enumerate(outputs)]
    found = torch.autograd.grad(outputs, [*leaves, *module.parameters()], gradients)
    return [*(y.detach() for y in outputs), *found, *module.buffers()]


def _key(compare: Compare, device: torch.device) -> str:
    here, own, card = Path(__file__).parent, cast(Any, compare), device.type
    files = {*here.glob("*.py"), *here.parent.glob("*.py"), Path(own.__code__.co_filename)}
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:16]
    if card == "cuda":
        card = torch.cuda.get_device_name(device)
        card += " {}.{}".format(*torch.cuda.get_device_capability(device))
    compiler = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
    triton = getattr(sys.modules.get("triton"), "__version__", None)
    versions = f"torch {torch.__version__}, triton {triton}, {compiler}"
    return f"{own.__name__}, {card}, {versions}, {code}"
