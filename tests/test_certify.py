"""The precision certificate: what it trains, measures and judges, and how it goes on."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY
from engines import batch, batch_norm_network, make_trainer, weights

from pipeline import run
from pipeline.commands import certify, trials
from pipeline.errors import STOPS
from pipeline.evaluation import fixed_batch
from pipeline.evaluation.bootstrap import EQUIVALENT, UNDECIDED, WORSE
from pipeline.evaluation.certificate import CONTROL, compare, markdown
from pipeline.evaluation.fixed_batch import agreement, gradient, step_cost
from pipeline.files import WriteError
from pipeline.precision import Precision

SOME = ["--dtypes", "bfloat16", "--seeds", "2", "--margin", "0.003"]


def command_line(dataset: Path, out: Path, *words: str) -> list[str]:
    values = {"dataset_dir": str(dataset), "output_dir": str(out), **TINY}
    values.pop("val_interval")
    pairs = ((f"--{k}", v if isinstance(v, str) else json.dumps(v)) for k, v in values.items())
    return ["configs/amp.json", *(word for pair in pairs for word in pair), *words]


class Finished:
    """Stands for the process of a run."""

    returncode, output = 0, ""

    def __init__(self, command: list[str], **_: object) -> None:
        self.command = command

    def communicate(self) -> tuple[str, str]:
        return self.output, ""

    def terminate(self) -> None:
        pass


def pretend(monkeypatch: pytest.MonkeyPatch, process: type[Finished]) -> None:
    monkeypatch.setattr(trials, "subprocess", SimpleNamespace(Popen=process, PIPE=None))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets runs train in this process, which is faster; their directories, in order."""
    monkeypatch.chdir(REPOSITORY)
    names: list[str] = []

    class InProcess(Finished):
        def communicate(self) -> tuple[str, str]:
            words = self.command[self.command.index("pipeline.run") + 1 :]
            names.append(Path(json.loads(words[words.index("--output_dir") + 1])).name)
            try:
                self.returncode = run.main(words)
            except SystemExit as end:
                self.returncode = end.code
                return str(end), "refused"
            return "", ""

    pretend(monkeypatch, InProcess)
    return names


def read(out: Path) -> dict:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads((out / "certificate.json").read_text(), parse_constant=refuse)


# --- the whole command


def test_certify_trains_compares_and_goes_on_where_it_stopped(dataset, tmp_path, trained, capfd):
    out = tmp_path / "c"
    assert certify.main(command_line(dataset, out, *SOME)) == 0
    every = ["float32_seed0", "bfloat16_seed0", "float32_seed1", "bfloat16_seed1"]
    assert trained == [*every, "float32_seed2", "float32_seed3"]
    certificate = read(out)
    assert (certificate["seeds"], certificate["control_seeds"]) == ([0, 1], [2, 3])
    assert certificate["margin"] == 0.003
    assert list(certificate["classes"]) == ["bfloat16", CONTROL]
    assert list(certificate["fixed_batch"]) == ["float32", "bfloat16"]
    assert certificate["fixed_batch"]["float32"]["gradient"]["first"]["cosine"] == pytest.approx(1)
    assert 0.9 < certificate["fixed_batch"]["bfloat16"]["gradient"]["first"]["cosine"] < 1
    assert certificate["fixed_batch"]["bfloat16"]["gradient"]["last"]["relative_error"] > 1e-4

    def dice(name: str, case: str) -> float:
        return json.loads((out / name / "validation.json").read_text())["cases"][case]["dim"]

    deltas = certificate["classes"]["bfloat16"]["dim"]["cases"]
    for case, found in deltas.items():
        expected = [
            dice(f"bfloat16_seed{s}", case) - dice(f"float32_seed{s}", case) for s in (0, 1)
        ]
        assert found == pytest.approx(expected)
    assert certificate["num_cases"] == len(deltas) == 2
    control = certificate["classes"][CONTROL]["dim"]["cases"]
    for case, found in control.items():
        expected = [
            dice(f"float32_seed{s + 2}", case) - dice(f"float32_seed{s}", case) for s in (0, 1)
        ]
        assert found == pytest.approx(expected)
    page = capfd.readouterr().out
    assert "| bfloat16 | dim |" in page
    assert (out / "certificate.md").read_text() in page

    # what was lost is trained again, nothing else; a further precision costs its own runs only
    (out / "bfloat16_seed1" / "summary.json").unlink()
    trained.clear()
    assert certify.main(command_line(dataset, out, *SOME)) == 0
    assert trained == ["bfloat16_seed1"]
    trained.clear()
    assert certify.main(command_line(dataset, out, *SOME[:2], "float16", *SOME[2:])) == 0
    assert trained == ["float16_seed0", "float16_seed1"]

    # a precision that scores lower is worse, and says so in the exit status
    for seed in (0, 1):
        path = out / f"bfloat16_seed{seed}" / "validation.json"
        content = json.loads(path.read_text())
        reference = json.loads((out / f"float32_seed{seed}" / "validation.json").read_text())
        for case, classes in reference["cases"].items():
            content["cases"][case] = {name: dice - 0.3 for name, dice in classes.items()}
        path.write_text(json.dumps(content))
    trained.clear()
    assert certify.main(command_line(dataset, out, *SOME)) == 1
    assert trained == []
    verdicts = [found["verdict"] for found in read(out)["classes"]["bfloat16"].values()]
    assert WORSE in verdicts

    # one certificate is of one config
    assert certify.main(command_line(dataset, out, *SOME, "--learning_rate", "0.5")) == 2
    assert "got other values of learning_rate" in capfd.readouterr().err


@pytest.mark.chaos
def test_certify_runs_in_processes_of_their_own_and_tells_what_one_refuses(
    tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(REPOSITORY)
    words = command_line(tmp_path / "nothing", tmp_path / "c", *SOME)
    assert certify.main(words) == 2
    error = capfd.readouterr().err
    assert "expected a folder with dataset.json" in error
    assert "Traceback" not in error


def test_certify_stops_when_a_run_fails(dataset, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(REPOSITORY)

    class Failed(Finished):
        returncode, output = 1, "step 3: expected finite loss"

    pretend(monkeypatch, Failed)
    assert certify.main(command_line(dataset, tmp_path / "c", *SOME)) == 1
    error = capfd.readouterr().err
    assert "float32 seed 0: expected the run to end, it failed (exit status 1)" in error
    assert "step 3: expected finite loss" in error
    assert not (tmp_path / "c" / "certificate.json").exists()


def test_no_run_begins_after_one_that_failed(dataset, tmp_path, monkeypatch):
    """The pool's thread is ahead of the main one when a run fails."""
    monkeypatch.chdir(REPOSITORY)
    begun = []

    class Slow(Finished):
        def __init__(self, command: list[str], **_: object) -> None:
            begun.append(command)
            self.returncode = 3 if len(begun) == 1 else 0
            self.told = threading.Event()

        def communicate(self) -> tuple[str, str]:
            if self.returncode == 0:
                self.told.wait(20)
            return "", ""

        def terminate(self) -> None:
            self.told.set()

    pretend(monkeypatch, Slow)
    started = time.monotonic()
    assert certify.main(command_line(dataset, tmp_path / "c", *SOME)) == 1
    assert time.monotonic() - started < 15
    assert len(begun) <= 2


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        (lambda: str(WriteError(Path("x.pt"), 7, OSError(errno.ENOSPC, "full"))), "bfloat16"),
        (lambda: f"step 3: expected finite loss. {STOPS}.", "float32"),
    ],
    ids=["full disk", "stop in float32"],
)
def test_run_that_says_nothing_of_the_precision_is_a_failure(
    dataset, tmp_path, trained, monkeypatch, capfd, said, dtype
):
    real = trials.subprocess.Popen

    class Stopped(real):
        def communicate(self) -> tuple[str, str]:
            if f"{dtype}_seed0" not in " ".join(self.command):
                return super().communicate()
            self.returncode = 1
            return said(), ""

    pretend(monkeypatch, Stopped)
    assert certify.main(command_line(dataset, tmp_path / "c", *SOME)) == 1
    assert f"{dtype} seed 0: expected the run to end, it failed" in capfd.readouterr().err
    assert not list((tmp_path / "c").glob("*/stopped.json"))


@pytest.mark.chaos
def test_precision_in_which_training_stops_is_worse(dataset, tmp_path, trained, capfd):
    """Inputs of 1e6 are out of float16's range, and not of float32's."""
    overlay = tmp_path / "loud.json"
    shift = {"_target_": "ShiftIntensityd", "keys": "image", "offset": 1e6}
    overlay.write_text(json.dumps({"transforms_after": [shift]}))
    words = command_line(dataset, tmp_path / "c", "--dtypes", "float16", "--seeds", "2",
                         "--max_consecutive_skips", "2")  # fmt: skip
    words.insert(1, str(overlay))
    assert certify.main(words) == 1
    found = read(tmp_path / "c")
    assert {entry["verdict"] for entry in found["classes"]["float16"].values()} == {WORSE}
    assert "2 skipped steps in a row" in found["runs"]["float16"]["0"]["stopped"]
    assert "float16 seed 1 stopped: step 2" in (tmp_path / "c/certificate.md").read_text()
    trained.clear()
    assert certify.main(words) == 1
    assert trained == []


def test_run_in_another_precision_than_its_name_is_refused(dataset, tmp_path, trained, capfd):
    words = command_line(dataset, tmp_path / "c", *SOME, "--precision#amp", "false")
    assert certify.main(words) == 2
    assert "expected a run in bfloat16, got dtype float32" in capfd.readouterr().err


@pytest.mark.chaos
def test_config_that_a_run_refused_can_be_corrected_in_place(dataset, tmp_path, trained):
    out = tmp_path / "c"
    assert certify.main(command_line(dataset, out, *SOME, "--seed", "3", "--fold", "9")) == 2
    assert certify.main(command_line(dataset, out, *SOME, "--seed", "3")) == 0


def test_interrupted_certificate_leaves_no_process_behind(dataset, tmp_path, monkeypatch, capfd):
    """Processes that wait stand for runs."""
    begun = tmp_path / "begun"
    begun.mkdir()
    waits = f"import os, time; open(f'{begun}/{{os.getpid()}}', 'w'); time.sleep(100)"

    def start(command, **settings):
        return subprocess.Popen([sys.executable, "-S", "-c", waits], **settings)

    monkeypatch.setattr(trials, "subprocess", SimpleNamespace(Popen=start, PIPE=subprocess.PIPE))
    monkeypatch.chdir(REPOSITORY)
    words = command_line(dataset, tmp_path / "c", *SOME, "--jobs", "2")
    monkeypatch.setattr(sys, "argv", ["certify", *words])

    def command():
        warnings.simplefilter("ignore")  # that the module has been imported before
        runpy.run_module("pipeline.commands.certify", run_name="__main__")

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    until = time.monotonic() + 60
    while len(list(begun.iterdir())) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)  # to the command alone, as a scheduler may
    process.join(60)
    assert process.exitcode == 130
    assert "Interrupted; the same command goes on." in capfd.readouterr().err
    assert len(list(begun.iterdir())) == 2  # none was begun after
    for file in begun.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.name), 0)


@pytest.mark.chaos
def test_interrupted_certificate_leaves_no_run_behind(dataset, tmp_path):
    words = command_line(dataset, tmp_path / "c", *SOME, "--jobs", "2", "--steps_per_epoch", "900")
    words += ["--checkpoint_every", "3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.commands.certify", *words],
        cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while len({path.parent for path in (tmp_path / "c").glob("*/checkpoints/*.pt")}) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # to the command alone, as a scheduler may
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Interrupted; the same command goes on." in error
    assert "Traceback" not in error
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert len(list((tmp_path / "c").glob("*_seed*"))) == 2  # none was begun after


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dtypes fp16", "got 'fp16'. Did you mean 'float16'"),
        ("--dtypes=5", "got 5. "),
        ("--dtypes=null", "got None. "),
        ("--dtypes float32", "--dtypes: expected one to compare with float32"),
        ("--dtypes", "--dtypes: expected one to compare with float32"),
        ("--seeds 1", "--seeds: expected at least 2"),
        ("--margin 0", "--margin: expected a difference of Dice"),
        ("--margin big", "--margin: expected a difference of Dice"),
        ("--jobs 0", "--jobs: expected at least 1"),
        ("--seed x", "seed: expected int"),
        ("--max_epoch 3", "Did you mean 'max_epochs'"),
        ("--amp_dtype float16", "--amp_dtype: expected no value, since a certificate sets it"),
    ],
)
def test_certify_mistake_is_one_line(words, message, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    out = ["--output_dir", str(tmp_path / "c")]
    assert certify.main(["configs/amp.json", *out, *words.split()]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_certify_without_config_is_one_line(capfd):
    assert certify.main(["--seeds", "2"]) == 2
    assert "expected a config file, got none" in capfd.readouterr().err


def test_certify_leaves_tf32_out_on_a_cpu(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = ["configs/amp.json", "--output_dir", str(tmp_path / "c"), "--device", "cpu"]
    plan = certify.make_plan(words)
    assert plan.dtypes == ["float16", "bfloat16"]
    assert "tf32 is left out" in capfd.readouterr().out
    assert plan.run_overrides("float16", 4)["seed"] == 4
    assert plan.overrides["val_interval"] == 6  # validated once, with the last weights


# --- the comparison


def test_compare_counts_only_persons_with_a_score_in_the_class():
    persons = {f"c{n}": f"p{n}" for n in range(9)}

    def scores(dice: float) -> list[dict]:
        return [{c: {"a": dice if c == "c0" else None} for c in persons} for _ in range(3)]

    for dice in (0.7, 0.8):
        assert compare(scores(dice), scores(0.8), persons, 0.005)["a"]["verdict"] == UNDECIDED


def test_compare_counts_what_is_found_of_a_class_that_is_not_there():
    persons = {f"c{n}": f"p{n}" for n in range(20)}
    reference = [{c: {"a": 0.8 if n < 10 else None} for n, c in enumerate(persons)}] * 2
    variant = [{c: {"a": 0.8 if n < 10 else 0.0} for n, c in enumerate(persons)}] * 2
    assert compare(variant, reference, persons, 0.005)["a"]["verdict"] == WORSE
    assert compare(reference, reference, persons, 0.005)["a"]["verdict"] == EQUIVALENT


def test_compare_calls_a_loss_worse_in_a_class_below_ten_margins():
    persons = {f"c{n}": f"p{n}" for n in range(9)}
    lost, found = ([{c: {"a": dice} for c in persons} for _ in range(3)] for dice in (0.0, 0.75))
    assert compare(lost, found, persons, 0.08)["a"]["verdict"] == WORSE


def test_compare_equals_plain_arithmetic():
    rng = np.random.default_rng(0)
    cases, persons = [f"c{n}" for n in range(8)], {f"c{n}": f"p{n // 2}" for n in range(8)}
    sides = [
        [{case: {"a": 0.9 + 0.01 * rng.normal(), "b": None} for case in cases} for _ in range(3)]
        for _ in range(2)
    ]
    sides[0][1]["c3"]["a"] = None
    sides[0][2]["c4"]["a"] = sides[1][2]["c4"]["a"] = None  # absent for both: left out
    pairs = [
        (1.0 if sides[0][s][c]["a"] is None else sides[0][s][c]["a"], sides[1][s][c]["a"])
        for s in range(3)
        for c in cases
        if (s, c) != (2, "c4")
    ]
    found = compare(*sides, persons, 0.05)["a"]
    assert found["delta"] == pytest.approx(sum(a - b for a, b in pairs) / len(pairs))
    assert found["reference"] == pytest.approx(np.mean([reference for _, reference in pairs]))
    assert found["interval"][0] < found["delta"] < found["interval"][1]
    assert found["cases"]["c4"][2] is None
    assert found["verdict"] == EQUIVALENT
    nowhere = compare(*sides, persons, 0.02)["b"]
    assert (nowhere["reference"], nowhere["delta"], nowhere["verdict"]) == (None, None, UNDECIDED)


@pytest.mark.parametrize(
    ("dice", "persons", "expected"),
    [
        (0.8, {"x": "1", "y": "2"}, EQUIVALENT),
        (0.8, {"x": "1", "y": "1"}, UNDECIDED),  # one person is no evidence
        (0.0, {"x": "1", "y": "2"}, UNDECIDED),  # equal, for nothing was learnt
        (0.049, {"x": "1", "y": "2"}, UNDECIDED),
    ],
)
def test_compare_needs_persons_and_something_learnt(dice, persons, expected):
    scores = [{case: {"a": dice} for case in persons} for _ in range(2)]
    assert compare(scores, scores, persons, 0.005)["a"]["verdict"] == expected


def test_markdown_shows_what_is_missing_as_a_dash():
    scores = [{"x": {"a": None}, "y": {"a": None}} for _ in range(2)]
    found = {"cosine": 1.0, "relative_error": 0.0}
    cost = {"step_ms": 1.0, "peak_memory_bytes": None, "gradient": {"first": found, "last": found}}
    certificate = {
        "dataset": "d", "device_name": "n", "versions": {"torch": "1", "monai": "2"}, "steps": 3,
        "seeds": [0, 1], "control_seeds": [2, 3], "num_cases": 2, "num_persons": 2,
        "command": "c", "margin": 0.005, "fixed_batch": {"float32": cost},
        "classes": {"float16": compare(scores, scores, {"x": "1", "y": "2"}, 0.005)},
        "runs": {"float32": {"0": {"skipped_steps": 4}, "1": {"skipped_steps": 0}}},
    }  # fmt: skip
    page = markdown(certificate)
    assert "| float16 | a | - | - | - to - | not enough evidence |" in page
    assert "| 1.0 | - | 4, 0 |" in page


# --- the fixed batch


def test_agreement_equals_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50))
    found = agreement(torch.tensor(a), torch.tensor(b))
    assert found["cosine"] == pytest.approx(a @ b / math.sqrt((a @ a) * (b @ b)))
    assert found["relative_error"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_gradient_equals_that_of_training(monkeypatch):
    """One step of SGD without clipping moves the weights by the learning rate times it."""
    batches = [batch(0), batch(1)]
    trainer = make_trainer(
        Precision("cpu", amp=False), batches, accumulation=2, network=batch_norm_network(),
        grad_clip=0,
    )  # fmt: skip
    before = weights(trainer.network)
    found = gradient(trainer, Precision("cpu", amp=False), batches, before)
    after = weights(trainer.network)
    assert all(torch.equal(after[name], before[name]) for name in before)  # buffers as well
    rate = trainer.lr_scheduler.get_last_lr()[0]
    trainer.run()
    moved = [(before[n] - p).flatten() for n, p in trainer.network.named_parameters()]
    assert torch.allclose(found.float(), torch.cat(moved).detach() / rate, rtol=1e-3, atol=1e-6)


def test_gradient_in_float16_halves_a_scale_that_overflows():
    trainer = make_trainer(Precision("cpu", amp=False), [batch(0)])
    state = weights(trainer.network)
    exact = gradient(trainer, Precision("cpu", amp=False), [batch(0)], state)
    half = Precision("cpu", amp_dtype="float16", init_scale=2.0**40)
    near = gradient(trainer, half, [batch(0)], state)
    assert trainer.precision is half
    assert 0.99 < agreement(near, exact)["cosine"] < 1
    assert 0 < agreement(near, exact)["relative_error"] < 0.1
    assert half.scaler.get_scale() == 2.0**40


def test_gradient_that_is_finite_in_no_scale_agrees_with_nothing():
    trainer = make_trainer(Precision("cpu", amp=False), [batch(0)])
    state = weights(trainer.network)
    found = gradient(trainer, trainer.precision, [batch(0, value=math.inf)], state)
    exact = gradient(trainer, trainer.precision, [batch(0)], state)
    assert agreement(found, exact) == {"cosine": None, "relative_error": None}


def test_step_cost_takes_whole_steps_in_the_precision(monkeypatch):
    monkeypatch.setattr(fixed_batch, "WARM_UP", 1)
    monkeypatch.setattr(fixed_batch, "MEASURED", 4)
    trainer = make_trainer(Precision("cpu", amp=False), [batch(0), batch(1)], accumulation=2)
    before = weights(trainer.network)
    cost = step_cost(trainer, Precision("cpu", amp_dtype="bfloat16"), [batch(0), batch(1)])
    assert trainer.state.output["pred"].dtype == torch.bfloat16
    assert trainer.progress.step == 5
    assert any(not torch.equal(before[n], w) for n, w in weights(trainer.network).items())
    assert 0 < cost["step_ms_quartiles"][0] <= cost["step_ms"] <= cost["step_ms_quartiles"][1]
    assert cost["peak_memory_bytes"] is None


@pytest.mark.gpu
def test_measured_tf32_is_in_force_when_another_precision_was_made_later():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    trainer = make_trainer(Precision("cuda", amp=False), [batch(0)])
    tf32 = Precision("cuda", amp=False, tf32=True)
    Precision("cuda", amp=False)
    trainer.use(tf32)
    assert torch.backends.cudnn.allow_tf32
    trainer.use(Precision("cuda", amp=False))
    assert not torch.backends.cudnn.allow_tf32
