"""A function in several processes that are ranks of one Gloo group."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline import distributed

WITHIN_S = 120


def in_ranks(function: Callable[..., Any], *arguments: Any, size: int = 2) -> list[Any]:
    """What `function(*arguments)` returns in each of `size` forked processes, by rank.

    An exception that it raises is what it returns.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(size):
            here, there = context.Pipe(duplex=False)
            work = (there, Path(folder) / "store", rank, size, function, arguments)
            process = context.Process(target=_work, args=work)
            process.start()
            there.close()
            ends.append(here)
            processes.append(process)
        results = []
        for rank, (end, process) in enumerate(zip(ends, processes, strict=True)):
            if not end.poll(WITHIN_S):
                for each in processes:
                    each.kill()
                raise TimeoutError(f"rank {rank}: expected to end within {WITHIN_S} s.")
            results.append(pickle.loads(end.recv_bytes()))
            process.join()
        return results


def _work(
    end: Connection, store: Path, rank: int, size: int, function: Callable, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    dist.barrier()  # or one may be gone before the others have met it
    distributed._object_group = dist.new_group(backend="gloo")  # as `distributed.join` makes one
    try:
        result = function(*arguments)
    except BaseException as error:
        traceback.print_exc()
        result = error
    end.send_bytes(pickle.dumps(result))  # tensors with their content, not as shared memory
    if dist.is_initialized():
        dist.destroy_process_group()
