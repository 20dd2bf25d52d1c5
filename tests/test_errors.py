import os
import signal
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import describe_worker_failure

# of torch, where a tensor does not fit into /dev/shm
NO_ROOM = """Caught RuntimeError in DataLoader worker process 0.
Original Traceback (most recent call last):
    return cls._new_using_fd_cpu(size)
RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: No space left (28)
"""
OF_A_CASE = NO_ROOM.replace("shared memory(shm)", "a volume")


class Dying(Dataset):
    """Its worker gets a signal, or ends with a status."""

    def __init__(self, number: signal.Signals | None) -> None:
        self.number = number

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        if self.number is None:
            os._exit(3)
        os.kill(os.getpid(), self.number)


def failure_of_worker(number: signal.Signals | None) -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        next(iter(DataLoader(Dying(number), num_workers=1)))
    return caught.value


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (
            signal.SIGBUS,
            ("room in /dev/shm", "Bus error", "num_workers=0, or docker's --shm-size=8g"),
        ),
        (signal.SIGKILL, ("memory for each worker", "Killed", "Use a smaller num_workers, or 0;")),
        (None, ("workers that deliver every case", "exit code 3", "Look at the free memory")),
    ],
)
def test_dead_worker_is_told_in_one_line_with_the_remedy(number, words):
    line = describe_worker_failure(failure_of_worker(number))
    assert line.startswith(f"num_workers: expected {words[0]}, got: DataLoader worker (pid")
    assert all(word in line for word in words)
    assert "\n" not in line


def test_worker_without_shared_memory_is_told_apart_from_a_fault_of_a_case():
    line = describe_worker_failure(RuntimeError(NO_ROOM))
    assert line.startswith("num_workers: expected room in /dev/shm, got: RuntimeError: unable to")
    assert "\n" not in line
    assert describe_worker_failure(RuntimeError(OF_A_CASE)) is None


def test_user_without_a_name_is_told_in_one_line():
    """MONAI's import fails for a user id that the system does not know."""
    script = """
import pwd
def refuse(number): raise KeyError(f"getpwuid(): uid not found: {number}")
pwd.getpwuid = refuse
from pipeline.errors import describe_import_failure
try:
    import monai
except Exception as error:
    print(describe_import_failure(error))
try:
    import no_such_module
except ImportError as error:
    print(describe_import_failure(error))
"""
    names = ("LOGNAME", "USER", "LNAME", "USERNAME")
    known = {key: value for key, value in os.environ.items() if key not in names}
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, cwd=REPOSITORY, env=known, capture_output=True, text=True)
    line, other = done.stdout.splitlines()
    assert line.startswith("user: expected one with a name, got: KeyError 'getpwuid(): uid not f")
    assert line.endswith("Use export USER=me HOME=/tmp.")
    assert other == "None"
