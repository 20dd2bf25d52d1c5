"""The weights that a new run begins with: of a file, compared with the network layer by layer."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from pipeline.errors import InputError, refuse, require
from pipeline.files import load
from pipeline.training.checkpoint import non_finite

HEAD = ("head.", "deep_heads.")  # what the names of the last layers begin with


def read_pretrained(
    path: Path, network: torch.nn.Module, reinit_head: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read weights and compare them with a network. Nothing in the file is executed.

    Args:
        path: A bundle's `model.pt`, a `.safetensors` file or a checkpoint of this project.
        network: Must have the layers of the file, no more and no fewer.
        reinit_head: Whether the head (`head.*`, `deep_heads.*`) stays random even so.

    Returns:
        The tensors to begin with, and a record of the file's SHA-256 and what of it is used.

    Raises:
        InputError: If the file cannot be read or holds no weights; a line for each tensor that is
            missing, left over, of another shape or dtype, or not finite.
    """
    (sha256, given), own = _read_weights(path), network.state_dict()
    head = [name for name in own if name.startswith(HEAD)] if reinit_head else []
    expected, got = "a network with layers head.* or deep_heads.*", type(network).__name__
    where, remedy = "reinit_head", "Use reinit_head=false."
    require(head or not reinit_head, where, expected, f"a {got} without", remedy)
    kept = {k: v for k, v in given.items() if not (reinit_head and k.startswith(HEAD))}
    faults = []
    for name in sorted({*own, *kept} - {*head}):
        expected, found = _describe(own.get(name)), _describe(kept.get(name))
        remedy = "Name weights of this network, or set network_def to theirs."
        if name.startswith(HEAD):
            remedy = "Use reinit_head=true to draw the head anew."
        if expected == found and non_finite(kept[name]):
            expected, found, remedy = "finite values", "NaN or infinity", "Name other weights."
        if expected != found:
            where = f"init_weights: {name}: expected {expected}, got {found}"
            faults.append(f"{where} in {path.name}. {remedy}")
    refuse(faults)
    return kept, {"sha256": sha256, "num_tensors": len(kept), "drawn_anew": head}


def _read_weights(path: Path) -> tuple[str, Mapping[str, torch.Tensor]]:
    try:
        data = path.read_bytes()
        is_safe = path.suffix == ".safetensors"
        content: Any = safetensors.torch.load(data) if is_safe else load(io.BytesIO(data))
        if isinstance(content, dict) and {"schema_version", "network"} <= content.keys():
            content = content["network"]
        if not content or not all(torch.is_tensor(value) for value in content.values()):
            raise ValueError("other content than tensors by name")
    except Exception as error:  # torch, pickle and safetensors raise many kinds
        reason = " ".join(str(error).split())
        raise InputError(
            f"init_weights: expected a state dict or a checkpoint in {path}, got: {reason[:200]}. "
            "Name a model.pt, a .safetensors file or a checkpoints/step_*.pt."
        ) from None
    return hashlib.sha256(data).hexdigest(), content


def _describe(value: torch.Tensor | None) -> str:
    if value is None:
        return "no such tensor"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
