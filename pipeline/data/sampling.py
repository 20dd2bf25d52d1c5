"""Random patches: training sample number n is a pure function of (seed, n).

Samples are numbered through the whole run; sample n is sample n mod N of epoch n // N, where N is
the number of samples in an epoch. Nothing depends on how many processes do the work.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import ClassesToIndices
from torch.utils.data import DataLoader, Sampler, default_collate

from pipeline import distributed
from pipeline.data.cache import CachedDataset, VolumeCache
from pipeline.data.cases import Case
from pipeline.errors import as_bool, require
from pipeline.progress_bar import details
from pipeline.signals import SIGNALS

MAX_POSITIONS_PER_CLASS = 10_000  # to choose a centre from; all of a small structure's voxels
ANNOTATED = "annotated"
VOLUMES = ("image", "label")
SHARE = 4  # `auto` takes no more than a quarter of what is free: network and activations come later


def sampling_positions(
    label: torch.Tensor, num_classes: int, ignore_value: int | None = None
) -> dict[str, np.ndarray]:
    """Find the voxels of a label, `(1, H, W, D)` integer, that centres of patches are drawn from.

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


class PatchDataset(CachedDataset):
    """Random patches of cached cases.

    A share `foreground_ratio` of the patches is centred on a voxel of a class drawn from those
    present in the case; the others on any voxel, or any annotated one where the case has voxels of
    `ignore_value`. The centre is then moved so that the patch of `roi_size` lies inside the volume
    where it fits. `patch_size` is what is cut out around it: larger than `roi_size` by the margin
    that the augmentation's resampling needs.

    Args:
        roi_size: Network input in voxels.
        patch_size: Size cut out in voxels, at least `roi_size`.
        samples_per_epoch: N above.
        foreground_ratio: Share of patches centred on foreground, 0 to 1.
        data, transform, cache, num_classes, ignore_value: See `CachedDataset`.

    Raises:
        InputError: As `CachedDataset`, and if there is no case, a size or ratio is out of range, or
            a case has no annotated voxel.
    """

    form = "patches"

    def __init__(
        self,
        data: Sequence[Case],
        transform: Callable[[Case], Mapping[str, Any]],
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
        self.roi_size, self.patch_size = np.asarray(roi_size), np.asarray(patch_size)
        self.seed, self.samples_per_epoch = seed, samples_per_epoch
        self.foreground_ratio = foreground_ratio
        self.classes = [f"class_{value}" for value in range(1, num_classes)]
        super().__init__(data, transform, cache, num_classes, ignore_value)

    def __len__(self) -> int:
        return self.samples_per_epoch

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return training sample `number` of the run.

        Returns:
            `image` `(C, *patch_size)` float32, `label` `(1, *patch_size)` uint8, `seed` (int,
            for everything else that is random about this sample), its `number`, `case_id`, and
            `origin`, the patch's first voxel in the preprocessed volume (negative in the padding).
        """
        return self.cut(number)

    def read_all(self, device: torch.device) -> list[dict[str, Any]]:
        """Read all cases, volumes to a device, positions as arrays; equal cases are there once."""
        loaded = {
            key: {
                name: tensor.to(device, copy=True) if name in VOLUMES else tensor.numpy().copy()
                for name, tensor in self.read(number)[0].items()
            }
            for key, number in {key: number for number, key in enumerate(self.keys)}.items()
        }
        return [loaded[key] for key in self.keys]

    def cut(self, number: int, in_memory: Sequence[Any] | None = None) -> dict[str, Any]:
        """Return sample `number`, cut from the tensors of cases that are in memory, if given."""
        round_number, place = divmod(number, len(self.data))
        # every case comes once in a round, each round in its own order
        index = int(generator(self.seed, "order", round_number).permutation(len(self.data))[place])
        case = in_memory[index] if in_memory else self.read(index)[0]
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
        present = [name for name in self.classes if name in case]
        if rng.random() < self.foreground_ratio and present:
            name = present[rng.integers(len(present))]
        elif ANNOTATED in case:
            name = ANNOTATED
        else:
            return rng.integers(size)
        drawn = int(rng.integers(len(case[name])))
        return np.array(np.unravel_index(int(case[name][drawn]), size))

    def _prepare(self, case: Case) -> Mapping[str, Any]:
        volumes = {k: v for k, v in self.transform(case).items() if k in VOLUMES}
        num_classes = len(self.classes) + 1
        return {**volumes, **sampling_positions(volumes["label"], num_classes, self.ignore_value)}


def cut_patch(volume: torch.Tensor, origin: np.ndarray, size: np.ndarray) -> torch.Tensor:
    """Copy a patch `(C, *size)` of a volume `(C, H, W, D)`, zero outside it.

    Its first voxel `origin`, `(3,)`, may be negative, but patch and volume overlap.
    """
    first, last = np.maximum(origin, 0), np.minimum(origin + size, volume.shape[1:])
    inside = volume[:, *map(slice, first.tolist(), last.tolist())]
    patch = inside.new_zeros((volume.shape[0], *size.tolist()))
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
        num_ranks = distributed.size()
        expected = f"{num_ranks} or more, a patch for each rank"
        is_enough = batch_size >= num_ranks
        require(is_enough, "batch_size", expected, batch_size, "Start fewer ranks.")
        self.batch_size = batch_size
        self.samples_per_epoch = batch_size * accumulation_steps * steps_per_epoch
        own = np.array_split(range(batch_size), num_ranks)[distributed.rank()].tolist()
        self.own = slice(own[0], own[-1] + 1)
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
        cache_on_device: `auto`: on CUDA, if the cases take no more than a quarter of its free
            memory; `true`: in any case, on a CPU in this process's memory; `false`: never.
        device: Device that the patches are for.

    Raises:
        InputError: If `cache_on_device` is none of these.
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
        is_auto, self.device = cache_on_device == "auto", torch.device(device)
        self.choice = None if is_auto else as_bool(cache_on_device, "cache_on_device")
        self.requested = {"cache_on_device": cache_on_device, "num_workers": num_workers}
        self.effective: dict[str, Any] = dict.fromkeys([*self.requested, "bytes", "reason"])
        self._in_memory: list[dict[str, Any]] | None = None
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

        All ranks have to call it the first time.

        Raises:
            InputError: If the cases are to be on the device and do not fit.
            RuntimeError: If a worker dies or hangs.
        """
        patches: Any = self.dataset
        if self.effective["reason"] is None:
            with distributed.sync_errors():
                self._place_cases(patches)
        if self._in_memory is not None:
            for numbers in self.batch_sampler or ():
                yield default_collate([patches.cut(number, self._in_memory) for number in numbers])
            return
        iterator: Any = super().__iter__()
        try:
            yield from iterator
        finally:
            if self.num_workers:
                iterator._shutdown_workers()
                for worker in iterator._workers:
                    worker.kill()  # one that hangs would not end otherwise, nor the interpreter

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return what is in force, `None` where not yet known, and what was asked for."""
        return {"effective": self.effective, "requested": self.requested}

    def _place_cases(self, patches: PatchDataset) -> None:
        """Decide where the cases are during training, and put them there."""
        paths = map(patches.cache.path, {*patches.keys})
        size = sum(path.stat().st_size for path in paths if path.exists())
        if self.choice is not None:
            on_device, reason = self.choice, "as asked for"
        elif self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            on_device = size * SHARE <= free
            share = "at most" if on_device else "more than"
            reason = f"{size / 1e6:.0f} MB of {free / 1e6:.0f} MB free, {share} a quarter"
        else:
            on_device, reason = False, "on a CPU the system keeps what is read often"
        try:
            self._in_memory = patches.read_all(self.device) if on_device else None
        except torch.OutOfMemoryError:
            expected = f"{size / 1e6:.0f} MB free on {self.device} for the training cases"
            remedy = "Use cache_on_device=false."
            require(False, "cache_on_device", expected, "less", remedy)
        workers = 0 if on_device else self.num_workers
        place = (
            f"in the memory of {self.device}" if on_device else f"by {workers} workers from disk"
        )
        asked = " and ".join(f"{key}={value}" for key, value in self.requested.items())
        details.info("Training cases are read %s (%s); asked for: %s", place, reason, asked)
        values = on_device, workers, size, reason
        self.effective = dict(zip(self.effective, values, strict=True))


def _ignore_signals(worker_id: int) -> None:
    """Leave signals to a whole group to the main process, which saves and ends the workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
