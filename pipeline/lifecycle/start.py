"""What a new run takes over from one before it: the weights of its network, if any."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from pipeline.config.keys import Config
from pipeline.config.parser import Parser
from pipeline.data.plan import Plan
from pipeline.errors import InputError, as_bool, innermost
from pipeline.training.pretrained import WeightsFile, fitted, read_weights

log = logging.getLogger(__name__)


class Start:
    """The weights that a new run begins with; a run that continues has its own.

    Args:
        source: The config, unevaluated.
        root: Folder that a relative path starts from.
        init_weights: A file, or `None` for the network's own random weights.
        reinit_head: Whether the head is random all the same.

    Attributes:
        tensors: Of the layers that begin as in the file, after `fit`; `None` without one.
        record: The file's SHA-256 and what of it is used, after `fit`; `None` without.
    """

    def __init__(
        self, source: Config, root: Path, init_weights: str | None, reinit_head: bool | str
    ) -> None:
        self.source, self.root = source, root
        self.init_weights, self.reinit_head = init_weights, reinit_head
        self.tensors: dict[str, torch.Tensor] | None = None
        self.record: dict[str, Any] | None = None
        self._file: WeightsFile | None = None

    def read(self, run_dir: Path | None = None) -> None:
        """Read the file; of a run that began, its record instead: the file may be gone.

        Args:
            run_dir: Of the run that is there and goes on.

        Raises:
            InputError: If it is not there or holds no weights, or none is named and `reinit_head`
                is asked for.
        """
        if run_dir is not None:
            self.record = json.loads((run_dir / "run.json").read_text()).get("init_weights")
        elif self.init_weights is not None:
            self._file = read_weights(self.root / self.init_weights)
        elif as_bool(self.reinit_head, "reinit_head"):
            raise InputError("reinit_head: expected init_weights beside it, got null. Name a file.")

    def fit(self, plan: Plan) -> None:
        """Compare the file with the network that the config has with this plan.

        Raises:
            InputError: A line for each tensor that differs.
        """
        if self._file is None:
            return
        try:
            parser = Parser({**self.source, "plan": plan})
            network = parser.get_parsed_content("network_def")
        except (RuntimeError, ValueError) as error:
            raise InputError(str(innermost(error))) from error
        reinit_head = as_bool(self.reinit_head, "reinit_head")
        self.tensors, drawn_anew = fitted(self._file, network, reinit_head=reinit_head)
        self.record = {
            "sha256": self._file.sha256,
            "num_tensors": len(self.tensors),
            "drawn_anew": drawn_anew,
        }
        self._file = None

    def tell(self) -> None:
        """Say in the log what the network begins with."""
        if self.tensors is not None and self.record is not None:
            log.info(
                "Weights of %d tensors from %s (SHA-256 %s); drawn anew: %s",
                self.record["num_tensors"],
                Path(str(self.init_weights)).name,
                self.record["sha256"],
                ", ".join(self.record["drawn_anew"]) or "none",
            )
