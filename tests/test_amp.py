"""Mixed precision: every link of the chain from loss to weights.

The scaler's behaviour is tested on the CPU in real float16, and again on CUDA where there is one.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from engines import (
    batch,
    batch_norm_network,
    half,
    in_mode,
    instance_norm_network,
    make_trainer,
    weights,
)
from monai.engines.utils import IterationEvents
from monai.losses import DiceCELoss
from torch.utils.data import DataLoader

from pipeline.precision import Precision
from pipeline.training.trainer import MixedPrecisionTrainer, StepEvents


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(((a[name] - b[name]) ** 2).sum().item() for name in a))


def test_forward_is_float16_and_loss_float32_under_autocast(device):
    trainer = make_trainer(half(device), [batch(0)])
    seen = {}

    def look(engine):
        seen["logits"] = engine.state.output["pred"].dtype
        seen["autocast"] = torch.is_autocast_enabled(device)

    trainer.add_event_handler(IterationEvents.FORWARD_COMPLETED, look)
    trainer.run()
    assert seen == {"logits": torch.float16, "autocast": True}
    assert trainer.state.output["loss"].dtype == torch.float32
    assert trainer.scaler is trainer.precision.scaler  # MONAI's run would make another one
    assert {p.dtype for p in trainer.network.parameters()} == {torch.float32}


def test_backward_is_scaled_and_step_is_unscaled_and_clipped(device):
    scale = 1024.0
    trainer = make_trainer(half(device, init_scale=scale), [batch(0)], grad_clip=0.01)
    reference = make_trainer(Precision(device, amp=False), [batch(0)], grad_clip=0)
    grads = {}

    def keep(name):
        return lambda engine: grads.update(
            {name: torch.cat([p.grad.flatten() for p in engine.network.parameters()]).cpu()}
        )

    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, keep("scaled"))
    trainer.add_event_handler(StepEvents.STEP_COMPLETED, keep("clipped"))
    reference.add_event_handler(IterationEvents.BACKWARD_COMPLETED, keep("true"))
    before = weights(trainer.network)
    trainer.run()
    reference.run()
    norm = grads["true"].norm().item()
    assert norm > 0.01  # else nothing would be clipped
    assert (grads["scaled"] / scale - grads["true"]).norm().item() < 0.02 * norm
    assert trainer.last_step.grad_norm == pytest.approx(norm, rel=0.02)
    assert grads["clipped"].norm().item() == pytest.approx(0.01, rel=1e-3)
    # the first step of the warm-up has half the peak learning rate of 0.1
    assert distance(weights(trainer.network), before) == pytest.approx(0.05 * 0.01, rel=1e-3)


def test_grad_clip_0_turns_clipping_off():
    trainer = make_trainer(in_mode("float32"), [batch(0)], grad_clip=0)
    before = weights(trainer.network)
    trainer.run()
    # half the peak learning rate of 0.1
    moved = distance(weights(trainer.network), before)
    assert moved == pytest.approx(0.05 * trainer.last_step.grad_norm, rel=1e-5)
    assert moved > 0


def test_scale_doubles_after_growth_interval(device):
    batches = [batch(n) for n in range(4)]
    precision = half(device, init_scale=64.0, growth_interval=2)
    make_trainer(precision, batches).run()
    assert precision.scaler.get_scale() == 256.0


def test_five_arguments_and_a_plain_dataloader_are_enough():
    cases = [{key: batch(n, size=1)[key][0] for key in ("image", "label")} for n in range(5)]
    network = instance_norm_network()
    trainer = MixedPrecisionTrainer(
        network=network,
        optimizer=torch.optim.AdamW(network.parameters()),
        loss_function=DiceCELoss(to_onehot_y=True, softmax=True),
        train_data_loader=DataLoader(cases, batch_size=2, shuffle=True),
        max_epochs=2,
    )
    before = weights(network)
    trainer.run()
    assert (trainer.progress.step, trainer.progress.epoch) == (6, 2)
    assert distance(weights(network), before) > 0
    effective = trainer.describe()["effective"]
    assert (effective["dtype"], effective["loss_backend"]) == ("float32", None)


def test_accumulated_micro_batches_equal_one_batch():
    """Instance norm and per-sample means: two batches of one are a batch of two."""
    whole = batch(0, size=2)
    parts = [{key: value[n : n + 1] for key, value in whole.items()} for n in range(2)]
    one = make_trainer(Precision("cpu", amp=False), [whole])
    two = make_trainer(Precision("cpu", amp=False), parts, accumulation=2)
    one.run()
    two.run()
    assert distance(weights(one.network), weights(two.network)) < 1e-6
    assert two.last_step.loss == pytest.approx(one.last_step.loss, rel=1e-5)
    assert two.progress.step == 1
    assert two.progress.samples == 2


@pytest.mark.gpu
@pytest.mark.parametrize("value", [None, math.nan], ids=["applied", "skipped"])
@pytest.mark.parametrize("mode", ["float16", "bfloat16", "float32"])
def test_step_waits_for_the_device_once(mode, value):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    precision = in_mode(mode, "cuda")
    batches = [batch(n, value=value) for n in range(4)]
    for one in batches:
        one |= {key: one[key].cuda() for key in ("image", "label")}
    trainer = make_trainer(precision, batches, network=batch_norm_network())
    trainer.run()  # the first steps may wait for libraries to load
    repeat = make_trainer(precision, batches, network=batch_norm_network())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            repeat.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
    assert len(waits) <= len(batches), [str(w.message) for w in waits]
