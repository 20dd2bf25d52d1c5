"""Statistics of volumes: of one case, measured in one pass over its files, and of a dataset.

Nothing is judged here, so that statistics that were stored can be judged again, against other class
names or another split.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy.ndimage import find_objects

from pipeline.data.cases import Case, files_of
from pipeline.data.content import HASHES, ContentHashes, read_checked, sha256_of, write_checked
from pipeline.data.nifti import Header, Headers, read_voxels
from transforms.preprocess import round_labels

VERSION = 4  # of CaseStatistics; statistics that another version stored are measured again
NUM_QUANTILES = 200  # of a case's foreground intensities
MAX_FOREGROUND_SAMPLES = 20_000
MAX_VALUES = 300  # different values of a label that are counted
MAX_DISTINCT = 64  # values of an image that are listed: one with so few may be a label
SKETCH_SIZE = 256
PIECE = 2**20  # voxels that are converted to float64 at once
FEW = 2**13
PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChannelStatistics:
    """One channel of an image: of its finite voxels, but for the first field and the last."""

    num_non_finite: int  # voxels that are NaN, or infinite as float32
    min: float | None  # None, as the three that follow: there is no finite voxel
    max: float | None
    mean: float | None
    std: float | None
    # 200 quantiles, at (n + ½) / 200, of every 2^k-th foreground voxel in file order, with the
    # smallest k for which these are 20,000 or fewer
    foreground_quantiles: list[float]
    distinct: list[float] | None  # all values, in order, where they are 64 or fewer
    sketch: list[int]  # the 256 smallest hashes of its values; see `_update_sketch`
    digest: str  # hash of all voxels as float64, whatever type they are stored as


@dataclass(frozen=True)
class CaseStatistics:
    """The voxels of one case."""

    label_counts: dict[str, int]  # voxels by label value, for the 300 smallest values
    num_fractions: int  # label voxels that are not whole numbers
    num_non_finite_labels: int  # label voxels that are NaN or infinite
    num_rounded: int  # label voxels that are rounded to a whole number nearby
    box: list[list[int]]  # first and last + 1 voxel per axis that is not zero in every channel
    channels: list[ChannelStatistics]


def measure_case(
    case: Case,
    headers: Headers,
    ignore_value: int | None = None,
    contents: Mapping[str, bytes] | None = None,
) -> CaseStatistics:
    """Measure the voxels of a case whose headers are valid and of one shape.

    `ignore_value` is a label value that is not foreground; `contents` holds the bytes of files, by
    path, where they have been read already.

    Raises:
        VolumeError: If a file cannot be read to its end.
        DicomError: If a slice's pixels cannot be decoded.
    """

    def read(key: str, number: int) -> np.ndarray:
        path = files_of(case)[key][number]
        return read_voxels(path, headers[key][number], (contents or {}).get(path))

    stored = read("label", 0)
    label = round_labels(stored)
    foreground = ((label > 0) & (label != ignore_value)).ravel(order="F")
    num_rounded = int(np.count_nonzero((label != stored) & np.isfinite(stored)))
    counts = _count_labels(label)
    occupied = np.zeros(label.shape, bool)
    channels = []
    for number in range(len(headers["image"])):
        voxels = read("image", number)
        for channel in np.moveaxis(voxels.reshape(*label.shape, -1, order="F"), -1, 0):
            occupied |= channel != 0
            channels.append(_measure_channel(channel.ravel(order="F"), foreground))
    found = find_objects(occupied.view(np.uint8))
    box = [[axis.start, axis.stop] for axis in found[0]] if found else [[0, 0]] * 3
    return CaseStatistics(**counts, num_rounded=num_rounded, box=box, channels=channels)


def _count_labels(label: np.ndarray) -> dict[str, Any]:
    num_voxels, fractions = label.size, 0
    if label.dtype.kind == "f":
        label = label[np.isfinite(label)]
        fractions = int((label != np.rint(label)).sum())
    if label.size and not fractions and label.min() >= 0 and label.max() < 256:
        pieces = _pieces(label.astype(np.uint8, copy=False).ravel(order="K"))
        counts = np.sum([np.bincount(piece, minlength=256) for piece in pieces], axis=0)
        values, totals = np.flatnonzero(counts), counts[counts > 0]
    else:
        values, totals = np.unique(label, return_counts=True)
    pairs = zip(values[:MAX_VALUES].tolist(), totals[:MAX_VALUES].tolist(), strict=True)
    return {
        "label_counts": {f"{value:g}": count for value, count in pairs},
        "num_fractions": fractions,
        "num_non_finite_labels": num_voxels - label.size,
    }


def _measure_channel(voxels: np.ndarray, foreground: np.ndarray) -> ChannelStatistics:
    """Statistics of `(N,)` voxels in file order; of them `foreground` is a mask."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in _pieces(voxels):
        digest.update(piece.astype(np.float64).tobytes())
    num_non_finite = 0
    if voxels.dtype.kind == "f":
        finite = np.abs(voxels) <= np.finfo(np.float32).max  # volumes are loaded as float32
        if num_non_finite := int(voxels.size - finite.sum()):
            voxels, foreground = voxels[finite], foreground[finite]
    inside = voxels[foreground]
    step = 1
    while -(-inside.size // step) > MAX_FOREGROUND_SAMPLES:
        step *= 2
    samples = inside[::step].astype(np.float64)
    levels = (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES
    mean = float(np.mean(voxels, dtype=np.float64)) if voxels.size else 0.0
    squares, sketch = 0.0, np.zeros(0, np.uint64)
    for piece in _pieces(voxels):
        values = piece.astype(np.float64)
        squares += float(np.square(values - mean).sum())
        sketch = _update_sketch(values, sketch)
    distinct = np.unique(voxels[:FEW])  # a few voxels show that most images have too many values
    if len(distinct) <= MAX_DISTINCT:
        distinct = np.unique(voxels)
    return ChannelStatistics(
        num_non_finite=num_non_finite,
        min=float(voxels.min()) if voxels.size else None,
        max=float(voxels.max()) if voxels.size else None,
        mean=mean if voxels.size else None,
        std=float(np.sqrt(squares / voxels.size)) if voxels.size else None,
        foreground_quantiles=np.quantile(samples, levels).tolist() if len(samples) else [],
        distinct=distinct.astype(float).tolist() if len(distinct) <= MAX_DISTINCT else None,
        sketch=sketch.tolist(),
        digest=digest.hexdigest(),
    )


def _update_sketch(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The 256 smallest hashes of the values so far (bottom-k sketch), without that of zero.

    Source: Broder, On the resemblance and containment of documents, 1997; the hash is the
    finalizer of SplitMix64 (Steele et al., OOPSLA 2014).
    """
    x = (values[values != 0] + 0.0).view(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    for part in (x[:FEW], x[FEW:]):  # the hashes of a few values bound those of the others
        if len(known) == SKETCH_SIZE:
            part = part[part < known[-1]]
        known = np.unique(np.concatenate([known, part]))[:SKETCH_SIZE]
    return known


def _pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    return (values[start : start + PIECE] for start in range(0, values.size, PIECE))


class StatisticsStore:
    """Statistics on disk: a small JSON file for each case, named by the content of its files."""

    def __init__(self, cache_dir: Path) -> None:
        self.directory = cache_dir / "statistics"
        self.hashes = ContentHashes(cache_dir / HASHES)
        self.is_writable = True

    def measure_case(
        self, case: Case, headers: Headers, ignore_value: int | None = None
    ) -> CaseStatistics:
        """Stored statistics, or those of `measure_case`, which are then stored."""
        contents: dict[str, bytes] = {}
        content = self.hashes.of_case(case, contents)
        path = self.directory / f"{sha256_of([VERSION, ignore_value, content])}.json"
        if values := read_checked(path):
            channels = [ChannelStatistics(**channel) for channel in values.pop("channels")]
            return CaseStatistics(**values, channels=channels)
        statistics = measure_case(case, headers, ignore_value, contents)
        if self.hashes.of_case(case) == content:  # else a file was changed meanwhile
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                write_checked(path, asdict(statistics))
            except OSError as error:
                if self.is_writable:
                    log.warning("%s: expected to store statistics, got: %s", path.parent, error)
                self.is_writable = False
        return statistics


@dataclass(frozen=True)
class Spread:
    """A triple per case along R, A, S, and the median, smallest and largest along each axis."""

    median: list[float]
    min: list[float]
    max: list[float]
    cases: list[list[float]]


@dataclass(frozen=True)
class ChannelFingerprint:
    """A channel of all images; every case counts alike, whatever its size."""

    name: str
    mean: float  # mean of the images' means
    std: float  # mean of the images' standard deviations
    means: list[float]  # smallest and largest of the images' means
    stds: list[float]  # smallest and largest of the images' standard deviations
    min: float
    max: float
    foreground_mean: float | None  # of all images' foreground quantiles; None without foreground
    foreground_std: float | None
    foreground_percentiles: dict[str, float | None]  # by level


@dataclass(frozen=True)
class ClassFingerprint:
    """A class of all labels."""

    name: str
    num_cases: int  # that have it
    voxel_share: float  # of all voxels
    median_volume_ml: float | None  # where it is present; None: nowhere


@dataclass(frozen=True)
class DatasetFingerprint:
    """Sizes, spacings, intensities and classes of a dataset; axes are R, A, S."""

    num_cases: int
    num_channels: int
    voxels_were_read: bool  # if not, the fields about voxels are empty or None
    spacings_mm: Spread
    shapes: Spread  # in voxels
    occupied_shapes: Spread | None  # without empty borders
    occupied_share: float | None  # mean share of the volumes within their empty borders
    channels: list[ChannelFingerprint]
    classes: list[ClassFingerprint]  # background first


def make_fingerprint(
    images: Sequence[Header],
    statistics: Sequence[CaseStatistics],
    class_names: Sequence[str],
    channel_names: Sequence[str],
) -> DatasetFingerprint:
    """Summarise cases without faults.

    `images` holds the header of each case's image, `statistics` those of each case, or none if
    voxels were not read.
    """
    boxes = [case.box for case in statistics] or [[[0, n] for n in h.shape[:3]] for h in images]
    grids = [_grid(header, np.array(box)) for header, box in zip(images, boxes, strict=True)]
    spacings, shapes, occupied = (np.array(values) for values in zip(*grids, strict=True))
    facts = len(images), len(channel_names), bool(statistics), _spread(spacings), _spread(shapes)
    if not statistics:
        return DatasetFingerprint(*facts, None, None, [], [])
    return DatasetFingerprint(
        *facts,
        occupied_shapes=_spread(occupied),
        occupied_share=float(np.mean(occupied.prod(axis=1) / shapes.prod(axis=1))),
        channels=[
            _summarise_channel(name, [case.channels[n] for case in statistics])
            for n, name in enumerate(channel_names)
        ],
        classes=[
            _summarise_class(name, str(value), statistics, spacings.prod(axis=1))
            for value, name in enumerate(class_names)
        ],
    )


def _grid(image: Header, box: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spacing in mm, shape, and shape without empty borders, in voxels along R, A, S."""
    order = np.argsort(nib.io_orientation(image.affine)[:, 0])
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    occupied = np.maximum(box[:, 1] - box[:, 0], 1)
    return spacing[order], np.array(image.shape[:3])[order], occupied[order]


def _spread(values: np.ndarray) -> Spread:
    parts = np.median(values, axis=0), values.min(axis=0), values.max(axis=0), values
    return Spread(*(part.tolist() for part in parts))


def _summarise_channel(name: str, channels: Sequence[ChannelStatistics]) -> ChannelFingerprint:
    facts = [(one.mean, one.std, one.min, one.max) for one in channels]
    means, stds, lows, highs = np.array(facts, float).T.copy()
    pooled = np.concatenate([channel.foreground_quantiles for channel in channels])
    known = len(pooled) > 0
    levels = np.percentile(pooled, PERCENTILES).tolist() if known else [None] * len(PERCENTILES)
    return ChannelFingerprint(
        name,
        mean=float(means.mean()),
        std=float(stds.mean()),
        means=[float(means.min()), float(means.max())],
        stds=[float(stds.min()), float(stds.max())],
        min=float(lows.min()),
        max=float(highs.max()),
        foreground_mean=float(pooled.mean()) if known else None,
        foreground_std=float(pooled.std()) if known else None,
        foreground_percentiles=dict(zip(map("{:g}".format, PERCENTILES), levels, strict=True)),
    )


def _summarise_class(
    name: str, value: str, statistics: Sequence[CaseStatistics], voxel_mm3: np.ndarray
) -> ClassFingerprint:
    counts = np.array([case.label_counts.get(value, 0) for case in statistics])
    total = sum(sum(case.label_counts.values()) for case in statistics)
    present = counts > 0
    volumes = counts[present] * voxel_mm3[present] / 1000
    median = float(np.median(volumes)) if len(volumes) else None
    return ClassFingerprint(name, int(present.sum()), float(counts.sum() / total), median)


def training_range(fingerprint: DatasetFingerprint) -> dict[str, Any]:
    """What images a network was trained on, without facts about any single image.

    Returns:
        `spacing_mm`: smallest and largest along R, A, S; `channels`: where voxels were read, for
        each `name`, and the smallest and largest of the images' `means` and `stds`.
    """
    spacings = fingerprint.spacings_mm
    return {
        "spacing_mm": [spacings.min, spacings.max],
        "channels": [
            {"name": channel.name, "means": channel.means, "stds": channel.stds}
            for channel in fingerprint.channels
        ],
    }
