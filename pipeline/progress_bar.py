"""A progress bar that leaves nothing behind for the processes that are forked later."""

from __future__ import annotations

import sys
import threading
from typing import Any

from tqdm import tqdm


class ProgressBar(tqdm):
    """A bar over cases on a terminal, without a thread of its own: workers are forked later.

    And with a lock of its own: tqdm's is shared with forked processes, and one that is killed while
    it holds it would have all others wait for ever. Of several ranks, `enabled` is for the first.
    """

    monitor_interval = 0
    _lock = threading.RLock()

    def __init__(self, *args: Any, enabled: bool = True, **keywords: Any) -> None:
        disable = None if enabled else True  # None: where there is no terminal
        super().__init__(*args, **{"unit": "case", "file": sys.stderr} | keywords, disable=disable)
