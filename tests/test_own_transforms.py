"""Transforms of the user's own in preprocessing: what parts image and label, or is random.

All through commands: no test here knows a module of the package by its path.
"""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def train_with(train, tmp_path):
    """Train with a transform of one's own: `train_with(key, transform)` → status, what was said."""

    def call(key, *transforms, **changes):
        overlay = tmp_path / "mine.json"
        overlay.write_text(json.dumps({key: list(transforms)}))
        return train(tmp_path / "r", overlay, cache_dir=str(tmp_path / "cache"), **changes)

    return call


@pytest.mark.parametrize(
    ("key", "transform"),
    [
        ("transforms_before", {"_target_": "Resized", "spatial_size": [16, 16, 16]}),
        ("transforms_after", {"_target_": "Resized", "spatial_size": [16, 16, 16]}),
        ("transforms_before", {"_target_": "Flipd", "spatial_axis": 0}),
        ("transforms_after", {"_target_": "Flipd", "spatial_axis": 0}),
        ("transforms_before", {"_target_": "Rotate90d"}),
        ("transforms_after", {"_target_": "CenterSpatialCropd", "roi_size": [8, 8, 8]}),
    ],
    ids=str,
)
def test_transform_that_parts_image_and_label_is_refused(train_with, tmp_path, key, transform):
    status, told = train_with(key, {**transform, "keys": "image"})
    assert status == 2
    line = told.strip().splitlines()[-1]
    assert f": {key}: expected image and label on one grid after {transform['_target_']}" in line
    assert line.startswith("tiny_00")
    assert "Traceback" not in told
    assert not (tmp_path / "r/models").exists() or not list((tmp_path / "r/models").iterdir())


@pytest.mark.parametrize(
    ("key", "keys"), [("transforms_before", "image"), ("transforms_after", ["image", "label"])]
)
def test_random_transform_is_refused_wherever_it_is(train_with, key, keys):
    flip = {"_target_": "RandFlipd", "keys": keys, "prob": 0.5}
    for transform in (
        flip,
        {"_target_": "Compose", "transforms": [{"_target_": "Identityd", "keys": "image"}, flip]},
        {"_target_": "OneOf", "transforms": [flip, flip]},
    ):
        status, told = train_with(key, transform)
        assert status == 2
        line = told.strip().splitlines()[-1]
        name = "OneOf" if transform["_target_"] == "OneOf" else "RandFlipd"
        assert f"{key}: expected a transform that is not random, got {name}." in line
        assert "Traceback" not in told


@pytest.mark.parametrize("key", ["transforms_before", "transforms_after"])
def test_transform_of_both_or_of_intensities_trains(train_with, key):
    """With the arguments that the refusal of one key advises."""
    both = {"keys": ["image", "label"], "allow_missing_keys": True}
    status, told = train_with(
        key,
        {"_target_": "Flipd", "spatial_axis": 0, **both},
        {"_target_": "ScaleIntensityd", "keys": "image"},
    )
    assert status == 0, told
