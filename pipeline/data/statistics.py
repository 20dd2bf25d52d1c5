"""Statistics of one case, measured in one pass over its files, and of a dataset.

Nothing is judged here, so that stored statistics serve other class names and another split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import nibabel as nib
import numpy as np
from scipy.ndimage import find_objects

from pipeline.data.cases import Case, files_of
from pipeline.data.content import ContentHashes, read_checked, sha256_of, write_checked
from pipeline.data.dataset import Cases
from pipeline.data.nifti import Headers, count_channels
from transforms.preprocess import round_labels
from transforms.volumes import Header, read_label, read_voxels

VERSION = 6  # of CaseStatistics; statistics that another version stored are measured again
NUM_QUANTILES = 200  # of a case's foreground intensities
MAX_FOREGROUND_SAMPLES = 20_000
MAX_VALUES = 300  # different values of a label that are counted
MAX_DISTINCT = 64  # values of an image that are listed: one with so few may be a label
SKETCH_SIZE = 256
PIECE = 2**20  # voxels that are converted to float64 at once
FEW = 2**13
PERCENTILES = ("0.5", "5", "50", "95", "99.5")


@dataclass(frozen=True)
class ChannelStatistics:
    """One channel of an image: of its finite voxels, but for the first field and the last."""

    num_non_finite: int  # voxels that are NaN, or infinite as float32
    min: float
    max: float
    mean: float
    std: float
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
    path, where they have been read already. Raises as `read_voxels`.
    """

    known, images, path = contents or {}, files_of(case)["image"], case["label"]
    label = round_labels(read_label(path, headers["image"][0], content=known.get(path)))
    foreground = ((label > 0) & (label != ignore_value)).ravel(order="F")
    counts = _count_labels(label)
    occupied = np.zeros(label.shape, bool)
    channels = []
    for path, header in zip(images, headers["image"], strict=True):
        voxels = read_voxels(path, header, known.get(path))
        for channel in np.moveaxis(voxels.reshape(*label.shape, -1, order="F"), -1, 0):
            occupied |= channel != 0
            channels.append(_measure_channel(channel.ravel(order="F"), foreground))
    found = find_objects(occupied.view(np.uint8))
    box = [[axis.start, axis.stop] for axis in found[0]] if found else [[0, 0]] * 3
    return CaseStatistics(**counts, box=box, channels=channels)


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
    if not voxels.size:
        voxels, foreground = np.zeros(1), np.zeros(1, bool)
    inside = voxels[foreground]
    most = max(1, -(-inside.size // MAX_FOREGROUND_SAMPLES))
    samples = inside[:: 2 ** (most - 1).bit_length()].astype(np.float64)
    levels = (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES
    mean = float(np.mean(voxels, dtype=np.float64))
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
        min=float(voxels.min()),
        max=float(voxels.max()),
        mean=mean,
        std=float(np.sqrt(squares / voxels.size)),
        foreground_quantiles=np.quantile(samples, levels).tolist() if len(samples) else [],
        distinct=distinct.astype(float).tolist() if len(distinct) <= MAX_DISTINCT else None,
        sketch=sketch.tolist(),
        digest=digest.hexdigest(),
    )


def _update_sketch(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Keep the 256 smallest hashes of all values but zero so far (bottom-k sketch).

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


def recall(
    case: Case, headers: Headers, ignore_value: int | None, hashes: ContentHashes | None
) -> CaseStatistics:
    """Call `measure_case`, unless its result for files of the same content is stored."""
    if hashes is None:
        return measure_case(case, headers, ignore_value)
    contents: dict[str, bytes] = {}
    content = hashes.of_case(case, contents)
    path = hashes.directory / "statistics" / f"{sha256_of([VERSION, ignore_value, content])}.json"
    if values := read_checked(path):
        channels = [ChannelStatistics(**channel) for channel in values.pop("channels")]
        return CaseStatistics(**values, channels=channels)
    statistics = measure_case(case, headers, ignore_value, contents)
    if hashes.of_case(case) == content:  # else a file was changed meanwhile
        write_checked(path, asdict(statistics))
    return statistics


# ---- all cases

Triples = list[list[float]]  # of each case, along R, A, S


@dataclass(frozen=True)
class ChannelFingerprint:
    """A channel of all images; every case counts alike, whatever its size."""

    name: str
    means: list[float]  # smallest and largest of the images' means
    stds: list[float]  # smallest and largest of the images' standard deviations
    foreground_mean: float | None  # of all images' foreground quantiles; None without foreground
    foreground_std: float | None
    foreground_percentiles: dict[str, float | None]  # by level


@dataclass(frozen=True)
class ClassFingerprint:
    """A class of all labels."""

    name: str
    num_cases: int  # that have it
    median_volume_ml: float | None  # where it is present; None: nowhere


@dataclass(frozen=True)
class DatasetFingerprint:
    """Sizes, spacings, intensities and classes of a dataset."""

    num_cases: int
    num_channels: int
    spacings_mm: Triples
    shapes: Triples  # in voxels
    # what follows is None or empty where voxels were not read
    occupied_shapes: Triples | None = None  # without empty borders
    occupied_share: float | None = None  # mean share of the volumes within their empty borders
    channels: list[ChannelFingerprint] = field(default_factory=list)
    classes: list[ClassFingerprint] = field(default_factory=list)  # background first


def make_fingerprint(
    cases: Cases, headers: list[Headers], statistics: list[CaseStatistics]
) -> DatasetFingerprint:
    """Summarise cases without faults; there are no `statistics` where voxels were not read."""
    images = [files["image"][0] for files in headers]
    boxes = [case.box for case in statistics] or [[[0, n] for n in h.shape[:3]] for h in images]
    grids = [_grid(header, np.array(box)) for header, box in zip(images, boxes, strict=True)]
    spacings, shapes, occupied = (np.array(values) for values in zip(*grids, strict=True))
    channels = cases.channel_names or [f"channel_{n}" for n in range(count_channels(headers[0]))]
    facts = len(images), len(channels), spacings.tolist(), shapes.tolist()
    if not statistics:
        return DatasetFingerprint(*facts)
    values = {int(value) for case in statistics for value in case.label_counts}
    highest = max(values - {cases.ignore_value}, default=0)
    classes = cases.class_names or ["background", *(f"class_{n + 1}" for n in range(highest))]
    return DatasetFingerprint(
        *facts,
        occupied.tolist(),
        float(np.mean(occupied.prod(axis=1) / shapes.prod(axis=1))),
        [_summarise_channel(statistics, n, name) for n, name in enumerate(channels)],
        [_summarise_class(statistics, n, name, spacings) for n, name in enumerate(classes)],
    )


def _grid(image: Header, box: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spacing in mm, shape, and shape without empty borders, in voxels along R, A, S."""
    order = np.argsort(nib.io_orientation(image.affine)[:, 0])
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    occupied = np.maximum(box[:, 1] - box[:, 0], 1)
    return spacing[order], np.array(image.shape[:3])[order], occupied[order]


def _summarise_channel(cases: list[CaseStatistics], number: int, name: str) -> ChannelFingerprint:
    channels = [case.channels[number] for case in cases]
    means, stds = [one.mean for one in channels], [one.std for one in channels]
    ranges = [min(means), max(means)], [min(stds), max(stds)]
    pooled = np.concatenate([channel.foreground_quantiles for channel in channels])
    if not len(pooled):
        return ChannelFingerprint(name, *ranges, None, None, dict.fromkeys(PERCENTILES))
    levels = np.percentile(pooled, [*map(float, PERCENTILES)]).tolist()
    percentiles = dict(zip(PERCENTILES, levels, strict=True))
    return ChannelFingerprint(name, *ranges, float(pooled.mean()), float(pooled.std()), percentiles)


def _summarise_class(
    cases: list[CaseStatistics], value: int, name: str, spacings: np.ndarray
) -> ClassFingerprint:
    counts = np.array([case.label_counts.get(str(value), 0) for case in cases])
    volumes = (counts * spacings.prod(axis=1) / 1000)[counts > 0]
    return ClassFingerprint(name, len(volumes), float(np.median(volumes)) if len(volumes) else None)


def training_range(fingerprint: DatasetFingerprint) -> dict[str, Any]:
    """Smallest and largest spacing, and means and deviations of channels where voxels were read."""
    spacings = np.array(fingerprint.spacings_mm)
    return {
        "spacing_mm": [spacings.min(axis=0).tolist(), spacings.max(axis=0).tolist()],
        "channels": [
            {"name": one.name, "means": one.means, "stds": one.stds} for one in fingerprint.channels
        ],
    }
