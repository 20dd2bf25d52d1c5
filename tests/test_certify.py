"""The precision certificate: what it trains and judges, and how it goes on."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY, TINY, make_dataset

from pipeline import run
from pipeline.commands import certify
from pipeline.config.keys import PRECISIONS
from pipeline.errors import STOPS
from pipeline.evaluation import certificate
from pipeline.evaluation.certificate import CONTROL, UNDECIDED, PrecisionSweep
from pipeline.evaluation.statistics import EQUIVALENT, WORSE

SOME = ["--dtypes", "bfloat16", "--seeds", "2", "--margin", "0.003"]


def command_line(dataset: Path, out: Path, *words: str) -> list[str]:
    values = {"dataset_dir": str(dataset), "output_dir": str(out), **TINY}
    values.pop("val_interval")
    pairs = ((f"--{k}", v if isinstance(v, str) else json.dumps(v)) for k, v in values.items())
    return ["configs/amp.json", *(word for pair in pairs for word in pair), *words]


class Finished:
    """Stands for the process of a run."""

    returncode = 0

    def __init__(self, command: list[str], **_: object) -> None:
        self.command = command

    def communicate(self) -> tuple[str, str]:
        return "", ""

    def terminate(self) -> None:
        pass


def pretend(monkeypatch: pytest.MonkeyPatch, process: type[Finished]) -> None:
    monkeypatch.setattr(certificate, "subprocess", SimpleNamespace(Popen=process, PIPE=None))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets runs train in this process, which is faster; their directories, in order."""
    monkeypatch.chdir(REPOSITORY)
    names: list[str] = []

    class InProcess(Finished):
        def communicate(self) -> tuple[str, str]:
            words = self.command[self.command.index("pipeline.run") + 1 :]
            out_dir = words[-words[::-1].index("--output_dir")]  # of those given, the last
            names.append(Path(json.loads(out_dir)).name)
            try:
                self.returncode = run.main(words)
            except SystemExit as end:
                self.returncode = end.code
                return str(end), "refused"
            return "", ""

    pretend(monkeypatch, InProcess)
    return names


def read(out: Path) -> dict:
    return json.loads((out / "certificate.json").read_text(), parse_constant=pytest.fail)


# --- the whole command


def test_certify_trains_compares_and_goes_on_where_it_stopped(
    tmp_path, trained, monkeypatch, capfd
):
    dataset, out = make_dataset(tmp_path / "data", 12), tmp_path / "c"
    words = command_line(dataset, out, *SOME, "--num_folds", "2")
    assert certify.main(words) == 0
    every = ["float32_seed0", "bfloat16_seed0", "float32_seed1", "bfloat16_seed1"]
    assert trained == [*every, "float32_seed2", "float32_seed3"]
    certificate = read(out)
    assert (certificate["seeds"], certificate["control_seeds"]) == ([0, 1], [2, 3])
    assert (certificate["margin"], certificate["dataset"]) == (0.003, "data")
    assert list(certificate["classes"]) == ["bfloat16", CONTROL]
    for name, (kind, seeds) in {"bfloat16": ("bfloat16", "01"), CONTROL: ("float32", "23")}.items():
        means = [
            sum(scores_of(out / f"{precision}_seed{seed}") for seed in of) / 2
            for precision, of in ((kind, seeds), ("float32", "01"))
        ]
        found = certificate["classes"][name]["dim"]
        assert found["difference"] == pytest.approx(means[0] - means[1])
        assert (found["mean_b"], found["num_persons"]) == (pytest.approx(means[1]), 6)
    page = capfd.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")] for line in page.splitlines()]
    assert ["bfloat16", "dim", f"{found['mean_b']:.4f}"] in [cells[1:4] for cells in lines]
    assert ["bfloat16", "0", "bfloat16"] in [cells[1:4] for cells in lines]
    assert (out / "certificate.md").read_text() in page

    # finished runs end at once; what was lost is trained again
    before = {path: path.stat().st_mtime_ns for path in out.glob("float32*/models/last.pt")}
    (out / "bfloat16_seed1" / "summary.json").unlink()
    assert certify.main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before

    # a precision that scores lower is worse, and says so in the exit status
    for seed in (0, 1):
        path = out / f"bfloat16_seed{seed}/scores/validation_last/metrics.csv"
        header, *lines = path.read_text().splitlines()
        rows = [",".join([*line.split(",")[:4], "-9", *[""] * 9]) for line in lines]
        path.write_text("\n".join([header, *rows]))
    assert certify.main(words) == 1
    assert WORSE in {entry["verdict"] for entry in read(out)["classes"]["bfloat16"].values()}

    # so is one in which training stops
    class Stopped(Finished):
        def communicate(self) -> tuple[str, str]:
            self.returncode = int("bfloat16_seed" in " ".join(self.command))
            return f"step 3: {STOPS}.", ""

    pretend(monkeypatch, Stopped)
    assert certify.main(words) == 1
    assert (read(out)["stopped"], [*read(out)["classes"]]) == (
        {"bfloat16": "step 3: Training stops."},
        [CONTROL],
    )
    assert "worse: step 3: Training stops." in capfd.readouterr().out

    # one certificate is of one config
    assert certify.main([*words, "--grad_clip", "3", "--overlap", "0.25"]) == 2
    assert "got other values of grad_clip, overlap. Choose" in capfd.readouterr().err


def scores_of(run_dir: Path) -> float:
    """Mean Dice of `dim`."""
    with open(run_dir / "scores/validation_last/metrics.csv", newline="") as file:
        dice = [float(row["dice"]) for row in csv.DictReader(file) if row["class"] == "dim"]
    return sum(dice) / len(dice)


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
            return "what it said", ""

        def terminate(self) -> None:
            self.told.set()

    pretend(monkeypatch, Slow)
    started = time.monotonic()
    with pytest.raises(SystemExit, match=r"float32 seed 0: .*status 3\. .*\nwhat it said"):
        certify.main(command_line(dataset, tmp_path / "c", *SOME))
    assert time.monotonic() - started < 15
    assert len(begun) <= 2


def test_interrupted_certificate_leaves_no_process_behind(dataset, tmp_path, monkeypatch, capfd):
    """Processes that wait stand for runs."""
    begun = tmp_path / "begun"
    begun.mkdir()
    waits = f"import os, time; open(f'{begun}/{{os.getpid()}}', 'w'); time.sleep(100)"

    begin = subprocess.Popen

    def start(command, **settings):
        return begin([sys.executable, "-S", "-c", waits], **settings)

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.chdir(REPOSITORY)
    words = command_line(dataset, tmp_path / "c", *SOME, "--jobs", "2")

    def command():
        sys.exit(certify.main(words))

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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dtypes fp16", "argument --dtypes: invalid choice: 'fp16'"),
        ("--dtypes float32", "--dtypes: expected one to compare with float32"),
        ("--seeds 1", "argument --seeds: expected 2 or more"),
        ("--jobs 0", "argument --jobs: expected 1 or more"),
        ("--max_epoch 3", "Did you mean '--max_epochs'"),
        ("--amp_dtype float16", "--amp_dtype: expected no value, since a certificate sets it"),
    ],
)
def test_certify_mistake_is_told_before_anything_is_made(
    words, message, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(REPOSITORY)
    out = ["--output_dir", str(tmp_path / "c")]
    assert certify.main(["configs/amp.json", *out, *words.split()]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.usefixtures("at_the_root")
def test_certify_leaves_tf32_out_on_a_cpu(tmp_path):
    composed = run.compose_run([], {"output_dir": str(tmp_path / "c"), "device": "cpu"})
    sweep = certificate.plan_sweep(composed, [], {}, [], PRECISIONS, 2, 0.01, 1)
    assert sweep.dtypes == ["float16", "bfloat16"]


# --- the verdicts


@pytest.fixture
def judge(tmp_path):
    """`judge(dice, reference)` → entry of a class, of 2 seeds and so many persons."""

    def make(dice, reference, num_persons=6):
        sweep = PrecisionSweep("d", str(tmp_path), [], ["float16"], [0, 1], [], 0.005)
        for precision, level in (("float16", dice), ("float32", reference)):
            for seed in (0, 1):
                folder = sweep.run_dir((precision, seed)) / "scores/validation_last"
                folder.mkdir(parents=True)
                lines = [
                    f"c{n},p{n},a,{'absent' if level is None else 'scored'},"
                    f"{'' if level is None else level + 1e-4 * (n + seed)}"
                    for n in range(num_persons)
                ]
                content = "\n".join(["case_id,person,class,status,dice", *lines])
                (folder / "metrics.csv").write_text(content)
        return certificate._compare(sweep, [("float16", 0), ("float16", 1)])["a"]

    return make


@pytest.mark.parametrize(
    ("dice", "reference", "num_persons", "expected"),
    [
        (0.8, 0.8, 6, EQUIVALENT),
        (0.801, 0.8, 6, EQUIVALENT),  # a difference, but none that matters
        (0.8, 0.8, 4, UNDECIDED),  # too few persons are no evidence
        (0.049, 0.049, 6, UNDECIDED),  # equal, for nothing was learnt
        (0.7, 0.8, 6, WORSE),
        (0.9, 0.8, 6, UNDECIDED),  # better is not asked for
        (None, None, 6, UNDECIDED),
    ],
)
def test_verdict_of_a_precision(judge, dice, reference, num_persons, expected):
    assert judge(dice, reference, num_persons)["verdict"] == expected
