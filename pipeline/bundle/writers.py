"""How a network is written in each of the formats, and read back.

What compilers note of where code lies, paths of this machine among it, is taken out again.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from monai.data import load_net_with_metadata, save_net_with_metadata

if TYPE_CHECKING:
    from pipeline.bundle.formats import Formats

Network = Callable[[torch.Tensor], torch.Tensor]
Facts = dict[str, Any]

OPSET = 20
AXES = ("height", "width", "depth")
EXTRA = "export"  # the optional dependencies of pyproject.toml


def write_torchscript(formats: Formats, path: Path) -> tuple[Facts, Network]:
    """TorchScript with metadata and configs."""
    method = "script"
    try:
        scripted = torch.jit.script(formats.network)
    except Exception:  # of what the language does not have, in many kinds
        method = "trace"
        scripted = torch.jit.trace(formats.network, formats.inputs[0])
    extra = {name: json.dumps(config).encode() for name, config in formats.embedded.items()}
    metadata = formats.embedded.get("metadata.json", {})
    extra.pop("metadata.json", None)  # which MONAI writes
    save_net_with_metadata(
        scripted,
        str(path),
        include_config_vals=False,  # a time, and versions that the metadata have
        meta_values=metadata,
        more_extra_files=extra,
    )
    _without_sources(path)
    network, *_ = load_net_with_metadata(str(path))
    return {"method": method, "constraint": formats.constraint}, network


def _without_sources(path: Path) -> None:
    """Take out of a TorchScript archive which line of which file its code comes from."""
    kept = path.with_suffix(".stripped")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(kept, "w") as target:
        for entry in archive.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                copy = zipfile.ZipInfo(entry.filename)  # of the first day of 1980
                target.writestr(copy, archive.read(entry), zipfile.ZIP_STORED)
    kept.replace(path)


def write_onnx(formats: Formats, path: Path) -> tuple[Facts, Network]:
    """ONNX, run by onnxruntime on the CPU."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"expected onnx, onnxscript and onnxruntime, got: {error}. Install the packages of the "
            f"extra '{EXTRA}'"
        ) from None
    names = dict(enumerate(("batch", None, *AXES)))
    del names[1]
    program = torch.onnx.export(
        formats.program,
        dynamo=True,
        dynamic_shapes=(names,),
        input_names=["image"],
        output_names=["pred"],
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    _strip(model)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])

    def run(image: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(["pred"], {"image": image.contiguous().numpy()})[0])

    opset = next(one.version for one in model.opset_import if one.domain == "")
    return {"opset": opset, "constraint": formats.constraint}, run


def _strip(message: Any) -> None:
    """Take out of an ONNX message what says where its parts come from, sources among it."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for child in value if field.is_repeated else [value]:
                _strip(child)


def write_torch_export(formats: Formats, path: Path) -> tuple[Facts, Network]:
    """An ExportedProgram."""
    torch.export.save(formats.program, path)
    return {"constraint": formats.constraint}, torch.export.load(path).module()
