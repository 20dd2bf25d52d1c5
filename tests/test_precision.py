"""The policy of precision: its table, what it prints, what it refuses, whom it governs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from engines import Samples, batch, in_mode, instance_norm_network, make_trainer
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer
from torch import nn

from pipeline.errors import InputError
from pipeline.precision import Precision
from pipeline.training.evaluator import MixedPrecisionEvaluator

# --- the table


@pytest.mark.parametrize(
    ("kind", "amp", "requested", "dtype", "scaled"),
    [
        ("cpu", True, "auto", "float32", False),
        ("cpu", True, "float16", "float16", True),
        ("cpu", True, "bfloat16", "bfloat16", False),
        ("cpu", "false", "float16", "float32", False),  # as monai.bundle passes words
        pytest.param("cuda", True, "auto", "float16", True, marks=pytest.mark.gpu),
        pytest.param("cuda", True, "float16", "float16", True, marks=pytest.mark.gpu),
        pytest.param("cuda", True, "bfloat16", "bfloat16", False, marks=pytest.mark.gpu),
        pytest.param("cuda", False, "auto", "float32", False, marks=pytest.mark.gpu),
    ],
)
def test_precision_resolves_to(kind, amp, requested, dtype, scaled):
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    precision = Precision(kind, amp=amp, amp_dtype=requested)
    assert precision.mode == dtype
    assert (precision.scaler is not None) is scaled
    assert precision.describe()["requested"]["amp_dtype"] == requested
    assert precision.describe()["effective"]["dtype"] == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"amp_dtype": "float61"}, "amp_dtype: expected one of auto.*Did you mean 'float16'"),
        ({"init_scale": 0.0}, "init_scale: expected a finite number above 0, got 0.0. Leave"),
        ({"amp": "maybe"}, "amp: expected true or false, got 'maybe'"),
        ({"device": "gpu"}, "device: expected auto, cpu or cuda"),
        ({"device": "cuda:99"}, "device: expected one of the"),
    ],
)
def test_precision_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        Precision(**{"device": "cpu", **arguments})


# --- CUDA's settings, on a card that is only said to be there

FLAGS = (
    (torch.backends.cuda.matmul, "allow_tf32"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cudnn, "benchmark"),
)


@pytest.fixture
def card(monkeypatch):
    """A CUDA device without its driver; bfloat16 as `card.bfloat16` says."""
    card = SimpleNamespace(bfloat16=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: card.bfloat16 or including_emulation,
    )
    before = [getattr(backend, flag) for backend, flag in FLAGS]
    yield card
    for (backend, flag), value in zip(FLAGS, before, strict=True):
        setattr(backend, flag, value)


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("benchmark", [False, True])
def test_precision_sets_the_flags_of_cuda(card, tf32, benchmark):
    precision = Precision("cuda", amp=False, tf32=tf32, cudnn_benchmark=benchmark)
    assert [getattr(backend, flag) for backend, flag in FLAGS] == [tf32, tf32, benchmark]
    effective = precision.describe()["effective"]
    assert (effective["tf32"], effective["cudnn_benchmark"]) == (tf32, benchmark)


def test_precision_refuses_bfloat16_when_the_card_only_emulates_it(card):
    assert Precision("cuda", amp_dtype="bfloat16").dtype == torch.bfloat16
    card.bfloat16 = False
    with pytest.raises(InputError, match=r"amp_dtype: expected a card .* got Some Card\. Use fl"):
        Precision("cuda", amp_dtype="bfloat16")


# --- what a run says


def test_default_run_on_cpu_prints_one_line_of_precision_and_no_warning(run, tmp_path, capfd):
    assert run(tmp_path / "r", device="cpu") == 0
    shown = "".join(capfd.readouterr())
    (line,) = [line for line in shown.splitlines() if "Precision" in line]
    assert line.startswith("Precision in force: device cpu, dtype float32, loss_scaling False")
    assert "warn" not in shown.lower()
    assert (tmp_path / "r/log.txt").read_text().count("Precision in force") == 1


# --- whom it governs


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "float16"])
def test_evaluator_predicts_in_the_policys_dtype(device, mode):
    precision = in_mode(mode, device)
    network = precision.place(instance_norm_network())
    evaluator = MixedPrecisionEvaluator(
        precision, network, val_data_loader=Samples([batch(0)]), inferer=SimpleInferer()
    )
    seen = []
    evaluator.add_event_handler(
        IterationEvents.FORWARD_COMPLETED, lambda e: seen.append(e.state.output["pred"])
    )
    evaluator.run()
    (logits,) = seen
    assert str(logits.dtype) == f"torch.{mode}"
    assert logits.device.type == device
    with torch.no_grad(), precision.autocast():
        expected = network.eval()(batch(0)["image"].to(device))
    assert torch.equal(logits, expected)


def train_with(network: nn.Module) -> None:
    make_trainer(Precision("cpu"), [batch(0)], network=network)


def evaluate_with(network: nn.Module) -> None:
    MixedPrecisionEvaluator(Precision("cpu"), network, val_data_loader=Samples([batch(0)]))


@pytest.mark.parametrize("use", [train_with, evaluate_with, Precision("cpu").place])
@pytest.mark.parametrize("part", [0, 1], ids=["weights", "buffers"])
def test_lowered_network_is_refused(use, part):
    network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2, affine=False))
    network[part].half()
    with pytest.raises(ValueError, match=r"expected float32 weights, got.*float16.*half\(\)"):
        use(network)
