"""What is wrong with people's data, and who says so: this project and stock MONAI.

    python -m benchmarks.input_faults [--output FILE.json] [--table FILE.md]

Each fault is put into one case of a small dataset that is sound otherwise. Stock MONAI is what its
tutorials do: `load_decathlon_datalist`, LoadImaged, CacheDataset, crops, SupervisedTrainer, four
steps; a process of its own with 3 GB of memory and 60 s. `tests/test_input_faults.py` holds that
this project names the case, the check and no healthy case.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

NUM_CASES = 6
BAD = "case_004"  # the one that is spoilt
AFFINE = np.diag([1.0, 1.0, 1.5, 1.0])
SHAPE = (24, 20, 16)


@dataclass(frozen=True)
class Fault:
    """One way to spoil a dataset.

    Attributes:
        name: In words.
        spoil: Changes the dataset in a folder.
        check: By which this project finds it; `dataset` where it is one of the whole dataset.
        warning: Whether training may go on.
    """

    name: str
    spoil: Callable[[Path], None]
    check: str
    warning: bool = False


def make_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image `SHAPE` float32 and label uint8 of three classes."""
    rng = np.random.default_rng(seed)
    label = np.zeros(SHAPE, np.uint8)
    centre = rng.integers(8, 12, 3)
    distance = np.linalg.norm(np.moveaxis(np.indices(SHAPE), 0, -1) - centre, axis=-1)
    label[distance < 6] = 1
    label[distance < 3] = 2
    image = label * 50 + rng.normal(100, 10, SHAPE)
    return image.astype(np.float32), label


def write(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    volume = nib.Nifti1Image(voxels, affine)
    volume.set_sform(affine, code=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(volume, path)


def make_dataset(root: Path) -> Path:
    """A sound dataset of `NUM_CASES` cases in the layout of the Decathlon."""
    ids = [f"case_{n:03d}" for n in range(1, NUM_CASES + 1)]
    for seed, case_id in enumerate(ids):
        image, label = make_case(seed)
        write(image_of(root, case_id), image)
        write(label_of(root, case_id), label)
    source = {
        "name": "faults",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "shell", "2": "core"},
        "training": [
            {"image": f"./imagesTr/{i}.nii.gz", "label": f"./labelsTr/{i}.nii.gz"} for i in ids
        ],
    }
    (root / "dataset.json").write_text(json.dumps(source))
    return root


def image_of(root: Path, case_id: str = BAD) -> Path:
    return root / "imagesTr" / f"{case_id}.nii.gz"


def label_of(root: Path, case_id: str = BAD) -> Path:
    return root / "labelsTr" / f"{case_id}.nii.gz"


def read(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def voxels(of: Callable[[Path], Path], change: Callable[[np.ndarray], Any]) -> Callable:
    """Spoils the voxels: `change` works in place or returns others."""

    def spoil(root: Path) -> None:
        old = np.array(read(of(root)))
        new = change(old)
        write(of(root), old if new is None else new)

    return spoil


def geometry(of: Callable[[Path], Path], affine: np.ndarray) -> Callable:
    return lambda root: write(of(root), read(of(root)), affine)


def content(of: Callable[[Path], Path], change: Callable[[bytes], bytes]) -> Callable:
    """Spoils the bytes of the file."""
    return lambda root: of(root).write_bytes(change(of(root).read_bytes()))


def inflated(of: Callable[[Path], Path], change: Callable[[bytearray], Any]) -> Callable:
    """Spoils the bytes before compression."""

    def spoil(root: Path) -> None:
        raw = bytearray(gzip.decompress(of(root).read_bytes()))
        new = change(raw)
        of(root).write_bytes(gzip.compress(bytes(raw if new is None else new)))

    return spoil


def entries(change: Callable[[list[dict[str, str]]], Any]) -> Callable:
    """Spoils the list of cases in dataset.json."""

    def edit(source: dict[str, Any]) -> None:
        change(source["training"])

    return description(edit)


def description(change: Callable[[dict[str, Any]], Any]) -> Callable:
    def spoil(root: Path) -> None:
        source = json.loads((root / "dataset.json").read_text())
        change(source)
        (root / "dataset.json").write_text(json.dumps(source))

    return spoil


def set_voxel(value: float) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[3, 4, 5] = value

    return change


def replaced(value: int) -> Callable:
    """Spoils the label: another value in the place of 2."""
    return voxels(label_of, lambda a: np.where(a == 2, value, a.astype(np.int16)))


def header(**fields: Any) -> Callable[[bytearray], None]:
    """Sets fields of the NIfTI header, unchecked."""

    def change(raw: bytearray) -> None:
        block = np.frombuffer(bytes(raw[:348]), nib.Nifti1Header.template_dtype).copy()
        for name, value in fields.items():
            block[0][name] = value
        raw[:348] = block.tobytes()

    return change


def huge(raw: bytearray) -> bytes:
    header(dim=[3, 1500, 1500, 1500, 1, 1, 1, 1])(raw)
    return bytes(raw[:1024])


def move_outside(root: Path) -> None:
    outside = root.parent / f"{root.name}_elsewhere"
    outside.mkdir(exist_ok=True)
    shutil.move(image_of(root), outside / image_of(root).name)


def dotted_outside(root: Path) -> None:
    move_outside(root)
    place = f"../{root.name}_elsewhere/{BAD}.nii.gz"
    entries(lambda cases: cases[3].update(image=place))(root)


def linked_outside(root: Path) -> None:
    move_outside(root)
    image_of(root).symlink_to(root.parent / f"{root.name}_elsewhere" / f"{BAD}.nii.gz")


def swap(root: Path) -> None:
    image, label = image_of(root).read_bytes(), label_of(root).read_bytes()
    image_of(root).write_bytes(label)
    label_of(root).write_bytes(image)


def copied(root: Path) -> None:
    shutil.copy(image_of(root, "case_002"), image_of(root))
    shutil.copy(label_of(root, "case_002"), label_of(root))


def recompressed(root: Path) -> None:
    raw = gzip.decompress(image_of(root, "case_002").read_bytes())
    image_of(root).write_bytes(gzip.compress(raw, compresslevel=1))
    shutil.copy(label_of(root, "case_002"), label_of(root))


def flip_bit(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[len(content) // 2] ^= 16
    return bytes(changed)


def uncompressed_cut(root: Path) -> None:
    raw = gzip.decompress(image_of(root).read_bytes())
    image_of(root).unlink()
    (root / "imagesTr" / f"{BAD}.nii").write_bytes(raw[: len(raw) // 2])
    entries(lambda cases: cases[3].update(image=f"./imagesTr/{BAD}.nii"))(root)


SHIFTED = AFFINE + np.array([[0, 0, 0, 5.0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
MIRRORED = np.diag([-1.0, 1.0, 1.0, 1.0]) @ AFFINE
RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])

FAULTS = [
    Fault("image: one NaN voxel", voxels(image_of, set_voxel(np.nan)), "finite"),
    Fault("image: one infinite voxel", voxels(image_of, set_voxel(np.inf)), "finite"),
    Fault("image: one value everywhere", voxels(image_of, lambda a: a * 0), "constant"),
    Fault("image: file cut off", content(image_of, lambda b: b[: len(b) // 2]), "unreadable"),
    Fault("image: uncompressed file cut off", uncompressed_cut, "unreadable"),
    Fault("image: one bit flipped", content(image_of, flip_bit), "unreadable"),
    Fault("image: empty file", content(image_of, lambda b: b""), "unreadable"),
    Fault("image: text in its place", content(image_of, lambda b: b"not found\n"), "unreadable"),
    Fault("image: a header alone", inflated(image_of, lambda b: b[:352]), "unreadable"),
    Fault("image: 1 KB that claims 1500 x 1500 x 1500", inflated(image_of, huge), "unreadable"),
    Fault(
        "image: 256 MB of zeros after the voxels",
        inflated(image_of, lambda b: bytes(b) + bytes(2**28)),
        "unreadable",
    ),
    Fault("image: colours", voxels(image_of, lambda a: np.zeros(SHAPE, RGB)), "unreadable"),
    Fault("image: complex", voxels(image_of, lambda a: a.astype(np.complex64)), "unreadable"),
    Fault("image: 2D", voxels(image_of, lambda a: a[..., 0]), "shape"),
    Fault("image: one slice", voxels(image_of, lambda a: a[..., :1]), "shape"),
    Fault("image: 4D, several time points", voxels(image_of, lambda a: np.stack([a] * 3, -1)),
          "channels"),
    Fault("image: 5D", voxels(image_of, lambda a: np.stack([a, a], -1)[:, :, :, None, :]), "shape"),
    Fault("image: missing", lambda root: image_of(root).unlink(), "missing"),
    Fault("label: missing", lambda root: label_of(root).unlink(), "missing"),
    Fault("label: one bit flipped", content(label_of, flip_bit), "unreadable"),
    Fault("label: file cut off", content(label_of, lambda b: b[: len(b) // 2]), "unreadable"),
    Fault("label: fewer slices", voxels(label_of, lambda a: a[..., :-2]), "shape"),
    Fault("label: axes exchanged", voxels(label_of, lambda a: a.transpose(1, 0, 2)), "shape"),
    Fault("label: one-hot, 4D", voxels(label_of, lambda a: np.stack([a, a], -1)), "shape"),
    Fault("label: moved by 5 mm", geometry(label_of, SHIFTED), "affine"),
    Fault("label: mirrored left to right in its header", geometry(label_of, MIRRORED), "affine"),
    Fault("label: another spacing", geometry(label_of, np.diag([1.0, 1.0, 1.6, 1.0])), "affine"),
    Fault("label: fractions, from linear resampling",
          voxels(label_of, lambda a: a.astype(np.float32) * 0.9), "label_values"),
    Fault("label: NaN", voxels(label_of, lambda a: np.where(a == 1, np.nan, a).astype("f4")),
          "label_values"),
    Fault("label: a value that is not declared", replaced(3), "label_values"),
    Fault("label: 255", replaced(255), "label_values"),
    Fault("label: -1", replaced(-1), "label_values"),
    Fault("label: background alone", voxels(label_of, lambda a: a * 0), "no_foreground", True),
    Fault("image and label swapped", swap, "swapped"),
    Fault("image and label: spacing of a micrometre in mm",
          lambda root: [geometry(f, np.diag([1e-6, 1e-6, 1e-6, 1.0]))(root)
                        for f in (image_of, label_of)], "spacing"),
    Fault("image and label: singular affine",
          lambda root: [inflated(f, header(srow_y=[0, 1, 1, 0], srow_z=[0] * 4))(root)
                        for f in (image_of, label_of)], "singular"),
    Fault("image: NaN in its affine", inflated(image_of, header(srow_x=[np.nan, 0, 0, 0])),
          "spacing"),
    Fault("label: infinite offset in its affine",
          inflated(label_of, header(srow_z=[0, 0, 1.5, np.inf])), "spacing"),
    Fault("label: singular affine", inflated(label_of, header(srow_x=[0] * 4)), "spacing"),
    Fault("image and label: voxel size of 0, no sform",
          lambda root: [inflated(f, header(sform_code=0, pixdim=[1, 0, 1, 1, 0, 0, 0, 0]))(root)
                        for f in (image_of, label_of)], "unreadable"),
    Fault("image: no orientation in its header",
          lambda root: [inflated(f, header(sform_code=0, qform_code=0))(root)
                        for f in (image_of, label_of)], "orientation", True),
    Fault("image: pixdim and affine of two minds",
          inflated(image_of, header(pixdim=[1, 3, 3, 3, 0, 0, 0, 0])), "spacing", True),
    Fault("list: a case twice", entries(lambda c: c.append(c[3])), "duplicate_id"),
    Fault("list: one file under two ids", copied, "identical"),
    Fault("list: one scan under two ids, compressed anew", recompressed, "identical"),
    Fault("list: a path with ../", dotted_outside, "outside"),
    Fault("list: a link that leads outside", linked_outside, "outside"),
    Fault("list: no case", entries(list.clear), "dataset"),
    Fault("list: label without its file name", entries(lambda c: c[3].pop("label")), "dataset"),
    Fault("dataset.json: a label value left out",
          description(lambda d: d.update(labels={"0": "a", "2": "b"})), "dataset"),
    Fault("dataset.json: two channels declared",
          description(lambda d: d.update(modality={"0": "T1", "1": "T2"})), "channels"),
]  # fmt: skip


def stock(root: Path) -> None:
    """Train with stock MONAI; raises what it raises, and says NaN if its weights are."""
    import torch
    from monai.data import CacheDataset, DataLoader, load_decathlon_datalist
    from monai.engines import SupervisedTrainer
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        NormalizeIntensityd,
        Orientationd,
        RandCropByPosNegLabeld,
        Spacingd,
    )

    keys = ("image", "label")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cases = load_decathlon_datalist(str(root / "dataset.json"), True, "training", str(root))
    crop = RandCropByPosNegLabeld(keys, "label", [16, 16, 8], num_samples=1)
    transform = Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            Orientationd(keys, "RAS", labels=None),
            Spacingd(keys, (1.0, 1.0, 1.5), mode=("bilinear", "nearest")),
            NormalizeIntensityd("image"),
            crop.set_random_state(0),
        ]
    )
    loader = DataLoader(CacheDataset(cases, transform, progress=False), batch_size=2, shuffle=True)
    network = UNet(3, 1, 3, (4, 8), (2,))
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=4,
        train_data_loader=loader,
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), 1e-2),
        loss_function=DiceCELoss(to_onehot_y=True, softmax=True),
    ).run()
    if not all(p.isfinite().all() for p in network.parameters()):
        print("NaN weights")


def _stock_process(root: Path, end: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            stock(root)
            said = "silent, weights NaN" if "NaN weights" in out.getvalue() else "silent"
        except BaseException as error:
            chain: list[str] = []
            link: BaseException | None = error
            while link is not None:
                chain.append(f"{type(link).__name__}: {link}")
                link = link.__cause__ or link.__context__
            names = BAD in " ".join(chain) or BAD in out.getvalue()
            said = ("names the case: " if names else "does not name the case: ") + chain[-1][:160]
    end.send(said)


def ask_stock(root: Path) -> tuple[str, float]:
    """What stock MONAI makes of the dataset, and the seconds it takes."""
    start = time.perf_counter()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_stock_process, args=(root, there))
    process.start()
    said = here.recv() if here.poll(60) else "no answer in 60 s"
    process.kill()
    process.join()
    return " ".join(said.split()), round(time.perf_counter() - start, 1)


def ask_us(root: Path) -> list[str]:
    """The lines of `pipeline.commands.check`'s report that name a finding."""
    from pipeline.data.dataset import load_cases
    from pipeline.data.preflight import preflight
    from pipeline.errors import InputError

    try:
        found = preflight(load_cases(root, num_folds=2))
    except InputError as error:
        return list(error.faults)
    return [finding.line for finding in found.issues]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/input_faults.json")
    parser.add_argument("--table", default="docs/input_faults.md")
    arguments = parser.parse_args()
    import monai.engines  # noqa: F401 (once, before the processes are forked)

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, fault in enumerate(
            [Fault("(a sound dataset)", lambda root: None, ""), *FAULTS]
        ):
            root = make_dataset(Path(folder) / f"d{number}")
            fault.spoil(root)
            said, seconds = ask_stock(root)
            ours = ask_us(root)
            row = {"fault": fault.name, "stock": said, "stock_s": seconds, "ours": ours}
            rows.append(json.loads(json.dumps(row).replace(str(root), "DATASET_DIR")))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    Path(arguments.output).write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        "# What is wrong with people's data, and who says so",
        "",
        "Each fault was put into one case (`case_004`) of a small sound dataset. Stock MONAI is",
        "what its tutorials do, four steps on a CPU; *silent* is an exit status of 0. Made by",
        "`python -m benchmarks.input_faults`; `tests/test_input_faults.py` holds the last column.",
        "",
    ]
    lines += ["| fault | stock MONAI 1.6.1 | this project |", "|---|---|---|"]
    lines += [
        "| {} | {} | {} |".format(
            row["fault"], row["stock"].replace("|", "/"), "<br>".join(row["ours"]) or "nothing"
        )
        for row in rows
    ]
    Path(arguments.table).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
