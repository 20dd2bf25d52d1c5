"""Durable files: the order of system calls, and what every possible crash leaves."""

from __future__ import annotations

import errno
import itertools
import json
import os
from pathlib import Path

import pytest
import torch

from pipeline.files import MANIFEST, CheckpointStore, WriteError, save, write_json


def content(step: int) -> dict:
    return {"progress": {"step": step}, "weights": torch.full((40,), float(step))}


NAMES = {
    "opened": "open", "written": "write", "synced": "fsync", "replaced": "replace",
    "unlinked": "unlink",
}  # fmt: skip


class Calls(list):
    """The calls that reach the disk, as (name, path, data), in order."""

    def named(self, *wanted: tuple[str, str]) -> list[int]:
        """Places of calls given by name and file name; -1 for one that was not made."""
        made = [(name, Path(path).name) for name, path, _ in self]
        return [made.index(call) if call in made else -1 for call in wanted]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made, paths = Calls(), {}
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "replace", "unlink")}

    def opened(path, flags, *args, **kwargs):
        file = real["open"](path, flags, *args, **kwargs)
        paths[file] = str(path)
        if flags & os.O_CREAT:
            made.append(("truncate" if flags & os.O_TRUNC else "create", str(path), b""))
        return file

    def written(file, data):
        number = real["write"](file, data)
        made.append(("write", paths[file], bytes(data[:number])))
        return number

    def synced(file):
        real["fsync"](file)
        made.append(("fsync", paths.get(file, "?"), b""))

    def replaced(source, target):
        real["replace"](source, target)
        made.append(("replace", str(target), str(source).encode()))

    def unlinked(path, *args, **kwargs):
        real["unlink"](path, *args, **kwargs)
        made.append(("unlink", str(path), b""))

    for wrapper in (opened, written, synced, replaced, unlinked):
        monkeypatch.setattr(os, NAMES[wrapper.__name__], wrapper)
    monkeypatch.setattr(os, "remove", unlinked)
    return made


def test_directory_is_on_the_disk_before_what_is_saved_in_it(tmp_path, calls):
    CheckpointStore(tmp_path / "run" / "checkpoints").save(content(1), "step_1.pt")
    order = calls.named(
        ("fsync", tmp_path.name), ("fsync", "run"), ("replace", MANIFEST), ("fsync", "checkpoints"),
        ("write", "step_1.pt.tmp"),
    )  # fmt: skip
    assert -1 not in order
    assert order == sorted(order)


@pytest.mark.parametrize("write", [save, lambda value, path: write_json(path, value)])
def test_model_and_json_are_written_the_same_way(tmp_path, calls, write):
    write({"a": 1}, tmp_path / "file")
    order = calls.named(
        ("write", "file.tmp"), ("fsync", "file.tmp"), ("replace", "file"), ("fsync", tmp_path.name)
    )
    assert -1 not in order
    assert order == sorted(order)


# --- every state that a crash can leave


class Disk:
    """What a file system may have kept: data and names reach the disk only with their fsync."""

    def __init__(self) -> None:
        self.synced: dict[int, bytes] = {}
        self.data: dict[int, bytes] = {}
        self.names: dict[str, int] = {}  # on the disk
        self.cached: dict[str, int] = {}  # as the process sees them
        self.pending: list[tuple[str, str, int]] = []

    def apply(self, call: tuple[str, str, bytes], directory: Path) -> None:
        name, path, data = call
        if name in ("create", "truncate"):
            if path not in self.cached:
                self.cached[path] = len(self.data)
                self.synced[len(self.data)] = b""
                self.pending.append(("link", path, len(self.data)))
                self.data[len(self.data)] = b""
            elif name == "truncate":
                self.data[self.cached[path]] = b""
        elif name == "write":
            self.data[self.cached[path]] += data
        elif name == "fsync" and path == str(directory):
            self.names, self.pending = dict(self.cached), []
        elif name == "fsync":
            self.synced[self.cached[path]] = self.data[self.cached[path]]
        elif name == "replace":
            self.cached[path] = self.cached.pop(data.decode())
            self.pending.append(("rename", data.decode() + "\0" + path, self.cached[path]))
        elif name == "unlink" and path in self.cached:
            del self.cached[path]
            self.pending.append(("unlink", path, -1))

    def states(self):
        """Every mapping of names to data that a crash may leave now."""
        unsynced = [n for n in self.data if self.synced[n] != self.data[n]]
        for chosen in itertools.product([False, True], repeat=len(self.pending)):
            names = dict(self.names)
            for (kind, path, inode), kept in zip(self.pending, chosen, strict=True):
                if not kept:
                    continue
                if kind == "link":
                    names[path] = inode
                elif kind == "rename":
                    source, target = path.split("\0")
                    names.pop(source, None)
                    names[target] = inode
                else:
                    names.pop(path, None)
            for parts in itertools.product([0.0, 0.5, 1.0], repeat=len(unsynced)):
                data = dict(self.synced)
                for inode, part in zip(unsynced, parts, strict=True):
                    more = self.data[inode][len(self.synced[inode]) :]
                    data[inode] = self.synced[inode] + more[: int(part * len(more))]
                yield {path: data[inode] for path, inode in names.items()}


def test_every_state_that_a_crash_can_leave_has_the_acknowledged_checkpoint(tmp_path, calls):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.directory.mkdir()
    for step in (1, 2, 3, 4):
        store.save(content(step), f"step_{step}.pt")
        calls.append(("acknowledged", str(step), b""))
    made = list(calls)
    calls.clear()
    disk, acknowledged, seen = Disk(), 0, set()
    for number, call in enumerate(made):
        disk.apply(call, store.directory)
        if call[0] == "acknowledged":
            acknowledged = int(call[1])
        for state in disk.states():
            key = tuple(sorted(state.items()))
            if (key, acknowledged) in seen:
                continue
            seen.add((key, acknowledged))
            check_state(tmp_path / f"crash{number}_{len(seen)}", state, acknowledged)
    assert acknowledged == 4
    assert len(seen) > 30


def check_state(folder: Path, state: dict[str, bytes], acknowledged: int) -> None:
    """The newest acknowledged checkpoint, or a later one, loads, and saving goes on."""
    folder.mkdir()
    for path, data in state.items():
        (folder / Path(path).name).write_bytes(data)
    store = CheckpointStore(folder)
    path = store.newest()
    step = 0 if path is None else torch.load(path, weights_only=True)["progress"]["step"]
    assert step >= acknowledged
    assert not list(folder.glob("*.damaged"))  # nothing that counted was lost
    store.save(content(9), "step_9.pt")
    assert CheckpointStore(folder).newest().name == "step_9.pt"


# --- damage


@pytest.mark.parametrize("damage", ["truncated", "bit"])
def test_damaged_newest_is_set_aside_and_the_one_before_is_used(tmp_path, caplog, damage):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(content(step), f"step_{step}.pt")
    newest = tmp_path / "step_2.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes({"truncated": data[:-100], "bit": data}[damage])
    assert store.newest().name == "step_1.pt"
    assert not newest.exists()
    assert (tmp_path / "step_2.pt.damaged").exists()
    assert "step_2.pt IS DAMAGED" in caplog.text
    assert store.newest().name == "step_1.pt"
    store.save(content(2), "step_2.pt")
    assert store.newest().name == "step_2.pt"


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("*.pt", lambda path: path.write_bytes(b"")),
        ("*.pt", Path.unlink),
        (MANIFEST, Path.unlink),
    ],
    ids=["damaged", "deleted", "manifest deleted"],
)
def test_run_stops_again_and_again_when_no_checkpoint_is_whole(tmp_path, pattern, damage):
    """An automatic restart must not take for a beginning what the stop before it left."""
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(content(step), f"step_{step}.pt")
    for path in tmp_path.glob(pattern):
        damage(path)
    for _ in range(3):
        assert CheckpointStore(tmp_path).has_begun()
        assert CheckpointStore(tmp_path).newest() is None


@pytest.mark.parametrize("line", ["[1]", '{"file": "step_1.pt"}', '{"file": "st'])
def test_line_of_the_manifest_that_is_none_does_not_count(tmp_path, line):
    store = CheckpointStore(tmp_path)
    store.save(content(1), "step_1.pt")
    with open(tmp_path / MANIFEST, "a") as file:
        file.write(line + "\n")
    assert store.newest().name == "step_1.pt"


def test_unacknowledged_file_does_not_count(tmp_path):
    CheckpointStore(tmp_path).save(content(7), "step_7.pt")
    first_line = (tmp_path / MANIFEST).read_text().splitlines()[0]
    (tmp_path / MANIFEST).write_text(first_line + "\n")
    store = CheckpointStore(tmp_path)
    assert not store.has_begun()
    assert store.newest() is None
    assert store.acknowledged() == []


def test_store_keeps_two_steps_at_least_and_the_latest_of_each(tmp_path):
    store = CheckpointStore(tmp_path, keep=0)
    for name, step in [("a", 1), ("b", 2), ("b_later", 2), ("c", 3), ("c_later", 3)]:
        store.save(content(step), name)
    assert [path.name for path in store.acknowledged()] == ["b_later", "c_later"]
    lines = [json.loads(line) for line in (tmp_path / MANIFEST).read_text().splitlines()[1:]]
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 3]
    assert lines[-1]["size"] == (tmp_path / "c_later").stat().st_size


# --- a disk that refuses


@pytest.mark.parametrize("name", ["write", "fsync", "replace"])
def test_refused_write_leaves_what_was_there_and_says_size_and_path(tmp_path, monkeypatch, name):
    store = CheckpointStore(tmp_path)
    store.save(content(1), "step_1.pt")

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, refuse)
        with pytest.raises(WriteError, match=r"step_2.pt: expected to write \d+ bytes, got: No"):
            store.save(content(2), "step_2.pt")
    assert not list(tmp_path.glob("*.tmp"))
    assert store.newest().name == "step_1.pt"
