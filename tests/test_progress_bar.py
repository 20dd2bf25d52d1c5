import contextlib
import io
import logging
import re
import sys

import pytest

from pipeline.errors import escape_record, escaping
from pipeline.progress_bar import ProgressBar, format_duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("total", "shown"),
    [
        (0, []),
        (1, ["0/1 case | 0 s", "1/1 case | 0 s"]),
        (2, ["0/2 cases | 0 s", "1/2 cases | 0 s, about 0 s left", "2/2 cases | 0 s"]),
    ],
)
def test_bar_has_words_and_none_where_there_is_nothing_to_do(total, shown):
    terminal = Terminal()
    bar = ProgressBar(range(total), desc="Checking", file=terminal, mininterval=0, ncols=90)
    assert list(bar) == list(range(total))
    states = [re.sub(r"\|.*\|", "|", part).strip() for part in terminal.getvalue().split("\r")]
    assert list(dict.fromkeys(filter(None, states))) == [f"Checking: {one}" for one in shown]


def test_bar_shows_nothing_where_there_is_no_terminal():
    assert list(ProgressBar([1, 2], file=(file := io.StringIO()))) == [1, 2]
    assert file.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89, "89 s"), (100, "1.7 min"), (9000, "2.5 h")],
)
def test_format_duration_takes_the_unit_that_suits(seconds, words):
    assert format_duration(seconds) == words


def test_bars_move_the_cursor_while_names_cannot(monkeypatch):
    terminals = Terminal(), Terminal()
    for terminal, inside in zip(terminals, (contextlib.nullcontext(), escaping()), strict=True):
        monkeypatch.setattr(sys, "stderr", terminal)
        with inside:
            for _ in ProgressBar([1], desc="outer", mininterval=0, ncols=60):
                for _ in ProgressBar([1], desc="inner", mininterval=0, ncols=60):
                    ProgressBar.write("a line", file=sys.stderr)
    seen = [re.sub(r"\d+ s", "", terminal.getvalue()) for terminal in terminals]
    assert "\x1b[A" in seen[0]
    assert seen[0] == seen[1]
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with escaping():
        list(ProgressBar([1], desc="a\x1b[A\rb", mininterval=0, ncols=60))
        print("c\x1b[A\r\x07", file=sys.stderr)
    shown = terminal.getvalue()
    assert r"a\x1b[A\rb: 1/1" in shown
    assert "c\\x1b[A\\r\\x07\n" in shown
    assert "\x1b" not in shown


def test_log_escapes_names_and_keeps_the_lines_of_a_traceback():
    handler = logging.StreamHandler(io.StringIO())
    handler.addFilter(escape_record)
    try:
        raise ValueError("b\x1b[2J")
    except ValueError as error:
        caught = type(error), error, error.__traceback__
    record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "%s", ("a\x07\u202e",), caught)
    handler.handle(record)
    first, *trace = handler.stream.getvalue().splitlines()
    assert first == r"a\x07\u202e"
    assert trace[0].startswith("Traceback")
    assert trace[-1] == r"ValueError: b\x1b[2J"
