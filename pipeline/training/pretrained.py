"""The weights that a new run begins with: of a file, compared with the network layer by layer."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from pipeline.errors import InputError
from pipeline.files import load
from pipeline.training.checkpoint import non_finite

HEAD = ("head.", "deep_heads.")  # what the names of the last layers begin with


@dataclass(frozen=True)
class WeightsFile:
    """Tensors of a file, as they are there.

    Attributes:
        name: Of the file.
        sha256: Of its bytes.
        tensors: By name.
    """

    name: str
    sha256: str
    tensors: Mapping[str, torch.Tensor]


def read_weights(path: Path) -> WeightsFile:
    """Read a bundle's `model.pt`, a `.safetensors` file or a checkpoint of this project.

    Nothing in the file is executed.

    Raises:
        InputError: If it cannot be read or holds something else.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load(data)
        else:
            content = load(io.BytesIO(data))
    except Exception as error:  # torch, pickle and safetensors raise many kinds
        reason = " ".join(str(error).split())
        raise InputError(
            f"init_weights: expected a state dict or a checkpoint in {path}, got: {reason[:200]}. "
            "Name a model.pt, a .safetensors file or a checkpoints/step_*.pt."
        ) from None
    if isinstance(content, dict) and {"schema_version", "network"} <= content.keys():
        content = content["network"]
    plain = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    )
    if not plain or not content:
        held = ", ".join(map(str, [*content][:5])) if isinstance(content, dict) else ""
        raise InputError(
            f"init_weights: expected tensors by name in {path}, got a {type(content).__name__}"
            f"{f' of {held}' if held else ''}. Name a state dict, or save that part of it alone."
        )
    return WeightsFile(path.name, hashlib.sha256(data).hexdigest(), content)


def fitted(
    file: WeightsFile, network: torch.nn.Module, *, reinit_head: bool
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights of a file that a network takes over.

    Args:
        file: With the network's layers, no more and no fewer.
        network: That is to begin with them.
        reinit_head: Whether its head (`head.*`, `deep_heads.*`) stays as it is, whatever the file
            has there.

    Returns:
        The file's tensors that the network takes over, and the names of its own that stay.

    Raises:
        InputError: A line for each tensor that is missing, left over, of another shape or dtype, or
            not finite.
    """
    own, given = network.state_dict(), dict(file.tensors)
    head = [name for name in own if name.startswith(HEAD)] if reinit_head else []
    if reinit_head and not head:
        raise InputError(
            f"reinit_head: expected a network with layers {' or '.join(f'{h}*' for h in HEAD)}, "
            f"got a {type(network).__name__} without. Use reinit_head=false."
        )
    if reinit_head:
        given = {name: value for name, value in given.items() if not name.startswith(HEAD)}
    wanted = {name: value for name, value in own.items() if name not in head}
    faults = [
        f"init_weights: {name}: expected {expected}, got {got} in {file.name}. {_remedy(name)}"
        for name in sorted({*wanted, *given})
        for expected, got in [(_described(wanted.get(name)), _described(given.get(name)))]
        if expected != got
    ]
    faults += [
        f"init_weights: {name}: expected finite values, got NaN or infinity in {file.name}. "
        "Name other weights."
        for name in given
        if name in wanted and _described(given[name]) == _described(wanted[name])
        if non_finite(given[name], name)
    ]
    if faults:
        raise InputError(*faults)
    return given, head


def _described(value: torch.Tensor | None) -> str:
    """All that two tensors must have in common for one to become the other."""
    if value is None:
        return "no such tensor"
    kind = str(value.dtype).removeprefix("torch.")
    dense = value.layout == torch.strided and not value.is_meta
    return f"{kind} {list(value.shape)}{'' if dense else ' that is not dense'}"


def _remedy(name: str) -> str:
    if name.startswith(HEAD):
        return "Use reinit_head=true to draw the head anew."
    return "Name weights of this network, or set network_def to theirs."
