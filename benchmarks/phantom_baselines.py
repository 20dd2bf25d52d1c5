"""How far two methods that learn no anatomy get on the phantom.

(a) The best intensity interval of each class; (b) the voxel-wise average of the training label
maps. Every fifth case is validation; Dice is the mean over classes and validation cases.

    python -m benchmarks.phantom_baselines [--dataset_dir D] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    NormalizeIntensityd,
    Orientationd,
    ResizeWithPadOrCrop,
    Spacingd,
)

from pipeline.data.phantom import make_phantom
from transforms.load import LoadVolumesd

SPACING_MM = (1.5, 1.5, 3.0)
NUM_BINS = 256
RESULT = Path(__file__).with_suffix(".json")

Case = tuple[np.ndarray, np.ndarray]  # image (X, Y, Z) in z-scores, label (X, Y, Z)


def load_cases(dataset_dir: Path) -> tuple[list[str], list[Case], list[Case]]:
    """Foreground class names in label order, training cases and validation cases."""
    record = json.loads((dataset_dir / "dataset.json").read_text())
    keys = ("image", "label")
    load = Compose(
        [
            LoadVolumesd(keys),
            EnsureChannelFirstd(keys),
            Orientationd(keys, axcodes="RAS", labels=None),
            Spacingd(keys, pixdim=SPACING_MM, mode=("bilinear", "nearest")),
            NormalizeIntensityd("image"),
        ]
    )
    cases = []
    for entry in record["training"]:
        data = load({key: str(dataset_dir / entry[key]) for key in keys})
        cases.append((data["image"][0].numpy(), data["label"][0].numpy().astype(np.uint8)))
    names = [record["labels"][str(i)] for i in range(1, len(record["labels"]))]
    return names, [c for i, c in enumerate(cases) if i % 5 != 4], cases[4::5]


def intensity_dice(num_classes: int, training: list[Case], validation: list[Case]) -> np.ndarray:
    """Mean validation Dice `(C,)` of the interval with the best pooled training Dice."""
    image = np.concatenate([image.ravel() for image, _ in training])
    label = np.concatenate([label.ravel() for _, label in training])
    edges = np.quantile(image, np.linspace(0, 1, NUM_BINS + 1))
    edges[[0, -1]] = -np.inf, np.inf
    all_below = np.concatenate([[0], np.cumsum(np.histogram(image, edges)[0])])
    scores = []
    for c in range(1, num_classes + 1):
        hits = np.histogram(image[label == c], edges)[0]
        below = np.concatenate([[0], np.cumsum(hits)])
        overlap = below[None, :] - below[:, None]  # (low edge, high edge)
        size = np.maximum(all_below[None, :] - all_below[:, None], 0)
        low, high = np.unravel_index(np.argmax(2 * overlap / (size + hits.sum())), size.shape)
        scores.append(
            np.mean([_dice((edges[low] <= x) & (x < edges[high]), y == c) for x, y in validation])
        )
    return np.array(scores)


def atlas_dice(num_classes: int, training: list[Case], validation: list[Case]) -> np.ndarray:
    """Mean validation Dice `(C,)` of the average label map, aligned at volume centres.

    Both readings of the average are scored, its argmax and the best training threshold of each
    class; the better one is returned.
    """
    shape = np.max([label.shape for _, label in training + validation], axis=0)
    align = ResizeWithPadOrCrop(shape.tolist())
    train, valid = (  # (N, X, Y, Z)
        np.stack([align(torch.from_numpy(label)[None])[0].numpy() for _, label in cases])
        for cases in (training, validation)
    )
    atlas = np.stack([(train == c).mean(axis=0) for c in range(num_classes + 1)])
    by_argmax, by_threshold = atlas.argmax(axis=0), []
    for c in range(1, num_classes + 1):
        masks = [atlas[c] >= t for t in np.linspace(0.05, 0.95, 19)]
        best = max(masks, key=lambda mask: np.mean([_dice(mask, y == c) for y in train]))
        by_threshold.append(np.mean([_dice(best, y == c) for y in valid]))
    argmax = [
        np.mean([_dice(by_argmax == c, y == c) for y in valid]) for c in range(1, num_classes + 1)
    ]
    return np.array(max(argmax, by_threshold, key=np.mean))


def measure(dataset_dir: Path) -> dict:
    """Both baselines on one dataset, per class and in the mean."""
    names, training, validation = load_cases(dataset_dir)
    result: dict = {"num_training": len(training), "num_validation": len(validation)}
    for baseline in (intensity_dice, atlas_dice):
        dice = baseline(len(names), training, validation)
        per_class = dict(zip(names, dice.round(4).tolist(), strict=True))
        result[baseline.__name__] = {"mean": round(float(dice.mean()), 4), "per_class": per_class}
    return result


def _dice(pred: np.ndarray, label: np.ndarray) -> float:
    return 2 * np.count_nonzero(pred & label) / max(pred.sum() + label.sum(), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_dir", type=Path, help="an existing dataset instead of a new one")
    parser.add_argument("--seed", type=int, default=0, help="seed of the new phantom")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        made = args.dataset_dir or make_phantom(Path(scratch) / "phantom", seed=args.seed)
        seed = None if args.dataset_dir else args.seed
        result = {"seed": seed, **measure(made)}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
