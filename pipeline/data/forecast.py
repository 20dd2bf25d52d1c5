"""What a run is going to take of a card's memory, said before it begins."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Forecast:
    """Predicted peaks of reserved memory, in bytes, and what there is.

    Attributes:
        training: Of training steps.
        validation: Of validation by sliding windows, with the trainer in place.
        available: What the process can have of the card.
        device: The card.
    """

    training: int
    validation: int
    available: int
    device: str

    @property
    def line(self) -> str:
        """All of it, for people."""
        peaks = f"{self.training / GIB:.2f} GiB in training"
        there = f"{self.device} has {self.available / GIB:.2f} GiB free"
        line = f"Memory, predicted: {peaks}, {self.validation / GIB:.2f} GiB in validation; {there}"
        if self.validation > self.available:
            line += ". Validation will go on with fewer windows, or sums in the host's memory"
        return line

    def as_dict(self) -> dict[str, int]:
        """Plain values for JSON."""
        return {"training": self.training, "validation": self.validation}

    def require_room(self) -> None:
        """Refuse training that is not going to fit.

        Raises:
            InputError: If it is not.
        """
        if self.training > self.available:
            raise InputError(
                f"batch_size: expected training steps that fit into {self.available / GIB:.2f} "
                f"GiB, free on {self.device}, got {self.training / GIB:.2f} GiB as predicted. "
                "Lower batch_size, roi_size or base_channels, or raise recompute_levels."
            )


def available_bytes(device: torch.device) -> int:
    """What this process can still have of a card: what is free, or what is left of its share."""
    device = torch.device(
        "cuda", torch.cuda.current_device() if device.index is None else device.index
    )
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - held
    share = torch.cuda.get_per_process_memory_fraction(device)
    return int(min(free + unused, share * total - held))
