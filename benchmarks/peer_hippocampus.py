"""Time to the accuracy of nnU-Net: both trained on the same hippocampi, scored once on others.

    python -m benchmarks.peer_hippocampus prepare DATASET_DIR --work W
    python -m benchmarks.peer_hippocampus nnunet --work W --seed N [--compile false]
    python -m benchmarks.peer_hippocampus ours --work W --seed N [--name R] [--set key=value ...]
    python -m benchmarks.peer_hippocampus validate --work W
    python -m benchmarks.peer_hippocampus score --work W [--name R] [--output FILE.json]

`DATASET_DIR` is Task04_Hippocampus. `prepare` draws persons into training, validation and test
cases, once, and has nnU-Net 2.8.1 plan and preprocess the first two; the test cases are in folders
of their own. `nnunet` trains 3d_fullres for 20 epochs, with the validation cases as its own.
`ours` trains `pipeline.run` by the recipe below, which is chosen by what `validate` shows. Both
begin with empty compile and data caches, are timed as whole processes, and then predict the cases
that `--cases` names (validation and test). What is finished is not done again; what was broken off
begins anew, since a time is of one whole process. `score` is for the test cases, and for once.

`W` may be moved. What is not nnU-Net's needs no nnunetv2, and `nnunet` nothing but it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peer_nnunet import CONFIGURATION, DATASET, TRAINER
from pipeline.data import splits

ROOT = Path(__file__).resolve().parents[1]
SPLIT_SEED, SHARES = 20, {"test": 0.25, "validation": 0.15}  # of persons; the rest is trained on
CLASSES = ["background", "Anterior", "Posterior"]
NNUNET = [sys.executable, "-m", "benchmarks.peer_nnunet"]
TINY_PERSONS = 20
LIMIT_S = 3600  # for one process; a hang is a failure, not a wait

RECIPE: dict[str, Any] = {
    "base_channels": 32,
    "strides": [2, 2, 2],
    "spacing": [1, 1, 1],
    "roi_size": [40, 56, 40],
    "batch_size": 8,
    "network_def#norm": "batch",
    "learning_rate": 0.008,
    "warmup_steps": 100,
    "steps_per_epoch": 200,
    "max_epochs": 10,
    "val_interval": 10,
    "num_workers": 8,
    "final_scores": False,
    "report": False,
}
PREDICTION: dict[str, Any] = {"mirror": True, "weights": "models/model.pt"}
TINY = {
    "base_channels": 4, "roi_size": [24, 32, 24], "batch_size": 2, "warmup_steps": 1,
    "steps_per_epoch": 2, "max_epochs": 1, "val_interval": 1, "num_workers": 0,
}  # fmt: skip


person_of = partial(splits.person_of, group_pattern="pairs")


def draw_split(case_ids: list[str], tiny: bool = False) -> dict[str, list[str]]:
    """Case ids of `train`, `validation` and `test`, a person's on one side."""
    persons = np.random.default_rng(SPLIT_SEED).permutation(sorted({*map(person_of, case_ids)}))
    persons = persons[:TINY_PERSONS] if tiny else persons
    side, taken = dict.fromkeys(persons.tolist(), "train"), 0
    for name, share in SHARES.items():
        number = math.ceil(share * len(persons))
        side |= dict.fromkeys(persons[taken : taken + number].tolist(), name)
        taken += number
    split: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for case_id in sorted(case_ids):
        if person_of(case_id) in side:
            split[side[person_of(case_id)]].append(case_id)
    return split


def prepare(words: argparse.Namespace) -> None:
    """Split, files for both, nnU-Net's plan and preprocessed cases."""
    work, source = words.work, Path(words.dataset_dir)
    done = work / "prepare.json"
    if done.exists():
        return print(f"{done} is there", flush=True)
    names = [path.name.removesuffix(".nii.gz") for path in source.glob("labelsTr/*.nii.gz")]
    split = draw_split([name for name in names if not name.startswith(".")], words.tiny)
    _lay_out(work, source, split)
    seconds = _timed([*NNUNET, "preprocess"], work / "prepare.log", _nnunet_env(work))
    plans = json.loads((work / "preprocessed" / DATASET / "nnUNetPlans.json").read_text())
    plan = plans["configurations"][CONFIGURATION]
    _write(
        done,
        {
            "split_seed": SPLIT_SEED,
            "split": split,
            "num_persons": {side: len({*map(person_of, ids)}) for side, ids in split.items()},
            "nnunet_preprocessing_s": seconds,
            "nnunet_preprocessing_cores": len(os.sched_getaffinity(0)),
            "nnunet_plan": {key: plan[key] for key in ("patch_size", "batch_size", "spacing")},
        },
    )
    print(done.read_text(), flush=True)


def _lay_out(work: Path, source: Path, split: dict[str, list[str]]) -> None:
    """nnU-Net's raw dataset, without the test cases, and folders of images and labels by side."""
    raw = work / "raw" / DATASET
    for side, case_ids in split.items():
        for case_id in case_ids:
            image, label = (source / of / f"{case_id}.nii.gz" for of in ("imagesTr", "labelsTr"))
            if side != "test":
                _copy(image, raw / "imagesTr" / f"{case_id}_0000.nii.gz")
                _copy(label, raw / "labelsTr" / label.name)
            if side != "train":
                _copy(image, work / "images" / side / f"{case_id}_0000.nii.gz")
                _copy(label, work / "labels" / side / label.name)
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {name: value for value, name in enumerate(CLASSES)},
        "numTraining": len(split["train"]) + len(split["validation"]),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIO",
    }
    _write(raw / "dataset.json", description)
    folds = [{"train": split["train"], "val": split["validation"]}]
    _write(work / "preprocessed" / DATASET / "splits_final.json", folds)


def _nnunet_env(work: Path, out: Path | None = None) -> dict[str, str]:
    results = (out or work) / "results"
    return {
        "nnUNet_raw": str(work / "raw"),
        "nnUNet_preprocessed": str(work / "preprocessed"),
        "nnUNet_results": str(results),
    }


def nnunet(words: argparse.Namespace) -> None:
    """Train one seed of nnU-Net, and predict."""
    work, out = words.work, words.work / "nnunet" / f"seed_{words.seed}"
    environment = _nnunet_env(work, out)
    if words.compile is not None:
        environment["nnUNet_compile"] = words.compile
    tiny = ["--tiny"] if words.tiny else []
    if not (out / "train.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        caches = _empty_caches(out)
        started = time.time()
        command = [*NNUNET, "train", "--seed", str(words.seed), *tiny]
        seconds = _timed(command, out / "train.log", environment | caches)
        shutil.rmtree(out / "compiled", ignore_errors=True)
        trained = {
            "seed": words.seed,
            "trainer": TRAINER,
            "compile": words.compile or "nnU-Net's default",
            "trained_s": seconds,
            "finished_s": seconds,
        }
        _write(out / "train.json", trained | _when(started, seconds))
    for side in words.cases:
        images = str(work / "images" / side)
        _predict(out, side, [*NNUNET, "predict", "--images", images, "--output"], environment)


def ours(words: argparse.Namespace) -> None:
    """Train one seed of ours, and predict."""
    work, out = words.work, words.work / "ours" / words.name / f"seed_{words.seed}"
    recipe = RECIPE | (TINY if words.tiny else {}) | _pairs(words.set)
    prediction = PREDICTION | _pairs(words.predict)
    was = {"recipe": recipe, "prediction": prediction}
    record = out / "train.json"
    if not record.exists():
        shutil.rmtree(out, ignore_errors=True)
        given = {
            "dataset_dir": work / "raw" / DATASET,
            "split_file": work / "preprocessed" / DATASET / "splits_final.json",
            "group_pattern": "pairs",
            "output_dir": out / "run",
            "cache_dir": out / "cache",
            "seed": words.seed,
        }
        caches = _empty_caches(out)
        started = time.time()
        seconds = _timed(_run("configs/amp.json", given | recipe), out / "train.log", caches)
        trained_s = (out / "run/models/last.pt").stat().st_mtime - started
        for folder in ("cache", "compiled", "run/checkpoints"):
            shutil.rmtree(out / folder, ignore_errors=True)
        summary = json.loads((out / "run/summary.json").read_text())
        kept = ("best_mean_dice", "last_mean_dice", "best_epoch", "epochs", "steps")
        kept += ("skipped_steps", "wall_time_s", "effective", "versions")
        trained = {
            "seed": words.seed,
            **was,
            "trained_s": round(trained_s, 1),
            "finished_s": seconds,
            "summary": {key: summary.get(key) for key in kept},
        }
        _write(record, trained | _when(started, seconds))
    told = json.loads(record.read_text())
    if {key: told[key] for key in was} != json.loads(json.dumps(was)):
        raise SystemExit(f"{out}: expected another --name for another recipe than {told}.")
    for side in words.cases:
        given = {"run_dir": out / "run", "input": work / "images" / side} | prediction
        _predict(out, side, [*_run("configs/inference.json", given), "--output_dir"], {})


def _run(config: str, settings: dict[str, Any]) -> list[str]:
    """The product's command; values as JSON, strings as they are."""
    command = [sys.executable, "-m", "pipeline.run", config]
    for key, value in settings.items():
        is_text = isinstance(value, (str, Path))
        command += [f"--{key}", str(value) if is_text else json.dumps(value)]
    return command


def _pairs(words: list[str]) -> dict[str, Any]:
    """`key=value` words; values as JSON, else as strings."""
    pairs: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        try:
            pairs[key] = json.loads(value)
        except json.JSONDecodeError:
            pairs[key] = value
    return pairs


def _empty_caches(out: Path) -> dict[str, str]:
    """Variables that put every compiler's cache into a new folder."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
    return {name: str(out / "compiled" / name.split("_")[0].lower()) for name in names}


def _timed(command: list[str], log: Path, environment: dict[str, str]) -> float:
    """Seconds from the start of a process to its end; what it says goes into a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("w") as file:
        code = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, timeout=LIMIT_S,
            stdout=file, stderr=subprocess.STDOUT,
        ).returncode  # fmt: skip
    seconds = round(time.perf_counter() - started, 1)
    print(f"{log}: status {code} after {seconds} s", flush=True)
    if code:
        print(log.read_text()[-4000:], flush=True)
        raise SystemExit(code)
    return seconds


def _when(started: float, seconds: float) -> dict[str, Any]:
    """Place and time of a training, by which `score` sees what ran beside it."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": card,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "host": platform.node(),
        "interval": [round(started, 1), round(started + seconds, 1)],
    }


def _predict(out: Path, side: str, command: list[str], environment: dict[str, str]) -> None:
    """Predict into `<out>/<side>`, the command's last word, whole or not at all."""
    target, partial_target = out / side, out / f"{side}.partial"
    if not target.exists():
        shutil.rmtree(partial_target, ignore_errors=True)
        log = out / f"predict_{side}.log"
        seconds = _timed([*command, str(partial_target)], log, environment)
        partial_target.rename(target)
        _write(out / f"predict_{side}.json", {"seconds": seconds})


def _scored(work: Path, out: Path, side: str) -> dict[str, Any]:
    """Dice by class and their mean, of the product's scorer; writes `<out>/<side>_scores`."""
    from pipeline.commands import evaluate

    scores = out / f"{side}_scores"
    options = ["--class_names", json.dumps(CLASSES), "--group_pattern", "pairs"]
    folders = [str(out / side), str(work / "labels" / side), "--output_dir", str(scores)]
    with contextlib.redirect_stdout(io.StringIO()) as told:
        status = evaluate.main([*folders, *options])
    if status:
        raise SystemExit(f"{out}: {told.getvalue()}")
    summary = json.loads((scores / "summary.json").read_text())
    dice = {name: of["dice"]["mean"] for name, of in summary["classes"].items()}
    return {"mean_dice": summary["mean_dice"], **dice}


def _runs(folder: Path, side: str) -> list[Path]:
    """Folders of the seeds that predicted these cases, in order."""
    found = [path for path in folder.glob("seed_*") if (path / side).is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("seed_")))


def validate(words: argparse.Namespace) -> None:
    """Mean Dice on the validation cases, a line for each seed of each recipe and of nnU-Net."""
    work = words.work
    for folder in [*sorted((work / "ours").glob("*")), work / "nnunet"]:
        found = []
        for out in _runs(folder, "validation"):
            trained = json.loads((out / "train.json").read_text())
            dice = _scored(work, out, "validation")["mean_dice"]
            in_training = trained.get("summary", {}).get("best_mean_dice")
            found.append(dice)
            print(
                f"{out.relative_to(work)}: mean Dice {dice:.4f}, in training {in_training}; "
                f"trained {trained['trained_s']} s, finished {trained['finished_s']} s",
                flush=True,
            )
        if found:
            print(f"{folder.relative_to(work)}: mean of {len(found)} {np.mean(found):.4f}")


def score(words: argparse.Namespace) -> None:
    """Both on the test cases; the difference of their means and its intervals."""
    from benchmarks import machine
    from pipeline.commands import compare

    work, output = words.work, Path(words.output)
    if output.exists():
        raise SystemExit(f"{output} is there: the test cases are scored once.")
    folders = {"ours": work / "ours" / words.name, "nnunet": work / "nnunet"}
    runs = {arm: _runs(folder, "test") for arm, folder in folders.items()}
    if not all(runs.values()):
        raise SystemExit(f"{work}: expected test predictions of both, got {runs}.")
    arms = {arm: [_entry(work, out) for out in outs] for arm, outs in runs.items()}
    every = [entry for entries in arms.values() for entry in entries]
    for entry in every:
        start, end = entry["interval"]
        beside = [other for other in every if other["interval"][0] < end]
        entry["trained_beside"] = sum(other["interval"][1] > start for other in beside) - 1
    files = {
        side: [str(out / "test_scores/metrics.csv") for out in runs[arm]]
        for side, arm in (("a", "ours"), ("b", "nnunet"))
    }
    words = ["--a", *files["a"], "--b", *files["b"], "--group_pattern", "pairs"]
    if compare.main([*words, "--output", str(work / "compared.json")]):
        raise SystemExit(f"{work}: the scores could not be compared.")
    compared = json.loads((work / "compared.json").read_text())
    kept = ("num_seeds", "num_cases", "num_persons", "overall", "classes", "notes")
    result = {
        "scored_on": machine.facts(),
        "prepared": json.loads((work / "prepare.json").read_text()),
        "recipe": words.name,
        **arms,
        "difference": difference(files),
        "compared": {key: compared[key] for key in kept},
    }
    _write(output, result)
    print("\n".join(table(result)), flush=True)


def _entry(work: Path, out: Path) -> dict[str, Any]:
    """Of one seed: how it was trained, and its test scores."""
    predicted = json.loads((out / "predict_test.json").read_text())
    trained = json.loads((out / "train.json").read_text())
    return trained | _scored(work, out, "test") | {"test_prediction_s": predicted["seconds"]}


def difference(files: dict[str, list[str]], num_resamples: int = 10_000) -> dict[str, Any]:
    """Mean Dice of ours less nnU-Net's, with the percentile interval of a bootstrap.

    Every resample draws persons, the same for both, with all of their cases, and seeds, for each
    arm its own. Of three seeds it reaches no further than the lowest and the highest, and is too
    narrow; the product's own comparison, beside it in the result, makes up for that.
    """
    from pipeline.evaluation.comparison import read_arms

    scores = read_arms(files, "dice", group_pattern="pairs")
    a, b = (np.nanmean(arm, axis=2) for arm in scores.arms)  # (seeds, cases)
    names, member = np.unique(scores.persons, return_inverse=True)
    rng = np.random.default_rng(0)
    values = np.empty(num_resamples)
    for n in range(num_resamples):
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)))
        weight = drawn[member] / drawn[member].sum()  # of each case
        means = [arm[rng.integers(len(arm), size=len(arm))].mean(axis=0) @ weight for arm in (a, b)]
        values[n] = means[0] - means[1]
    low, high = np.quantile(values, [0.025, 0.975])
    return {
        "meaning": "mean Dice of both classes, ours - nnU-Net; low and high: 2.5th and 97.5th "
        "percentile of resamples of persons and seeds; see compared/overall/interval for another",
        **{"mean": float(a.mean() - b.mean()), "low": float(low), "high": float(high)},
    }


def table(result: dict[str, Any]) -> list[str]:
    """The result for people."""
    lines = ["", f"{'':8}seed   mean  anterior  posterior  trained s  finished s  beside"]
    for arm in ("ours", "nnunet"):
        lines += [
            f"{arm:8}{run['seed']:4}  {run['mean_dice']:.4f}   {run['Anterior']:.4f}     "
            f"{run['Posterior']:.4f}  {run['trained_s']:9.1f}  {run['finished_s']:10.1f}  "
            f"{run['trained_beside']:6}"
            for run in result[arm]
        ]
    of, overall = result["difference"], result["compared"]["overall"]
    low, high = overall["interval"]
    lines.append(
        f"ours - nnU-Net: {of['mean']:+.4f}; persons and seeds drawn anew, 95 %: "
        f"{of['low']:+.4f} to {of['high']:+.4f}"
    )
    if low is not None:
        lines.append(
            f"made up for few seeds (pipeline.commands.compare): {low:+.4f} to {high:+.4f}"
        )
    return lines


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stages = parser.add_subparsers(dest="stage", required=True)
    added = {}
    for stage in (prepare, nnunet, ours, validate, score):
        added[stage] = stages.add_parser(stage.__name__, help=stage.__doc__.splitlines()[0])
        added[stage].set_defaults(run=stage)
        added[stage].add_argument("--work", type=lambda word: Path(word).resolve(), required=True)
    added[prepare].add_argument("dataset_dir")
    for stage in (nnunet, ours):
        added[stage].add_argument("--seed", type=int, required=True)
        sides = ("validation", "test")
        added[stage].add_argument("--cases", nargs="*", choices=sides, default=list(sides))
    for stage in (prepare, nnunet, ours):
        added[stage].add_argument("--tiny", action="store_true", help="to try the stages")
    added[nnunet].add_argument("--compile", choices=("true", "false"))
    for stage in (ours, score):
        added[stage].add_argument("--name", default="recipe", help="of the recipe")
    for option in ("--set", "--predict"):
        added[ours].add_argument(option, nargs="*", default=[], metavar="key=value")
    added[score].add_argument("--output", default="benchmarks/peer_hippocampus.json")
    words = parser.parse_args()
    words.run(words)


if __name__ == "__main__":
    main()
