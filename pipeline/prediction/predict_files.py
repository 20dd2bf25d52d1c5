"""Predicts a file or a folder with a trained run; `configs/inference.json` is the config.

A case that cannot be predicted is named and left out, and the exit status is 1; with `strict`, the
process that has it stops. Started by torchrun, each process predicts a share of the cases.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from tqdm.contrib.logging import logging_redirect_tqdm

from pipeline import distributed
from pipeline.config.keys import Config
from pipeline.config.parser import require_unaltered
from pipeline.data.cases import Case, paths_of
from pipeline.data.nifti import check_headers
from pipeline.errors import InputError, as_bool, innermost, some
from pipeline.files import make_directory, replace_file
from pipeline.prediction.segmenter import PredictionError, Segmenter, is_out_of_memory
from pipeline.progress_bar import ProgressBar
from transforms.preprocess import Preprocessing
from transforms.volumes import read_header

log = logging.getLogger(__name__)

# raised in reading, preprocessing and prediction for a volume that cannot be predicted
FAULTS = (OSError, EOFError, ValueError, RuntimeError, MemoryError, LookupError)
KINDS = "", "_probabilities"  # endings of a case's results
SPACING_FACTOR = 1.5  # beyond the training images' smallest and largest voxel
CONTRAST_FACTOR = 3.0  # beyond their smallest and largest deviation of intensities
# fields of a NIfTI header that say where voxels are, beside `pixdim`
GRID_FIELDS = [
    "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units",
]  # fmt: skip
MARK = b"segmentation by mixed-precision-segmentation"  # in the description of predictions

Outcomes = list[tuple[str, str | None]]  # case ids, and the reason if it was not predicted


class Prediction:
    """Predicts cases, dictionaries with `case_id` and `image` (a path or one per channel).

    `output_dir`, which may be relative to `bundle_root`, gets `<case_id>.nii.gz` for each, and with
    `probabilities` also `<case_id>_probabilities.nii.gz`, float32 `(H, W, D, num_classes)`.
    `trained_on` has spacing and intensities of the training images, to compare with, if known. With
    `strict`, the first case that cannot be predicted is the last.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        preprocessing: Preprocessing,
        segmenter: Segmenter,
        bundle_root: str,
        output_dir: str,
        in_channels: int,
        trained_on: Config | None = None,
        probabilities: bool | str = False,
        strict: bool | str = False,
    ) -> None:
        self.cases, self.preprocessing, self.segmenter = cases, preprocessing, segmenter
        self.output_dir = Path(bundle_root).resolve() / output_dir
        self.in_channels, self.trained_on = in_channels, trained_on
        self.probabilities = as_bool(probabilities, "probabilities")
        self.strict = as_bool(strict, "strict")

    def run(self) -> None:
        """Predict all cases, each rank its share.

        Exit with status 1 if a case could not be predicted, with 2 if `output_dir` cannot be used.
        """
        try:
            with distributed.sync_errors():
                distributed.silence_other_ranks()
                require_unaltered()
                case_ids = [case["case_id"] for case in self.cases]
                if case_ids != distributed.broadcast_object(case_ids):
                    raise InputError(
                        "input: expected the cases of rank 0, got others. Give all ranks the same."
                    )
                self._prepare_output()
        except InputError as error:
            error.tell()
            raise SystemExit(2) from None
        mine = distributed.shard(self.cases)
        done: Outcomes = []
        try:
            self._predict_each(mine, done)
        except BaseException:  # an interruption: the others are not waited for
            self._report(done, len(mine))
            raise
        done = distributed.interleave(distributed.all_gather_object(done))
        self._report(done, len(self.cases))
        distributed.destroy()
        if any(why for _, why in done):
            raise SystemExit(1)

    def _predict_each(self, cases: Sequence[Case], done: Outcomes) -> None:
        """Predict cases; each is added to `done`, so that an interruption knows how far it came."""
        # the redirection replaces the console's handler, also one that was silenced
        is_main = distributed.is_main()
        with logging_redirect_tqdm(tqdm_class=ProgressBar) if is_main else contextlib.nullcontext():
            for case in ProgressBar(cases, desc="Predicting", enabled=is_main):
                try:
                    self._predict(case)
                    done.append((case["case_id"], None))
                except FAULTS as error:
                    done.append((case["case_id"], describe_fault(error)))
                    log.error("%s: %s", *done[-1])
                    log.debug("", exc_info=True)
                    if self.strict:
                        break

    def _report(self, done: Outcomes, num_cases: int) -> None:
        faults = [f"  {case_id}: {why}" for case_id, why in done if why is not None]
        if distributed.is_main():
            num_done = len(done) - len(faults)
            log.info("%d of %d cases predicted, in %s", num_done, num_cases, self.output_dir)
            if faults:
                told = f"Not predicted: {len(faults)} of {num_cases}"
                print(told, *faults, sep="\n", file=sys.stderr)

    def _prepare_output(self) -> None:
        """Make the output directory; refuse one in which other files would be overwritten."""
        out = Path(os.path.realpath(self.output_dir))
        images = [Path(os.path.realpath(path)) for case in self.cases for path in paths_of(case)]
        if out in {image.parent for image in images} or {out, *out.parents} & {*images}:
            raise InputError(
                f"output_dir: expected another folder than that of the images, got "
                f"{self.output_dir}. Choose another."
            )
        targets = [path for case in self.cases for path in self._targets(case)]
        if foreign := [path.name for path in targets if path.exists() and not is_prediction(path)]:
            raise InputError(
                f"output_dir: expected a folder without other files of the results' names, got "
                f"{some(foreign)} in {self.output_dir}. Choose another."
            )
        try:
            make_directory(self.output_dir)
            tempfile.TemporaryFile(dir=self.output_dir).close()
        except OSError as error:
            raise InputError(
                f"output_dir: expected a folder that can be written, got: {error}. Choose another."
            ) from None

    def _targets(self, case: Case) -> list[Path]:
        return [self.output_dir / f"{case['case_id']}{kind}.nii.gz" for kind in KINDS]

    def _predict(self, case: Case) -> None:
        if "fault" in case:  # two files have its name
            raise PredictionError(case["fault"])
        for issue in check_headers(case, self.in_channels)[1]:
            if not issue.warning:
                raise PredictionError(issue.message)
            log.warning("%s", issue.line)
        loaded = self.preprocessing.load(case)
        image = loaded["image"]
        if wrong := int((~torch.isfinite(image)).sum()):
            raise PredictionError(
                f"expected finite voxels, got {wrong} that are NaN or infinite. Replace them."
            )
        for line in find_differences_from_training(image, self.trained_on):
            log.warning("%s: %s", case["case_id"], line)
        image = self.preprocessing.regularize(loaded)["image"]
        found = self.segmenter(image, with_probabilities=self.probabilities)
        results = [found.labels]
        if found.probabilities is not None:
            results.append(np.moveaxis(found.probabilities, 0, -1))
        for path, voxels in zip(self._targets(case), results, strict=False):
            save_like(voxels, paths_of(case)[0], path)


def find_differences_from_training(image: MetaTensor, trained_on: Config | None) -> Iterator[str]:
    """Yield a line for each way in which `image` `(C, H, W, D)`, as in its file, is unusual."""
    if trained_on is None:
        return
    remedy = "It is predicted all the same; look at the result."
    affine = np.asarray(image.affine)
    order = np.argsort(nib.io_orientation(affine)[:, 0])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[order]
    low, high = np.array(trained_on["spacing_mm"])
    if (spacing < low / SPACING_FACTOR).any() or (spacing > high * SPACING_FACTOR).any():
        least, most, got = ("x".join(f"{n:.3g}" for n in sizes) for sizes in (low, high, spacing))
        yield (
            f"expected voxels of {least} to {most} mm (R, A, S), as in training, got {got} mm. "
            + remedy
        )
    for channel, facts in zip(image, trained_on["channels"], strict=False):
        std, mean = (float(one) for one in torch.std_mean(channel.as_tensor(), correction=0))
        (lowest, highest), (least, most) = facts["means"], facts["stds"]
        is_shifted = not lowest - most <= mean <= highest + most
        if is_shifted or not least / CONTRAST_FACTOR <= std <= most * CONTRAST_FACTOR:
            yield (
                f"expected intensities of {facts['name']} as in training (means {lowest:.4g} to "
                f"{highest:.4g}, deviations {least:.4g} to {most:.4g}), got mean {mean:.4g} and "
                f"deviation {std:.4g}. {remedy}"
            )


def is_prediction(path: Path) -> bool:
    """Return whether a file was written by `save_like`, which may then overwrite it."""
    try:
        header: Any = nib.load(path).header
        return bool(header["descrip"] == MARK)
    except Exception:  # nibabel raises many kinds for what is no image
        return False


def save_like(voxels: np.ndarray, source: str | Path, path: Path) -> None:
    """Write a volume `(H, W, D)` or `(H, W, D, classes)` on the grid of another file, or nothing.

    Header fields of a NIfTI `source` that place its voxels are kept bit for bit: sform and qform
    with their codes, pixdim, units. The affine of another source becomes sform and qform, in mm.
    """
    image: Any
    if not str(source).lower().endswith((".nii", ".nii.gz")):
        affine = read_header(str(source)).affine
        image = nib.Nifti1Image(voxels, affine)
        image.set_sform(affine, code="scanner")
        image.set_qform(affine, code="scanner")
        image.header.set_xyzt_units("mm")
    else:
        like: Any = nib.load(source)
        header = type(like)(voxels, None, dtype=voxels.dtype).header
        for field in GRID_FIELDS:
            header[field] = like.header[field]
        header["pixdim"][:4] = like.header["pixdim"][:4]
        image = type(like)(voxels, None, header)
    image.header["descrip"] = MARK
    with replace_file(path) as temporary:
        nib.save(image, temporary)


def describe_fault(error: BaseException) -> str:
    """Return the message of the innermost exception, in one line."""
    if is_out_of_memory(error):
        return "expected a volume that fits into the device's memory, got more. Use device cpu."
    error = innermost(error)
    return " ".join(str(error).split()) or type(error).__name__
