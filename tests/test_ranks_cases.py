"""Cases divided among ranks: their cache, their validation, their scores and their prediction."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import further, make_dataset, write_case
from ignite.engine import Events
from in_ranks import in_ranks
from torch import nn
from torch.utils.data import DataLoader

from pipeline import distributed
from pipeline.data import cache as cache_module
from pipeline.data.cache import CachedDataset, CaseSampler, VolumeCache
from pipeline.data.dataset import load_cases
from pipeline.data.input_images import list_images
from pipeline.errors import InputError
from pipeline.evaluation import final_scores
from pipeline.evaluation.final_scores import Scoring
from pipeline.evaluation.metrics import MeanDice
from pipeline.precision import Precision
from pipeline.prediction.predict_files import Prediction
from pipeline.prediction.segmenter import PredictionError, Segmenter
from pipeline.prediction.sliding_window import SlidingWindow
from pipeline.progress_bar import ProgressBar
from pipeline.training.evaluator import MixedPrecisionEvaluator
from transforms.preprocess import ValidationPreprocessing, preprocessing

NAMES = ["background", "dim", "bright"]
SIZES = (1, 2, 3)


@pytest.fixture(scope="module")
def cases(dataset):
    """All six cases, which no test changes."""
    found = load_cases(dataset, num_folds=3)
    return sorted([*found.train, *found.validation], key=lambda case: case["case_id"])


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file's content, by its path from the folder."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def ids(cases) -> list[str]:
    return [case["case_id"] for case in cases]


# ---- the cache


class Counted:
    """Stands for preprocessing: notes the cases it is asked for, and refuses some."""

    def __init__(self, refused=()):
        self.seen, self.refused = [], refused

    def __call__(self, case):
        self.seen.append(case["case_id"])
        if case["case_id"] in self.refused:
            raise InputError(f"{case['case_id']}: expected a volume, got noise. Leave it out.")
        number = int(case["case_id"].rpartition("_")[2])
        return {"image": np.full((1, 9, 8, 7), number, dtype=np.float32)}


def fill(folder: Path, cases, *, folders: int = 1, limit_bytes: int = 10**9, **counted: Any):
    """Cases that this rank made, and the first voxel of each case's entry."""
    made = Counted(**counted)
    place = folder / f"cache_{distributed.rank() % folders}"
    cached = VolumeCache(place, limit_bytes, {}).fill(cases, made)
    return made.seen, [float(cached_image(cached, n)[0, 0, 0, 0]) for n in range(len(cases))]


def cached_image(cached, number):
    with cached.open(number) as entry:
        return entry["image"][:].numpy()


@pytest.mark.parametrize("size", SIZES)
def test_each_entry_is_made_by_one_rank(cases, tmp_path, size):
    results = in_ranks(fill, tmp_path, cases, size=size)
    made = [case_id for seen, _ in results for case_id in seen]
    assert sorted(made) == ids(cases)
    assert {len(seen) for seen, _ in results} == {len(cases) // size}
    assert [voxels for _, voxels in results] == [[1, 2, 3, 4, 5, 6]] * size
    again = in_ranks(fill, tmp_path, cases, size=size)
    assert [seen for seen, _ in again] == [[]] * size


def test_ranks_of_two_nodes_fill_both_caches_and_divide_each(cases, tmp_path):
    results = in_ranks(fill_of_nodes, tmp_path, cases, size=4)
    assert [voxels for _, voxels in results] == [[1, 2, 3, 4, 5, 6]] * 4
    for node in (0, 1):
        made = [case_id for seen, _ in results[node::2] for case_id in seen]
        assert sorted(made) == ids(cases)
        assert len(list((tmp_path / f"cache_{node}").glob("*.safetensors"))) == len(cases)


def fill_of_nodes(folder, cases):
    return fill(folder, cases, folders=2)


def test_rank_whose_cache_is_full_makes_nothing(cases, tmp_path):
    for n in (0, 1):  # node 0 has the first three, node 1 has all
        VolumeCache(tmp_path / f"cache_{n}", 10**9, {}).fill(cases[: 3 + 3 * n], Counted())
    (first, _), (second, _) = in_ranks(fill_of_nodes, tmp_path, cases)
    assert sorted(first) == ids(cases[3:])
    assert second == []


def changed_on_others(folder, cases, change, **given):
    """`fill`, of other cases on all ranks but the first."""
    return fill(folder, change(cases) if distributed.rank() else cases, **given)


def refusals(results) -> list[str]:
    """What rank 0 tells; the others are told to be silent."""
    assert {type(result) for result in results} == {InputError}
    assert [error.is_told for error in results] == [False] + [True] * (len(results) - 1)
    assert len({error.faults for error in results}) == 1
    return list(results[0].faults)


def test_ranks_with_another_file_are_refused_by_its_case(cases, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "copy")
    copies = load_cases(tmp_path / "copy", num_folds=3)
    copies = sorted([*copies.train, *copies.validation], key=lambda case: case["case_id"])
    in_ranks(changed_on_others, tmp_path, cases, lambda _: copies)  # the same bytes elsewhere
    write_case(tmp_path / "copy", "tiny_003", seed=99)
    shutil.rmtree(tmp_path / "cache_0")
    (line,) = refusals(in_ranks(changed_on_others, tmp_path, cases, lambda _: copies))
    assert line.startswith("rank 1 on ")
    assert line.endswith(
        ": tiny_003: expected the files that rank 0 has, got others. "
        "Give all ranks the same dataset_dir."
    )
    assert not list((tmp_path / "cache_0").glob("*.safetensors"))


def test_cases_that_other_ranks_lack_or_have_beside_are_named(cases, tmp_path):
    lines = refusals(in_ranks(changed_on_others, tmp_path, cases[1:], lambda all_: all_[:-1]))
    assert [line.split(": ", 1)[1] for line in lines] == [
        "tiny_006: expected the files that rank 0 has, got none. "
        "Give all ranks the same dataset_dir."
    ]
    lines = refusals(in_ranks(changed_on_others, tmp_path, cases, lambda all_: all_[::-1]))
    assert "expected the cases in the order of rank 0, got another" in lines[0]


def test_of_many_cases_that_differ_ten_are_named(cases, tmp_path):
    many = [{**cases[0], "case_id": f"case_{n:02d}"} for n in range(14)]

    def change(all_):
        return [{**case, "session": 1} for case in all_]

    lines = refusals(in_ranks(changed_on_others, tmp_path, many, change))
    assert [line.split(": ")[1] for line in lines[:-1]] == ids(many[:10])
    assert lines[-1].endswith(": and 4 more")


def test_ranks_with_another_library_are_refused_by_its_name(cases, tmp_path):
    def change(all_):
        real = cache_module.importlib.metadata.version
        cache_module.importlib.metadata.version = lambda name: (
            "0.1" if name == "monai" else real(name)
        )
        return all_

    (line,) = refusals(in_ranks(changed_on_others, tmp_path, cases, change))
    assert "monai: expected version 1." in line
    assert "which rank 0 has, got 0.1. " in line


def test_file_that_one_rank_cannot_read_ends_all(cases, tmp_path):
    def change(all_):
        return [*all_[:2], {**all_[2], "image": str(tmp_path / "no.nii.gz")}, *all_[3:]]

    (line,) = refusals(in_ranks(changed_on_others, tmp_path, cases, change, size=3))
    assert ": tiny_003: expected files that can be read, got: " in line


@pytest.mark.parametrize(("refused", "whose"), [("tiny_001", ""), ("tiny_004", "rank 1 on ")])
def test_case_that_one_rank_cannot_preprocess_ends_all(cases, tmp_path, refused, whose):
    lines = refusals(in_ranks(fill_but, tmp_path, cases, refused))
    assert len(lines) == 1
    assert lines[0].startswith(whose)
    assert lines[0].endswith(f"{refused}: expected a volume, got noise. Leave it out.")


def fill_but(folder, cases, refused):
    return fill(folder, cases, refused=[refused])


def test_limit_counts_what_the_other_ranks_made(cases, tmp_path):
    in_ranks(fill, tmp_path, cases)
    sizes = [path.stat().st_size for path in (tmp_path / "cache_0").glob("*.safetensors")]
    shutil.rmtree(tmp_path / "cache_0")

    def fill_within(limit_bytes):
        return fill(tmp_path, cases, limit_bytes=limit_bytes)

    lines = refusals(in_ranks(fill_within, sum(sizes) - 1))  # enough for what each makes
    assert lines[0].startswith("cache_limit_bytes: expected room for the 6 cases of this run")
    assert [seen for seen, _ in in_ranks(fill_within, sum(sizes))] == [[], []]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_is_shown_by_the_first_rank_alone():
    def shown():
        distributed.all_gather_object(None)  # before one ends, all have met
        terminal = Terminal()
        list(ProgressBar(range(3), file=terminal, mininterval=0))
        return bool(terminal.getvalue())

    assert shown()
    assert in_ranks(shown, size=3) == [True, False, False]


# ---- validation


def volumes(num_cases: int) -> list[dict[str, Any]]:
    """Cases in memory whose image is what is predicted."""
    rng = np.random.default_rng(0)
    made = []
    for n in range(num_cases):
        highest = 2 if n % 3 == 1 else 3  # of some, a class is absent
        pred, label = rng.integers(highest, size=(2, 1, 5, 6, 7))
        made.append(
            {
                "case_id": f"case_{n}",
                "image": torch.as_tensor(pred, dtype=torch.float32),
                "label": torch.as_tensor(label),
            }
        )
    return made


def evaluate(num_cases: int, batch_size: int = 1) -> dict[str, Any]:
    """What two evaluations leave, of this rank's share."""
    data = volumes(num_cases)
    sampler = CaseSampler(data)
    evaluator = MixedPrecisionEvaluator(
        Precision("cpu"),
        nn.Identity(),
        val_data_loader=DataLoader(data, batch_size=batch_size, sampler=sampler),
        key_val_metric={"mean_dice": MeanDice(NAMES)},
    )
    fired, asked, gathered = [], [], distributed.all_gather_object
    for event in (Events.STARTED, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED):
        evaluator.add_event_handler(event, lambda e: fired.append(e.last_event_name.value))
    distributed.all_gather_object = lambda value: asked.append(value) or gathered(value)
    predicted = []
    evaluator.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda e: predicted.extend(case["case_id"] for case in e.state.batch),
    )
    for epoch in (3, 5):
        evaluator.run(epoch)
        fired.append(evaluator.state.epoch)
    distributed.all_gather_object = gathered
    state = evaluator.state
    told = {
        "metrics": state.metrics,
        "details": state.metric_details,
        "best": [state.best_metric, state.best_metric_epoch],
        "epoch_length": state.epoch_length == len(evaluator.data_loader),
        "fired": fired,
        "asked": len(asked),
    }
    # as text, in which every bit of a float shows, and NaN equals NaN
    return {"told": json.dumps(told), "predicted": predicted, "length": len(sampler)}


@pytest.mark.parametrize(("num_cases", "batch_size"), [(7, 1), (7, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("size", SIZES)
def test_evaluation_tells_all_ranks_the_same_bits_as_one(num_cases, batch_size, size):
    alone = evaluate(num_cases, batch_size)
    results = in_ranks(evaluate, num_cases, batch_size, size=size)
    assert {result["told"] for result in results} == {alone["told"]}
    expected = [f"case_{n}" for n in range(num_cases)]
    for rank, result in enumerate(results):
        assert result["predicted"] == 2 * expected[rank::size]
        assert result["length"] == len(expected[rank::size])
    told = json.loads(alone["told"])
    assert list(told["details"]["mean_dice"]["cases"]) == expected
    assert told["fired"] == [
        word
        for epoch in (3, 5)
        for word in ("started", "epoch_started", "epoch_completed", "completed", epoch)
    ]
    assert told["asked"] == 2 * 2  # each time whether there are cases, and what they scored


def test_evaluation_without_any_case_does_nothing():
    for result in in_ranks(evaluate, 0):
        told = json.loads(result["told"])
        assert (told["metrics"], told["details"], told["fired"]) == ({}, {}, [0, 0])


def test_mean_dice_may_be_computed_by_one_rank_alone():
    def compute():
        distributed.all_gather_object(None)  # before one ends, all have met
        metric = MeanDice(NAMES)
        metric.cases = {"a": np.array([0.25, 0.5])}
        return metric.compute() if distributed.rank() == 1 else None

    assert in_ranks(compute) == [None, 0.375]


# ---- scores


def small_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Conv3d(1, 3, 3, padding=1)
    nn.init.normal_(network.weight, std=0.5)
    return network


class Heard(logging.Handler):
    """Lines that would be told."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def heard():
    """Lines of the log of at least INFO, in order."""
    handler, logger = Heard(), logging.getLogger("pipeline")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Fussy(Segmenter):
    """Refuses the case whose first voxel is of a given value."""

    refused: float | None = None
    asked = 0

    def __call__(self, image, **values):
        self.asked += 1
        if float(image.flatten()[0]) == self.refused:
            raise PredictionError("expected finite logits in float32, got NaN.")
        return super().__call__(image, **values)


def score(folder: Path, dataset: Path, same_weights: bool, set_up=lambda: None):
    """Score a run that is made here; messages of this rank, and how often it predicted."""
    final_scores.Segmenter = Fussy  # in this process, which ends
    validation_cases, test_cases = split_of(dataset)
    if distributed.is_main():
        (folder / "models").mkdir(parents=True)
        (folder / "scores/old").mkdir(parents=True)
        (folder / "scores/old/metrics.csv").touch()
        torch.save(small_network(1).state_dict(), folder / "models/model.pt")
        torch.save(small_network(2).state_dict(), folder / "models/last.pt")
        if same_weights:
            shutil.copy(folder / "models/model.pt", folder / "models/last.pt")
    distributed.all_gather_object(None)
    transform = ValidationPreprocessing(preprocessing([1, 1, 1]))
    validation = CachedDataset(
        validation_cases, transform, VolumeCache(dataset.parent / "cache", 10**9, {})
    )
    network = small_network(0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    work = Scoring(
        run_dir=folder,
        is_held=True,
        cases=SimpleNamespace(validation=validation_cases, test=test_cases),
        network=network,
        precision=Precision("cpu"),
        inferer=SlidingWindow([16, 16, 8], 3),
        validation=validation,
        preprocessing=preprocessing([1, 1, 1]),
        class_names=NAMES,
    )
    work.segmenter.refused = float(validation[1]["image"].flatten()[0])
    set_up()
    with heard() as lines:
        work.run()
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    return lines, work.segmenter.asked


def split_of(dataset: Path):
    """Five cases that validate, and two of a test."""
    found = load_cases(dataset, num_folds=2, test_fraction=0.2)
    validation = [*found.train, *found.validation]
    assert (len(validation), len(found.test)) == (5, 2)
    return validation, found.test


@pytest.fixture(scope="module")
def to_score(tmp_path_factory) -> Path:
    """Cases of which one cannot be scored: its label has a class that nobody named."""
    folder = make_dataset(tmp_path_factory.mktemp("scored") / "data", 7)
    first = split_of(folder)[0][0]
    label = nib.load(first["label"])
    voxels = np.asarray(label.dataobj).copy()
    voxels[0, 0, 0] = 7
    nib.save(nib.Nifti1Image(voxels, label.affine), first["label"])
    return folder


@pytest.mark.parametrize("same_weights", [False, True])
@pytest.mark.parametrize("size", [further(2), 3])
def test_scores_are_those_of_one_rank(to_score, tmp_path, same_weights, size):
    alone, several = tmp_path / "1/r", tmp_path / "n/r"
    ((expected, asked),) = in_ranks(score, alone, to_score, same_weights, size=1)
    results = in_ranks(score, several, to_score, same_weights, size=size)
    files = files_in(alone / "scores")
    assert files_in(several / "scores") == files
    assert {Path(name).parent.name for name in files} == {
        f"{split}_{weights}" for split in ("validation", "test") for weights in ("best", "last")
    }
    assert files["validation_best/metrics.csv"].count(b"\n") == 1 + 3 * 2
    summary = json.loads((alone / "scores/validation_last/summary.json").read_text())
    first, second, *_ = split_of(to_score)[0]
    assert list(summary["refused"]) == [first["case_id"], second["case_id"]]
    assert [lines for lines, _ in results] == [expected] + [[]] * (size - 1)
    assert sum(count for _, count in results) == asked == (7 if same_weights else 14)
    assert min(count for _, count in results) > 0


def hide_best():
    """On the second rank the best weights are seen late."""
    if distributed.rank() == 1:
        real = final_scores.Path.is_file
        calls: list[Path] = []

        def is_file(path):
            late = path.name == "model.pt" and not calls
            calls.append(path)
            return False if late else real(path)

        final_scores.Path.is_file = is_file


def test_which_weights_there_are_is_decided_by_rank_0(to_score, tmp_path):
    in_ranks(score, tmp_path / "a", to_score, True, size=1)
    in_ranks(score, tmp_path / "b", to_score, True, hide_best)
    assert files_in(tmp_path / "b/scores") == files_in(tmp_path / "a/scores") != {}


@pytest.mark.parametrize(
    ("what", "rank"), [("write_scores", 0), ("save_like", 0), ("save_like", 1)]
)
def test_disk_that_is_full_for_one_rank_ends_all(to_score, tmp_path, what, rank):
    def fill_disk():
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        if distributed.rank() == rank:
            setattr(final_scores, what, full)

    results = in_ranks(score, tmp_path / "r", to_score, False, fill_disk)
    assert all(isinstance(result, SystemExit) and result.code == 1 for result in results)


# ---- prediction


def predict_images(images: Path, out: Path, set_up=lambda work: None, **values):
    """How it ended, what was written to stderr, the log, and how often ranks were left."""
    left = []
    distributed.destroy = lambda: left.append(1)  # the group is ended by `in_ranks`
    inferer = SlidingWindow([16, 16, 8], 3)
    work = Prediction(
        list_images(images, 1),
        preprocessing([1, 1, 1], keys=("image",)),
        Segmenter([small_network(1)], Precision("cpu"), inferer),
        str(out.parent),
        out.name,
        in_channels=1,
        **values,
    )
    set_up(work)
    end: BaseException | None = None
    with contextlib.redirect_stderr(io.StringIO()) as told, heard() as lines:
        try:
            work.run()
        except BaseException as error:
            end = error
    return SimpleNamespace(
        end=getattr(end, "code", type(end)), told=told.getvalue(), lines=lines, left=len(left)
    )


def summary_of(result) -> list[str]:
    """What is printed at the end, after the lines of the log."""
    lines = result.told.splitlines()
    return lines[[line.startswith("Not predicted") for line in lines].index(True) :]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Seven images, the second, fourth and fifth of them broken."""
    root = tmp_path_factory.mktemp("images")
    for n in range(7):
        write_case(root, f"case_{n}", seed=n)
    for n in (1, 3, 4):
        path = root / f"imagesTr/case_{n}.nii.gz"
        path.write_bytes(path.read_bytes()[: -200 - n])
    return root / "imagesTr"


@pytest.mark.parametrize("size", [2, 3])
def test_prediction_is_that_of_one_rank(images, tmp_path, size):
    (alone,) = in_ranks(predict_images, images, tmp_path / "1/out", size=1)
    results = in_ranks(predict_images, images, tmp_path / "n/out", size=size)
    named = {path.name: path.read_bytes() for path in (tmp_path / "1/out").iterdir()}
    assert sorted(named) == [f"case_{n}.nii.gz" for n in (0, 2, 5, 6)]
    assert {path.name: path.read_bytes() for path in (tmp_path / "n/out").iterdir()} == named
    assert summary_of(alone)[0] == "Not predicted: 3 of 7"
    assert summary_of(results[0]) == summary_of(alone)
    assert [result.told for result in results[1:]] == [""] * (size - 1)
    assert [result.end for result in results] == [1] * size
    assert [result.left for result in results] == [1] * size
    counts = [line for result in results for line in result.lines if "cases predicted" in line]
    assert counts == [f"4 of 7 cases predicted, in {tmp_path}/n/out"]
    assert counts[0] in results[0].lines
    of_cases = [line for result in results for line in result.lines if line.startswith("case_")]
    assert sorted(of_cases) == [line for line in alone.lines if line.startswith("case_")]


def test_prediction_without_a_fault_ends_well_on_all_ranks(images, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(images / "case_0.nii.gz", tmp_path / "one")  # and nothing for the second rank
    results = in_ranks(predict_images, tmp_path / "one", tmp_path / "out")
    assert [(result.end, result.told, result.left) for result in results] == [
        (type(None), "", 1)
    ] * 2


def test_strict_stops_each_rank_at_its_first_fault(images, tmp_path):
    def work(folder):
        return predict_images(images, folder / "out", strict=True)

    results = in_ranks(work, tmp_path)
    # of cases 0, 2, 4, 6 and of 1, 3, 5
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "case_0.nii.gz", "case_2.nii.gz",
    ]  # fmt: skip
    assert [result.end for result in results] == [1, 1]
    listed = [line.split(":")[0].strip() for line in summary_of(results[0])]
    assert listed == ["Not predicted", "case_1", "case_4"]
    assert results[1].told == ""


def test_output_that_one_rank_refuses_is_refused_once(images, tmp_path):
    def refuse_on_the_second(work):
        if distributed.rank() == 1:
            work.output_dir = images

    results = in_ranks(predict_images, images, tmp_path / "out", refuse_on_the_second)
    assert [(result.end, result.left) for result in results] == [(2, 1)] * 2
    (line,) = results[0].told.splitlines()
    assert line.startswith("rank 1 on ")
    assert "output_dir: expected another folder than that of the images" in line
    assert results[1].told == ""
    assert not list((tmp_path / "out").iterdir())


def test_interrupted_prediction_waits_for_no_other_rank(images, tmp_path):
    def interrupt_the_first(work):
        predict_one = work._predict

        def until_third(case):
            if case["case_id"] == "case_6":
                raise KeyboardInterrupt
            predict_one(case)

        if distributed.rank() == 0:
            work._predict = until_third

    first, second = in_ranks(predict_images, images, tmp_path / "out", interrupt_the_first)
    assert first.end is KeyboardInterrupt
    assert summary_of(first)[0] == "Not predicted: 1 of 4"  # of its own
    assert f"2 of 4 cases predicted, in {tmp_path}/out" in first.lines
    assert second.end == 1  # by the connection that the first has closed
    assert second.told == ""
