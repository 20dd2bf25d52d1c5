"""From a preprocessed image to a label map on the grid of its file, in bounded memory."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor, decollate_batch

from pipeline.precision import Precision
from pipeline.prediction.sliding_window import BLEND_BYTES, Slab, SlidingWindow
from transforms.cleanup import Cleanup
from transforms.postprocess import FileGrid

log = logging.getLogger(__name__)


class PredictionError(ValueError):
    """A volume cannot be predicted; the message says what was expected and what was found."""


@dataclass(frozen=True)
class Segmentation:
    """The prediction for one image, on the grid of its file."""

    labels: np.ndarray  # (H, W, D) uint8
    probabilities: np.ndarray | None  # (num_classes, H, W, D) float32 where asked for


class Segmenter:
    """Predicts preprocessed images with one network, or the mean probabilities of several.

    Probabilities are averaged over networks, interpolated linearly to the file's voxels, and only
    then made labels, slab by slab. When the device runs out of memory, prediction goes on with
    fewer windows at a time, and then with the sums in the host's memory. `networks` are on the
    device of `precision`, with their weights; `cleanup` is applied to label maps at the end.
    """

    def __init__(
        self,
        networks: Sequence[torch.nn.Module],
        precision: Precision,
        inferer: SlidingWindow,
        cleanup: Cleanup | None = None,
    ) -> None:
        self.networks, self.precision = list(networks), precision
        self.inferer = copy.copy(inferer)  # whose demands may have to be lowered
        self.cleanup = cleanup

    def __call__(self, image: MetaTensor, *, with_probabilities: bool = False) -> Segmentation:
        """Predict one image `(C, H, W, D)` float32 as preprocessing returns it.

        With `with_probabilities`, those of all classes are kept in the host's memory: 4 bytes per
        voxel and class. A `PredictionError` says that the network's output is not finite, a
        `torch.OutOfMemoryError` that the network itself does not fit on the device.
        """
        on_device, probabilities = self.predict(image, with_probabilities)
        labels = on_device.cpu().numpy()
        if self.cleanup is not None:
            spacing_mm = np.linalg.norm(FileGrid(image).affine[:3, :3], axis=0)
            labels = self.cleanup(labels, spacing_mm)
        return Segmentation(labels, None if probabilities is None else probabilities.numpy())

    def predict(
        self, image: MetaTensor, with_probabilities: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Do the same without cleanup; the labels stay where the logits were blended."""
        while True:
            try:
                return self._predict(image, with_probabilities)
            except RuntimeError as error:
                if not is_out_of_memory(error) or not self._lower_demands():
                    raise
            torch.cuda.empty_cache()  # here, where the failed attempt's tensors are gone

    def _lower_demands(self) -> bool:
        """Ask for less memory; return whether that was possible."""
        inferer = self.inferer
        if inferer.batch_size > 1:
            inferer.sw_batch_size = inferer.batch_size // 2
            log.warning("Out of memory: going on with %d windows at once", inferer.sw_batch_size)
        elif self.precision.device.type != "cpu" and inferer.device is None:
            inferer.device = torch.device("cpu")
            log.warning("Out of memory: going on with sums in the host's memory")
        else:
            return False
        return True

    @torch.inference_mode()
    def _predict(
        self, image: MetaTensor, with_probabilities: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        grid = FileGrid(image)
        volume = image.as_tensor().to(self.precision.device)
        for network in self.networks:
            network.eval()
        labels = probabilities = None
        finite: list[torch.Tensor] = []
        with self.precision.autocast():  # casts of weights are kept until it ends
            for axis, start, block in _join_slabs(
                self.inferer.slabs(volume, self.networks), finite
            ):
                if labels is None:
                    labels = torch.zeros(grid.shape, dtype=torch.uint8, device=block.device)
                    if with_probabilities:
                        probabilities = torch.zeros((len(block), *grid.shape))
                        probabilities[0] = 1  # where borders were cut off there is background
                for values, write in grid.pieces(block, axis, start):
                    write(values.argmax(dim=0).to(torch.uint8), labels)
                    if probabilities is not None:
                        write(values, probabilities)
        assert labels is not None
        if not torch.stack(finite).all():
            raise PredictionError(
                f"expected finite logits in {self.precision.mode}, got NaN or infinity. "
                "Predict with amp false; if that does not help, look at the image's intensities."
            )
        return labels, probabilities


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the device ran out of memory; cuDNN and cuBLAS have messages of their own."""
    words = ("ALLOC_FAILED", "unable to find an engine", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


class SlidingWindowLabels(SlidingWindow):
    """An evaluator's inferer that returns labels on the grids of the files instead of logits.

    It does what `Segmenter` does, in the same memory, with the arguments of `SlidingWindow`. Where
    logits are not finite, the result is background, with a warning: training goes on, since it
    watches its own steps.
    """

    def __init__(
        self,
        precision: Precision,
        roi_size: Sequence[int],
        num_classes: int,
        sw_batch_size: int = 4,
        overlap: float = 0.5,
        max_blend_bytes: int = BLEND_BYTES,
    ) -> None:
        super().__init__(
            roi_size, num_classes, sw_batch_size, overlap, max_blend_bytes=max_blend_bytes
        )
        self._segmenter = Segmenter([], precision, self)  # which copies this inferer

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict labels `(B, 1, *shape of the files)` uint8, on the inputs' device.

        `inputs` are a `(B, C, H, W, D)` MetaTensor whose metadata hold the files' grid.
        """
        self._segmenter.networks, found = [network], []
        for image in decollate_batch(inputs):
            try:
                labels, _ = self._segmenter.predict(image)
            except PredictionError as error:
                log.warning("Validation: %s", error)
                labels = torch.zeros(FileGrid(image).shape, dtype=torch.uint8)
            found.append(labels.to(inputs.device))  # where the evaluator has the reference
        return torch.stack(found)[:, None]


def _join_slabs(
    slabs: Iterable[Slab], finite: list[torch.Tensor]
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield axis, first plane, and `(C, h, w, d)` mean probabilities of each slab.

    Each has the last plane of the one before, as voxels of a file may lie between two slabs.
    `finite` gets for each, on its device, whether all logits are finite.
    """
    before: torch.Tensor | None = None
    for axis, start, logits in slabs:
        finite.append(torch.isfinite(logits.sum()))  # a value that is not finite spoils it
        members = torch.softmax(logits, dim=1)
        values = members[0] if len(members) == 1 else members.mean(dim=0)
        last = values.narrow(axis + 1, -1, 1).clone()
        if before is not None:
            start, values = start - 1, torch.cat([before, values], dim=axis + 1)
        yield axis, start, values
        before = last
