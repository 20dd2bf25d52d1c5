"""Kernels and graphs that are compared with torch before their first use."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from engines import batch
from interpreted import GPU
from torch import nn

from networks import fused_layers
from networks.kernels import norm_activation, self_check
from pipeline.errors import InputError
from pipeline.training import graph, loss

fused_loss = pytest.importorskip("networks.kernels.fused_loss")

KERNELS = [
    (norm_activation, "norm_relu_kernel", 1, "BatchNorm3d with ReLU is off by 0.01"),
    (norm_activation, "norm_relu_backward", 2, "BatchNorm3d with ReLU is off by 0.01"),
    (norm_activation, "max_pool_backward", 3, "pooling is off by 0.01"),
    (norm_activation, "upsample_kernel", 1, "upsampling is off by 0.01"),
    (norm_activation, "upsample_backward", 1, "upsampling is off by 0.01"),
    (fused_loss, "sums_kernel", "partials", "the loss is off by"),
    (fused_loss, "gradient_kernel", "gradient", "the loss is off by 0.01"),
    (fused_loss, "value_kernel", 2, "the loss is off by 0.01"),
]


class Broken:
    """A kernel whose output, an argument, is off by 1e-2."""

    def __init__(self, kernel, output):
        self.kernel, self.output = kernel, output

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.kernel[grid](*args, **options)
            (args if isinstance(self.output, int) else options)[self.output].add_(1e-2)

        return launch


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def restart():
    """What a new process does not know."""
    for cached in (
        self_check.find_fault, fused_layers.works_on, fused_loss.failure, loss._obstacle
    ):  # fmt: skip
        cached.cache_clear()


def used_with(broken, cache_home, device):
    """What is used of layers and loss, the lines that are logged, and what was compared."""
    handler, device, compared, used = Lines(), torch.device(device), [], {}
    logging.getLogger().addHandler(handler)
    restart()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache_home))
        module, name, output, _ = KERNELS[broken] if broken is not None else (None,) * 4
        if module:
            patch.setattr(module, name, Broken(getattr(module, name), output))
        compare = self_check.compare_operations
        patch.setattr(
            self_check, "compare_operations", lambda *a: compared.append(a[0]) or compare(*a)
        )
        if module is not fused_loss:
            used["layers"] = fused_layers.works_on(device)
            x = torch.randn(1, 8, 2, 2, 2, device=device).to(memory_format=torch.channels_last_3d)
            norm = nn.InstanceNorm3d(8, affine=True, device=device)
            torch.testing.assert_close(fused_layers.norm_relu(norm, x.clone()), F.relu(norm(x)))
        if module is not norm_activation:
            used["loss"] = loss.SegmentationLoss().in_force(device)
    restart()
    logging.getLogger().removeHandler(handler)
    return used, handler.lines, len(compared)


@pytest.mark.parametrize("broken", range(len(KERNELS)), ids=[kernel[1] for kernel in KERNELS])
def test_broken_kernel_is_noticed_and_torchs_operations_are_used(place, tmp_path, broken):
    is_loss, fault = KERNELS[broken][0] is fused_loss, KERNELS[broken][-1]
    for turn in range(2):
        used, lines, count = place.run(used_with, broken, tmp_path, place.device)
        assert used == ({"loss": "torch"} if is_loss else {"layers": False})
        (line,) = lines
        what = "The loss is" if is_loss else "Layers are"
        assert re.match(f"{what} not fused on {place.device}(:0)?: {fault}", line)
        assert (count > 0) == (turn == 0)  # a remembered failure is not tried again
        assert ("remembers it" in line) == (turn == 1)


def test_kernels_that_agree_are_used_and_remembered(place, tmp_path):
    used, lines, count = place.run(used_with, None, tmp_path, place.device)
    assert (used, lines) == ({"layers": True, "loss": "triton"}, [])
    assert count == 12  # two norms, pooling, upsampling and two layouts of the loss, in two dtypes
    (file,) = (tmp_path / "ampseg").iterdir()  # and no temporary file
    assert [*json.loads(file.read_text()).values()] == [None, None]
    assert place.run(used_with, None, tmp_path, place.device)[2] == 0


def fault_of_nothing(cache_home: Path, changed: str = "") -> tuple[str | None, list[str]]:
    """Compare nothing in two starts, before the second of which a version or compiler changes."""
    calls: list[str] = []

    def compare(device: torch.device) -> None:
        calls.append(device.type)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache_home))
        for _ in range(2):
            self_check.find_fault.cache_clear()
            fault = self_check.find_fault(compare, torch.device("cpu"))
            if changed == "torch":
                patch.setattr(torch, "__version__", "0")
            elif changed == "compiler":
                patch.setenv("CC", "another")
            elif changed == "code":
                patch.setattr(Path, "read_bytes", lambda path: path.name.encode())
    return fault, calls


@pytest.mark.parametrize("changed", ["torch", "compiler", "code"])
def test_result_is_of_these_versions(tmp_path, changed):
    assert fault_of_nothing(tmp_path, changed) == (None, ["cpu", "cpu"])


@pytest.mark.parametrize("content", ["{", "[1]", "7", None])
def test_file_that_is_not_ours_or_cannot_be_written_means_another_look(tmp_path, content):
    if content is None:
        (tmp_path / "ampseg").write_text("no folder")
    else:
        (tmp_path / "ampseg").mkdir()
        (tmp_path / "ampseg/kernel_checks.json").write_text(content)
    looks = 2 if content is None else 1
    assert fault_of_nothing(tmp_path) == (None, ["cpu"] * looks)


def test_full_card_is_no_fault(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def compare(device: torch.device) -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        self_check.find_fault(compare, torch.device("cpu"))
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("is_stale", [False, True])
def test_replay_of_an_earlier_batch_is_noticed(tmp_path, monkeypatch, is_stale):
    """Here a replay calls the step, as a CPU can, with its inputs or with those of the capture."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def capture(step, images, labels):
        return lambda *given: step.work(*((images, labels) if is_stale else given))

    monkeypatch.setattr(graph.StepGraph, "_capture", capture)
    self_check.find_fault.cache_clear()
    fault = self_check.find_fault(graph.compare_replay, torch.device("cpu"))
    self_check.find_fault.cache_clear()
    assert (fault or "").startswith("a replayed step is off by") == is_stale


@pytest.mark.parametrize("required", [False, True])
def test_steps_go_without_a_graph_that_is_wrong(monkeypatch, caplog, required):
    monkeypatch.setattr(self_check, "find_fault", lambda compare, device: "it is off by 1")
    for name in ("get_sync_debug_mode", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda mode="default": mode)
    network = nn.Conv3d(1, 2, 1)
    step = graph.StepGraph(lambda x, y: (x, y), network, required=required)
    given = batch(0)["image"], batch(0)["label"]
    outputs = [step(*given) for _ in range(graph.WARM_UP - 1)]
    if required:
        with pytest.raises(InputError, match=r"that cannot: it is off by 1\. Use none"):
            step(*given)
    else:
        outputs += [step(*given), step(*given)]
        assert caplog.messages == ["Steps are not replayed as a CUDA graph: it is off by 1"]
    assert all(pred is given[0] for pred, _ in outputs)
    assert step.captures == 0


class TestOnCard:
    pytestmark = GPU

    def test_replay_is_right_and_a_lost_one_is_noticed(self, monkeypatch):
        device = torch.device("cuda")
        before = torch.cuda.get_rng_state()
        graph.compare_replay(device)
        assert torch.equal(torch.cuda.get_rng_state(), before)
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: None)
        with pytest.raises(ArithmeticError, match="a replayed step is off by"):
            graph.compare_replay(device)

    @pytest.mark.parametrize("recompute_levels", [0, 1])
    def test_first_use_may_be_in_inference_or_while_levels_are_recomputed(
        self, monkeypatch, recompute_levels
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
        network = graph.DenseUNet(1, 2, 8, (2, 2), recompute_levels=recompute_levels).cuda()
        network.to(memory_format=torch.channels_last_3d).train(recompute_levels > 0)
        restart()
        with torch.inference_mode(recompute_levels == 0):
            out = network(torch.randn(2, 1, 8, 8, 8, device="cuda"))
        if recompute_levels:
            out.sum().backward()
        assert fused_layers.works_on(out.device)
        restart()
