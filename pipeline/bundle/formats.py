"""A network in formats that run without this repository, each read back and compared.

    torchscript   `model.ts`, by `torch.jit.script` or, where that fails, `torch.jit.trace`; holds
                  metadata and configs, as `monai.bundle.load_bundle_config` reads them
    onnx          `model.onnx`, of one opset
    torch_export  `model.pt2`, by `torch.export`

Batch and spatial axes are dynamic in all of them. `torch_export`, and `onnx` which is made from it,
take spatial axes that are multiples of the product of the network's strides.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from pipeline.bundle.writers import (
    AXES,
    Facts,
    Network,
    write_onnx,
    write_torch_export,
    write_torchscript,
)

TOLERANCE = 1e-3  # largest difference of a logit
FROM_PROGRAM = ("onnx", "torch_export")
SOURCES = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node")  # where code was
FOLDERS = re.compile(r"(?<![\w.:/])/(?:[\w.+-]+/)+")  # before the name of a file

FORMATS: dict[str, tuple[str, Callable[[Formats, Path], tuple[Facts, Network]]]] = {
    "torchscript": ("model.ts", write_torchscript),
    "onnx": ("model.onnx", write_onnx),
    "torch_export": ("model.pt2", write_torch_export),
}


class Formats:
    """Makes files of a network.

    Args:
        network: With its weights, on the CPU.
        in_channels: Of an image.
        roi_size: A size in voxels that it takes.
        embedded: Configs by file name, `metadata.json` among them, for formats that hold them.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        in_channels: int,
        roi_size: Sequence[int],
        embedded: Mapping[str, Any],
    ) -> None:
        self.network, self.embedded = network.eval(), embedded
        self.multiples = tuple(getattr(network, "reduction", roi_size))
        self.program_seconds = 0.0  # which all formats that are made from it need
        generator = torch.Generator().manual_seed(0)
        self.inputs = [
            torch.randn(shape, generator=generator)
            for shape in _shapes(in_channels, roi_size, self.multiples)
        ]

    def make(self, name: str, folder: Path) -> tuple[Facts, Network | None]:
        """Write one format, read it and compare its logits with the network's.

        Args:
            name: Key of `FORMATS`.
            folder: Gets the file, if it is good.

        Returns:
            What there is to say of it, and the network that was read; `None` where it could not be
            made, for which the facts have a `reason`.
        """
        file, write = FORMATS[name]
        path = folder / file
        before = self.program_seconds if name in FROM_PROGRAM else 0.0
        start = time.perf_counter()
        try:
            with _quiet(), torch.no_grad():
                facts, network = write(self, path)
                seconds = time.perf_counter() - start + before
                difference = self.difference(network)
            if not difference <= TOLERANCE:  # NaN included
                raise ValueError(
                    f"expected logits within {TOLERANCE:g} of the network's, got a difference of "
                    f"{difference:.3g}"
                )
        except Exception as error:  # compilers and runtimes raise many kinds
            path.unlink(missing_ok=True)
            return {"made": False, "reason": reason(error)}, None
        facts = {"made": True, "file": file, **facts, "max_abs_difference": difference}
        facts["shapes"] = [list(image.shape) for image in self.inputs]
        return facts | {"seconds": round(seconds, 2), "bytes": path.stat().st_size}, network

    @torch.no_grad()
    def difference(self, network: Network) -> float:
        """Largest difference of a logit between a network and this one.

        Raises:
            ValueError: If the shapes differ.
        """
        worst = 0.0
        for image, expected in zip(self.inputs, self.logits, strict=True):
            got = network(image)
            if got.shape != expected.shape:
                raise ValueError(f"expected logits {[*expected.shape]}, got {[*got.shape]}")
            found = float((got - expected).abs().max())
            worst = max(worst, math.inf if math.isnan(found) else found)
        return worst

    @cached_property
    def logits(self) -> list[torch.Tensor]:
        """What the network makes of the inputs."""
        with torch.no_grad():
            return [self.network(image) for image in self.inputs]

    @cached_property
    def program(self) -> ExportedProgram:
        """The network as `torch.export` reads it, without the places of its source."""
        start = time.perf_counter()
        axes: dict[int, Any] = {0: Dim("batch")}
        for axis, (name, multiple) in enumerate(zip(AXES, self.multiples, strict=True), start=2):
            axes[axis] = Dim(name) if multiple == 1 else multiple * Dim(name)
        # two of each, since one, of images as of multiples, would be taken for the only number
        size = [2 * multiple for multiple in self.multiples]
        example = torch.zeros(2, self.inputs[0].shape[1], *size)
        program = torch.export.export(self.network, (example,), dynamic_shapes=(axes,))
        program.example_inputs = None  # which would be saved with it
        for module in program.graph_module.modules():
            for node in getattr(getattr(module, "graph", None), "nodes", ()):
                for key in SOURCES:
                    node.meta.pop(key, None)
        self.program_seconds = time.perf_counter() - start
        return program

    @property
    def constraint(self) -> str:
        """Which sizes it was made for and compared with."""
        shown = ", ".join(map(str, self.multiples))
        return f"any batch; spatial axes in multiples of {shown}"


def reason(error: BaseException) -> str:
    """What an exception says, in one line that is not endless, without the folders of files."""
    text = FOLDERS.sub("", " ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} …"


def _shapes(
    in_channels: int, roi_size: Sequence[int], multiples: Sequence[int]
) -> list[tuple[int, ...]]:
    """Three shapes of different sizes and batches, in multiples."""
    first = [math.ceil(n / m) * m for n, m in zip(roi_size, multiples, strict=True)]
    second = [first[0] + multiples[0], *first[1:]]
    third = [min(n, 2 * m) for n, m in zip(first, multiples, strict=True)]
    if third == first:
        third = [first[0], first[1] + multiples[1], first[2]]
    sizes = zip(itertools.count(1), (first, second, third))
    return [(batch, in_channels, *size) for batch, size in sizes]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, what compilers warn of is not shown: what counts is compared."""
    logs = [logging.getLogger(f"torch.{part}") for part in ("onnx", "export", "_dynamo", "jit")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
