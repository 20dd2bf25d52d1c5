"""Which patch of which case is training sample number n: a pure function of (seed, n).

Samples are numbered through the whole run; sample n is sample n mod N of epoch n // N, where N
is the number of samples in an epoch. Nothing depends on how many processes do the work, and a
run that continues needs to know one number only.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from pipeline import distributed
from pipeline.data.cache import VolumeCache, require_classes
from pipeline.data.cases import Case, add_case_id
from pipeline.data.device_cache import DeviceCache, ResidentCases
from pipeline.data.positions import CaseTensors, draw_centre, sampling_positions
from pipeline.errors import InputError

log = logging.getLogger(__name__)


def generator(*key: int | str) -> np.random.Generator:
    """Random generator that is a function of `key` alone, the same on every platform."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


class PatchDataset(Dataset):
    """Random patches of cached cases.

    A share `foreground_ratio` of the patches is centred on a voxel of a class drawn from those
    present in the case; the others on any voxel, or any annotated one where the case has voxels of
    `ignore_value`. The centre is then moved so that the patch of `roi_size` lies inside the volume
    where it fits. `patch_size` is what is cut out around it:
    larger than `roi_size` by the margin that the augmentation's resampling needs.

    Args:
        data: Cases to load, as dictionaries with `case_id`, `image` and `label`.
        transform: Deterministic preprocessing, applied once per case.
        roi_size: Network input in voxels.
        patch_size: Size cut out in voxels, at least `roi_size`.
        num_classes: Classes, background included.
        seed: Of the run.
        samples_per_epoch: N above.
        cache: Where preprocessed cases are; a sample is read from it when it is asked for.
        foreground_ratio: Share of patches centred on foreground, 0 to 1.
        ignore_value: Label of voxels that nobody annotated; no patch is centred on one.

    Raises:
        InputError: If a case has no annotated voxel, or cannot be cached.
        ValueError: If there is no case, or a size or ratio is out of range.
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
        if not data:
            raise ValueError("training cases: expected at least one, got none.")
        if not 0 <= foreground_ratio <= 1:
            raise ValueError(f"foreground_ratio: expected 0 to 1, got {foreground_ratio}.")
        if min(roi_size) < 1 or any(p < r for p, r in zip(patch_size, roi_size, strict=True)):
            raise ValueError(f"roi_size: expected 1 to {tuple(patch_size)}, got {roi_size}.")
        self.data, self.transform = [add_case_id(case) for case in data], transform
        self.roi_size = np.asarray(roi_size)
        self.patch_size = np.asarray(patch_size)
        self.seed, self.samples_per_epoch = seed, samples_per_epoch
        self.foreground_ratio = foreground_ratio
        self.num_classes, self.ignore_value = num_classes, ignore_value
        # for each worker its process id and 1 + the sample it is at; negative when it is through
        self.loading: Any = []
        self.cached = cache.fill(
            self.data,
            self._prepare,
            form="patches",
            num_classes=num_classes,
            ignore_value=ignore_value,
        )

    def __len__(self) -> int:
        return self.samples_per_epoch

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Training sample `number` of the run.

        Returns:
            `image` `(C, *patch_size)` float32, `label` `(1, *patch_size)` uint8, `seed` (int,
            for everything else that is random about this sample), its `number`, `case_id`, and
            `origin`, the patch's first voxel in the preprocessed volume (negative in the padding).
        """
        worker = get_worker_info()
        if worker is None:
            return self._sample(number)
        place = slice(2 * worker.id, 2 * worker.id + 2)
        self.loading[place] = [os.getpid(), number + 1]  # for `explain`, should this be its end
        sample = self._sample(number)
        self.loading[place] = [os.getpid(), -number - 1]
        return sample

    def case_id(self, number: int) -> str:
        """Case of training sample `number`."""
        return self.data[self._case_index(number)]["case_id"]

    def _sample(self, number: int) -> dict[str, Any]:
        case_index = self._case_index(number)
        with self.cached.open(case_index) as case:
            origin, seed = self._draw(case, number)
            image, label = (case[key].cut(origin, self.patch_size) for key in ("image", "label"))
        return {
            "image": image,
            "label": label,
            "seed": seed,
            "number": number,
            "case_id": self.data[case_index]["case_id"],
            "origin": torch.as_tensor(origin),
        }

    def resident_batch(self, numbers: Sequence[int], cases: ResidentCases) -> dict[str, Any]:
        """Training samples `numbers`, collated, cut where the cases are; bit for bit the same."""
        indices = [self._case_index(number) for number in numbers]
        draws = [self._draw(cases[i], n) for i, n in zip(indices, numbers, strict=True)]
        origins = [origin for origin, _ in draws]
        return {
            **cases.cut(indices, origins, self.patch_size),
            "seed": torch.tensor([seed for _, seed in draws]),
            "number": torch.tensor(numbers),
            "case_id": [self.data[i]["case_id"] for i in indices],
            "origin": torch.from_numpy(np.stack(origins)),
        }

    def _draw(self, case: CaseTensors, number: int) -> tuple[np.ndarray, int]:
        """First voxel of a sample's patch, and the seed of what else is random about it."""
        rng = generator(self.seed, *divmod(number, self.samples_per_epoch))
        centre = draw_centre(case, self.num_classes, self.foreground_ratio, rng)
        origin = self._inside(centre, case["label"].shape[1:]) - self.patch_size // 2
        return origin, int(rng.integers(2**63))

    def _prepare(self, case: Case) -> dict[str, Any]:
        loaded = self.transform(case)
        volumes = {key: loaded[key] for key in ("image", "label")}
        require_classes(case["case_id"], volumes["label"], self.num_classes, self.ignore_value)
        try:
            positions = sampling_positions(volumes["label"], self.num_classes, self.ignore_value)
        except ValueError as error:
            raise InputError(f"{case['case_id']}: {error} Leave the case out.") from None
        return {**volumes, **positions}

    def _case_index(self, number: int) -> int:
        """Cases come in rounds: every case once per round, each round in an order of its own."""
        round_number, place = divmod(number, len(self.data))
        return int(_order(self.seed, round_number, len(self.data))[place])

    def _inside(self, centre: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """The centre, moved so that the roi lies inside the volume where it fits."""
        size = np.asarray(shape)
        low = self.roi_size // 2
        high = size - (self.roi_size - low)
        return np.where(high > low, np.clip(centre, low, np.maximum(high, low)), size // 2)


@functools.lru_cache(maxsize=4)
def _order(seed: int, round_number: int, num_cases: int) -> np.ndarray:
    return generator(seed, "order", round_number).permutation(num_cases)


class EpochSampler(Sampler[int]):
    """Numbers of the samples from `start` to the end of its epoch.

    Of several ranks each has a part of every micro-batch, the first ones a sample more where it
    cannot be divided evenly; all of them together have what one process has.

    Args:
        batch_size: Samples in a micro-batch, of all ranks together.
        accumulation_steps: Micro-batches in an optimizer step.
        steps_per_epoch: Optimizer steps in an epoch; it holds whole batches only.

    Attributes:
        samples_per_epoch: Their product.
        own: Place of this rank's part in a micro-batch.
        start: Number of the next sample of the run; the trainer sets it before each epoch.

    Raises:
        InputError: If there is not a sample for each rank.
    """

    def __init__(self, batch_size: int, accumulation_steps: int, steps_per_epoch: int) -> None:
        if batch_size < distributed.size():
            raise InputError(
                f"batch_size: expected {distributed.size()} or more, a patch for each rank, got "
                f"{batch_size}. Start fewer ranks."
            )
        self.batch_size = batch_size
        self.samples_per_epoch = batch_size * accumulation_steps * steps_per_epoch
        least, more = divmod(batch_size, distributed.size())
        first = distributed.rank() * least + min(distributed.rank(), more)
        self.own = slice(first, first + least + (distributed.rank() < more))
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
        dataset: Where the patches come from.
        sampler: Their numbers.
        batch_size: Patches in a micro-batch, of all ranks together.
        num_workers: Processes of this rank that cut them on the host; 0: none.
        timeout_s: Seconds after which a worker that delivers nothing is taken to hang.
        cache_on_device: Whether the cases are put on the device; see `DeviceCache`.
        device: That the patches are for.
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
        self.residence = DeviceCache(cache_on_device, device, num_workers)
        dataset.loading = multiprocessing.Array("q", 2 * num_workers, lock=False)
        super().__init__(
            dataset,
            batch_size=len(range(batch_size)[sampler.own]),
            sampler=sampler,
            num_workers=num_workers,
            timeout=timeout_s if num_workers else 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_signals,
            # forked, a worker sees its parent's death and shares `loading`; a fork server outlives
            multiprocessing_context="fork" if num_workers else None,
        )

    def __iter__(self) -> Any:
        """One epoch; workers are gone when it ends, however it ends.

        Raises:
            InputError: If the cases are to be on the device and do not fit.
        """
        patches: Any = self.dataset
        batches: Any = self.batch_sampler
        cases = self.residence.of(patches.cached)
        if cases is not None:
            for numbers in batches:
                yield patches.resident_batch(numbers, cases)
            return
        iterator: Any = super().__iter__()
        try:
            yield from iterator
        finally:
            if self.num_workers:
                iterator._shutdown_workers()
                for worker in iterator._workers:
                    worker.kill()  # one that hangs would not end otherwise, nor the interpreter

    def begin(self) -> None:
        """Before an epoch of a training: say, the first time, where the cases are.

        Raises:
            InputError: If they are to be on the device and do not fit.
        """
        patches: Any = self.dataset
        if not self.residence.is_decided:
            with distributed.sync_errors():
                self.residence.of(patches.cached)
            log.info("%s", self.residence)

    def describe(self) -> dict[str, dict[str, Any]]:
        """What was asked for and what is in force; `None` before the first batch."""
        return self.residence.describe()

    def explain(self, error: RuntimeError) -> str | None:
        """Which cases a worker that died or hung was loading; `None` for any other error."""
        words = re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\)|timed out", str(error))
        if words is None:
            return None
        dead = {int(pid) for pid in (words[1] or "").split(",") if pid}
        dataset: Any = self.dataset
        pairs = zip(dataset.loading[::2], dataset.loading[1::2], strict=True)
        at = [n for pid, n in pairs if n and (not dead or pid in dead)]
        numbers = [n for n in at if n > 0] or at  # it may have died just after, in its batch
        cases = ", ".join(dataset.case_id(abs(n) - 1) for n in numbers) or "unknown"
        return (
            f"{cases}: expected a loader worker to deliver this case, got: {error}. Look at the "
            "memory that is free, or use num_workers=0; the same command goes on from the newest "
            "checkpoint."
        )


def _ignore_signals(worker_id: int) -> None:
    """Leave signals to a whole group to the main process, which saves and ends the workers."""
    for number in distributed.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
