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
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import compress
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
from pipeline.errors import InputError, as_bool, innermost, require, some
from pipeline.files import make_directory
from pipeline.prediction.dicom_output import is_segmentation, load_highdicom, save_segmentation
from pipeline.prediction.nifti_output import is_prediction, save_like
from pipeline.prediction.results import (
    CaseResult,
    count_voxels,
    draw_pictures,
    find_foreign_files,
    write_results,
)
from pipeline.prediction.segmenter import (
    PredictionError,
    Segmentation,
    Segmenter,
    is_out_of_memory,
)
from pipeline.progress_bar import ProgressBar
from transforms.dicom import is_dicom
from transforms.preprocess import Preprocessing

log = logging.getLogger(__name__)

# raised in reading, preprocessing and prediction for a volume that cannot be predicted
FAULTS = (OSError, EOFError, ValueError, RuntimeError, MemoryError, LookupError)
KINDS = ".nii.gz", "_probabilities.nii.gz", ".dcm"  # endings of a case's results
SPACING_FACTOR = 1.5  # beyond the training images' smallest and largest voxel
NO_SERIES = (
    "dicom_seg: expected a DICOM series, got another file. Its label map is written as NIfTI alone."
)
CONTRAST_FACTOR = 3.0  # beyond their smallest and largest deviation of intensities


class Prediction:
    """Predicts cases, dictionaries with `case_id` and `image` (a path or one per channel).

    `output_dir`, which may be relative to `bundle_root`, gets `<case_id>.nii.gz` for each, with
    `probabilities` also `<case_id>_probabilities.nii.gz`, float32 `(H, W, D, num_classes)`, with
    `dicom_seg` also `<case_id>.dcm`, a DICOM Segmentation, for each that is a DICOM series, and the
    files of `write_results`.
    `trained_on` has spacing and intensities of the training images, to compare with, if known. With
    `strict`, the first case that cannot be predicted is the last. Without `class_names`, as in
    configs of earlier versions, classes are numbered.
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
        class_names: Sequence[str] | None = None,
        dicom_seg: bool | str = False,
    ) -> None:
        self.cases, self.preprocessing, self.segmenter = cases, preprocessing, segmenter
        numbered = [f"class_{n}" for n in range(segmenter.inferer.num_classes)]
        self.class_names = class_names or numbered
        self.model = Path(bundle_root).resolve().name
        self.output_dir = Path(bundle_root).resolve() / output_dir
        self.in_channels, self.trained_on = in_channels, trained_on
        self.probabilities = as_bool(probabilities, "probabilities")
        self.strict = as_bool(strict, "strict")
        self.dicom_seg = as_bool(dicom_seg, "dicom_seg")

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
        done: list[CaseResult] = []
        try:
            self._predict_each(mine, done)
        except BaseException:  # an interruption: the others are not waited for
            self._report(done, len(mine))
            raise
        done = distributed.interleave(distributed.all_gather_object(done))
        self._report(done, len(self.cases))
        distributed.destroy()
        if any(result.fault for result in done):
            raise SystemExit(1)

    def _predict_each(self, cases: Sequence[Case], done: list[CaseResult]) -> None:
        """Predict cases; each is added to `done`, so that an interruption knows how far it came."""
        # the redirection replaces the console's handler, also one that was silenced
        is_main = distributed.is_main()
        with logging_redirect_tqdm(tqdm_class=ProgressBar) if is_main else contextlib.nullcontext():
            for case in ProgressBar(cases, desc="Predicting", enabled=is_main):
                image = os.path.abspath(paths_of(case)[0])
                with contextlib.suppress(ValueError):  # Windows has several drives
                    image = os.path.relpath(image, self.output_dir)
                result = CaseResult(case["case_id"], image, self.model)
                try:
                    self._predict(case, result)
                except FAULTS as error:
                    result.fault = describe_fault(error)
                    log.error("%s: %s", result.case_id, result.fault)
                    log.debug("", exc_info=True)
                done.append(result)
                if result.fault and self.strict:
                    break

    def _report(self, done: list[CaseResult], num_cases: int) -> None:
        if not distributed.is_main():
            return
        faults = [f"  {result.case_id}: {result.fault}" for result in done if result.fault]
        num_done = len(done) - len(faults)
        log.info("%d of %d cases predicted, in %s", num_done, num_cases, self.output_dir)
        if faults:
            told = f"Not predicted: {len(faults)} of {num_cases}"
            print(told, *faults, sep="\n", file=sys.stderr)
        if done:
            write_results(self.output_dir, done, self.class_names)
            log.info("Look at them: %s", self.output_dir / "index.html")

    def _prepare_output(self) -> None:
        """Make the output directory; refuse one in which other files would be overwritten."""
        out = Path(os.path.realpath(self.output_dir))
        images = [Path(os.path.realpath(path)) for case in self.cases for path in paths_of(case)]
        if out in {image.parent for image in images} or {out, *out.parents} & {*images}:
            raise InputError(
                f"output_dir: expected another folder than that of the images, got "
                f"{self.output_dir}. Choose another."
            )
        if self.dicom_seg:
            load_highdicom()
        targets = [path for case in self.cases for path in self._targets(case)]
        owns = {True: is_segmentation, False: is_prediction}
        foreign = [
            path.name for path in targets if path.exists() and not owns[path.suffix == ".dcm"](path)
        ]
        is_used = (True, self.probabilities, self.dicom_seg)
        counts = Counter(p for case in self.cases for p in compress(self._targets(case), is_used))
        twice = [path.name for path, count in counts.items() if count > 1]
        expected, remedy = "a name of its own for each result", "Rename an image."
        require(not twice, "input", expected, f"several {some(twice)}", remedy)
        if foreign := foreign + find_foreign_files(self.output_dir, self.class_names):
            raise InputError(
                f"output_dir: expected a folder without other files of the results' names, or with "
                f"predictions of the same classes, got {some(foreign)} in {self.output_dir}. "
                "Choose another."
            )
        try:
            make_directory(self.output_dir)
            tempfile.TemporaryFile(dir=self.output_dir).close()
        except OSError as error:
            raise InputError(
                f"output_dir: expected a folder that can be written, got: {error}. Choose another."
            ) from None

    def _targets(self, case: Case) -> list[Path]:
        return [self.output_dir / f"{case['case_id']}{kind}" for kind in KINDS]

    def _predict(self, case: Case, result: CaseResult) -> None:
        """Predict a case, write its files, and note warnings and volumes in `result`."""
        loaded, result.warnings = load_image(case, self.preprocessing, self.in_channels)
        image = loaded["image"]
        result.warnings += find_differences_from_training(image, self.trained_on)
        if self.dicom_seg and not is_dicom(paths_of(case)[0]):
            result.warnings.append(NO_SERIES)
        for line in result.warnings:
            log.warning("%s: %s", result.case_id, line)
        regular = self.preprocessing.regularize(loaded)["image"]
        found = self.segmenter(regular, with_probabilities=self.probabilities)
        self._write(case, image, found, result)
        labels = torch.from_numpy(found.labels)
        result.voxels = count_voxels(labels, self.class_names)
        result.voxel_ml = float(abs(np.linalg.det(np.asarray(image.affine)[:3, :3]))) / 1000

    def _write(
        self, case: Case, image: MetaTensor, found: Segmentation, result: CaseResult
    ) -> None:
        source = paths_of(case)[0]
        of_labels, of_probabilities, of_segmentation = self._targets(case)
        if self.dicom_seg and is_dicom(source):
            try:
                save_segmentation(found.labels, source, of_segmentation, self.class_names)
            except PredictionError as error:
                result.warnings.append(str(error))
                log.warning("%s: %s", result.case_id, error)
        save_like(found.labels, source, of_labels, self.class_names)
        if found.probabilities is not None:
            save_like(np.moveaxis(found.probabilities, 0, -1), source, of_probabilities)
        try:
            draw_pictures(self.output_dir, case["case_id"], image, found.labels)
        except FAULTS as error:  # the label map is there
            result.warnings.append(f"pictures: expected to draw them, got: {describe_fault(error)}")
            log.warning("%s: %s", result.case_id, result.warnings[-1])


def load_image(
    case: Case, preprocessing: Preprocessing, in_channels: int
) -> tuple[dict[str, Any], list[str]]:
    """Load the image of a case as preprocessing does, with what is doubtful about its header.

    A `PredictionError` says that it cannot be predicted.
    """
    if "fault" in case:  # two files have its name
        raise PredictionError(case["fault"])
    issues = check_headers(case, in_channels)[1]
    for issue in issues:
        if not issue.warning:
            raise PredictionError(issue.message)
    loaded = preprocessing.load(case)
    if wrong := int((~torch.isfinite(loaded["image"])).sum()):
        raise PredictionError(
            f"expected finite voxels, got {wrong} that are NaN or infinite. Replace them."
        )
    return loaded, [issue.message for issue in issues]


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


def describe_fault(error: BaseException) -> str:
    """Return the message of the innermost exception, in one line."""
    if is_out_of_memory(error):
        return "expected a volume that fits into the device's memory, got more. Use device cpu."
    error = innermost(error)
    return " ".join(str(error).split()) or type(error).__name__
