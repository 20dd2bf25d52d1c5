"""A finished run whose best network is evaluated, and in which nothing changes.

`configs/evaluate.json` puts it in the place of the run's lifecycle.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline import distributed
from pipeline.errors import InputError
from pipeline.lifecycle.lifecycle import Lifecycle

log = logging.getLogger(__name__)


class ReadOnlyRun(Lifecycle):
    """The run directory, plan and data of a run, which it neither locks nor writes to.

    Arguments and attributes are those of `Lifecycle`.
    """

    @property
    def best_model(self) -> str:
        """File of the best weights."""
        return str(self.run_dir / "models" / "model.pt")

    def _open(self) -> None:
        """Take the run's plan, and the data that the config names: its own, or others."""
        self.open_stored_run(any_data=True)
        with distributed.sync_errors():
            self._require_same_on_all_ranks()
        if not Path(self.best_model).is_file():
            raise InputError(
                f"{self.best_model}: expected the best network of the run, found none. "
                "Name a run that has one, or finish this one."
            )
        self.data_module.run_preflight(self.cases).require_sound()

    def _log_start(self) -> None:
        log.info("Evaluating %s", self.best_model)
        log.info("on %d validation cases of %s", len(self.cases.validation), self.cases.name)
