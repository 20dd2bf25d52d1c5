"""Which configs share their preprocessed cases."""

from __future__ import annotations

import errno
import importlib
import json
import os
from copy import deepcopy
from dataclasses import replace

import pytest
from conftest import REPOSITORY

from pipeline.data.plan import Plan
from pipeline.data.recipe import preprocessing_recipe

AMP = json.loads((REPOSITORY / "configs/amp.json").read_text())
PLAN = Plan([1, 2, 3], False, ["zscore"], [8, 8, 8], [2], ["background", "a"], 1, 2)


def recipe(plan=PLAN, **changes):
    source = deepcopy(AMP)
    for key, value in changes.items():
        node = source
        *above, last = key.split("#")
        for part in above:
            node = node[part]
        node[last] = value
    found = preprocessing_recipe(source, plan)
    assert json.loads(json.dumps(found)) == found
    return found


def test_recipe_has_values_in_place_of_references():
    found = recipe(transforms_after=[{"_target_": "ScaleIntensityd"}])
    expected = {
        "_target_": "transforms.preprocess.preprocessing",
        "spacing": [1, 2, 3],
        "normalization": ["zscore"],
        "crop_empty_borders": False,
        "before": [],
        "after": [{"_target_": "ScaleIntensityd"}],
    }
    assert found["preprocessing"] == expected
    assert found["train#preprocessing"] == expected
    assert found["validate#preprocessing"]["image"] == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": replace(PLAN, spacing=[1, 1, 1])},
        {"plan": replace(PLAN, crop_empty_borders=True)},
        {"plan": replace(PLAN, normalization=["percentile_zscore"])},
        {"preprocessing#spacing": [1, 1, 1]},
        {"transforms_before": [{"_target_": "ScaleIntensityd", "keys": "image"}]},
        {"preprocessing#keys": ["image"]},
        {"train#preprocessing": {"_target_": "ScaleIntensityd"}},
        {"validate#preprocessing#image": {"_target_": "ScaleIntensityd"}},
    ],
)
def test_recipe_differs_with(changes):
    assert recipe(**changes) != recipe()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 5},
        {"roi_size": [8, 8, 8]},
        {"output_dir": "elsewhere"},
        {"dataset_dir": "elsewhere"},
        {"fold": 2},
        {"preprocessing#normalization": ["zscore"]},  # what the plan says anyway
        {"plan": replace(PLAN, class_names=["background", "b"])},
        {"plan": replace(PLAN, roi_size=[16, 16, 16], reasons={"roi_size": "given"})},
    ],
)
def test_recipe_does_not_differ_with(changes):
    assert recipe(**changes) == recipe()


def test_recipe_follows_references_through_others():
    change = {"preprocessing#spacing": "@overlap", "overlap": "@sw_batch_size"}
    assert recipe(**change)["preprocessing"]["spacing"] == AMP["sw_batch_size"]


def test_recipe_has_expressions_with_what_they_use():
    text = "$[s * 2 for s in @overlap] if @plan.in_channels else @lifecycle.run_dir"
    found = recipe(**{"preprocessing#spacing": text})["preprocessing"]["spacing"]
    assert found["expression"] == text
    assert found["uses"]["overlap"] == AMP["overlap"]
    assert found["uses"]["plan"]["in_channels"] == 1
    assert "lifecycle" not in found["uses"]


def test_recipe_differs_when_a_file_of_own_code_differs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "mine_for_recipe.py"
    own = {"transforms_after": [{"_target_": "mine_for_recipe.Mine"}]}
    found = []
    for text in ("class Mine: pass", "class Mine: pass", "class Mine: 'other'"):
        file.write_text(text)
        importlib.invalidate_caches()
        found.append(recipe(**own))
    assert found[0] == found[1] != found[2]


def test_recipe_names_code_of_ours_and_none_of_a_library():
    code = recipe(transforms_after=[{"_target_": "monai.transforms.ScaleIntensityd"}])["code"]
    assert set(code) == {
        "transforms.preprocess.preprocessing",
        "transforms.preprocess.ValidationPreprocessing",
    }


def test_recipe_leaves_a_target_that_is_not_there_to_monai():
    assert recipe(transforms_after=[{"_target_": "nowhere.Nothing"}])["code"] == recipe()["code"]


# ---- in a run


def entries(folder):
    return {path.name for path in folder.glob("*.safetensors")}


def test_runs_share_the_cases_that_they_preprocess_alike(run, tmp_path):
    shared = {"cache_dir": str(tmp_path / "cache")}
    assert run(tmp_path / "a", **shared) == 0
    made = entries(tmp_path / "cache")
    assert len(made) == 6  # four to train on, two to validate on
    times = {name: (tmp_path / "cache" / name).stat().st_ino for name in made}
    assert run(tmp_path / "b", seed=1, **shared) == 0
    assert times == {name: (tmp_path / "cache" / name).stat().st_ino for name in made}
    assert entries(tmp_path / "cache") == made
    assert run(tmp_path / "c", **{**shared, "spacing": [1, 1, 2]}) == 0
    assert len(entries(tmp_path / "cache")) == 12


def test_run_says_its_cache_is_too_small_in_one_line(run, tmp_path, capsys):
    folder = str(tmp_path / "cache")
    assert run(tmp_path / "r", cache_dir=folder, cache_limit_bytes=50_000) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("cache_limit_bytes: expected room for the")


def test_run_says_its_disk_is_full_in_one_line(run, tmp_path, capsys, monkeypatch):
    real = os.replace

    def full(source, target):
        if str(target).endswith(".safetensors"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert run(tmp_path / "r", cache_dir=str(tmp_path / "cache")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("cache_dir: expected to write")
    assert "No space left on device" in line


def test_run_directory_names_the_cache_from_where_it_is(run, tmp_path):
    assert run(tmp_path / "r", cache_dir=str(tmp_path / "cache")) == 0
    saved = json.loads((tmp_path / "r/configs/train.json").read_text())
    assert saved["cache_dir"] == "../cache"
