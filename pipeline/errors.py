"""Mistakes of users, faults of a dataset, and the exceptions with which a run ends itself."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
import sys
import tempfile
import traceback
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """A mistake in the input or the config: commands print it and exit with status 2.

    Each fault is a line, `{where}: expected {X}, got {Y}. {what to do}`. Where `is_told` is true,
    another process prints it.
    """

    def __init__(self, *faults: str, is_told: bool = False) -> None:
        self.faults, self.is_told = faults, is_told
        super().__init__("\n".join(faults))

    def tell(self) -> None:
        """Print it, where no other process does."""
        if not self.is_told:
            print(printable(self), file=sys.stderr)


# packages whose exceptions are the cause themselves; the last one differs in an exported bundle
OWN = ("pipeline", "transforms", "networks", __name__.partition(".")[0])

# stands in the diagnosis of a run whose numbers went wrong, and of no other
STOPS = "Training stops"


class TrainingStopped(SystemExit):
    """A run that ended itself before it did damage: exit status 1, the reason already logged."""

    def __init__(self, diagnosis: str) -> None:
        super().__init__(diagnosis)
        self.code = 1


class TrainingInterrupted(SystemExit):
    """A run that was told to end by a signal, and saved: the same command continues it."""

    def __init__(self) -> None:
        super().__init__(interrupted_status())


def interrupted_status() -> int:
    """Exit status 75 (`EX_TEMPFAIL`: try again), or 0 under torchrun, where others are crashes."""
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else 75


def innermost(error: BaseException) -> BaseException:
    """Return the exception that others were raised from, or the outermost of this project."""
    while error.__cause__ is not None and type(error).__module__.split(".")[0] not in OWN:
        error = error.__cause__
    return error


def describe_failure(error: BaseException) -> str:
    """Return one line: the `config_id` that `config.compose` noted, what was said, where, notes."""
    cause = innermost(error)
    said = " ".join(str(cause).split())[:500]
    frames = traceback.extract_tb(cause.__traceback__)[-1:]
    details = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
    details += getattr(cause, "__notes__", [])
    name = getattr(error, "config_id", "")
    return f"{name and f'{name}: '}{type(cause).__name__}: {said} ({', '.join(details)})"


def print_failure(error: BaseException, log_file: Path | None = None) -> int:
    """Print the faults of an `InputError` and return 2, or one line about another error: 1.

    Its traceback goes to `log_file`, by default a temporary one.
    """
    if isinstance(cause := innermost(error), InputError):
        cause.tell()
        return 2
    if log_file is None or not log_file.parent.is_dir():
        log_file = Path(tempfile.mkdtemp(prefix="traceback_"), "traceback.txt")
    with open(log_file, "a") as file:
        file.write(printable("".join(traceback.format_exception(error))))
    told = f"{describe_failure(error)}. The traceback is in {log_file}."
    print(printable(told), file=sys.stderr)
    return 1


def nearest(word: str, valid: Iterable[str]) -> str:
    """`Did you mean ...?` with the valid name nearest to `word`, else the list of valid names."""
    valid = list(valid)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Valid are: {', '.join(valid)}."


def require_choice(value: object, valid: Iterable[str], where: str) -> None:
    """Raise an InputError if the value of config key `where` is not one of the valid names."""
    if value not in (names := list(valid)):
        expected = f"{where}: expected one of {', '.join(names)}, got {value!r}."
        raise InputError(f"{expected} {nearest(str(value), names)}")


# what torch says of a loader worker, what it lacked, and the remedy
WORKER_FAULTS = (
    ("Bus error|shared memory", "room in /dev/shm", "Use num_workers=0, or docker's --shm-size=8g"),
    ("signal: Killed", "memory for each worker", "Use a smaller num_workers, or 0"),
    ("", "workers that deliver every case", "Look at the free memory, or use num_workers=0"),
)


def describe_worker_failure(error: Exception) -> str | None:
    """Return one line where a loader worker died or hung; `None` for any other error."""
    pattern = r"DataLoader (worker|timed out)|Caught (.*) in DataLoader worker(?s:.*)shared memory"
    if not re.match(pattern, str(error)):
        return None
    said = str(error.__cause__ or "") or str(error)  # the cause names the signal
    expected, remedy = next(rest for found, *rest in WORKER_FAULTS if re.search(found, said))
    return (
        f"num_workers: expected {expected}, got: {said.splitlines()[-1].strip(' .')}. {remedy}; "
        "the same command goes on from the newest checkpoint."
    )


def describe_import_failure(error: BaseException) -> str | None:
    """Return one line where an import failed because the user has no name; `None` for others.

    MONAI calls `getpass.getuser`, which raises `KeyError` (`OSError` from Python 3.13 on) where the
    system does not know the user id, as in a container that was started with one.
    """
    if not any(frame.name == "getuser" for frame in traceback.extract_tb(error.__traceback__)):
        return None
    got = f"{type(error).__name__} {error}"
    return f"user: expected one with a name, got: {got}. Use export USER=me HOME=/tmp."


def as_bool(value: object, where: str) -> bool:
    """A JSON boolean, or 'true' or 'false' as `monai.bundle` passes them; else an InputError."""
    if str(value).lower() not in ("true", "false"):
        raise InputError(f"{where}: expected true or false, got {value!r}. Use one of the two.")
    return str(value).lower() == "true"


@dataclass(frozen=True)
class DatasetIssue:
    """One fault or warning about one case."""

    case_id: str
    check: str  # that found it, one word for programs: `missing`, `outside`, `affine`, …
    message: str  # `expected {X}, got {Y}. {what to do}`, without the case id
    warning: bool = False  # whether training may start all the same

    @property
    def line(self) -> str:
        """The message after the case id."""
        return f"{self.case_id}: {self.message}"


def make_issue(
    case_id: str, check: str, expected: str, got: object, remedy: str, *, warning: bool = False
) -> DatasetIssue:
    """An issue with a message of the usual form; the remedy is a sentence without its period."""
    return DatasetIssue(case_id, check, f"expected {expected}, got {got}. {remedy}.", warning)


def require(condition: object, where: object, expected: str, got: object, remedy: str) -> None:
    """Raise an InputError of one line unless a condition holds."""
    if not condition:
        raise InputError(f"{where}: expected {expected}, got {got}. {remedy}")


def require_path(where: str, path: str | Path, what: str) -> None:
    """Raise an `InputError` if there is nothing at a path."""
    refuse(filter(None, [find_path_fault(where, path, what)]))


def find_path_fault(where: str, path: str | Path, what: str) -> str | None:
    """Say that there is nothing at a path, with the nearest name beside it; else `None`."""
    path, near = Path(path), ""
    if path.exists():
        return None
    with contextlib.suppress(OSError):
        near = nearest(path.name, [one.name for one in path.absolute().parent.iterdir()])
    remedy = near if near.startswith("Did") else "Check the path."
    return f"{where}: expected {what}, found nothing at {path}. {remedy}"


def refuse(faults: Iterable[str]) -> None:
    """Raise an InputError of these lines if there are any."""
    if lines := tuple(faults):
        raise InputError(*lines)


def printable(text: object, keep: str = "\n\t") -> str:
    """Return text with all characters escaped that are neither printable, a space nor in `keep`.

    Names of files and classes come from others, and a terminal obeys control characters in them.
    """
    return "".join(
        c if c.isprintable() or c in keep or unicodedata.category(c) == "Zs" else ascii(c)[1:-1]
        for c in str(text)
    )


class _PrintableStream:
    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        start = text[:1] == "\r"  # of tqdm's bars; their movements to a line above come alone
        if not re.fullmatch(r"(\x1b\[A)+", text):
            text = text[:start] + printable(text[start:])
        return int(self.stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def escaping() -> Iterator[None]:
    """Let stdout and stderr write what is `printable`, beside the progress bars of tqdm."""
    files: Any = _PrintableStream(sys.stdout), _PrintableStream(sys.stderr)
    with contextlib.redirect_stdout(files[0]), contextlib.redirect_stderr(files[1]):
        yield


def escape_record(record: logging.LogRecord) -> bool:
    """Make a record's text `printable`; a filter for the handlers of a log."""
    record.msg, record.args = printable(record.getMessage()), None
    if record.exc_info:
        record.exc_text = printable(logging.Formatter().formatException(record.exc_info))
    return True


def some(words: Sequence[str]) -> str:
    """Name the first five words, and count the others."""
    return ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")
