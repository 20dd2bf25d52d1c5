"""A finished run whose best network is evaluated, and in which nothing changes.

`configs/evaluate.json` puts it in the place of the run's lifecycle.
"""

from __future__ import annotations

import logging

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

    def enter(self) -> None:
        """Take the run's plan, and the data that the config names: its own, or others.

        Raises:
            SystemExit: With status 2 and a line per fault if there is no run with a best network,
                the config is another run's, or the data are not sound.
        """
        if self.is_entered:
            return
        try:
            with distributed.sync_errors():
                self._set_up_ranks()
                self.open_stored_run(any_data=True)
                with distributed.sync_errors():
                    self._require_same_on_all_ranks()
                if not (self.run_dir / "models" / "model.pt").is_file():
                    raise InputError(
                        f"{self.best_model}: expected the best network of the run, found none. "
                        "Name a run that has one, or finish this one."
                    )
                self.data_module.run_preflight(self.cases).require_sound()
        except InputError as error:
            error.tell()
            raise SystemExit(2) from None
        log.info("Evaluating %s", self.best_model)
        log.info("on %d validation cases of %s", len(self.cases.validation), self.cases.name)
