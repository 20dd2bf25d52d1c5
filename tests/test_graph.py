"""Steps that are replayed as a CUDA graph, beside the same steps without one."""

from __future__ import annotations

import copy

import pytest
import torch
from engines import batch, differing, in_mode, make_trainer, state_of
from monai.engines.utils import IterationEvents
from torch import nn

from networks.dense_unet import DenseUNet
from pipeline.errors import InputError
from pipeline.training import graph
from pipeline.training.graph import StepGraph

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = graph.WARM_UP + 4


def trained(cuda_graph, accumulation=1, mode="float16", network=None, change=None):
    """A trainer after `STEPS` steps."""
    if network is None:
        network = DenseUNet(1, 2, 8, (2,), num_dense_layers=1, growth_rate=8, dropout=0.2, seed=0)
    trainer = make_trainer(
        in_mode(mode, "cuda"),
        [batch(n) for n in range(STEPS * accumulation)],
        accumulation=accumulation,
        network=network,
        optimizer=torch.optim.AdamW,
        cuda_graph=cuda_graph,
    )
    if change:
        change(trainer)
    trainer.run()
    return trainer


class TestOnCard:
    pytestmark = GPU

    @pytest.mark.parametrize("accumulation", [1, 3])
    @pytest.mark.parametrize("mode", ["float16", "bfloat16", "float32"])
    def test_replayed_steps_give_the_same_bits(self, mode, accumulation):
        with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
            plain = trained("none", accumulation, mode)
            replayed = trained("cuda_graphs", accumulation, mode)
        assert plain.describe()["effective"]["cuda_graph"] == "none"
        assert replayed.describe()["effective"]["cuda_graph"] == "cuda_graphs"
        assert replayed._graph.captures == 1
        if mode == "float32":  # seen to be close on a card; bits were not compared
            pairs = [[*trainer.network.parameters()] for trainer in (plain, replayed)]
            torch.testing.assert_close(*pairs, rtol=1e-3, atol=1e-4)
        else:
            assert differing(state_of(plain), state_of(replayed)) == []
        assert plain.last_step.loss == pytest.approx(replayed.last_step.loss, rel=1e-4)

    def test_handlers_see_the_loss_of_each_step(self):
        losses = []

        def watch(trainer):
            event = IterationEvents.BACKWARD_COMPLETED
            trainer.add_event_handler(
                event, lambda engine: losses.append(engine.state.output["loss"].item())
            )

        assert trained("auto", change=watch)._graph.captures == 1
        assert len(set(losses)) == STEPS

    @pytest.mark.parametrize("what", ["handler", "hook"])
    def test_what_looks_into_a_step_is_called_in_each(self, what):
        calls = []

        def watch(trainer):
            if what == "hook":
                module = next(iter(trainer.network.modules()))
                module.register_forward_hook(lambda *args: calls.append(1))
            else:
                event = IterationEvents.FORWARD_COMPLETED
                trainer.add_event_handler(event, lambda engine: calls.append(1))

        assert trained("auto", change=watch)._graph.captures == 0
        assert len(calls) == STEPS

    @pytest.mark.parametrize(
        ("kind", "reason"),
        [("Waits", "it waits for the device"), ("Averages", "it replaces a buffer")],
    )
    def test_step_that_cannot_be_captured_goes_without(self, kind, reason, caplog):
        class Waits(nn.Conv3d):
            def forward(self, x):
                return super().forward(x) * (1 if x.sum().item() else 2)

        class Averages(nn.Conv3d):
            def __init__(self, *sizes):
                super().__init__(*sizes)
                self.register_buffer("mean", torch.zeros(()))

            def forward(self, x):
                y = super().forward(x)
                self.mean = self.mean * 0.9 + y.detach().float().mean()
                return y

        network = nn.Sequential({"Waits": Waits, "Averages": Averages}[kind](1, 2, 1))
        trainer = trained("auto", network=copy.deepcopy(network))
        assert trainer.describe()["effective"]["cuda_graph"] == "none"
        assert trainer.progress.step == STEPS
        assert f"not replayed as a CUDA graph: {reason}" in caplog.text
        with pytest.raises(InputError, match=r"^cuda_graph: expected a step that can be captured"):
            trained("cuda_graphs", network=network)

    def test_memory_is_given_back_when_training_ends(self):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        trainer = trained("auto")
        assert trainer.describe()["effective"]["cuda_graph"] == "cuda_graphs"
        weights = sum(p.numel() for p in trainer.network.parameters()) * 4
        trainer.state.output = None
        assert torch.cuda.memory_allocated() - before < 4 * weights + 2**20

    def test_tensors_of_another_kind_are_no_mistake(self):
        module = nn.ParameterList([torch.ones(3, device="cuda")])
        weight = module[0]

        def work(images, labels):
            loss = (weight * images.sum() * labels.sum()).sum()
            loss.backward()
            return images * 2, loss.detach()

        step = StepGraph(work, module)
        label = torch.ones(1, device="cuda")
        for turn, size in enumerate([4] * 6 + [5] * 6 + [4, 5, 4]):
            weight.grad = None
            images = torch.full((size,), float(turn), device="cuda")
            pred, loss = step(images, label)
            assert torch.equal(pred, images * 2)
            assert loss.item() == 3 * turn * size
            assert weight.grad.tolist() == [turn * size] * 3
        assert step.captures == 2

    def test_frozen_parameter_gets_no_gradient_from_an_earlier_graph(self):
        frozen = []

        def freeze(engine):
            if engine.state.iteration == graph.WARM_UP + 2:
                first = next(engine.network.parameters()).requires_grad_(False)
                frozen.extend([first, first.clone()])

        def change(trainer):
            trainer.add_event_handler(IterationEvents.MODEL_COMPLETED, freeze)

        trained("auto", change=change)
        assert torch.equal(*frozen)


@pytest.mark.parametrize(
    ("cuda_graph", "line"),
    [
        ("graphs", r"^cuda_graph: expected one of auto, cuda_graphs, none, got 'graphs'\."),
        ("cuda_graphs", r"^cuda_graph: expected a CUDA device and one rank for cuda_graphs"),
    ],
)
def test_what_cannot_be_compiled_is_told_in_a_line(cuda_graph, line):
    with pytest.raises(InputError, match=line):
        make_trainer(in_mode("float32", "cpu"), [batch(0)], cuda_graph=cuda_graph)
