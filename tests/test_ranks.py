"""Training in several ranks is training in one process: forked Gloo ranks, batches of their own."""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import further
from engines import (
    batch,
    batch_norm_network,
    differing,
    in_mode,
    instance_norm_network,
    make_trainer,
    make_validator,
    overflows,
    state_of,
    weights,
)
from ignite.engine import Events
from in_ranks import in_ranks
from monai.engines.utils import IterationEvents
from monai.losses import DiceCELoss
from torch import nn

from networks.dense_unet import DenseUNet
from pipeline import distributed
from pipeline.data.sampling import EpochSampler
from pipeline.distributed import SummedDDP
from pipeline.errors import InputError, TrainingStopped
from pipeline.training.checkpoint import CheckpointHandler
from pipeline.training.flight_recorder import FlightRecorder
from pipeline.training.loss import SegmentationLoss
from pipeline.training.trainer import StepEvents

SIZE, STEPS = 5, 20  # samples in a micro-batch; five are divided 3 + 2 and 2 + 2 + 1


def part(whole: dict[str, Any]) -> dict[str, Any]:
    """This rank's part of a micro-batch."""
    own = EpochSampler(len(whole["seed"]), 1, 1).own
    return {key: value[own] for key, value in whole.items()}


def train(mode="float32", network=None, batches=None, poison=None, **kwargs) -> Any:
    """A trainer that has trained on this rank's parts of the batches."""
    network = network or instance_norm_network()
    batches = [batch(n, SIZE) for n in range(STEPS)] if batches is None else batches
    losses: list[float] = []
    trainer = make_trainer(
        in_mode(mode, init_scale=1024.0),
        [part(each) for each in batches],
        network=network,
        replica=SummedDDP(network) if dist.is_initialized() else None,
        **kwargs,
    )
    trainer.add_event_handler(
        StepEvents.STEP_COMPLETED, lambda engine: losses.append(engine.last_step.loss)
    )
    if poison:
        poison(trainer)
    try:
        trainer.run()
    except SystemExit as error:
        trainer.ended = type(error).__name__
    return trainer, losses


def facts(trainer: Any, losses: list[float]) -> dict[str, Any]:
    """What has to be the same on all ranks, as what can be sent to another process."""
    return {
        "losses": losses,
        "state": state_of(trainer),
        "progress": trainer.progress.state_dict() | {"wall_time_s": 0},
        "scaler": trainer.scaler.state_dict() if trainer.scaler else None,
        "last_step": trainer.last_step,
        "diagnosis": trainer.diagnosis,
        "interrupted": trainer.interrupted,
        "ended": getattr(trainer, "ended", None),
    }


def trained(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return facts(*train(*args, **kwargs))


def in_all(function, *args, size: int = 2) -> list[dict[str, Any]]:
    """Results of all ranks, which have to be the same bit for bit."""
    results = in_ranks(function, *args, size=size)
    for result in results:
        if isinstance(result, BaseException):
            raise result
        assert differing(result["state"], results[0]["state"]) == []
        for key in ("losses", "progress", "scaler", "last_step", "interrupted"):
            assert str(result[key]) == str(results[0][key]), key
    return results


def small_unet() -> nn.Module:
    return DenseUNet(
        1, 2, base_channels=2, strides=[2], num_dense_layers=1, growth_rate=4,
        norm="instance", seed=3,
    )  # fmt: skip


# --- the same training


@pytest.mark.parametrize("size", [2, further(3)])
@pytest.mark.parametrize(
    "settings",
    [
        {"loss_function": SegmentationLoss(batch_dice=True, include_background=False)},
        {"loss_function": SegmentationLoss(class_weights=[1.0, 3.0]), "accumulation": 2},
        {"loss_function": SegmentationLoss(batch_dice=True), "grad_clip": 0.05},
        {"loss_function": DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)},
        {"loss_function": SegmentationLoss(batch_dice=True), "optimizer": torch.optim.AdamW},
    ],
    ids=["batch-dice", "weights-accumulated", "clipped", "monai-loss", "adamw"],
)
def test_ranks_have_the_loss_curve_of_one_process(settings, size):
    alone = trained(network=small_unet(), **settings)
    result = in_all(lambda: trained(network=small_unet(), **settings), size=size)[0]
    steps = STEPS // settings.get("accumulation", 1)
    assert len(alone["losses"]) == steps
    assert len(set(alone["losses"])) == steps  # it does train
    torch.testing.assert_close(result["losses"], alone["losses"], rtol=1e-4, atol=0)
    assert result["progress"] == alone["progress"]
    if "optimizer" not in settings:  # AdamW's first steps are signs, of noise too
        for name, value in alone["state"]["network"].items():
            torch.testing.assert_close(
                result["state"]["network"][name], value, rtol=1e-3, atol=1e-5
            )


@pytest.mark.parametrize("batch_size", [2, 3, 5, 7])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_sampler_divides_every_batch_without_gap_or_copy(batch_size, size):
    if batch_size < size:
        pytest.skip("fewer samples than ranks")

    def numbers():
        sampler = EpochSampler(batch_size, 2, 3)
        sampler.start = 6 * batch_size + 2 * batch_size  # in its second epoch
        return list(sampler), len(sampler), sampler.own.stop - sampler.own.start

    found = in_ranks(numbers, size=size)
    for own, length, share in found:
        assert len(own) == length == 4 * share
    for n in range(4):
        parts = [own[n * share : (n + 1) * share] for own, _, share in found]
        first = (8 + n) * batch_size
        assert [number for own in parts for number in own] == [*range(first, first + batch_size)]
    assert max(s for *_, s in found) - min(s for *_, s in found) <= 1


# --- precision


def put(value: float, rank: int, place: str, iteration: int = 4):
    """Something that is not finite comes up once, on one rank."""

    def poison(trainer):
        if distributed.rank() != rank:
            return
        batches = trainer.data_loader.batches
        if place == "input":
            batches[iteration - 1]["image"][0, 0, 0, 0, 0] = value
        elif place == "gradient":

            def set_gradient(engine):
                if engine.progress.step == iteration - 1:
                    next(engine.network.parameters()).grad[0] = value

            trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, set_gradient)

    return poison


@pytest.mark.parametrize(
    ("mode", "place", "rank", "value"),
    [
        ("float32", "input", 0, math.inf),
        ("float32", "gradient", 1, math.nan),
        ("float16", "input", 1, math.nan),
        ("float16", "gradient", 0, math.inf),
    ],
)
def test_what_is_not_finite_on_one_rank_skips_the_step_on_all(mode, place, rank, value):
    def run():
        states = []

        def look(trainer):
            put(value, rank, place)(trainer)
            for event in (Events.STARTED, StepEvents.STEP_COMPLETED):
                trainer.add_event_handler(event, lambda engine: states.append(state_of(engine)))

        trainer, losses = train(
            mode, batch_norm_network(), [batch(n, SIZE) for n in range(6)], look,
            optimizer=torch.optim.AdamW,
        )  # fmt: skip
        changed = [differing(a, b) != [] for a, b in itertools.pairwise(states)]
        return facts(trainer, losses) | {"changed": changed}

    for result in in_all(run):
        assert result["changed"] == [True, True, True, False, True, True]
        assert result["progress"]["skipped_steps"] == 1
        assert result["progress"]["samples"] == 6 * SIZE
        if mode == "float16":
            assert result["scaler"]["scale"] == 512.0
            assert result["scaler"]["_growth_tracker"] == 2
        assert result["state"]["lr_scheduler"]["last_epoch"] == 5


@pytest.mark.parametrize("place", ["input", "gradient"])
def test_recorder_names_the_rank_and_its_cases_unless_only_the_sum_overflows(tmp_path, place):
    def run():
        recorder = FlightRecorder(tmp_path)
        batches = [batch(n, SIZE) for n in range(6)]
        poison = put(math.inf, 1, place)
        mode = "float16" if place == "input" else "float32"
        return trained(mode, None, batches, poison, train_handlers=[recorder])

    in_all(run, size=3)
    (line,) = overflows(tmp_path)
    found = line["rank"], line["stage"], line["first_module"], line["non_finite_cases"]
    assert found == (
        (1, "input", "image", ["case_3_2"]) if place == "input" else (None,) * 3 + ([],)
    )
    assert line["samples"] == [15, 16, 17, 18, 19]
    assert line["case_ids"] == [f"case_3_{n}" for n in range(SIZE)]
    assert torch.load(tmp_path / line["kept"], weights_only=True)["first_sample"] == 15


def test_running_statistics_are_the_mean_over_ranks():
    """Each rank normalises with its own samples; what is kept is the mean, also for evaluation."""
    network, means = batch_norm_network().train(), []
    before = weights(network)
    for own in (slice(0, 2), slice(2, 4)):
        network.load_state_dict(before)
        network(batch(0, 4)["image"][own])
        means.append(network[1].running_mean.double())
    result = in_all(lambda: trained(network=batch_norm_network(), batches=[batch(0, 4)]))
    found = result[0]["state"]["network"]["1.running_mean"]
    torch.testing.assert_close(found.double(), sum(means) / 2)


# --- ending together


def test_signal_to_one_rank_ends_all_at_the_same_step():
    def run():
        def tell(trainer):
            if distributed.rank() == 1:
                trainer.add_event_handler(
                    Events.ITERATION_STARTED,
                    lambda engine: engine.progress.step == 3 and engine.interrupt(),
                )

        return trained(poison=tell)

    for result in in_all(run):
        assert result["interrupted"]
        assert result["progress"]["step"] == 4
        assert result["ended"] == "TrainingInterrupted"


def test_rank_that_stops_ends_all(tmp_path, caplog):
    """The first rank alone writes; where it cannot, the others must not wait for it."""

    def run():
        with caplog.at_level(logging.INFO):
            handler = CheckpointHandler(tmp_path, make_validator(), every=3)
            if distributed.is_main():
                handler.lost = lambda: "process 1 on other"
            result = trained(train_handlers=[handler])
        levels = [r.levelname for r in caplog.records if "to be held by this process" in r.message]
        return result | {"levels": levels}

    results = in_all(run)
    for result in results:
        assert result["progress"]["step"] == 3
        assert "process 1 on other has taken it over" in result["diagnosis"]
        assert result["ended"] == TrainingStopped.__name__
    assert [result["levels"] for result in results] == [["ERROR"], ["INFO"]]


# --- what ranks say


def test_one_process_is_a_rank_by_itself():
    value = torch.tensor([2.0], requires_grad=True)
    assert (distributed.rank(), distributed.size(), distributed.local_rank()) == (0, 1, None)
    assert distributed.all_gather_object(3) == [3]
    assert distributed.shard([1, 2, 3]) == [1, 2, 3]
    assert distributed.all_reduce_sum(value) is value
    assert distributed.gather_rows(value).tolist() == [[2.0]]
    with pytest.raises(InputError, match=r"^a: expected b\.$") as raised, distributed.sync_errors():
        raise InputError("a: expected b.")
    assert not raised.value.is_told


@pytest.mark.parametrize("number", [0, 1, 4, 5])
def test_shares_are_all_items_once_and_come_back_in_order(number):
    def run():
        shares = distributed.all_gather_object(distributed.shard(range(number)))
        return distributed.interleave(shares)

    assert in_ranks(run, size=3) == [[*range(number)]] * 3


@pytest.mark.parametrize("who", [[0, 1], [1, 2]])
def test_a_refusal_of_some_is_told_once_by_the_first(who):
    def run():
        with distributed.sync_errors(), distributed.sync_errors():
            if distributed.rank() in who:
                raise InputError("a: expected b.")
            distributed.all_gather_object("c")
        return "went on"

    for rank, error in enumerate(in_ranks(run, size=3)):
        assert isinstance(error, InputError)
        assert error.is_told == (rank > 0)
        whose = "" if 0 in who else rf"rank {who[0]} on \S+: "
        assert [line.partition(": ")[2] if whose else line for line in error.faults] == [
            "a: expected b."
        ]
        assert str(error).startswith(whose[:6])


@pytest.mark.parametrize("status", [0, 2])
def test_an_exit_of_one_is_that_of_all(status):
    def run():
        with distributed.sync_errors():
            with distributed.sync_errors():
                if distributed.is_main():
                    raise SystemExit(status)
            distributed.all_gather_object("c")

    assert [error.code for error in in_ranks(run)] == [status, status]


def test_other_ranks_log_errors_alone(capfd):
    def run():
        logging.basicConfig(force=True, format="%(message)s", level=logging.INFO)
        distributed.silence_other_ranks()
        logging.info("told by %d", distributed.rank())
        logging.error("failed on %d", distributed.rank())

    in_ranks(run)
    assert sorted(capfd.readouterr().err.split("\n")) == [
        "", "failed on 0", "failed on 1", "told by 0",
    ]  # fmt: skip


def test_local_only_sums_nothing_and_has_batch_norms_of_its_own():
    def run():
        own, synchronized = nn.BatchNorm3d(1), nn.SyncBatchNorm(1)
        image = torch.rand(2, 1, 2, 2, 2) + distributed.rank()
        with distributed.local_only(synchronized):
            inside = distributed.all_reduce_sum(torch.ones(1)).item()
            is_same = torch.equal(synchronized(image), own(image))
        assert synchronized.forward.__func__ is nn.SyncBatchNorm.forward
        return inside, is_same, distributed.all_reduce_sum(torch.ones(1)).item()

    assert in_ranks(run) == [(1.0, True, 2.0)] * 2
