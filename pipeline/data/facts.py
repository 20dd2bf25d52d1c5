"""Measures a case: what its headers say and what its voxels are, as plain values for JSON.

Nothing is judged here, so that what was measured once can be judged again, against other class
names or another split. Voxels pass by in pieces: of a volume only two masks are kept in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.data.dataset import Case
from pipeline.data.nifti import Header, VolumeError, files_of, read_header, slabs
from pipeline.data.streams import FEW, Moments, smallest_hashes
from transforms.dicom import DicomError
from transforms.labels import round_labels

Facts = dict[str, Any]

VERSION = 3  # of the form below; measured facts of another one are measured again
NUM_QUANTILES = 200  # of a case's foreground intensities
MAX_FOREGROUND_SAMPLES = 20_000
MAX_VALUES = 300  # different values of a label that are counted
MAX_DISTINCT = 64  # values of an image that are remembered: one with so few may be a label


def measure_headers(case: Case) -> Facts:
    """What the headers of a case say.

    Returns:
        `image` and `label`, a list with an entry per file: `shape`, `affine`, `dtype`,
        `is_oriented`, `zooms_mm`; or, where there is no readable header, `error`, which of DICOM
        is a whole message.
    """
    return {key: [_header_facts(path) for path in paths] for key, paths in files_of(case).items()}


def _header_facts(path: str) -> Facts:
    try:
        header = read_header(path)
    except (VolumeError, DicomError) as error:
        return _unreadable(error)
    return {
        "shape": list(header.shape),
        "affine": header.affine.tolist(),
        "dtype": str(header.dtype),
        "is_oriented": header.is_oriented,
        "zooms_mm": list(header.zooms),
    }


def measure_voxels(case: Case, ignore_value: int | None = None) -> Facts:
    """What the voxels of a case are; its headers are sound and of one shape.

    Args:
        case: With `image` and `label`.
        ignore_value: Label value that is no foreground.

    Returns:
        `values`: number of voxels by label value (the first 300), `non_integer`,
        `non_finite_label` and `rounded` (to a whole number nearby): their numbers; `channels`: for
        each the facts of `_Channel`; `box`: first and last + 1 voxel on each axis that is not zero
        in every channel; or `error`, and `key` and `number` of the file that could not be read to
        its end.
    """
    paths = files_of(case)
    try:
        path = paths["label"][0]
        header = read_header(path)
        label = _Label(ignore_value, math.prod(header.shape))
        for piece in slabs(path, header):
            label.add(piece)
    except (VolumeError, DicomError) as error:
        return _unreadable(error, key="label", number=0)
    occupied = np.zeros(len(label.foreground), bool)
    channels = []
    for number, path in enumerate(paths["image"]):
        try:
            channels += _measure_file(path, label.foreground, occupied)
        except (VolumeError, DicomError) as error:
            return _unreadable(error, key="image", number=number)
    box = _box(occupied.reshape(header.shape, order="F"))
    return {**label.facts(), "channels": channels, "box": box}


def _unreadable(error: Exception, **file: Any) -> Facts:
    return {"error": str(error), "is_dicom": isinstance(error, DicomError), **file}


def _measure_file(path: str, foreground: np.ndarray, occupied: np.ndarray) -> list[Facts]:
    """Facts of a file's channels; marks in `occupied` where one is not zero."""
    channels: list[_Channel] = []
    for start, piece in _by_channel(path, read_header(path), len(foreground)):
        if start == 0:
            channels.append(_Channel())
        inside = slice(start, start + len(piece))
        channels[-1].add(piece, foreground[inside])
        occupied[inside] |= piece != 0
    return [channel.facts() for channel in channels]


def _by_channel(path: str, header: Header, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces that do not reach over the end of a channel, with their place in it."""
    at = 0
    for slab in slabs(path, header):
        while len(slab):
            piece, slab = slab[: size - at], slab[size - at :]
            yield at, piece
            at = (at + len(piece)) % size


def _box(occupied: np.ndarray) -> list[list[int]]:
    box = []
    for axis in range(3):
        places = np.flatnonzero(occupied.any(axis=tuple({0, 1, 2} - {axis})))
        box.append([int(places[0]), int(places[-1]) + 1] if len(places) else [0, 0])
    return box


class _Label:
    """Counts the values of a label."""

    def __init__(self, ignore_value: int | None, size: int) -> None:
        self.ignore_value = ignore_value
        self.foreground, self.seen = np.zeros(size, bool), 0
        self.values: dict[float, int] = {}
        self.non_integer = self.non_finite = self.rounded = 0

    def add(self, piece: np.ndarray) -> None:
        inside = slice(self.seen, self.seen + len(piece))
        given, piece = piece, round_labels(piece)
        self.rounded += int(np.count_nonzero((given != piece) & np.isfinite(given)))
        self.foreground[inside] = (piece > 0) & (piece != self.ignore_value)
        self.seen += len(piece)
        if piece.dtype.kind == "f":
            finite = np.isfinite(piece)
            self.non_finite += int(len(piece) - finite.sum())
            piece = piece[finite] + 0  # of -0 and 0 one value
            self.non_integer += int((piece != np.rint(piece)).sum())
        if piece.dtype == np.uint8:
            counts = np.bincount(piece)
            found = np.flatnonzero(counts)
            counts = counts[found]
        else:
            found, counts = np.unique(piece, return_counts=True)
        for value, count in zip(found.tolist(), counts.tolist(), strict=True):
            if value in self.values or len(self.values) < MAX_VALUES:
                self.values[value] = self.values.get(value, 0) + count

    def facts(self) -> Facts:
        return {
            "values": {f"{value:g}": n for value, n in sorted(self.values.items())},
            "non_integer": self.non_integer,
            "non_finite_label": self.non_finite,
            "rounded": self.rounded,
        }


class _Channel:
    """Gathers what is known of one channel of an image."""

    def __init__(self) -> None:
        self.digest = hashlib.blake2b(digest_size=16)
        self.non_finite = 0
        self.low, self.high = math.inf, -math.inf
        self.moments, self.foreground = Moments(), Moments()
        self.samples: list[np.ndarray] = []
        self.stride, self.skipped = 1, 0
        self.distinct: set[float] | None = set()
        self.sketch = np.zeros(0, np.uint64)

    def add(self, piece: np.ndarray, foreground: np.ndarray) -> None:
        values = piece.astype(np.float64)
        self.digest.update(values.tobytes())
        finite = np.abs(values) <= np.finfo(np.float32).max  # as which volumes are loaded
        if not finite.all():
            self.non_finite += int(len(values) - finite.sum())
            values, foreground = values[finite], foreground[finite]
        if not len(values):
            return
        self.low, self.high = min(self.low, values.min()), max(self.high, values.max())
        self.moments.add(values)
        self._add_foreground(values[foreground])
        for part in (values[:FEW], values[FEW:]):  # a few tell that most images have too many
            if self.distinct is not None:
                self.distinct |= set(np.unique(part).tolist())
                self.distinct = self.distinct if len(self.distinct) <= MAX_DISTINCT else None
        self.sketch = smallest_hashes(values, self.sketch)

    def _add_foreground(self, values: np.ndarray) -> None:
        """Moments of all, and every n-th as a sample; n doubles when there are too many."""
        self.foreground.add(values)
        first = -self.skipped % self.stride
        self.skipped += len(values)
        self.samples.append(values[first :: self.stride])
        while sum(map(len, self.samples)) > MAX_FOREGROUND_SAMPLES:
            self.samples = [np.concatenate(self.samples)[::2]]
            self.stride *= 2

    def facts(self) -> Facts:
        """Plain values.

        `non_finite`: number of voxels that are NaN, or infinite once they are float32; of the
        others `count`, `min`, `max`, `mean`, `std`; of those in the foreground
        `foreground_count`, `foreground_mean`, `foreground_std` and 200 `foreground_quantiles`;
        `distinct`: its values, where they are 64 or fewer; `sketch`: see `shared_grey_values`;
        `digest`: of all voxels, whatever type they are stored as.
        """
        samples = np.concatenate(self.samples) if self.samples else np.zeros(0)
        levels = (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES
        return {
            "non_finite": self.non_finite,
            "min": float(self.low) if self.moments.count else None,
            "max": float(self.high) if self.moments.count else None,
            **self.moments.facts(),
            **self.foreground.facts("foreground_"),
            "foreground_quantiles": np.quantile(samples, levels).tolist() if len(samples) else [],
            "distinct": None if self.distinct is None else sorted(self.distinct),
            "sketch": self.sketch.tolist(),
            "digest": self.digest.hexdigest(),
        }
