"""What the commands make, as hashes and figures, to compare two states of this repository.

    python -m benchmarks.golden record --repository DIR --output FILE.json [--card]
    python -m benchmarks.golden compare OLD.json NEW.json

`record` makes small datasets and calls the commands of the repository in DIR on them, on one CPU
thread: trainings in three precisions, killed and resumed, under MONAI's own command and on two
ranks; every layout of a dataset; every fault of `benchmarks/input_faults.py`; predictions, an
ensemble, DICOM, exports in each format, scores, comparisons. No module of the package is named but
its commands, in `COMMANDS`. With `--card` it is 50 steps in float16 on a CUDA device instead, with
cuDNN's deterministic algorithms.

`compare` names what differs. Of `EXCEPTIONS` each has its reason beside it. Figures of statistics
may differ by 1e-6, losses of two ranks by 1e-4 of their value; all else has to be equal.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

COMMANDS = {
    "train": "pipeline.run",
    "predict": "pipeline.run",
    "check": "pipeline check",
    "evaluate": "pipeline evaluate",
    "compare": "pipeline compare",
    "export": "pipeline export",
    "bundle": "monai.bundle",
}  # of a repository whose commands are modules of their own, `pipeline.check` and so on
# path in the record, with the reason why it may differ
EXCEPTIONS: dict[str, str] = {
    "compare/nnunet": "nnU-Net's summary.json was not read before",
}
NEAR = {"two_ranks/": 1e-4, "compare/": 1e-6, "evaluate/": 1e-6, "formats/": 1e-5}  # relative
SETTINGS: dict[str, Any] = {
    "spacing": [1, 1, 1.5],
    "normalization": {"clip": [-20, 100], "mean": 15, "std": 30},
    "crop_empty_borders": False,
    "roi_size": [16, 16, 8],
    "base_channels": 4,
    "network_def#num_dense_layers": 1,
    "network_def#growth_rate": 4,
    "strides": [[2, 2, 1], [2, 2, 2]],
    "batch_size": 2,
    "foreground_ratio": 0.67,
    "flip_axes": [0, 1],
    "num_folds": 3,
    "steps_per_epoch": 10,
    "max_epochs": 2,
    "val_interval": 1,
    "learning_rate": 0.005,
    "warmup_steps": 4,
    "checkpoint_every": 5,
    "log_every": 1,
    "report": False,
    "device": "cpu",
}
MODES = {
    "float32": {"amp": False},
    "bfloat16": {"amp_dtype": "bfloat16"},
    "float16": {"amp_dtype": "float16"},
    "float16_batch_norm": {"amp_dtype": "float16", "network_def#norm": "batch"},
    "float32_accumulated": {"amp": False, "accumulation_steps": 2, "network_def#norm": "batch"},
}
Parts = Iterator[tuple[str, Any]]  # places in the record, and what stands there
CLOCKS = ("time", "per_s", "seconds", "memory")  # in the names of what no two runs have in common


class KillAfter:
    """A handler that kills its process after an iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def attach(self, engine: Any) -> None:
        from ignite.engine import Events

        engine.add_event_handler(Events.ITERATION_COMPLETED, self.after_iteration)

    def after_iteration(self, engine: Any) -> None:
        if engine.state.iteration == self.iteration:
            os.kill(os.getpid(), signal.SIGKILL)


# --- datasets


def volumes(seed: int, size: tuple[int, int, int] = (20, 18, 12)) -> tuple[np.ndarray, np.ndarray]:
    """Image float32 and label uint8: bright blobs of two classes in noise."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    blobs = gaussian_filter(rng.normal(size=size), 2)
    label = np.digitize(blobs, np.quantile(blobs, [0.7, 0.9])).astype(np.uint8)
    return (label * 40 + rng.normal(0, 5, size)).astype(np.float32), label


def save(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 1.5, 1.0])), path)


def make_datasets(root: Path) -> dict[str, Path]:
    """One in each layout, by name; cases `case_0` to `case_5`."""
    for n in range(6):
        image, label = volumes(n)
        name = f"case_{n}"
        for folder in ("msd/imagesTr", "folders/images"):
            save(root / folder / f"{name}.nii.gz", image)
        for folder in ("msd/labelsTr", "folders/labels", "nnunet/labelsTr"):
            save(root / folder / f"{name}.nii.gz", label)
        for channel in range(2):
            save(root / f"nnunet/imagesTr/{name}_{channel:04d}.nii.gz", image + channel)
    entries = [
        {"image": f"./imagesTr/case_{n}.nii.gz", "label": f"./labelsTr/case_{n}.nii.gz"}
        for n in range(6)
    ]
    labels = {"background": 0, "dim": 1, "bright": 2}
    decathlon = {
        "name": "golden", "modality": {"0": "MRI"}, "training": entries,
        "labels": {str(value): name for name, value in labels.items()},
    }  # fmt: skip
    (root / "msd/dataset.json").write_text(json.dumps(decathlon))
    raw = {
        "channel_names": {"0": "T1", "1": "T2"}, "labels": labels, "numTraining": 6,
        "file_ending": ".nii.gz",
    }  # fmt: skip
    (root / "nnunet/dataset.json").write_text(json.dumps(raw))
    shutil.copytree(root / "folders", root / "table")
    with open(root / "table/cases.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label", "case_id", "group"])
        for n in range(6):
            files = [f"{folder}/case_{n}.nii.gz" for folder in ("images", "labels")]
            rows.writerow([*files, f"case_{n}", f"person_{n // 2}"])
    write_dicom(root / "dicom/case_9", volumes(9)[0])
    return {name: root / name for name in ("msd", "folders", "nnunet", "table", "dicom")}


def write_dicom(folder: Path, image: np.ndarray) -> None:
    """An axial CT series with one file per slice."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    folder.mkdir(parents=True)
    for k in range(image.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = (
            CTImageStorage,
            ExplicitVRLittleEndian,
        )
        meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
        one = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        one.SOPClassUID, one.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        one.Modality, one.SeriesInstanceUID, one.InstanceNumber = "CT", "1.2.3", k + 1
        one.ImagePositionPatient = [0, 0, 1.5 * k]
        one.ImageOrientationPatient, one.PixelSpacing = [1, 0, 0, 0, 1, 0], [1, 1]
        pixels = np.ascontiguousarray(image[:, :, k].T).astype("<i2")
        one.Rows, one.Columns = pixels.shape
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated = one.BitsStored = 16
        one.HighBit, one.PixelRepresentation = 15, 1
        one.RescaleSlope, one.RescaleIntercept, one.PixelData = 1, 0, pixels.tobytes()
        one.save_as(folder / f"slice_{k:03d}", enforce_file_format=True)


# --- commands


class Commands:
    """Runs commands of a repository, each in a forked process of its own.

    Args:
        repository: Its root; the working directory of every command.
        work: Folder for output that is not looked at.
    """

    def __init__(self, repository: Path, work: Path) -> None:
        self.work = work
        os.chdir(repository)
        here = str(Path(__file__).resolve().parent)
        sys.path[:0] = [str(repository), here]
        os.environ["PYTHONPATH"] = os.pathsep.join([str(repository), here])
        runpy.run_module("pipeline.run", run_name="imported")  # once, for all that are forked
        self.separator = " " if (repository / "pipeline/commands").is_dir() else "."

    def __call__(self, command: str, *words: object) -> int:
        """Exit status of a command; minus a signal's number."""
        process = multiprocessing.get_context("fork").Process(
            target=self._work, args=(*self.command(command), *(str(word) for word in words))
        )
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    def command(self, name: str) -> list[str]:
        """Module that is run, and what is typed after it."""
        return COMMANDS[name].replace(" ", self.separator).split()

    def _work(self, module: str, *words: str) -> None:
        log = os.open(self.work / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        print("+", module, *words, flush=True)
        sys.argv = [module, *words]
        warnings.simplefilter("ignore", RuntimeWarning)  # the module was imported before
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    def train(self, data: Path, out: Path, *files: object, **changes: Any) -> int:
        """A training with `SETTINGS`."""
        words = settings(data, out, **changes)
        return self("train", "configs/amp.json", *files, *words)


def values_of(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """`SETTINGS` and where a training's files are."""
    places = {"dataset_dir": data, "output_dir": out, "cache_dir": out.parent / "cache"}
    return {**{key: str(path) for key, path in places.items()}, **SETTINGS, **changes}


def settings(data: Path, out: Path, **changes: Any) -> list[str]:
    """These values on the command line."""
    return [
        word
        for key, value in values_of(data, out, **changes).items()
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


# --- what they made


def of_weights(path: Path) -> str:
    """SHA-256 of the tensors of a state dict."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(torch.load(path, "cpu", weights_only=True).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def of_labels(folder: Path) -> dict[str, str]:
    """SHA-256 of voxels and affine of every NIfTI file in a folder."""
    found = {}
    for path in sorted(folder.rglob("*.nii.gz")):
        image = nib.load(path)
        voxels = np.asanyarray(image.dataobj)
        content = voxels.tobytes() + np.asarray(image.affine).tobytes()
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def curves(run: Path) -> dict[str, list[float]]:
    """Every scalar of TensorBoard that is no clock's."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [point.value for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not any(word in tag.lower() for word in CLOCKS)
    }


def rows_of(path: Path) -> list[dict[str, str]]:
    """A CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def of_run(run: Path) -> dict[str, Any]:
    """What there is of a finished training."""
    summary = json.loads((run / "summary.json").read_text())
    return {
        "best": of_weights(run / "models/model.pt"),
        "last": of_weights(run / "models/last.pt"),
        "curves": curves(run),
        "steps": summary["steps"],
        "skipped": summary["skipped_steps"],
        "validation": json.loads((run / "validation.json").read_text()),
        "scores": {
            path.parent.name: rows_of(path) for path in sorted(run.glob("scores/*/metrics.csv"))
        },
        "labels": of_labels(run / "scores"),
    }


def record_training(run: Commands, data: Mapping[str, Path], root: Path) -> Parts:
    """Three precisions, undisturbed, and killed after seven steps and resumed."""
    kill = root / "kill.json"
    for name, mode in MODES.items():
        assert run.train(data["msd"], root / name, **mode) == 0, name
        yield f"training/{name}", of_run(root / name)
        iteration = 7 * mode.get("accumulation_steps", 1)
        handler = {"_target_": "golden.KillAfter", "iteration": iteration}
        kill.write_text(json.dumps({"+train#handlers": [handler]}))
        out = root / f"{name}_killed"
        died = run.train(data["msd"], out, kill, **mode, allow="golden.KillAfter")
        assert died == -signal.SIGKILL, name
        assert run.train(data["msd"], out, **mode) == 0, name
        yield f"resumed/{name}", of_run(out)
    overlay = root / "bundle.json"
    overlay.write_text(json.dumps(values_of(data["msd"], root / "bundle", amp=False)))
    files = ["configs/amp.json", str(overlay)]
    assert run("bundle", "run", "--config_file", str(files)) == 0
    yield "bundle_run", of_run(root / "bundle")
    assert run.train(data["nnunet"], root / "two_channels", amp=False, max_epochs=1) == 0
    yield "two_channels", of_run(root / "two_channels")


def record_ranks(run: Commands, data: Mapping[str, Path], root: Path) -> Parts:
    """Two Gloo ranks, and the run of two that one goes on with."""
    words = settings(data["msd"], root / "ranks", amp=False, max_epochs=1)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    files = ["configs/amp.json", "configs/multi_gpu.json"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", COMMANDS["train"], *files, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert run.train(data["msd"], root / "ranks", amp=False) == 0
    found = curves(root / "ranks")
    yield "two_ranks/then_one", {tag: found[tag] for tag in found if "loss" in tag.lower()}


def record_data(run: Commands, data: Mapping[str, Path], root: Path) -> Parts:
    """Case lists of every layout, and the verdict on every fault."""
    report = root / "report.json"
    words = ("--json", report, "--num_folds", 3, "--cache_dir", root / "cache")
    for name in ("msd", "folders", "nnunet", "table"):
        status = run("check", data[name], *words)
        found = json.loads(report.read_text())
        kept = {key: found[key] for key in ("split", "faults", "warnings", "excluded")}
        yield f"layouts/{name}", {"status": status, **kept}
    faults = importlib.import_module("benchmarks.input_faults")
    for fault in faults.FAULTS:
        spoilt = root / "spoilt"
        shutil.rmtree(spoilt, ignore_errors=True)
        report.unlink(missing_ok=True)
        fault.spoil(faults.make_dataset(spoilt))
        status = run("check", spoilt, *words)
        found = json.loads(report.read_text()) if report.exists() else {}
        named = [(one["case_id"], one["check"], one["warning"]) for kind in ("faults", "warnings")
                 for one in found.get(kind, ())]  # fmt: skip
        yield f"faults/{fault.name}", {"status": status, "named": sorted(named)}


def record_results(run: Commands, data: Mapping[str, Path], root: Path) -> Parts:
    """Predictions, an ensemble, DICOM, scores, comparisons and exports of the float32 run."""
    model, other = root / "float32", root / "bfloat16"
    images = data["msd"] / "imagesTr"
    predict = ("predict", "configs/inference.json", "--device", "cpu")
    for name, words in {
        "plain": ("--run_dir", model, "--input", images),
        "mirrored": ("--run_dir", model, "--input", images, "--mirror", "true"),
        "ensemble": ("--run_dir", model, "--ensemble", json.dumps([str(other)]), "--input", images),
        "dicom": ("--run_dir", model, "--input", data["dicom"]),
    }.items():
        out = root / "predictions" / name
        assert run(*predict, *words, "--output_dir", out) == 0, name
        yield f"predictions/{name}", of_labels(out)
    labels = data["msd"] / "labelsTr"
    for name in ("plain", "ensemble"):
        out = root / "evaluated" / name
        words = (root / "predictions" / name, labels, "--output_dir", out)
        assert run("evaluate", *words) == 0
        yield f"evaluate/{name}", rows_of(out / "metrics.csv")
    arms = [root / f"evaluated/{name}/metrics.csv" for name in ("plain", "ensemble")]
    summaries = [root / f"nnunet_{n}/summary.json" for n in range(2)]
    for summary, arm in zip(summaries, arms, strict=True):
        summary.parent.mkdir()
        summary.write_text(json.dumps(as_nnunet(rows_of(arm), labels)))
    for name, (a, b) in {"metrics": arms, "nnunet": summaries}.items():
        report = root / f"compared_{name}.json"
        status = run("compare", "--a", a, "--b", b, "--output", report)
        found = json.loads(report.read_text()) if report.exists() else None
        yield f"compare/{name}", {"status": status, "report": found}
    bundle = root / "exported"
    formats = ("torchscript", "onnx", "torch_export")
    assert run("export", model, "--output", bundle, "--formats", *formats) == 0
    facts = json.loads((bundle / "export.json").read_text())
    kept = ("made", "max_abs_difference")
    formats_made = facts["formats"].items()
    yield "export", {name: {key: of.get(key) for key in kept} for name, of in formats_made}
    yield "formats", dict(logits_of_formats(bundle / "models"))
    out = root / "predictions/exported"
    words = ("--bundle_root", bundle, "--dataset_dir", images, "--output_dir", out)
    config = bundle / "configs/inference.json"
    assert run("bundle", "run", "--config_file", config, *words) == 0
    yield "predictions/exported", of_labels(out)


def logits_of_formats(models: Path) -> Iterator[tuple[str, list[float]]]:
    """What the network answers in each exported format: sum and largest of each channel."""
    import onnxruntime
    import torch

    image = torch.randn(1, 1, 16, 16, 8, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(models / "model.onnx")
    networks: dict[str, Callable[[Any], Any]] = {
        "torchscript": torch.jit.load(models / "model.ts"),
        "onnx": lambda x: torch.tensor(
            session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        ),
        "torch_export": torch.export.load(models / "model.pt2").module(),
    }
    with torch.no_grad():
        for name, network in networks.items():
            logits = network(image)[0].double()
            yield name, [*logits.sum((1, 2, 3)).tolist(), *logits.amax((1, 2, 3)).tolist()]


def as_nnunet(rows: list[dict[str, str]], labels: Path) -> dict[str, Any]:
    """Scores in the form of nnU-Net's `summary.json`."""
    cases: dict[str, dict[str, Any]] = {}
    for row in rows:
        value = str({"dim": 1, "bright": 2}.get(row["class"], row["class"]))
        dice = float(row["dice"]) if row["dice"] else math.nan
        cases.setdefault(row["case_id"], {})[value] = {"Dice": dice}
    return {
        "metric_per_case": [
            {"metrics": metrics, "reference_file": str(labels / f"{case}.nii.gz"),
             "prediction_file": f"{case}.nii.gz"}
            for case, metrics in cases.items()
        ]
    }  # fmt: skip


def record_card(run: Commands, data: Mapping[str, Path], root: Path) -> Parts:
    """Fifty steps in float16, eager and as a CUDA graph where the repository has them."""
    how = {
        "device": "cuda", "amp_dtype": "float16", "base_channels": 32, "max_epochs": 5,
        "network_def#num_dense_layers": 4, "network_def#growth_rate": 32, "val_interval": 5,
    }  # fmt: skip
    for norm in ("instance", "batch"):
        name = f"card_{norm}"
        more = {"network_def#norm": norm, "network_def#recompute_levels": int(norm == "batch")}
        assert run.train(data["msd"], root / name, **how, **more) == 0, name
        yield f"card/{norm}", of_run(root / name)


# --- record and compare


def record(repository: Path, card: bool) -> dict[str, Any]:
    """All of it, or the part on a card."""
    import torch

    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = card
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="golden_") as folder:
        root = Path(folder)
        data = make_datasets(root / "data")
        run = Commands(repository, root)
        parts: list[Callable[..., Parts]] = [
            record_training, record_data, record_results, record_ranks,
        ]  # fmt: skip
        if card:
            parts = [record_card]
        try:
            for part in parts:
                for name, value in part(run, data, root):
                    print(name, flush=True)
                    found[name] = value
        except AssertionError:
            print((root / "log.txt").read_text()[-3000:], flush=True)
            raise
    return json.loads(json.dumps(found).replace(folder, "ROOT"))


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Places where two records differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{path}/{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for n, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{path}/{n}")
    elif not is_equal(old, new, next((r for p, r in NEAR.items() if path.startswith(p)), 0)):
        yield f"{path}: {str(old)[:60]} -> {str(new)[:60]}"


def is_equal(old: Any, new: Any, relative: float) -> bool:
    """Whether two values are the same, or numbers as near as is allowed."""
    with contextlib.suppress(TypeError, ValueError):
        one, other = float(old), float(new)
        return math.isclose(one, other, rel_tol=relative) or (math.isnan(one) and math.isnan(other))
    return bool(old == new)


def main() -> int:
    """Record or compare; returns the exit status, 1 where something differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("--repository", type=Path, default=Path.cwd())
    recording.add_argument("--output", type=Path, required=True)
    recording.add_argument("--card", action="store_true")
    comparing = commands.add_parser("compare")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    given = parser.parse_args()
    if given.command == "record":
        output = given.output.resolve()
        text = json.dumps(record(given.repository.resolve(), given.card), indent=1, sort_keys=True)
        output.write_text(text + "\n")
        return 0
    old, new = (json.loads(path.read_text()) for path in (given.old, given.new))
    found = list(differences(old, new))
    unexplained = [line for line in found if not line.startswith(tuple(EXCEPTIONS))]
    print("\n".join(unexplained[:50]) or "nothing differs")
    print(f"{len(found) - len(unexplained)} differences are listed with their reasons")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
