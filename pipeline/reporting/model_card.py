"""The model card of a run, `docs/README.md`: what people ask of a model before they use it.

Made from the run's own files alone. Counts, ranges and means stand in it, but nothing of a single
case, no place where anything lies, and no command line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Facts = Mapping[str, Any]
PARTS = (("train", "training"), ("validation", "validation"), ("test", "the test"))

USAGE = """\
In this directory, which is a MONAI bundle, with the project's code on `PYTHONPATH`:

    # predict files
    python -m monai.bundle run --config_file configs/inference.json --input FILE_OR_FOLDER \\
        --output_dir OUT
    # the mean Dice of the validation cases; nothing here changes
    python -m monai.bundle run --config_file "['configs/train.json','configs/evaluate.json']"
    # train anew, beside this directory
    python -m monai.bundle run --config_file configs/train.json --dataset_dir DATASET

In memory:

    from pipeline.prediction.predictor import Predictor
    labels = Predictor("RUN")(array, affine)
"""


def model_card(run_dir: Path, usage: str = USAGE) -> str:
    """Markdown about the run in a directory.

    Args:
        run_dir: Of the run, with `configs/metadata.json` and `configs/inference.json`; what the
            run says at its end, `summary.json` and `scores`, is told where it is there.
        usage: How the model is used; by default as a run directory is.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If it is none of a run.
    """
    metadata = _read(run_dir / "configs" / "metadata.json")
    inference = _read(run_dir / "configs" / "inference.json")
    path = run_dir / "summary.json"
    summary = _read(path) if path.is_file() else {}
    scores = {
        path.parent.name: _read(path) for path in sorted(run_dir.glob("scores/*/summary.json"))
    }
    sections = {
        "What it segments": _classes(metadata),
        "What it takes": _inputs(metadata, inference),
        "How it works": _plan(metadata, inference),
        "Training": _training(summary),
        "Scores": _scores(scores),
        "How to run it": [usage],
        "Limits": _limits(metadata, scores),
        "Licence": _licence(metadata),
    }
    text = f"# {metadata['name']}\n\n{metadata['description']}\n\n{metadata['intended_use']}.\n"
    for title, lines in sections.items():
        if body := "\n".join(lines).strip("\n"):
            text += f"\n## {title}\n\n{body}\n"
    return text


def _read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content


def _classes(metadata: Facts) -> list[str]:
    names = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    return _table(("value", "class"), names.items())


def _inputs(metadata: Facts, inference: Facts) -> list[str]:
    image = metadata["network_data_format"]["inputs"]["image"]
    channels = ", ".join(f"{n}: {_plain(name)}" for n, name in image["channel_def"].items())
    lines = [
        "NIfTI files or DICOM series of any size and orientation, their intensities in the units "
        "of the training images.",
        "",
        f"- Modality: {_plain(image['modality'])}",
        f"- Channels: {channels}",
    ]
    trained_on = inference.get("trained_on")
    if not trained_on:
        return lines
    low, high = trained_on["spacing_mm"]
    spacings = " x ".join(_range(ends) for ends in zip(low, high, strict=True))
    lines.append(
        f"- Voxel sizes of the training images: {spacings} mm (left-right, posterior-anterior, "
        "inferior-superior)"
    )
    for channel in trained_on["channels"]:
        lines.append(
            f"- Intensities of {_plain(channel['name'])} in the training images: means of "
            f"{_range(channel['means'])}, standard deviations of {_range(channel['stds'])}"
        )
    return [*lines, "", "Other images are predicted with a warning."]


def _plan(metadata: Facts, inference: Facts) -> list[str]:
    ends = metadata["network_data_format"]["inputs"]["image"]["value_range"]
    given = inference["normalization"]
    channels = given if isinstance(given, list) else [given]
    names = [_normalization(one) for one in channels]
    borders = "cut off first" if inference["crop_empty_borders"] is True else "kept"
    facts = {
        "Resampled to": f"{_sizes(inference['spacing'])} mm",
        "Intensities": "; ".join(dict.fromkeys(names)),
        "Values that the network is given": f"{_range(ends)}" if ends else "not bounded",
        "Empty borders": borders,
        "Windows": f"{_sizes(inference['roi_size'])} voxels, overlapping by "
        f"{inference['overlap']:.4g} of their size",
        "Result": "a label map on the grid of the input file",
    }
    return _table(("", ""), facts.items())


def _normalization(one: Any) -> str:
    if not isinstance(one, Mapping):
        names = {
            "zscore": "mean 0 and deviation 1 in each volume",
            "percentile_zscore": "clipped to the 0.5th and 99.5th percentile, then mean 0 and "
            "deviation 1 in each volume",
        }
        return names.get(one, str(one))
    return f"clipped to {_range(one['clip'])}, minus {one['mean']:.4g}, over {one['std']:.4g}"


def _training(summary: Facts) -> list[str]:
    if not summary:
        return []
    force, cases = summary["effective"], summary.get("num_cases", {})
    versions = summary["versions"]
    scaling = "with" if force["loss_scaling"] else "without"
    facts = {
        "Cases": ", ".join(f"{cases[part]} for {use}" for part, use in PARTS if cases.get(part)),
        "Steps": f"{summary['steps']} in {summary['epochs']} epochs, "
        f"{summary['skipped_steps']} skipped",
        "Precision": f"{force['dtype']}, {scaling} loss scaling",
        "Device": f"{summary['device_name']} ({force['device'].partition(':')[0]})",
        "Time": f"{summary['wall_time_s']:.0f} s",
        "Parameters": f"{summary['num_parameters']:,}",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    if summary.get("init_weights"):
        facts["Began with"] = "the weights of another model"
    if summary["best_epoch"] is not None:
        facts["Weights"] = f"of epoch {summary['best_epoch']}, the best by validation"
    return _table(("", ""), ((name, value) for name, value in facts.items() if value))


def _scores(scores: Mapping[str, Facts]) -> Iterator[str]:
    """A table for each split, of the weights that the bundle has."""
    for split in ("test", "validation"):
        for weights in ("best", "last"):
            if (found := scores.get(f"{split}_{weights}")) is not None:
                yield from _of_split(split, weights, found)
                break  # the last ones are the model's where there are no best


def _of_split(split: str, weights: str, found: Facts) -> Iterator[str]:
    figures = {"all, case by case": found["over_classes"], **found["classes"]}
    rows = [(name, _mean(f["dice"], 4), _mean(f["hd95_mm"], 2)) for name, f in figures.items()]
    refused = f", {len(found['refused'])} could not be scored" if found["refused"] else ""
    yield ""
    yield (
        f"{found['num_cases']} {split} cases of {found['num_persons']} persons{refused}, {weights} "
        "weights; mean and 95 % interval over persons:"
    )
    yield ""
    yield from _table(("class", "Dice", "95 % Hausdorff distance, mm"), rows)


def _mean(figure: Facts, decimals: int) -> str:
    if figure["mean"] is None:
        return "undefined"
    shown = f"{figure['mean']:.{decimals}f}"
    if figure["interval"] is None:
        return shown
    low, high = figure["interval"]
    return f"{shown} ({low:.{decimals}f} to {high:.{decimals}f})"


def _limits(metadata: Facts, scores: Mapping[str, Facts]) -> list[str]:
    lines = [
        "- Every voxel gets one of the classes above, in an image that shows none of them too.",
        "- Scores tell of images like those of training; of other scanners, protocols and patients "
        "they tell nothing.",
    ]
    if not scores:
        lines.append("- It was not scored.")
    elif not any(name.startswith("test_") for name in scores):
        lines.append(
            "- The weights were chosen by the validation cases, so that their scores are "
            "somewhat too good; no case was kept apart as a test."
        )
    return [*lines, f"- {metadata['intended_use']}."]


def _licence(metadata: Facts) -> list[str]:
    return [
        f"- Code: {metadata['copyright']}; see `LICENSE`.",
        f"- Data: {_plain(metadata['data_source'])}; licence: {_plain(metadata['data_license'])}.",
    ]


def _range(ends: Sequence[float]) -> str:
    low, high = (f"{end:.4g}" for end in ends)
    return low if low == high else f"{low} to {high}"


def _sizes(values: Iterable[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def _plain(value: Any) -> str:
    """Words of a dataset, on one line and as they stand."""
    words = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "|<>*`[]\\" else c for c in words)


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *([_plain(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]
