"""Writes a network in formats that run without its code, and compares each with the network.

    torchscript   `model.ts`, by `torch.jit.script` or, if that fails, `torch.jit.trace`; embeds
                  metadata and configs, as `monai.bundle.load_bundle_config` reads them
    onnx          `model.onnx`, of one opset
    torch_export  `model.pt2`, by `torch.export`

Batch and spatial axes are dynamic in all of them. `torch_export`, and `onnx` which is made from it,
take spatial axes that are multiples of the product of the network's strides. What compilers record
of the place of the source code is removed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from monai.data import load_net_with_metadata, save_net_with_metadata
from torch.export import Dim, ExportedProgram

NetworkFunction = Callable[[torch.Tensor], torch.Tensor]
ExportFacts = dict[str, Any]

FORMATS = {"torchscript": "model.ts", "onnx": "model.onnx", "torch_export": "model.pt2"}
OPSET = 20
LOGIT_TOLERANCE = 1e-3
AXES = ("height", "width", "depth")
SOURCES = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node")
FOLDERS_BEFORE_FILE = re.compile(r"(?<![\w.:/])/(?:[\w.+-]+/)+")  # before the name of a file


class NetworkExporter:
    """Writes a network in other formats.

    Args:
        network: With its weights, on the CPU.
        in_channels: Number of image channels.
        roi_size: A size in voxels that the network takes.
        embedded: Configs by file name, `metadata.json` among them, for formats that embed them.
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
        generator = torch.Generator().manual_seed(0)
        self.inputs = [
            torch.randn((batch, in_channels, *size), generator=generator)
            for batch, size in enumerate(_sizes(roi_size, self.multiples), 1)
        ]

    def export(self, name: str, folder: Path) -> tuple[ExportFacts, NetworkFunction | None]:
        """Write one format, read it back and compare its logits with the network's.

        Args:
            name: Key of `FORMATS`.
            folder: Gets the file, if its logits are right.

        Returns:
            Facts for `export.json`, and the network that was read back; `None` if the format could
            not be made, and the facts have the `reason`.
        """
        path = folder / FORMATS[name]
        start = time.perf_counter()
        try:
            with _no_warnings(), torch.no_grad():
                facts, network = getattr(self, f"_write_{name}")(path)
                seconds = time.perf_counter() - start
                difference = self._measure_difference(network)
            if not difference <= LOGIT_TOLERANCE:  # NaN included
                raise ValueError(
                    f"expected logits within {LOGIT_TOLERANCE:g} of the network's, got a "
                    f"difference of {difference:.3g}"
                )
        except Exception as error:  # compilers and runtimes raise many kinds
            path.unlink(missing_ok=True)
            return {"made": False, "reason": describe_error(error)}, None
        facts = {"made": True, "file": path.name, **facts, "max_abs_difference": difference}
        multiples = ", ".join(map(str, self.multiples))
        facts["constraint"] = f"any batch; spatial axes in multiples of {multiples}"
        facts["shapes"] = [list(image.shape) for image in self.inputs]
        return facts | {"seconds": round(seconds, 2), "bytes": path.stat().st_size}, network

    def _measure_difference(self, network: NetworkFunction) -> float:
        """Return the largest difference of a logit between a network and this one."""
        worst = 0.0
        for image, expected in zip(self.inputs, self.logits, strict=True):
            got = network(image)
            if got.shape != expected.shape:
                raise ValueError(f"expected logits {[*expected.shape]}, got {[*got.shape]}")
            found = float((got - expected).abs().max())
            worst = max(worst, math.inf if math.isnan(found) else found)
        return worst

    def _write_torchscript(self, path: Path) -> tuple[ExportFacts, NetworkFunction]:
        method = "script"
        try:
            scripted = torch.jit.script(self.network)
        except Exception:  # many kinds, for what the language lacks
            method = "trace"
            scripted = torch.jit.trace(self.network, self.inputs[0])
        extra = {name: json.dumps(config).encode() for name, config in self.embedded.items()}
        extra.pop("metadata.json", None)  # MONAI writes it
        save_net_with_metadata(
            scripted,
            str(path),
            include_config_vals=False,  # a time, and versions that the metadata have
            meta_values=self.embedded.get("metadata.json", {}),
            more_extra_files=extra,
        )
        _remove_debug_files(path)
        network, *_ = load_net_with_metadata(str(path))
        return {"method": method}, network

    def _write_onnx(self, path: Path) -> tuple[ExportFacts, NetworkFunction]:
        try:
            import onnx
            import onnxruntime
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"expected onnx, onnxscript and onnxruntime, got: {error}. Install the packages of "
                "the extra 'export'"
            ) from None
        program = torch.onnx.export(
            self.program,
            dynamo=True,
            dynamic_shapes=({0: "batch", **dict(enumerate(AXES, 2))},),
            input_names=["image"],
            output_names=["pred"],
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        model = program.model_proto
        _remove_sources(model)
        onnx.checker.check_model(model)
        onnx.save(model, str(path))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])

        def run(image: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run(["pred"], {"image": image.contiguous().numpy()})[0])

        return {"opset": OPSET}, run

    def _write_torch_export(self, path: Path) -> tuple[ExportFacts, NetworkFunction]:
        torch.export.save(self.program, path)
        return {}, torch.export.load(path).module()

    @cached_property
    def logits(self) -> list[torch.Tensor]:
        """Logits of the network for the inputs."""
        return [self.network(image) for image in self.inputs]

    @cached_property
    def program(self) -> ExportedProgram:
        """The network as `torch.export` reads it, without the places of its source."""
        axes: dict[int, Any] = {0: Dim("batch")}
        for axis, (name, multiple) in enumerate(zip(AXES, self.multiples, strict=True), start=2):
            axes[axis] = Dim(name) if multiple == 1 else multiple * Dim(name)
        # a size of one, of a batch or in multiples, would be taken for a constant
        size = [2 * multiple for multiple in self.multiples]
        example = torch.zeros(2, self.inputs[0].shape[1], *size)
        program = torch.export.export(self.network, (example,), dynamic_shapes=(axes,))
        program.example_inputs = None  # they would be saved with it
        for module in program.graph_module.modules():
            for node in getattr(getattr(module, "graph", None), "nodes", ()):
                for key in SOURCES:
                    node.meta.pop(key, None)
        return program


def describe_error(error: BaseException) -> str:
    """Return the message of an exception in one line of limited length, without folders."""
    text = FOLDERS_BEFORE_FILE.sub("", " ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} …"


def _sizes(roi_size: Sequence[int], multiples: Sequence[int]) -> list[list[int]]:
    """Three different sizes in voxels, in multiples."""
    first = [math.ceil(n / m) * m for n, m in zip(roi_size, multiples, strict=True)]
    second = [first[0] + multiples[0], *first[1:]]
    third = [min(n, 2 * m) for n, m in zip(first, multiples, strict=True)]
    if third == first:
        third = [first[0], first[1] + multiples[1], first[2]]
    return [first, second, third]


def _remove_debug_files(path: Path) -> None:
    """Remove from a TorchScript archive which line of which file its code comes from."""
    kept = path.with_suffix(".stripped")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(kept, "w") as target:
        for entry in archive.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                target.writestr(zipfile.ZipInfo(entry.filename), archive.read(entry))
    kept.replace(path)


def _remove_sources(message: Any) -> None:
    """Remove from an ONNX message which source its parts come from."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for child in value if field.is_repeated else [value]:
                _remove_sources(child)


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Hide what compilers warn of: the results are compared."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
