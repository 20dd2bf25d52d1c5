"""Cases divided among ranks: their cache and their validation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_case
from ignite.engine import Events
from in_ranks import in_ranks
from torch import nn
from torch.utils.data import DataLoader

from pipeline import distributed
from pipeline.data.cache import CachedDataset, CaseSampler, VolumeCache
from pipeline.data.dataset import load_cases
from pipeline.errors import InputError
from pipeline.evaluation.metrics import MeanDice
from pipeline.precision import Precision
from pipeline.training.evaluator import MixedPrecisionEvaluator

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
    cached = CachedDataset(cases, made, VolumeCache(place, limit_bytes, {}))
    return made.seen, [float(cached_image(cached, n)[0, 0, 0, 0]) for n in range(len(cases))]


def cached_image(cached, number):
    return cached.read(number)[0]["image"].numpy()


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
        ": tiny_003: expected what rank 0 has, got something else. Give all ranks the same "
        "dataset_dir and the same versions of monai, torch, numpy, nibabel."
    )
    assert not list((tmp_path / "cache_0").glob("*.safetensors"))


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
    # whichever rank comes to the last entry says so
    assert "cache_limit_bytes: expected room for the 6 cases of this run" in lines[0]
    # the entry that did not fit was not written, unless both ranks wrote their last at once
    assert sum(len(seen) for seen, _ in in_ranks(fill_within, sum(sizes))) <= 1


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
    predicted: list[str] = []
    evaluator.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda e: predicted.extend(case["case_id"] for case in e.state.batch),
    )
    for epoch in (3, 5):
        evaluator.run(epoch)
    state = evaluator.state
    told = {
        "metrics": state.metrics,
        "details": state.metric_details,
        "best": [state.best_metric, state.best_metric_epoch],
        "epoch_length": state.epoch_length == len(evaluator.data_loader),
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


def test_evaluation_without_any_case_does_nothing():
    for result in in_ranks(evaluate, 0):
        told = json.loads(result["told"])
        assert (told["metrics"], told["details"]) == ({}, {})
