import io
import logging
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from engines import StubTrainer, curve, make_validator, read, steps_of, strict_json
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from PIL import Image

from pipeline.drawing import CaseVolumes, draw_plane
from pipeline.precision import StepStats
from pipeline.training import logging_handlers
from pipeline.training.logging_handlers import LoggingHandler
from pipeline.training.trainer import StepEvents

UPDATE = "weight_update/"
NAMES = ("lr", "loss_scale", "skipped_steps", "grad_norm", "max_abs_logit")
TRAINING_TAGS = {"train/loss", *(UPDATE + name for name in NAMES)}
VALIDATION_TAGS = {"val/mean_dice", "val/mean_dice_dim", "val/mean_dice_bright"}


def picture_of(point):
    return np.asarray(Image.open(io.BytesIO(point.encoded_image_string)))


# ---- in a run


def test_run_shows_training_and_validation(run, tmp_path):
    changes = {"steps_per_epoch": 4, "warmup_steps": 3, "learning_rate": 0.01}
    assert run(tmp_path / "run", **changes) == 0
    events = read(tmp_path / "run")
    summary, written = (
        strict_json((tmp_path / "run" / name).read_text())
        for name in ("summary.json", "validation.json")
    )
    # TensorBoard sorts by name and opens the first two groups
    tags = sorted(events.Tags()["scalars"])
    assert tags[:2] == ["train/loss", "val/mean_dice"]
    assert set(tags) == TRAINING_TAGS | VALIDATION_TAGS
    for tag in TRAINING_TAGS:
        assert steps_of(events, tag) == list(range(1, 9)), tag
    for tag in VALIDATION_TAGS:
        assert steps_of(events, tag) == [4, 8], tag
    # eight steps: three of warm-up to the peak, then half a cosine
    expected = [0.01 * n / 3 for n in (1, 2, 3)]
    expected += [0.01 * math.cos(math.pi / 2 * n / 5) ** 2 for n in range(5)]
    np.testing.assert_allclose([lr for _, lr in curve(events, UPDATE + "lr")], expected, rtol=1e-5)
    dice = [value for _, value in curve(events, "val/mean_dice")]
    assert dice[-1] == pytest.approx(summary["last_mean_dice"], abs=1e-7)
    # both classes are in every case, so that the mean over classes is the mean
    classes = [
        [value for _, value in curve(events, f"val/mean_dice_{n}")] for n in ("dim", "bright")
    ]
    np.testing.assert_allclose(np.mean(classes, axis=0), dice, atol=1e-6)
    assert (written["epoch"], written["step"], len(written["cases"])) == (2, 8, 2)
    assert all(list(dice) == ["dim", "bright"] for dice in written["cases"].values())
    mean = np.mean([np.mean(list(dice.values())) for dice in written["cases"].values()])
    assert mean == pytest.approx(summary["last_mean_dice"], abs=1e-12)

    images = events.Images("val/first_case")
    assert [image.step for image in images] == [4, 8]
    assert picture_of(images[0]).shape == (4 * 18, 4 * 20, 3)


def set_aside(run_dir):
    """Give the event file a name that sorts before those written within the same second."""
    for number, path in enumerate(sorted((run_dir / "tensorboard").glob("events*"))):
        path.rename(path.with_name(f"events.out.tfevents.1.{number}"))


# ---- with engines that only count


def record(run_dir, steps, *, start=0, log_every=1, results=None):
    """One session of training, of `steps` steps from `start`."""
    handler = LoggingHandler(run_dir, make_validator(), log_every=log_every)
    length = start + steps
    trainer = StubTrainer([handler], step=start, steps_per_epoch=length, results=results)
    trainer.run([0] * steps, max_epochs=1)


def test_tensorboard_writes_every_nth_step_every_skipped_one_and_the_epochs_last(tmp_path):
    skipped = StepStats(
        applied=False, loss=9.0, grad_norm=math.inf, loss_scale=1024, max_abs_logit=3
    )
    record(tmp_path, 10, log_every=4, results={5: skipped, 8: skipped})
    events = read(tmp_path)
    assert curve(events, "train/loss") == [(4, 4), (5, 9), (8, 9), (10, 10)]
    assert curve(events, UPDATE + "skipped_steps") == [(4, 0), (5, 1), (8, 2), (10, 2)]
    assert curve(events, UPDATE + "loss_scale") == [(4, 1), (5, 1024), (8, 1024), (10, 1)]
    assert curve(events, UPDATE + "grad_norm") == [(4, 2), (5, math.inf), (8, math.inf), (10, 2)]
    assert curve(events, UPDATE + "lr") == [(4, 3), (5, 4), (8, 7), (10, 9)]  # what step n used


def test_tensorboard_hides_the_steps_that_a_killed_session_lost(tmp_path):
    lost = StepStats(applied=True, loss=-1.0, grad_norm=2, loss_scale=1, max_abs_logit=3)
    record(tmp_path, 6, results={5: lost, 6: lost})
    set_aside(tmp_path)
    record(tmp_path, 4, start=4)
    assert curve(read(tmp_path), "train/loss") == [(n, n) for n in range(1, 9)]


def test_tensorboard_keeps_the_epochs_last_step_when_its_validation_is_made_up_for(tmp_path):
    record(tmp_path, 4)
    set_aside(tmp_path)
    handler = LoggingHandler(tmp_path, make_validator(dice=0.5))
    trainer = StubTrainer([handler], step=4)
    trainer.fire_event(Events.EPOCH_COMPLETED)  # before the trainer's first step
    events = read(tmp_path)
    assert curve(events, "train/loss") == [(n, n) for n in range(1, 5)]
    assert curve(events, "val/mean_dice") == [(4, 0.5)]


def test_validation_json_has_null_when_a_class_is_absent(tmp_path):
    cases = {"tiny_001": [0.25, math.nan], "tiny_002": [math.nan, math.nan]}
    handler = LoggingHandler(tmp_path, make_validator(dice=0.25, epoch=1, cases=cases))
    StubTrainer([handler]).run([0] * 4, max_epochs=1)
    assert strict_json((tmp_path / "validation.json").read_text()) == {
        "epoch": 1,
        "step": 4,
        "cases": {
            "tiny_001": {"dim": 0.25, "bright": None},
            "tiny_002": {"dim": None, "bright": None},
        },
    }


# ---- pictures


def cube(shape, i, j, k, value=1):
    volume = np.zeros(shape, np.uint8)
    volume[slice(*i), slice(*j), slice(*k)] = value
    return volume


def test_tensorboard_picture_is_axial_and_upright_whatever_the_files_orientation(tmp_path):
    ras = {
        "image": np.random.default_rng(0).normal(size=(10, 12, 5)),
        "label": cube((10, 12, 5), (1, 5), (2, 6), (1, 3)),
        "pred": cube((10, 12, 5), (3, 8), (2, 9), (1, 3)),
    }
    expected = np.array(draw_plane(CaseVolumes(*ras.values(), np.ones(3)), "axial"))

    def flipped_and_permuted(volume):
        """The same volume with axes S, L, A."""
        affine = np.array([[0, -1, 0, 9], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
        return MetaTensor(volume.transpose(2, 0, 1)[None, :, ::-1].copy(), affine=affine)

    for name, store in (("ras", lambda v: MetaTensor(v[None])), ("sla", flipped_and_permuted)):
        validator = make_validator(case={key: store(volume) for key, volume in ras.items()})
        handler = LoggingHandler(tmp_path / name, validator)
        handler.attach(StubTrainer([]))
        validator.state = Engine(lambda *_: None).state
        validator.run([0, 1])
        handler.writer.flush()
        (point,) = read(tmp_path / name).Images("val/first_case")
        np.testing.assert_array_equal(picture_of(point), expected)


# ---- the console


def messages(caplog):
    return [
        r.getMessage() for r in caplog.records if r.name == "pipeline.training.logging_handlers"
    ]


def test_console_prints_one_line_per_epoch_when_there_is_no_terminal(tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO)
    handler = LoggingHandler(tmp_path, make_validator(dice=0.25, epoch=1))
    trainer = StubTrainer([handler], results={6: StepStats(False, 6.0, math.inf, 1, 3)})
    trainer.run([0] * 4, max_epochs=2)
    assert messages(caplog) == [
        "epoch 1/2, step 4, loss 2.5000, mean Dice 0.2500, 20 s",
        "epoch 2/2, step 8, loss 6.6667, skipped steps 1, 20 s",  # mean of 5, 7, 8
    ]
    assert "\r" not in capfd.readouterr().err


@pytest.mark.parametrize("start", [0, 4])
def test_console_shows_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch, start):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    handler = LoggingHandler(tmp_path, make_validator())
    trainer, seen = StubTrainer([handler], step=start), []
    trainer.add_event_handler(StepEvents.STEP_COMPLETED, lambda _: seen.append(handler.bar.n))
    trainer.run([0] * 4)
    assert seen == list(range(start + 1, 9))
    assert handler.bar is None  # closed
    shown = capsys.readouterr().err
    assert "Training: 8/8 steps |" in shown
    assert "loss 8.000" in shown


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize(
    ("scored", "expected"),
    [
        # 4 steps an epoch, 10 s each: 200, 160, 120, 80, 40, 0 s; validations: 2 x 100, …, 0 s
        (False, [*(f"{n} min left" for n in ("3.3", "6.0", "5.3", "3.0", "2.3")), ""]),
        # and five cases with two weights, at 25 s a case
        (True, ["3.3 min left", *(f"{n} min left with scores" for n in (10, 9.5, 7.2, 6.5, 4.2))]),
    ],
)
def test_time_left_counts_validations_and_scores(
    tmp_path, caplog, monkeypatch, start, scored, expected
):
    caplog.set_level(logging.INFO)
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(logging_handlers, "time", clock)
    handler = LoggingHandler(
        tmp_path,
        make_validator(dice=0.5, epoch=2),
        val_interval=2,
        cases=SimpleNamespace(validation=[1, 2, 3, 4], test=[5]),
        final_scores=scored,
    )
    trainer = StubTrainer([], step=start, max_epochs=6)

    def take(seconds):
        clock.now += seconds

    trainer.add_event_handler(
        StepEvents.STEP_COMPLETED,
        lambda engine: take(60 if engine.progress.step == start + 1 else 10),  # the first is slow
    )
    validation = Events.EPOCH_COMPLETED(once=2)
    trainer.add_event_handler(validation, lambda engine: take(100))
    handler.attach(trainer)
    trainer.run([0] * 4)
    assert [line.partition(", about ")[2] for line in messages(caplog)] == expected[start // 4 :]
