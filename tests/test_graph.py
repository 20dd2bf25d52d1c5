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
            for one, other in zip(
                plain.network.parameters(), replayed.network.parameters(), strict=True
            ):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        else:
            assert differing(state_of(plain), state_of(replayed)) == []
        assert plain.last_step.loss == pytest.approx(replayed.last_step.loss, rel=1e-4)

    def test_handlers_see_each_event_and_the_values_of_the_step(self):
        losses = []

        def watch(trainer):
            trainer.add_event_handler(
                IterationEvents.BACKWARD_COMPLETED,
                lambda engine: losses.append(engine.state.output["loss"].item()),
            )

        replayed = trained("auto", change=watch)
        assert replayed._graph.captures == 1
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

    def test_step_that_waits_for_the_device_goes_without(self, caplog):
        class Waits(nn.Conv3d):
            def forward(self, x):
                return super().forward(x) * (1 if x.sum().item() else 2)

        network = nn.Sequential(Waits(1, 2, 1))
        trainer = trained("auto", network=copy.deepcopy(network))
        assert trainer.describe()["effective"]["cuda_graph"] == "none"
        assert trainer.progress.step == STEPS
        assert "not replayed as a CUDA graph: it waits for the device" in caplog.text
        with pytest.raises(InputError, match=r"^cuda_graph: expected a step that can be captured"):
            trained("cuda_graphs", network=network)

    def test_network_that_replaces_a_buffer_goes_without(self, caplog):
        class Averages(nn.Conv3d):
            def __init__(self):
                super().__init__(1, 2, 1)
                self.register_buffer("mean", torch.zeros(()))

            def forward(self, x):
                y = super().forward(x)
                self.mean = self.mean * 0.9 + y.detach().float().mean()
                return y

        trainer = trained("auto", network=nn.Sequential(Averages()))
        assert "it replaces a buffer of the network" in caplog.text
        assert trainer.describe()["effective"]["cuda_graph"] == "none"
        assert trainer.progress.step == STEPS
        assert trainer.network[0].mean.item() != 0

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

    def test_parameter_that_is_frozen_gets_no_gradient_from_a_graph_of_before(self):
        def freeze(trainer):
            first = next(trainer.network.parameters())
            before = first.detach().clone()

            def at_some_step(engine):
                if engine.state.iteration == graph.WARM_UP + 2:
                    first.requires_grad_(False)
                    before.copy_(first)

            trainer.add_event_handler(IterationEvents.MODEL_COMPLETED, at_some_step)
            trainer.frozen = first, before

        trainer = trained("auto", change=freeze)
        first, before = trainer.frozen
        assert torch.equal(first, before)


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
