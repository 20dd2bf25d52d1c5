"""No process outlives its test."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """One that hangs fails its test; left alone, it would keep the interpreter from ending."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
