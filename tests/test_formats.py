"""TorchScript, ONNX and torch.export: each read back, compared, and free of where it was made."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, further
from monai.bundle import load_bundle_config
from monai.data import load_net_with_metadata

from networks.dense_unet import DenseUNet
from pipeline.bundle.formats import FORMATS, LOGIT_TOLERANCE, OPSET, NetworkExporter

EMBEDDED = {"metadata.json": {"name": "a"}, "inference.json": {"overlap": 0.5}}
STRIDES = [[2, 2, 1], [2, 2, 2]]  # multiples of 4, 4, 2


def tiny_network(norm: str = "instance", **changes: Any) -> DenseUNet:
    arguments = {
        "out_channels": 3, "base_channels": 2, "strides": STRIDES, "norm": norm,
        "num_dense_layers": 1, "growth_rate": 4, "seed": 0,
    }  # fmt: skip
    return DenseUNet(**{**arguments, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Any]:
    """Every format of a tiny network: the folder, the facts, and the networks read back."""
    folder = tmp_path_factory.mktemp("formats")
    maker = NetworkExporter(tiny_network(), 1, [16, 16, 8], EMBEDDED)
    found = {name: maker.export(name, folder) for name in FORMATS}
    return {
        "folder": folder,
        "facts": {name: facts for name, (facts, _) in found.items()},
        "networks": {name: network for name, (_, network) in found.items()},
    }


@pytest.mark.parametrize("name", FORMATS)
def test_format_gives_the_networks_logits_for_other_sizes_and_batches(made, name):
    assert made["facts"][name]["made"], made["facts"][name]
    assert made["facts"][name]["max_abs_difference"] <= LOGIT_TOLERANCE
    network, reference = made["networks"][name], tiny_network().eval()
    for shape in [(1, 1, 16, 16, 8), (4, 1, 12, 24, 10), (2, 1, 8, 8, 4)]:  # one of them unseen
        image = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(network(image), reference(image), atol=1e-3, rtol=0)


def test_formats_are_compared_on_three_sizes_and_batches(made):
    assert made["facts"]["torch_export"]["multiples"] == (4, 4, 2)
    batches, _, *sizes = zip(*made["facts"]["onnx"]["shapes"], strict=True)
    assert len({*batches}) == len({*zip(*sizes, strict=True)}) == 3
    assert (16, 16, 8) in zip(*sizes, strict=True)


@pytest.mark.parametrize("name", FORMATS)
def test_file_names_no_place_of_this_machine(made, name):
    path = made["folder"] / FORMATS[name]
    contents = [path.read_bytes()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            contents += [archive.read(entry) for entry in archive.namelist()]
    for place in (REPOSITORY, Path(torch.__file__).parent, made["folder"], Path.home() / "."):
        if len(place.parts) > 2:
            assert not any(str(place).encode() in content for content in contents), place


def test_torchscript_embeds_metadata_and_configs(made):
    path = str(made["folder"] / "model.ts")
    assert load_bundle_config(path, "inference.json")["overlap"] == 0.5
    _, metadata, extra = load_net_with_metadata(path, more_extra_files=["inference.json"])
    assert metadata == EMBEDDED["metadata.json"]  # no time, no versions of its own
    assert json.loads(extra["inference.json"]) == EMBEDDED["inference.json"]


def test_onnx_states_opset_and_dynamic_axes(made):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(made["folder"] / "model.onnx")
    assert made["facts"]["onnx"]["opset"] == OPSET == model.opset_import[0].version
    axes = model.graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_param or axis.dim_value for axis in axes] == [
        "batch", 1, "height", "width", "depth",
    ]  # fmt: skip
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["image", "pred"]


@pytest.mark.parametrize("name", ["torchscript", further("onnx"), "torch_export"])
def test_format_of_a_flat_window_with_batch_norm(name, tmp_path):
    # of one multiple, which torch.export would take for the only size
    network = tiny_network("batch", strides=[[2, 2, 2], [2, 2, 2]])
    facts, _ = NetworkExporter(network, 1, [16, 16, 4], {}).export(name, tmp_path)
    assert facts["made"], facts


class Unscriptable(torch.nn.Module):
    """Keyword arguments are nothing that TorchScript has."""

    def forward(self, image: torch.Tensor, **options: Any) -> torch.Tensor:
        return torch.cat([image, 2 * image], dim=1)


class Frozen(torch.nn.Module):
    """A trace takes the size of what it saw for a constant."""

    def forward(self, image: torch.Tensor, **options: Any) -> torch.Tensor:
        return image + torch.arange(int(image.shape[0])).max()


def test_torchscript_is_traced_where_it_cannot_be_scripted(tmp_path):
    exporter = NetworkExporter(Unscriptable(), 1, [4, 4, 4], {})
    facts, network = exporter.export("torchscript", tmp_path)
    assert facts["method"] == "trace"
    assert network(torch.ones(1, 1, 2, 2, 2)).shape == (1, 2, 2, 2, 2)
    facts, network = NetworkExporter(Frozen(), 1, [4, 4, 4], {}).export("torchscript", tmp_path)
    assert (network, facts["made"]) == (None, False)  # the trace is good for one size only
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda logits: logits + 0.002, "difference: 0.002"),
        (lambda logits: logits * float("nan"), "difference: nan"),
        (lambda logits: logits[:, :1], "shape"),
    ],
)
def test_other_logits_are_refused(change, expected, tmp_path, monkeypatch):
    network = tiny_network()

    def write(_, path):
        path.write_text("something")
        return {}, lambda image: change(network.eval()(image))

    monkeypatch.setattr(NetworkExporter, "_write_torchscript", write)
    facts, read = NetworkExporter(network, 1, [16, 16, 8], {}).export("torchscript", tmp_path)
    assert read is None
    assert expected in facts["reason"]
    assert not list(tmp_path.iterdir())


def test_onnx_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    facts, _ = NetworkExporter(tiny_network(), 1, [16, 16, 8], {}).export("onnx", tmp_path)
    assert "expected onnx, onnxruntime and onnxscript, got: " in facts["reason"]
    assert "Install the extra 'export'" in facts["reason"]
