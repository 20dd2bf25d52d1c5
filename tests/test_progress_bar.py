import io
import re

import pytest

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
