"""How the processes that torchrun starts find one another, also after a restart."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from pipeline.errors import InputError

DEADLINE = timedelta(minutes=5)  # for all to be there


def meet() -> tuple[dist.Store, int, int]:
    """A store of this start of the processes alone, this one's number and how many there are.

    Raises:
        InputError: If not all come.
    """
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=DEADLINE))
        return dist.PrefixStore(name_of_start(store, number, count), store), number, count
    except (TimeoutError, dist.DistStoreError, dist.DistNetworkError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(
            f"ranks: expected all to meet within {DEADLINE.total_seconds():g} s, got: {reason}. "
            "Look at the other launchers; where nodes come later, start all of them with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1."
        ) from error


def name_of_start(store: dist.Store, number: int, count: int) -> str:
    """A name that the processes of this start have in common, and no earlier ones.

    After a restart torchrun's store still holds the addresses of processes that are gone, and the
    new ones would wait for them (pytorch issue 135712). Rank 0 answers whatever it is asked, until
    all have confirmed its own answer: what a former rank asked gets one, which nobody reads.
    """
    if number > 0:
        question = uuid.uuid4().hex
        store.set(f"question/{number}", question)
        name = store.get(question).decode()  # waits for it
        store.set(f"{name}/{number}", "")
        return name
    name, silent = uuid.uuid4().hex, set(range(1, count))
    end = time.monotonic() + DEADLINE.total_seconds()
    while silent:
        for other in list(silent):
            if store.check([f"question/{other}"]):
                store.set(store.get(f"question/{other}").decode(), name)
            if store.check([f"{name}/{other}"]):
                silent.remove(other)
        if time.monotonic() > end:
            raise TimeoutError(f"nothing of rank {', '.join(map(str, sorted(silent)))}.")
        time.sleep(0.01)
    return name
