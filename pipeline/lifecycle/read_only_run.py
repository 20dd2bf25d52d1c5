"""A finished run in the place of the run's lifecycle in `configs/evaluate.json`."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline import distributed
from pipeline.errors import InputError
from pipeline.lifecycle.lifecycle import Lifecycle

log = logging.getLogger(__name__)


class ReadOnlyRun(Lifecycle):
    """A run whose best network is evaluated, and which is neither locked nor written to."""

    @property
    def best_model(self) -> str:
        """File of the best weights."""
        return str(self.run_dir / "models" / "model.pt")

    def _open(self) -> None:
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
        where, number = self.cases.name, len(self.cases.validation)
        log.info("Evaluating %s on %d validation cases of %s", self.best_model, number, where)
