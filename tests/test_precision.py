"""The policy of precision: its table, what it prints, what it refuses, whom it governs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from engines import Samples, batch, half, in_mode, instance_norm_network, make_trainer
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer
from torch import nn

from networks import fused_layers
from networks.dense_unet import DenseUNet
from pipeline.errors import InputError
from pipeline.precision import Precision
from pipeline.training.evaluator import MixedPrecisionEvaluator
from pipeline.training.trainer import describe_in_words

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


def test_default_run_on_cpu_prints_one_sentence_and_logs_the_details(run, tmp_path, capfd):
    assert run(tmp_path / "r", device="cpu") == 0
    shown = "".join(capfd.readouterr())
    dataset, plan, where, *_, precision = shown.partition("epoch 1/2")[0].splitlines()
    assert dataset.startswith("Dataset tiny (msd): ")
    values = "16x16x8 voxels of 1x1x1 mm, 2 in a batch; 2 channels; 2 epochs of 2 steps"
    assert plan == f"Plan: patches of {values}"
    assert where == f"Run directory {tmp_path}/r; details: log.txt"
    assert precision == (
        "Training in float32 on a CPU (1 thread); mixed precision was asked for, "
        "a CPU trains in float32"
    )
    assert "warn" not in shown.lower()
    log = (tmp_path / "r/log.txt").read_text()
    told = ("Precision in force: device cpu, dtype float32", "cuda_graph in force", "flip_axes  ")
    assert [(log.count(line), line in shown) for line in told] == [(1, False)] * 3


@pytest.mark.parametrize(
    ("precision", "network", "words"),
    [
        (half(), DenseUNet(base_channels=2), "float16 with loss scaling on a CPU (1 thread)"),
        (in_mode("float32"), None, "float32 on a CPU (1 thread)"),
    ],
)
@pytest.mark.parametrize("kernels", [True, False])
def test_sentence_names_kernels_that_serve(monkeypatch, precision, network, words, kernels):
    """Where kernels of layers serve, they compute those of our network, and of no other."""
    monkeypatch.setattr(fused_layers, "serves", lambda x: kernels)
    trainer = make_trainer(precision, [batch(0)], network=network)
    fused = ", fused layers" if kernels and network is not None else ""
    assert describe_in_words(trainer) == words + fused


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
