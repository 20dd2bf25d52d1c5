"""What a terminal shows: progress bars, durations, and the logger of what it does not show."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

# of lines that go to the run's `log.txt` alone, as long as a process holds a run directory
details = logging.getLogger("pipeline.details")


class ProgressBar(tqdm):
    """A bar over cases on a terminal, without a thread of its own: workers are forked later.

    And with a lock of its own: tqdm's is shared with forked processes, and one that is killed while
    it holds it would have all others wait for ever. Of several ranks, `enabled` is for the first.
    Nothing is shown where there is nothing to do. `left` replaces tqdm's estimate of the time left.
    """

    monitor_interval = 0
    _lock = threading.RLock()
    left: str | None = None

    def __init__(self, *args: Any, enabled: bool = True, **keywords: Any) -> None:
        total = keywords["total"] if "total" in keywords else len(args[0])
        disable = None if enabled and total else True  # None: where there is no terminal
        layout = "{desc}: {n_fmt}/{total_fmt}{units} |{bar}| {spent}{to_go}{postfix}"
        usual = {"unit": "case", "file": sys.stderr, "dynamic_ncols": True, "bar_format": layout}
        super().__init__(*args, **usual | keywords, disable=disable)

    @property
    def format_dict(self) -> Mapping[str, Any]:
        """The values of the layout."""
        values = super().format_dict
        if not values["total"]:  # never shown
            return values
        done, to_do, spent_s = self.n - self.initial, self.total - self.n, values["elapsed"]
        left = self.left
        if left is None and done and to_do:
            left = f"about {format_duration(spent_s / done * to_do)} left"
        units, spent = f" {self.unit}{'s' * (self.total != 1)}", format_duration(spent_s)
        return {**values, "units": units, "spent": spent, "to_go": f", {left}" if left else ""}


def format_duration(seconds: float) -> str:
    """Return a duration in the unit that suits it: `42 s`, `3 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.{seconds < 600:d}f} min"
    return f"{seconds / 3600:.1f} h"
