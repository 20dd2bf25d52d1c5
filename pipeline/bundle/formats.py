"""Writes a network in formats that run without its code, and compares each with the network.

Batch and spatial axes are dynamic; those of `model.pt2`, and of `model.onnx` which is made from it,
are multiples of the product of the network's strides. `model.ts` embeds metadata and configs. What
compilers record of the place of the source code is removed.
"""

from __future__ import annotations

import json
import logging
import math
import re
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from monai.data import load_net_with_metadata, save_net_with_metadata
from torch.export import Dim, ExportedProgram

from pipeline.config.keys import Config
from pipeline.training.protocols import HasReduction

NetworkFunction = Callable[[torch.Tensor], torch.Tensor]
ExportFacts = dict[str, Any]

FORMATS = {"torchscript": "model.ts", "onnx": "model.onnx", "torch_export": "model.pt2"}
OPSET = 20
LOGIT_TOLERANCE = 1e-3
AXES = ("height", "width", "depth")
SOURCES = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node")
FOLDERS_BEFORE_FILE = re.compile(r"(?<![\w.:/])/(?:[\w.+-]+/)+")  # they stand before a file name


class NetworkExporter:
    """Writes a network in other formats.

    Args:
        network: With its weights, on the CPU.
        roi_size: A size in voxels that the network takes.
        embedded: Configs by file name for TorchScript, `metadata.json` among them.
    """

    def __init__(
        self, network: torch.nn.Module, in_channels: int, roi_size: Sequence[int], embedded: Config
    ) -> None:
        self.network, self.embedded = network.eval(), embedded
        self.multiples = tuple(network.reduction if isinstance(network, HasReduction) else roi_size)
        first = [math.ceil(n / m) * m for n, m in zip(roi_size, self.multiples, strict=True)]
        second = [first[0] + self.multiples[0], *first[1:]]
        third = [min(n, 2 * m) for n, m in zip(first, self.multiples, strict=True)]
        generator = torch.Generator().manual_seed(0)
        self.inputs = [
            torch.randn((batch, in_channels, *size), generator=generator)
            for batch, size in enumerate((first, second, third), 1)
        ]

    def export(self, name: str, folder: Path) -> tuple[ExportFacts, NetworkFunction | None]:
        """Write one format, read it back and compare its logits with the network's.

        Args:
            name: Key of `FORMATS`.
            folder: Gets the file, if its logits are right.

        Returns:
            Facts for `export.json` and the network that was read back, or a `reason` and `None`.
        """
        path = folder / FORMATS[name]
        logging.disable(logging.WARNING)  # their results are compared
        try:
            with warnings.catch_warnings(action="ignore"), torch.no_grad():
                facts, network = getattr(self, f"_write_{name}")(path)
                difference = max(self._compare(network, image) for image in self.inputs)
        except Exception as error:  # compilers and runtimes raise many kinds
            path.unlink(missing_ok=True)
            text = FOLDERS_BEFORE_FILE.sub("", str(error))
            reason = textwrap.shorten(text, 300, placeholder=" …") or type(error).__name__
            return {"made": False, "reason": reason}, None
        finally:
            logging.disable(logging.NOTSET)
        return {
            "made": True,
            "file": path.name,
            **facts,
            "max_abs_difference": difference,
            "multiples": self.multiples,  # spatial axes have these as factors
            "shapes": [list(image.shape) for image in self.inputs],
            "bytes": path.stat().st_size,
        }, network

    def _compare(self, network: NetworkFunction, image: torch.Tensor) -> float:
        """Return the largest difference of a logit, or raise if the logits are others."""
        got, expected = network(image), self.network(image)
        torch.testing.assert_close(got, expected, rtol=0, atol=LOGIT_TOLERANCE)
        return float((got - expected).abs().max())

    def _write_torchscript(self, path: Path) -> tuple[ExportFacts, NetworkFunction]:
        try:
            method, scripted = "script", torch.jit.script(self.network)
        except Exception:  # TorchScript raises many kinds
            method, scripted = "trace", torch.jit.trace(self.network, self.inputs[0])
        extra = {name: json.dumps(config).encode() for name, config in self.embedded.items()}
        extra.pop("metadata.json", None)  # MONAI writes it
        save_net_with_metadata(
            scripted,
            str(path),
            include_config_vals=False,  # these are a time and versions that the metadata have
            meta_values=self.embedded.get("metadata.json", {}),
            more_extra_files=extra,
        )
        _remove_debug_files(path)
        return {"method": method}, load_net_with_metadata(str(path))[0]

    def _write_onnx(self, path: Path) -> tuple[ExportFacts, NetworkFunction]:
        try:
            import onnx
            import onnxruntime
            import onnxscript  # noqa: F401
        except ImportError as error:
            expected = "expected onnx, onnxruntime and onnxscript"
            raise ValueError(f"{expected}, got: {error}. Install the extra 'export'") from None
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
        for node in model.graph.node:
            node.ClearField("metadata_props")  # they name the source code
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
    def program(self) -> ExportedProgram:
        """Return the network as `torch.export` reads it, without the places of its source."""
        axes: dict[int, Any] = {0: Dim("batch")}
        for axis, (name, multiple) in enumerate(zip(AXES, self.multiples, strict=True), start=2):
            axes[axis] = Dim(name) if multiple == 1 else multiple * Dim(name)
        # torch.export takes a size of one, of a batch or in multiples, for a constant
        size = [2 * multiple for multiple in self.multiples]
        example = torch.zeros(2, self.inputs[0].shape[1], *size)
        program = torch.export.export(self.network, (example,), dynamic_shapes=(axes,))
        program.example_inputs = None  # they would be saved with it
        for module in program.graph_module.modules():
            for node in getattr(getattr(module, "graph", None), "nodes", ()):
                for key in SOURCES:
                    node.meta.pop(key, None)
        return program


def _remove_debug_files(path: Path) -> None:
    """Remove files and lines of the source code from a TorchScript archive."""
    kept = path.with_suffix(".stripped")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(kept, "w") as target:
        for entry in archive.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                target.writestr(zipfile.ZipInfo(entry.filename), archive.read(entry))
    kept.replace(path)
