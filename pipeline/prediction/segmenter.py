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
from pipeline.prediction.sliding_window import SUMS_BYTES, Block, Network, SlidingWindow
from transforms.cleanup import Cleanup
from transforms.file_grid import FileGrid

log = logging.getLogger(__name__)


class PredictionError(ValueError):
    """A volume that cannot be predicted; the message says what was expected and got."""


@dataclass(frozen=True)
class Segmentation:
    """What was predicted for one image, on the grid of its file.

    Attributes:
        labels: `(H, W, D)` uint8.
        probabilities: `(num_classes, H, W, D)` float32 where asked for, else `None`.
        affine: `(4, 4)` float64 of the file, to RAS mm.
    """

    labels: np.ndarray
    probabilities: np.ndarray | None
    affine: np.ndarray


class Segmenter:
    """Predicts preprocessed images with one network, or the mean probabilities of several.

    Logits are blended over windows, made probabilities, averaged over networks, interpolated
    linearly to the file's voxels, and only then made labels, slab by slab. Where memory does not
    suffice, it goes on with fewer windows at a time, and then with the sums in the host's memory.

    Args:
        networks: On the precision's device, their weights loaded.
        precision: Owns device and autocast.
        inferer: Cuts windows and blends them.
        cleanup: What is done to label maps at the end.
    """

    def __init__(
        self,
        networks: Sequence[torch.nn.Module],
        precision: Precision,
        inferer: SlidingWindow,
        cleanup: Cleanup | None = None,
    ) -> None:
        self.networks, self.precision = list(networks), precision
        self.inferer = copy.copy(inferer)  # of which it may have to lower the demands
        self.cleanup = cleanup

    def __call__(self, image: MetaTensor, *, with_probabilities: bool = False) -> Segmentation:
        """Predict one image.

        Args:
            image: `(C, H, W, D)` float32 as preprocessing leaves it.
            with_probabilities: Whether to keep the probabilities of all classes, in the host's
                memory: 4 bytes per voxel and class.

        Raises:
            PredictionError: If the network's output is not finite.
            torch.OutOfMemoryError: If the network itself does not fit on the device.
        """
        while True:
            try:
                found = self._segment(image, with_probabilities)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error) or not self._retreat():
                    raise
            torch.cuda.empty_cache()  # here, where the failed attempt's tensors are gone
        if self.cleanup is None:
            return found
        cleaned = self.cleanup(found.labels, np.linalg.norm(found.affine[:3, :3], axis=0))
        return Segmentation(cleaned, found.probabilities, found.affine)

    def _retreat(self) -> bool:
        """Ask for less memory; whether there is a way."""
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
    def _segment(self, image: MetaTensor, with_probabilities: bool) -> Segmentation:
        grid = FileGrid(image)
        volume = image.as_tensor().to(self.precision.device)
        for network in self.networks:
            network.eval()
        labels: torch.Tensor | None = None
        probabilities: torch.Tensor | None = None
        finite: list[torch.Tensor] = []
        blocks = self.inferer.blocks(volume, [self._in_precision(net) for net in self.networks])
        for first, block in joined(_checked(blocks, finite)):
            if labels is None:
                labels = torch.zeros(grid.shape, dtype=torch.uint8, device=block.device)
                if with_probabilities:
                    probabilities = torch.zeros((len(block), *grid.shape))
                    probabilities[0] = 1  # where borders were cut off there is background
            for piece in grid.pieces(block, first):
                piece.write(piece.values.argmax(dim=0).to(torch.uint8), labels)
                if probabilities is not None:
                    piece.write(piece.values, probabilities)
        assert labels is not None
        if not torch.stack(finite).all():
            raise PredictionError(
                f"expected finite logits in {self.precision.mode}, got NaN or infinity. "
                "Predict with amp false; if that does not help, look at the image's intensities."
            )
        return Segmentation(
            labels.cpu().numpy(),
            None if probabilities is None else probabilities.numpy(),
            grid.affine,
        )

    def _in_precision(self, network: torch.nn.Module) -> Network:
        def predict(windows: torch.Tensor) -> torch.Tensor:
            with self.precision.autocast():
                return network(windows)

        return predict


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device has no memory left: cuDNN and cuBLAS say so in words of their own."""
    words = ("ALLOC_FAILED", "unable to find an engine", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


class SlidingWindowLabels(SlidingWindow):
    """An evaluator's inferer that gives labels on the grids of the files instead of logits.

    What `Segmenter` does, in the same memory. Where logits are not finite there is background, with
    a warning: training, which watches its own steps, goes on.

    Args:
        precision: Owns device and autocast.
        roi_size: As for `SlidingWindow`, like all that follow.
        num_classes: See there.
        sw_batch_size: See there.
        overlap: See there.
        max_blend_bytes: See there.
    """

    def __init__(
        self,
        precision: Precision,
        roi_size: Sequence[int],
        num_classes: int,
        sw_batch_size: int = 4,
        overlap: float = 0.5,
        max_blend_bytes: int = SUMS_BYTES,
    ) -> None:
        super().__init__(
            roi_size, num_classes, sw_batch_size, overlap, max_blend_bytes=max_blend_bytes
        )
        self._segmenter = Segmenter([], precision, self)  # which copies it

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Labels of preprocessed images.

        Args:
            inputs: `(B, C, H, W, D)` MetaTensor whose metadata remember the files' grid.
            network: Gives logits of windows.
            args: Not used.
            kwargs: Not used.

        Returns:
            `(B, 1, *shape of the files)` uint8, on the inputs' device.
        """
        self._segmenter.networks = [network]
        labels = torch.stack([self._labels(image) for image in decollate_batch(inputs)])
        return labels.to(inputs.device)  # where the evaluator has the reference

    def _labels(self, image: MetaTensor) -> torch.Tensor:
        try:
            labels = self._segmenter(image).labels
        except PredictionError as error:
            log.warning("Validation: %s", error)
            labels = np.zeros(FileGrid(image).shape, dtype=np.uint8)
        return torch.as_tensor(labels)[None]


def joined(blocks: Iterable[Block]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Mean probabilities, each block with the last planes of the blocks before it.

    Voxels of a file may lie between two blocks.

    Args:
        blocks: As `SlidingWindow.blocks` orders them.

    Yields:
        First voxel, and `(C, h, w, d)` float32 probabilities.
    """
    behind: torch.Tensor | None = None  # last plane of the block before, in this lane
    beside: torch.Tensor | None = None  # last plane of the whole lane before
    border: list[torch.Tensor] = []  # of this lane, so far
    for block in blocks:
        along, across = block.along + 1, block.across + 1
        first = list(block.first)
        members = torch.softmax(block.logits, dim=1)
        values = members[0] if len(members) == 1 else members.mean(dim=0)
        if first[block.along] == 0:  # a lane begins
            behind = None
            beside = torch.cat(border, dim=along) if border else None
            border = []
        border.append(values.narrow(across, -1, 1).clone())  # of all planes that a lane has
        if beside is not None:
            near = beside.narrow(along, first[block.along], values.shape[along])
            values = torch.cat([near, values], dim=across)
            first[block.across] -= 1
        last = values.narrow(along, -1, 1).clone()
        if behind is not None:
            values = torch.cat([behind, values], dim=along)
            first[block.along] -= 1
        behind = last
        yield first, values


def _checked(blocks: Iterable[Block], finite: list[torch.Tensor]) -> Iterator[Block]:
    """The blocks; whether each is finite is added to `finite`, on its device."""
    for block in blocks:
        finite.append(torch.isfinite(block.logits.sum()))  # of what is not, the sum is not either
        yield block
