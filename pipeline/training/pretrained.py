"""The weights that a new run begins with: of a file, compared with the network layer by layer."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from pipeline.errors import InputError
from pipeline.files import load
from pipeline.training.checkpoint import non_finite

log = logging.getLogger(__name__)

HEAD = ("head.", "deep_heads.")  # what the names of the last layers begin with


class PretrainedWeights:
    """The weights that a new run begins with; a run that continues has its own.

    Args:
        root: Folder that a relative path starts from.
        path: A bundle's `model.pt`, a `.safetensors` file or a checkpoint of this project; `None`
            for the network's own random weights.
        reinit_head: Whether the head (`head.*`, `deep_heads.*`) stays random even so.

    Attributes:
        tensors: Weights of the layers that begin as in the file, after `fit`.
        record: SHA-256 of the file and what of it is used, after `fit`.
    """

    def __init__(self, root: Path, path: str | None, reinit_head: bool = False) -> None:
        self.path = None if path is None else root / path
        self.reinit_head = reinit_head
        self.tensors: dict[str, torch.Tensor] | None = None
        self.record: dict[str, Any] | None = None
        self._file: tuple[str, Mapping[str, torch.Tensor]] | None = None  # SHA-256 and content

    @property
    def is_read(self) -> bool:
        """Whether there are weights of a file to be compared with the network."""
        return self._file is not None

    def read(self) -> None:
        """Read the file, if one is named. Nothing in it is executed.

        Raises:
            InputError: If it cannot be read or holds no weights, or none is named and `reinit_head`
                is asked for.
        """
        if self.path is not None:
            self._file = _read_weights(self.path)
        elif self.reinit_head:
            raise InputError("reinit_head: expected init_weights beside it, got null. Name a file.")

    def fit(self, network: torch.nn.Module) -> None:
        """Compare the file with a network, which must have its layers, no more and no fewer.

        Raises:
            InputError: A line for each tensor that is missing, left over, of another shape or
                dtype, or not finite.
        """
        assert self.path is not None
        assert self._file is not None
        (sha256, given), own = self._file, network.state_dict()
        head = [name for name in own if name.startswith(HEAD)] if self.reinit_head else []
        if self.reinit_head and not head:
            raise InputError(
                "reinit_head: expected a network with layers head.* or deep_heads.*, "
                f"got a {type(network).__name__} without. Use reinit_head=false."
            )
        if self.reinit_head:
            given = {name: value for name, value in given.items() if not name.startswith(HEAD)}
        faults = []
        for name in sorted({*own, *given} - {*head}):
            expected, found = _describe(own.get(name)), _describe(given.get(name))
            remedy = "Name weights of this network, or set network_def to theirs."
            if name.startswith(HEAD):
                remedy = "Use reinit_head=true to draw the head anew."
            if expected == found and non_finite(given[name]):
                expected, found, remedy = "finite values", "NaN or infinity", "Name other weights."
            if expected != found:
                where = f"init_weights: {name}: expected {expected}, got {found}"
                faults.append(f"{where} in {self.path.name}. {remedy}")
        if faults:
            raise InputError(*faults)
        self.tensors, self._file = dict(given), None
        self.record = {"sha256": sha256, "num_tensors": len(given), "drawn_anew": head}

    def log(self) -> None:
        """Say in the log what the network begins with."""
        if self.tensors is not None and self.record is not None and self.path is not None:
            anew = ", ".join(self.record["drawn_anew"]) or "none"
            sha256, number = self.record["sha256"], len(self.tensors)
            text = "Weights of %d tensors from %s (SHA-256 %s); drawn anew: %s"
            log.info(text, number, self.path.name, sha256, anew)


def _read_weights(path: Path) -> tuple[str, Mapping[str, torch.Tensor]]:
    """Return the SHA-256 of a file and its tensors by name."""
    try:
        data = path.read_bytes()
        is_safe = path.suffix == ".safetensors"
        content: Any = safetensors.torch.load(data) if is_safe else load(io.BytesIO(data))
    except Exception as error:  # torch, pickle and safetensors raise many kinds
        reason = " ".join(str(error).split())
        raise InputError(
            f"init_weights: expected a state dict or a checkpoint in {path}, got: {reason[:200]}. "
            "Name a model.pt, a .safetensors file or a checkpoints/step_*.pt."
        ) from None
    if isinstance(content, dict) and {"schema_version", "network"} <= content.keys():
        content = content["network"]
    entries = content.items() if isinstance(content, dict) else ()
    if not entries or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in entries):
        held = f" of {', '.join(str(name) for name, _ in [*entries][:5])}" if entries else ""
        raise InputError(
            f"init_weights: expected tensors by name in {path}, got a {type(content).__name__}"
            f"{held}. Name a state dict, or save that part of it alone."
        )
    return hashlib.sha256(data).hexdigest(), content


def _describe(value: torch.Tensor | None) -> str:
    """Everything that two tensors must have in common for one to replace the other."""
    if value is None:
        return "no such tensor"
    kind = str(value.dtype).removeprefix("torch.")
    dense = value.layout == torch.strided and not value.is_meta
    return f"{kind} {list(value.shape)}{'' if dense else ' that is not dense'}"
