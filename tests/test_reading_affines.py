"""An affine of no space is a line about its case, and hides nothing of the others: by commands."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from conftest import make_dataset

NAN, INF = np.nan, np.inf
FIELDS = {
    "NaN in the sform": {"srow_x": [NAN, 0, 0, 0]},
    "infinite sform": {"srow_x": [INF, 0, 0, 0]},
    "column of zeros": {"srow_x": [0, 0, 0, 0]},
    "two parallel columns": {"srow_x": [1, 1, 0, 0], "srow_y": [0, 0, 0, 0]},
    "spacing of a kilometre": {"srow_x": [1e6, 0, 0, 0]},
    "qform of NaN": {"sform_code": 0, "qform_code": 1, "quatern_b": NAN},
    "qform that is no rotation": {"sform_code": 0, "qform_code": 1, "quatern_b": 3},
    "qform with an infinite offset": {"sform_code": 0, "qform_code": 1, "qoffset_x": INF},
    "qform, pixdim of NaN": {"sform_code": 0, "qform_code": 1, "pixdim": [1] + [NAN] * 7},
    "pixdim of zero": {"sform_code": 0, "qform_code": 1, "pixdim": [1, 0, 1, 1, 0, 0, 0, 0]},
    "neither, pixdim of zero": {"sform_code": 0, "qform_code": 0, "pixdim": [1] + [0] * 7},
}


def spoil(path, fields):
    """Set fields of a NIfTI header, unchecked."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    block = np.frombuffer(bytes(raw[:348]), nib.Nifti1Header.template_dtype).copy()
    for name, value in fields.items():
        block[0][name] = value
    raw[:348] = block.tobytes()
    path.write_bytes(gzip.compress(bytes(raw)))


def blamed(told):
    return {line.split()[1] for line in told.splitlines() if line.startswith("fault ")}


@pytest.mark.parametrize("level", ["full", "fast", "off"])
@pytest.mark.parametrize("folders", [("imagesTr",), ("labelsTr",), ("imagesTr", "labelsTr")])
def test_every_case_is_told_of(command, train, tmp_path, level, folders):
    root = make_dataset(tmp_path / "d", len(FIELDS) + 4)
    names = [f"tiny_{n:03d}" for n in range(1, len(FIELDS) + 1)]
    for name, fields in zip(names, FIELDS.values(), strict=True):
        for folder in folders:
            spoil(root / folder / f"{name}.nii.gz", fields)
    cut = root / "imagesTr" / f"tiny_{len(FIELDS) + 1:03d}.nii.gz"
    cut.write_bytes(b"no volume")
    expected = {*names, cut.name.removesuffix(".nii.gz")}
    status, told = command("check", root, "--preflight", level, "--cache_dir", tmp_path / "cache")
    assert status == 2
    assert blamed(told) == expected, told
    for case in names:
        lines = [line for line in told.splitlines() if case in line]
        assert len(lines) == len(folders), lines
        assert all("  expected " in line and "  fault" not in line for line in lines)
    status, told = train(tmp_path / "r", dataset_dir=str(root), preflight=level)
    assert status == 2
    assert {line.split(":")[0] for line in told.splitlines()} == expected, told
    assert not (tmp_path / "r").exists()


def test_the_others_are_predicted(command, train, tmp_path):
    few = {"max_epochs": 1, "steps_per_epoch": 1}
    assert train(tmp_path / "r", **few)[0] == 0
    images = make_dataset(tmp_path / "d", len(FIELDS) + 1) / "imagesTr"
    names = sorted(path.name.removesuffix(".nii.gz") for path in images.iterdir())
    for name, fields in zip(names, FIELDS.values(), strict=False):
        spoil(images / f"{name}.nii.gz", fields)
    words = ["--run_dir", tmp_path / "r", "--input", images, "--output_dir", tmp_path / "out"]
    status, told = command("run", "configs/inference.json", *words)
    assert status == 1
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == [f"{names[-1]}.nii.gz"]
    listed = told.partition("Not predicted: ")[2].splitlines()
    assert [line.split(":")[0].strip() for line in listed[1:]] == names[:-1], told
    assert all(": expected " in line for line in listed[1:])
