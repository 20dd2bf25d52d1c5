"""The default run's work as a script of stock MONAI, as its tutorials write one.

    python -m benchmarks.cpu_stock_run [NUM_WORKERS]

The phantom's volumes in memory (CacheDataset), the same patches, network, optimizer, steps, epochs
and validations; augmentation by MONAI's transforms, with the probabilities of `configs/amp.json`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from monai.data import CacheDataset, DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import CheckpointSaver, MeanDice, StatsHandler, ValidationHandler, from_engine
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.transforms import (
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandAdjustContrastd,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    Spacingd,
    SpatialPadd,
)
from monai.utils import set_determinism

from benchmarks.cpu_training import CASES, with_torch_alone
from networks.dense_unet import DenseUNet

ROI, SPACING, CLASSES = CASES["default_run"]["size"], (1.584, 1.584, 3.019), 6
STEPS, EPOCHS, INTERVAL, NUM_VALIDATION = 60, 6, 2, 5
BOTH, IMAGE = ["image", "label"], ["image"]


def loaders(num_workers: int) -> tuple[DataLoader, DataLoader]:
    root = Path("data/phantom")
    cases = [
        {key: str(root / case[key]) for key in BOTH}
        for case in json.loads((root / "dataset.json").read_text())["training"]
    ]
    load = [
        LoadImaged(BOTH),
        EnsureChannelFirstd(BOTH),
        Orientationd(BOTH, axcodes="RAS", labels=None),
        Spacingd(BOTH, pixdim=SPACING, mode=("bilinear", "nearest")),
        NormalizeIntensityd(IMAGE),
    ]
    angle, scale = np.deg2rad(30), (-0.3, 0.4)
    random = [
        SpatialPadd(BOTH, ROI),
        RandCropByPosNegLabeld(BOTH, "label", ROI, pos=1, neg=2, num_samples=1),
        RandAffined(
            BOTH, prob=0.36, rotate_range=(angle,) * 3, scale_range=(scale,) * 3,
            mode=("bilinear", "nearest"), padding_mode="zeros",
        ),
        RandFlipd(BOTH, prob=0.5, spatial_axis=1),
        RandFlipd(BOTH, prob=0.5, spatial_axis=2),
        RandGaussianNoised(IMAGE, prob=0.1, std=0.1),
        RandGaussianSmoothd(
            IMAGE, prob=0.2, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0), sigma_z=(0.5, 1.0)
        ),
        RandScaleIntensityd(IMAGE, prob=0.15, factors=0.25),
        RandAdjustContrastd(IMAGE, prob=0.15, gamma=(0.75, 1.25)),
        RandAdjustContrastd(IMAGE, prob=0.1, gamma=(0.7, 1.5), invert_image=True),
        RandAdjustContrastd(IMAGE, prob=0.3, gamma=(0.7, 1.5)),
    ]  # fmt: skip
    train = CacheDataset(cases[NUM_VALIDATION:], Compose([*load, *random]), progress=False)
    validation = CacheDataset(cases[:NUM_VALIDATION], Compose(load), progress=False)
    return (
        DataLoader(
            train, batch_size=2, shuffle=True, num_workers=num_workers, drop_last=True,
            persistent_workers=num_workers > 0,
        ),
        DataLoader(validation, batch_size=1),
    )  # fmt: skip


def main() -> None:
    set_determinism(0)
    with_torch_alone()
    num_workers = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    train, validation = loaders(num_workers)
    network = DenseUNet(1, CLASSES, seed=0, **CASES["default_run"]["network"])
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.005, weight_decay=0.01)
    discrete = Compose(
        [
            AsDiscreted("pred", argmax=True, to_onehot=CLASSES),
            AsDiscreted("label", to_onehot=CLASSES),
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=validation,
            network=network,
            inferer=SlidingWindowInferer(ROI, 4, 0.5, "gaussian"),
            postprocessing=discrete,
            key_val_metric={
                "dice": MeanDice(False, output_transform=from_engine(["pred", "label"]))
            },
            val_handlers=[
                CheckpointSaver(folder, {"network": network}, save_key_metric=True),
                StatsHandler(iteration_log=False),
            ],
        )
        SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=EPOCHS,
            epoch_length=STEPS,
            train_data_loader=train,
            network=network,
            optimizer=optimizer,
            loss_function=DiceCELoss(
                include_background=False, to_onehot_y=True, softmax=True, batch=True
            ),
            inferer=SimpleInferer(),
            train_handlers=[ValidationHandler(INTERVAL, evaluator, epoch_level=True)],
        ).run()
    print(f"mean Dice {evaluator.state.best_metric:.4f}")


if __name__ == "__main__":
    main()
