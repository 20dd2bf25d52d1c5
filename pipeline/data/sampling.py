"""Random patches: training sample number n is a pure function of (seed, n).

Samples are numbered through the whole run; sample n is sample n mod N of epoch n // N, where N is
the number of samples in an epoch. Nothing depends on how many processes do the work, and a run
that continues needs to know one number only.
"""

from __future__ import annotations

import functools
import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import ClassesToIndices
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from pipeline import distributed
from pipeline.data.cache import VolumeCache
from pipeline.data.cases import Case, add_case_id
from pipeline.data.device_cache import DeviceCache
from pipeline.data.issues import require

MAX_POSITIONS_PER_CLASS = 10_000  # to choose a centre from; all of a small structure's voxels
ANNOTATED = "annotated"


def sampling_positions(
    label: torch.Tensor, num_classes: int, ignore_value: int | None = None
) -> dict[str, np.ndarray]:
    """Find the voxels that centres of patches are drawn from.

    Args:
        label: `(1, H, W, D)` integer.
        num_classes: Classes, background included.
        ignore_value: Label of voxels that nobody annotated.

    Returns:
        Flat positions `class_1`, `class_2`, … for each class that is present, and `annotated`, of
        all classes, where some voxels are ignored: at most `MAX_POSITIONS_PER_CLASS` each, in the
        smallest unsigned integer that holds them all.

    Raises:
        ValueError: If every voxel is ignored.
    """
    find = ClassesToIndices(num_classes=num_classes, max_samples_per_class=MAX_POSITIONS_PER_CLASS)
    found = {f"class_{c}": np.asarray(p) for c, p in enumerate(find(label)) if c}
    if ignore_value is not None and (np.asarray(label) == ignore_value).any():
        found.pop(f"class_{ignore_value}", None)
        annotated = np.flatnonzero(np.asarray(label) != ignore_value)
        if not len(annotated):
            raise ValueError(
                f"expected an annotated voxel, got {ignore_value} (ignored) only. Omit the case."
            )
        if len(annotated) > MAX_POSITIONS_PER_CLASS:
            # at random: positions at regular steps might all lie in one plane
            rng = np.random.Generator(np.random.PCG64(0))
            annotated = np.sort(rng.choice(annotated, MAX_POSITIONS_PER_CLASS, replace=False))
        found[ANNOTATED] = annotated
    dtype = np.min_scalar_type(label.numel() - 1)
    return {name: positions.astype(dtype) for name, positions in found.items() if len(positions)}


def generator(*key: int | str) -> np.random.Generator:
    """Make a random generator from `key` alone, the same on every platform."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


class PatchDataset(Dataset):
    """Random patches of cached cases.

    A share `foreground_ratio` of the patches is centred on a voxel of a class drawn from those
    present in the case; the others on any voxel, or any annotated one where the case has voxels of
    `ignore_value`. The centre is then moved so that the patch of `roi_size` lies inside the volume
    where it fits. `patch_size` is what is cut out around it: larger than `roi_size` by the margin
    that the augmentation's resampling needs.

    Args:
        data: Cases, as dictionaries with `case_id`, `image` and `label`.
        transform: Deterministic preprocessing, applied once per case.
        roi_size: Network input in voxels.
        patch_size: Size cut out in voxels, at least `roi_size`.
        samples_per_epoch: N above.
        cache: Keeps preprocessed cases; a sample is read from it when it is asked for.
        foreground_ratio: Share of patches centred on foreground, 0 to 1.
        ignore_value: Label of voxels that nobody annotated; no patch is centred on one.

    Raises:
        InputError: If there is no case, a size or ratio is out of range, or a case has no annotated
            voxel or cannot be cached.
    """

    def __init__(
        self,
        data: Sequence[Case],
        transform: Callable,
        roi_size: Sequence[int],
        patch_size: Sequence[int],
        num_classes: int,
        seed: int,
        samples_per_epoch: int,
        cache: VolumeCache,
        foreground_ratio: float = 0.67,
        ignore_value: int | None = None,
    ) -> None:
        require(data, "training cases", "at least one", "none", "Leave some to train on.")
        is_share = 0 <= foreground_ratio <= 1
        require(is_share, "foreground_ratio", "0 to 1", foreground_ratio, "Correct it.")
        fits = all(1 <= r <= p for r, p in zip(roi_size, patch_size, strict=True))
        require(fits, "roi_size", f"1 to {tuple(patch_size)}", roi_size, "Correct it.")
        self.data, self.transform = [add_case_id(case) for case in data], transform
        self.roi_size, self.patch_size = np.asarray(roi_size), np.asarray(patch_size)
        self.seed, self.samples_per_epoch = seed, samples_per_epoch
        self.foreground_ratio = foreground_ratio
        self.num_classes, self.ignore_value = num_classes, ignore_value
        self.cached = cache.fill(self.data, self._prepare, "patches", num_classes, ignore_value)

    def __len__(self) -> int:
        return self.samples_per_epoch

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return training sample `number` of the run.

        Returns:
            `image` `(C, *patch_size)` float32, `label` `(1, *patch_size)` uint8, `seed` (int,
            for everything else that is random about this sample), its `number`, `case_id`, and
            `origin`, the patch's first voxel in the preprocessed volume (negative in the padding).
        """
        index = self._case_index(number)
        with self.cached.open(index) as case:
            return self._cut(number, index, case)

    def batch_on_device(self, numbers: Sequence[int], cases: Sequence[Any]) -> dict[str, Any]:
        """Return samples `numbers` of cases whose tensors are in memory, collated."""
        indices = map(self._case_index, numbers)
        samples = [self._cut(n, i, cases[i]) for n, i in zip(numbers, indices, strict=True)]
        return default_collate(samples)

    def _cut(self, number: int, index: int, case: Any) -> dict[str, Any]:
        """Draw and cut a sample of a case: a mapping of tensors, in an open file or in memory."""
        rng = generator(self.seed, *divmod(number, self.samples_per_epoch))
        size = np.asarray(case["label"].shape[1:])
        low = self.roi_size // 2
        high = size - (self.roi_size - low)
        inside = np.clip(self._draw_centre(case, size, rng), low, np.maximum(high, low))
        origin = np.where(high > low, inside, size // 2) - self.patch_size // 2
        return {
            "image": cut_patch(case["image"], origin, self.patch_size),
            "label": cut_patch(case["label"], origin, self.patch_size),
            "seed": int(rng.integers(2**63)),
            "number": number,
            "case_id": self.data[index]["case_id"],
            "origin": torch.as_tensor(origin),
        }

    def _draw_centre(self, case: Any, size: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw the voxel `(3,)` that a patch is centred on."""
        classes = [f"class_{c}" for c in range(1, self.num_classes) if f"class_{c}" in case]
        if rng.random() < self.foreground_ratio and classes:
            name = classes[rng.integers(len(classes))]
        elif ANNOTATED in case:
            name = ANNOTATED
        else:
            return rng.integers(size)
        positions = case[name]
        drawn = int(rng.integers(positions.shape[0]))
        return np.array(np.unravel_index(int(positions[drawn : drawn + 1][0]), size))

    def _prepare(self, case: Case) -> dict[str, Any]:
        volumes = {k: v for k, v in self.transform(case).items() if k in ("image", "label")}
        positions = sampling_positions(volumes["label"], self.num_classes, self.ignore_value)
        return {**volumes, **positions}

    def _case_index(self, number: int) -> int:
        """Choose the case: every case comes once in a round, each round in its own order."""
        round_number, place = divmod(number, len(self.data))
        return int(_order(self.seed, round_number, len(self.data))[place])


@functools.lru_cache(maxsize=4)
def _order(seed: int, round_number: int, num_cases: int) -> np.ndarray:
    return generator(seed, "order", round_number).permutation(num_cases)


def cut_patch(volume: Any, origin: np.ndarray, size: np.ndarray) -> torch.Tensor:
    """Copy a patch `(C, *size)` of a volume `(C, H, W, D)`, zero outside it.

    Args:
        volume: A tensor, or something with a shape whose slices are tensors.
        origin: First voxel `(3,)`, negative outside the volume, with which the patch overlaps.
    """
    first, last = np.maximum(origin, 0), np.minimum(origin + size, volume.shape[1:])
    inside = volume[:, *map(slice, first.tolist(), last.tolist())]
    patch: torch.Tensor = inside.new_zeros((volume.shape[0], *size.tolist()))
    patch[:, *map(slice, (first - origin).tolist(), (last - origin).tolist())] = inside
    return patch


class EpochSampler(Sampler[int]):
    """Numbers of the samples from `start` to the end of its epoch.

    Of several ranks each has a part of every micro-batch, the first ones a sample more where it
    cannot be divided evenly; all of them together have what one process has.

    Args:
        batch_size: Samples in a micro-batch, of all ranks together.
        accumulation_steps: Micro-batches in an optimizer step.
        steps_per_epoch: Optimizer steps in an epoch, which holds whole batches only.

    Attributes:
        samples_per_epoch: Product of the three.
        own: Slice of a micro-batch that is this rank's part.
        start: Number of the next sample of the run; the trainer sets it before each epoch.

    Raises:
        InputError: If there is not a sample for each rank.
    """

    def __init__(self, batch_size: int, accumulation_steps: int, steps_per_epoch: int) -> None:
        rank, num_ranks = distributed.rank(), distributed.size()
        expected = f"{num_ranks} or more, a patch for each rank"
        is_enough = batch_size >= num_ranks
        require(is_enough, "batch_size", expected, batch_size, "Start fewer ranks.")
        self.batch_size = batch_size
        self.samples_per_epoch = batch_size * accumulation_steps * steps_per_epoch
        least, more = divmod(batch_size, num_ranks)
        first = rank * least + min(rank, more)
        self.own = slice(first, first + least + (rank < more))
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        end = (self.start // self.samples_per_epoch + 1) * self.samples_per_epoch
        for first in range(self.start, end, self.batch_size):
            yield from range(first, first + self.batch_size)[self.own]

    def __len__(self) -> int:
        left = self.samples_per_epoch - self.start % self.samples_per_epoch
        return left // self.batch_size * (self.own.stop - self.own.start)


class PatchLoader(DataLoader):
    """Loader of micro-batches in the order of their samples' numbers.

    Where the preprocessed cases fit into the device's memory they are put there when the first
    batch is asked for, and patches are cut there, in this process. Else they are cut on the host,
    by workers if there are any, into pinned memory on a CUDA machine. The samples are the same.

    Workers live for an epoch, so that none is left when the interpreter exits: a process on a CUDA
    machine was seen to hang there with workers kept alive (cause not established).

    Args:
        batch_size: Patches in a micro-batch, of all ranks together.
        num_workers: Processes of this rank that cut them on the host; 0: none.
        timeout_s: Seconds after which a worker that delivers nothing is taken to hang.
        cache_on_device: Whether the cases are put on the device; see `DeviceCache`.
        device: Device that the patches are for.
    """

    def __init__(
        self,
        dataset: PatchDataset,
        sampler: EpochSampler,
        batch_size: int,
        num_workers: int = 0,
        timeout_s: float = 120.0,
        cache_on_device: bool | str = "auto",
        device: str | torch.device = "cpu",
    ) -> None:
        self.device_cache = DeviceCache(cache_on_device, device, num_workers)
        self.describe = self.device_cache.describe
        super().__init__(
            dataset,
            batch_size=len(range(batch_size)[sampler.own]),
            sampler=sampler,
            num_workers=num_workers,
            timeout=timeout_s if num_workers else 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_signals,
            # forked, a worker sees its parent's death; a fork server would outlive it
            multiprocessing_context="fork" if num_workers else None,
        )

    def __iter__(self) -> Any:
        """Iterate over one epoch; workers are gone when it ends, however it ends.

        Raises:
            InputError: If the cases are to be on the device and do not fit.
            RuntimeError: If a worker dies or hangs.
        """
        patches: Any = self.dataset
        cases = self.device_cache.load(patches.cached)
        if cases is not None:
            for numbers in self.batch_sampler or ():
                yield patches.batch_on_device(numbers, cases)
            return
        iterator: Any = super().__iter__()
        try:
            yield from iterator
        finally:
            if self.num_workers:
                iterator._shutdown_workers()
                for worker in iterator._workers:
                    worker.kill()  # one that hangs would not end otherwise, nor the interpreter


def _ignore_signals(worker_id: int) -> None:
    """Leave signals to a whole group to the main process, which saves and ends the workers."""
    for number in distributed.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
