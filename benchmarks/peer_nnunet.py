"""nnU-Net's side of `benchmarks.peer_hippocampus`: a process for each of its stages.

    python -m benchmarks.peer_nnunet preprocess
    python -m benchmarks.peer_nnunet train --seed N [--tiny]
    python -m benchmarks.peer_nnunet predict --images DIR --output DIR

The folders are those that nnU-Net's variables name (`nnUNet_raw`, `nnUNet_preprocessed`,
`nnUNet_results`). It needs nnunetv2 (2.8.1) and nothing of this repository. nnU-Net has no seed of
its own: that of `train` is set before the network is made, in this process; the workers of its
loaders draw theirs from the system.
"""

from __future__ import annotations

import argparse
import os
import random

import numpy as np
import torch

NUMBER = 4
DATASET = f"Dataset{NUMBER:03d}_Hippocampus"
CONFIGURATION, TRAINER = "3d_fullres", "nnUNetTrainer_20epochs"


def device() -> torch.device:
    """The card, set up as nnU-Net's command does it; else the processor."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    return torch.device("cuda")


def preprocess() -> None:
    """What `nnUNetv2_plan_and_preprocess -c 3d_fullres --verify_dataset_integrity` does."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    processes = len(os.sched_getaffinity(0))
    api.extract_fingerprints(
        [NUMBER], num_processes=processes, check_dataset_integrity=True, clean=True
    )
    api.plan_experiments([NUMBER])
    api.preprocess([NUMBER], configurations=[CONFIGURATION], num_processes=[processes])


def train(seed: int, tiny: bool) -> None:
    """What `nnUNetv2_train` does, less the prediction of the validation cases at its end."""
    from nnunetv2.run.run_training import get_trainer_from_args
    from torch.backends import cudnn

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    where = device()
    trainer = get_trainer_from_args(DATASET, CONFIGURATION, 0, TRAINER, device=where)
    if tiny:
        trainer.num_epochs, trainer.num_iterations_per_epoch = 1, 2
        trainer.num_val_iterations_per_epoch = 1
    cudnn.deterministic, cudnn.benchmark = False, True
    trainer.run_training()


def predict(images: str, output: str) -> None:
    """What `nnUNetv2_predict` does, mirroring included."""
    from batchgenerators.utilities.file_and_folder_operations import join
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.paths import nnUNet_results

    trained = f"{TRAINER}__nnUNetPlans__{CONFIGURATION}"
    predictor = nnUNetPredictor(device=device(), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(
        join(nnUNet_results, DATASET, trained), use_folds=(0,)
    )
    predictor.predict_from_files(
        images, output, num_processes_preprocessing=2, num_processes_segmentation_export=2
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("preprocess", "train", "predict"))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--images")
    parser.add_argument("--output")
    words = parser.parse_args()
    if words.stage == "preprocess":
        preprocess()
    elif words.stage == "train":
        train(words.seed, words.tiny)
    else:
        predict(words.images, words.output)


if __name__ == "__main__":
    main()
