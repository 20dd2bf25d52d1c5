"""Durable files: the order of system calls, damaged checkpoints, and disks that refuse."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from engines import in_mode, make_trainer

from pipeline.files import WriteError, make_directory, replace_file, save, write_csv, write_json
from pipeline.training.checkpoint import CheckpointHandler, checkpoints, newest_checkpoint


def save_checkpoints(run_dir: Path, *names: str, keep: int = 2) -> Path:
    """Save checkpoints as a trainer does, in a directory that is returned."""
    handler = CheckpointHandler(run_dir, None, keep=keep)
    make_directory(handler.directory)
    for name in names:
        content = {"weights": torch.arange(400.0)}
        handler._save(make_trainer(in_mode("float32"), []), content, handler.directory / name)
    return handler.directory


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The calls that reach the disk, as name and file name, in order."""
    made: list[tuple[str, str]] = []
    paths: dict[int, str] = {}
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "replace", "unlink")}

    def opened(path, *args, **kwargs):
        file = real["open"](path, *args, **kwargs)
        paths[file] = Path(path).name
        return file

    def noted(name, place):
        def call(*args, **kwargs):
            made.append((name, paths.get(args[place]) or Path(args[place]).name))
            return real[name](*args, **kwargs)

        return call

    monkeypatch.setattr(os, "open", opened)
    for name, place in (("write", 0), ("fsync", 0), ("replace", 1), ("unlink", 0)):
        monkeypatch.setattr(os, name, noted(name, place))
    return made


def check_order(calls: list[tuple[str, str]], *wanted: tuple[str, str]) -> None:
    assert [call for call in calls if call in wanted] == [*wanted]


@pytest.mark.parametrize("write", [save, lambda value, path: write_json(path, value)])
def test_file_is_on_the_disk_before_it_has_its_name(tmp_path, calls, write):
    write({"a": 1}, tmp_path / "file")
    assert calls[0] == ("write", "file.tmp")
    check_order(calls, ("fsync", "file.tmp"), ("replace", "file"), ("fsync", tmp_path.name))


def test_checkpoint_is_on_the_disk_before_an_older_one_is_removed(tmp_path, calls):
    save_checkpoints(tmp_path / "run", *(f"step_{n}.pt" for n in (1, 2, 3)))
    after = calls[calls.index(("replace", "step_3.pt")) :]
    check_order(calls, ("fsync", tmp_path.name), ("fsync", "run"), ("write", "step_1.pt.tmp"))
    check_order(after, ("replace", "step_3.pt"), ("fsync", "checkpoints"), ("unlink", "step_1.pt"))


def test_two_steps_at_least_are_kept_and_the_latest_of_each(tmp_path):
    names = ["step_1.pt", "step_2_pending.pt", "step_2.pt", "step_3_pending.pt", "step_3.pt"]
    folder = save_checkpoints(tmp_path, *names, keep=0)
    assert [path.name for path in checkpoints(folder)] == ["step_2.pt", "step_3.pt"]


@pytest.mark.parametrize("damage", ["truncated", "bit", "emptied"])
def test_damaged_newest_is_set_aside_and_the_one_before_is_used(tmp_path, caplog, damage):
    folder = save_checkpoints(tmp_path, "step_1_pending.pt", "step_1.pt", "step_2.pt")
    newest = folder / "step_2.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes({"truncated": data[:-100], "bit": data, "emptied": b""}[damage])
    for _ in range(2):
        assert newest_checkpoint(folder).name == "step_1.pt"
        assert not newest.exists()
        assert (folder / "step_2.pt.damaged").exists()
    assert "step_2.pt IS DAMAGED" in caplog.text
    save_checkpoints(tmp_path, "step_2.pt")
    assert newest_checkpoint(folder).name == "step_2.pt"


@pytest.mark.parametrize("name", ["write", "fsync", "replace"])
def test_refused_write_leaves_what_was_there_and_says_size_and_path(tmp_path, monkeypatch, name):
    folder = save_checkpoints(tmp_path, "step_1.pt")

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, refuse)
        with pytest.raises(WriteError, match=r"step_2.pt: expected to write \d+ bytes, got: No"):
            save({}, folder / "step_2.pt")
    assert not list(folder.glob("*.tmp"))
    assert newest_checkpoint(folder).name == "step_1.pt"


def test_file_larger_than_the_room_leaves_the_old_one_and_says_path_and_size(tmp_path):
    """The limit on the size of files stands for a full disk."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    path, cases = tmp_path / "map.nii", ["x" * 1000] * 100
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = []
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(WriteError) as caught, replace_file(path) as file:
            file.write_bytes(bytes(64_000))
        told.append(str(caught.value))
        with pytest.raises(WriteError) as caught:
            write_csv(tmp_path / "volumes.csv", ["case"], [{"case": case} for case in cases])
        told.append(str(caught.value))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert told[0].startswith(f"{path}: expected to write more than 20000 bytes, got: File too lar")
    assert told[1].startswith(f"{tmp_path / 'volumes.csv'}: expected to write 100105 bytes, got: ")
    assert all("Make room, or choose another output_dir." in line for line in told)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
