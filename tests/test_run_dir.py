"""Whose a run directory is, when torchrun starts the processes of a launch anew."""

from __future__ import annotations

import pytest

from pipeline.errors import InputError
from pipeline.lifecycle.run_directory import RunDirectory


@pytest.fixture
def launch(monkeypatch):
    """Become a process of the launch of a name; `None`: of none."""

    def become(name: str | None) -> None:
        for key, value in (("TORCHELASTIC_RUN_ID", name), ("RANK", "0")):
            monkeypatch.setenv(key, value) if name else monkeypatch.delenv(key, raising=False)

    return become


def begin(path, resume):
    """Take the directory as a run does, and leave it as one that was killed."""
    directory = RunDirectory(path, resume)
    directory.require_usable()
    directory.lock()
    (path / "run.json").write_text('{"fingerprint": ""}')
    (path / "models").mkdir(exist_ok=True)
    (path / "configs").mkdir(exist_ok=True)
    (path / "configs" / "train.json").touch()
    directory.release()
    return directory


def test_restart_of_a_launch_goes_on_with_what_it_began(launch, tmp_path):
    launch("a")
    assert begin(tmp_path / "r", False).resume is False
    assert begin(tmp_path / "r", False).resume == "auto"


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("none", "none"), (None, "a")])
def test_another_launch_refuses_what_is_there(launch, tmp_path, first, second):
    """torchrun calls every launch `none` that is given no name."""
    launch(first)
    begin(tmp_path / "r", False)
    launch(second)
    for _ in range(2):  # a restart of it as well
        with pytest.raises(InputError, match="expected an empty directory with resume=false"):
            begin(tmp_path / "r", False)


def test_refusal_for_want_of_a_run_stays_one(launch, tmp_path):
    launch("a")
    for _ in range(2):
        with pytest.raises(InputError, match="resume: expected a run with a checkpoint"):
            begin(tmp_path / "r", True)
    assert not (tmp_path / "r").exists()


def test_launch_that_came_to_its_end_is_over(launch, tmp_path):
    launch("a")
    begin(tmp_path / "r", False).forget_launch()
    with pytest.raises(InputError, match="expected an empty directory with resume=false"):
        begin(tmp_path / "r", False)
