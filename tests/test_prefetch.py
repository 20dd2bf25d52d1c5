"""Micro-batches that are loaded and augmented before their turn: nothing but the time changes."""

from __future__ import annotations

import pytest
import torch
from engines import Samples, batch, batch_norm_network, differing, half, make_trainer, state_of
from ignite.engine import Events

from pipeline.errors import InputError, TrainingInterrupted
from pipeline.precision import Precision
from pipeline.training.prefetch import PrefetchingLoader
from pipeline.training.trainer import StepEvents
from transforms.augment import Augment


class Loader(Samples):
    """Notes what it is asked for, and fails at batch number `fails_at`."""

    def __init__(self, batches, fails_at=None):
        super().__init__(batches)
        self.asked, self.fails_at, self.closed = [], fails_at, 0

    def __iter__(self):
        try:
            for n in range(self.start // 2, len(self.batches)):
                self.asked.append(n)
                if n == self.fails_at:
                    raise InputError("lost")
                yield self.batches[n]
        finally:
            self.closed += 1


def trainer_of(loader, **kwargs):
    precision, network = Precision("cpu", amp=False), batch_norm_network()
    return make_trainer(precision, loader, network=network, **kwargs)


def noting(prepared):
    """`prepare_batch` that notes the seed of each batch."""

    def prepare(data, device, non_blocking):
        prepared.append(int(data["seed"][0]))
        return data["image"] * 2, data["label"]

    return prepare


def augment(size):
    both = {name: {"prob": 0.5} for name in ("noise", "blur", "gamma", "contrast")}
    spatial = {"rotation": {"degrees": 0}, "scale": {"prob": 0.5, "range": [1, 2]}}
    return Augment((size,) * 3, spatial=spatial, intensity=both)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("is_random", [False, True], ids=["augmented", "drawing from torch"])
def test_training_is_the_same_with_and_without(monkeypatch, accumulation, is_random):
    def noisy(data, device, non_blocking):
        return data["image"] + torch.randn(data["image"].shape), data["label"]

    batches = [batch(n) for n in range(4)]
    for one in batches:
        one |= {key: torch.nn.functional.pad(one[key], (1,) * 6) for key in ("image", "label")}
    ours = noisy if is_random else augment(10)
    trainers = [
        trainer_of(batches, accumulation=accumulation, epochs=2, prepare_batch=ours)
        for _ in range(2)
    ]
    trainers[0].run()
    monkeypatch.setattr(PrefetchingLoader, "prefetch", lambda self: None)
    trainers[1].run()
    assert differing(*map(state_of, trainers)) == []
    assert trainers[0].last_step == trainers[1].last_step


def test_next_batch_is_prepared_before_the_host_waits(monkeypatch):
    seen, step = [], Precision.step

    def spy(self, *args, **kwargs):
        seen.append("step")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Precision, "step", spy)
    trainer_of([batch(n) for n in range(3)], prepare_batch=noting(seen)).run()
    assert seen == [0, 1, "step", 2, "step", "step"]


def test_error_of_loading_comes_at_its_batch():
    loader = Loader([batch(n) for n in range(4)], 2)
    trainer = trainer_of(loader)
    with pytest.raises(InputError) as caught:
        trainer.run()
    assert caught.value.__notes__ == ["step 3, cases case_1_0, case_1_1"]
    assert trainer.progress.step == 2  # the steps before it were taken, and are saved as such
    assert trainer.progress.samples == 4
    assert (loader.asked, loader.closed) == ([0, 1, 2], 1)


def test_interrupted_run_counts_no_batch_that_was_only_prefetched():
    batches = [batch(n) for n in range(4)]
    loader = Loader(batches)
    trainer = trainer_of(loader)
    trainer.add_event_handler(
        StepEvents.STEP_COMPLETED, lambda engine: engine.progress.step == 2 and engine.interrupt()
    )
    with pytest.raises(TrainingInterrupted):
        trainer.run()
    assert (trainer.progress.step, trainer.progress.samples) == (3, 6)  # told after its second
    assert (loader.asked, loader.closed) == ([0, 1, 2, 3], 1)


def test_group_holds_batches_as_loaded_and_a_replay_prepares_anew():
    prepared, batches = [], [batch(n) for n in range(3)]
    trainer = trainer_of(batches, prepare_batch=noting(prepared))

    def again(engine):
        (own,) = engine.group
        assert own is batches[engine.progress.step - 1]
        engine.forward(own, engine.precision.autocast())

    trainer.add_event_handler(StepEvents.STEP_COMPLETED, again)
    trainer.run()
    # each batch once for its step and once for the look at it, the next one in between
    assert prepared == [0, 1, 0, 2, 1, 2]


@pytest.mark.parametrize("how", ["another", "in place"])
def test_batch_that_a_handler_changed_is_prepared_anew(how):
    seen = []
    trainer = trainer_of([batch(n) for n in range(3)], prepare_batch=noting([]))

    def change(engine):
        data = engine.state.batch
        if how == "another":
            engine.state.batch = {**data, "image": torch.zeros_like(data["image"])}
        else:
            data["image"].zero_()

    trainer.add_event_handler(Events.ITERATION_STARTED, change)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.output["image"].any())
    )
    trainer.run()
    assert not any(seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_a_card_is_the_same_with_and_without(monkeypatch):
    pinned = [batch(n, size=4) for n in range(8)]
    for one in pinned:
        one |= {key: one[key].pin_memory() for key in ("image", "label")}

    def images():
        seen = []
        trainer = make_trainer(half("cuda"), pinned, epochs=3, prepare_batch=augment(8))
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED,
            lambda engine: seen.append(engine.state.output["image"].clone()),
        )
        trainer.run()
        return seen

    ahead = images()
    monkeypatch.setattr(PrefetchingLoader, "prefetch", lambda self: None)
    assert all(map(torch.equal, ahead, images()))
