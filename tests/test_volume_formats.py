"""NRRD, MetaImage and Analyze, written by SimpleITK, against NIfTI written by nibabel."""

import json
import os
import re

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from any_datasets import AFFINE as PLAIN
from any_datasets import volumes
from nibabel.analyze import AnalyzeImage

from pipeline.data.cases import case_name, list_images
from pipeline.data.content import ContentHashes
from pipeline.data.dataset import load_cases
from pipeline.data.nifti import check_headers, read_pair
from pipeline.data.preflight import preflight
from pipeline.prediction.predict_files import save_like
from transforms.load import LoadVolumesd
from transforms.volumes import VolumeError, read_header, read_voxels

SHAPE = (7, 6, 5)
NAMES = ["a.nrrd", "a.nhdr", "a.seg.nrrd", "a.mha", "a.mhd", "a.hdr", "A.NRRD", "A.MHD", "A.NII.GZ"]
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])


def oblique():
    """Axes at odd angles, of three sizes, from RAS mm."""
    turn = nib.eulerangles.euler2mat(0.2, -0.4, 0.3)
    return nib.affines.from_matvec(turn * [0.8, 1.2, 2.5], [-31.5, 12.25, 7])


def save(path, voxels, affine, *, packed=False):
    """Write with SimpleITK, or with nibabel what it writes; a fourth axis is of channels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in (".gz", ".hdr"):
        kind = nib.Nifti1Pair if path.suffix == ".hdr" else nib.Nifti1Image
        nib.save(kind(voxels, affine), path)
        return str(path)
    lps, sizes = FLIP @ affine, np.linalg.norm(affine[:3, :3], axis=0)
    moved = np.moveaxis(voxels.T, 0, -1) if voxels.ndim == 4 else voxels.T
    image = SimpleITK.GetImageFromArray(moved, isVector=voxels.ndim == 4)
    image.SetDirection((lps[:3, :3] / sizes).ravel().tolist())
    image.SetSpacing(sizes.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    written = path.with_name(path.name.lower())
    SimpleITK.WriteImage(image, written, useCompression=packed)
    written.rename(path)
    return str(path)


def read(path):
    return read_voxels(str(path), read_header(str(path)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "packed"), [("i2", True), ("f4", False), ("u1", False)])
def test_volume_is_read_as_the_nifti_file_of_the_same_voxels(tmp_path, name, dtype, packed):
    voxels = np.random.default_rng(0).normal(50, 20, SHAPE).astype(dtype)
    path, nifti = save(tmp_path / name, voxels, oblique(), packed=packed), tmp_path / "b.nii.gz"
    save(nifti, voxels, oblique())
    header, got = read_header(path), read(path)
    assert (header.shape, header.dtype, header.is_oriented) == (SHAPE, np.dtype(dtype), True)
    assert (case_name(path).lower(), got.dtype) == ("a", np.dtype(dtype))
    np.testing.assert_array_equal(got, voxels)
    np.testing.assert_allclose(header.affine, nib.load(nifti).affine, atol=1e-5)
    one, other = (LoadVolumesd("image")({"image": str(p)})["image"] for p in (path, nifti))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-5)
    assert check_headers({"case_id": "a", "image": path, "label": str(nifti)}, 1)[1] == []
    save_like(np.ones(SHAPE, np.uint8), path, tmp_path / "out.nii.gz")
    np.testing.assert_allclose(nib.load(tmp_path / "out.nii.gz").affine, oblique(), atol=1e-5)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_components_are_the_channels_of_a_fourth_axis(tmp_path, name):
    voxels = np.random.default_rng(0).integers(0, 99, (*SHAPE, 3)).astype("i2")
    path = save(tmp_path / name, voxels, oblique(), packed=True)
    np.testing.assert_array_equal(read(path), voxels)
    loaded = LoadVolumesd("image")({"image": path})["image"]
    np.testing.assert_array_equal(loaded.numpy(), voxels)


def test_analyze_and_nrrd_without_orientation_are_warned_of(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 99, SHAPE).astype("i2")
    image = AnalyzeImage(voxels, None)
    image.header.set_zooms((1, 2, 3))
    nib.save(image, tmp_path / "a.hdr")
    header = "type: short\ndimension: 3\nsizes: 7 6 5\nspacings: 1 2 3\nencoding: raw\n"
    header = f"NRRD0004\n{header}endian: little\n\n"
    (tmp_path / "a.nrrd").write_bytes(header.encode() + voxels.tobytes(order="F"))
    for name in ("a.hdr", "a.nrrd"):
        path = str(tmp_path / name)
        np.testing.assert_array_equal(read(path), voxels)
        np.testing.assert_allclose(read_header(path).zooms_mm, (1, 2, 3))
        (issue,) = check_headers({"case_id": "a", "image": path}, 1)[1]
        assert issue.warning
        assert issue.message.startswith(f"expected an orientation in the header of {name}, got no")


def test_label_is_put_into_the_axes_of_an_image_of_another_format(tmp_path):
    label = np.random.default_rng(0).integers(0, 3, SHAPE).astype("u1")
    image = save(tmp_path / "a.mha", label.astype("f4"), oblique())
    other = nib.Nifti1Image(label, oblique()).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    nib.save(other, tmp_path / "b.nii.gz")
    case = {"image": image, "label": str(tmp_path / "b.nii.gz")}
    assert check_headers({"case_id": "a", **case}, 1)[1] == []
    np.testing.assert_array_equal(LoadVolumesd(["image", "label"])(case)["label"], label)
    pred, found, _ = read_pair(tmp_path / "a.mha", tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(pred, found)


@pytest.mark.parametrize("layout", ["folders", "table", "nnunet"])
def test_dataset_of_other_formats_is_read(tmp_path, layout):
    folders = ("imagesTr", "labelsTr") if layout == "nnunet" else ("images", "labels")
    for n in range(4):
        names = (
            (f"c{n}_0000.mha", f"c{n}.mha")
            if layout == "nnunet"
            else (f"c{n}.MHA", f"c{n}.seg.nrrd")
        )
        for folder, name, voxels in zip(folders, names, volumes(n), strict=True):
            save(tmp_path / folder / name, voxels, PLAIN)
    if layout == "table":
        rows = [f"images/c{n}.MHA,labels/c{n}.seg.nrrd" for n in range(4)]
        (tmp_path / "cases.csv").write_text("\n".join(["image,label", *rows]))
    if layout == "nnunet":
        source = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "a": 1, "b": 2}}
        (tmp_path / "dataset.json").write_text(json.dumps({**source, "file_ending": ".mha"}))
    found = preflight(load_cases(tmp_path, num_folds=2))
    assert (found.faults, found.cases.kind) == ([], layout)
    assert [case["case_id"] for case in found.cases.cases] == [f"c{n}" for n in range(4)]
    counts = [entry.num_cases for entry in found.fingerprint.classes]
    assert counts == [4, 4, 4]
    assert len(list_images(tmp_path / folders[0], labels=tmp_path / folders[1])) == 4


def refusal(path):
    with pytest.raises(VolumeError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert os.path.basename(path) in message
    return message


def edit(path, old, new):
    """Replace a pattern in the text of a header."""
    content, count = re.subn(old, new, path.read_bytes(), count=1)
    assert count
    path.write_bytes(content)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "sizes"), [("a.nrrd", b"sizes: 7 6 5"), ("a.mha", b"DimSize = 7 6 5"),
                        ("a.nhdr", b"sizes: 7 6 5"), ("a.mhd", b"DimSize = 7 6 5")],
)  # fmt: skip
def test_header_that_claims_more_than_its_file_holds_is_refused(tmp_path, name, sizes, packed):
    path = tmp_path / name
    save(path, np.zeros(SHAPE, "i2"), oblique(), packed=packed)
    edit(path, sizes, sizes.replace(b"7", b"70007"))
    assert re.search(r"claims 4200420 bytes of voxels, in a file that can hold \d+", refusal(path))


@pytest.mark.parametrize("name", ["a.nhdr", "a.mhd"])
@pytest.mark.parametrize(
    "stated", ["../a.raw", "{}/a.raw", "LIST", "a_%03d.raw 1 5 1", "absent.raw", ".hidden", "a\\b"]
)
def test_voxels_are_read_from_beside_the_header_alone(tmp_path, name, stated):
    path, place = tmp_path / "in" / name, tmp_path.as_posix()
    save(path, np.ones(SHAPE, "i2"), oblique())
    (tmp_path / "a.raw").write_bytes((tmp_path / "in" / "a.raw").read_bytes())
    (tmp_path / "in" / ".hidden").write_bytes(bytes(420))
    edit(path, rb"a\.raw", stated.format(place).encode().replace(b"\\", b"\\\\"))
    assert "that is no file beside it" in refusal(path)
    edit(path, rb"(data file:|ElementDataFile =)", rb"\1/")
    refusal(path)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.hdr"])
def test_damaged_voxels_are_refused(tmp_path, name):
    path = tmp_path / name
    save(path, np.random.default_rng(0).integers(0, 99, SHAPE).astype("i2"), oblique(), packed=True)
    if name == "a.hdr":
        path.with_suffix(".img").write_bytes(b"short")
    else:
        content = bytearray(path.read_bytes())
        content[-12] ^= 16
        path.write_bytes(content)
    refusal(path)


def test_data_file_counts_for_content_and_may_not_lie_elsewhere(tmp_path):
    for n in range(3):
        image, label = volumes(n)
        save(tmp_path / f"d/images/c{n}.mhd", image, PLAIN)
        save(tmp_path / f"d/labels/c{n}.hdr", label, PLAIN)
    before = load_cases(tmp_path / "d", num_folds=2)
    keys = [ContentHashes(tmp_path).of_case(case) for case in before.cases]
    (tmp_path / "d/images/c0.raw").rename(tmp_path / "c0.raw")
    (tmp_path / "d/images/c0.raw").symlink_to(tmp_path / "c0.raw")
    raw = bytearray((tmp_path / "d/labels/c1.img").read_bytes())
    raw[5] ^= 1
    (tmp_path / "d/labels/c1.img").write_bytes(raw + b"0")
    after = load_cases(tmp_path / "d", num_folds=2)
    assert [(issue.case_id, issue.check) for issue in after.issues] == [("c0", "outside")]
    changed = [ContentHashes(tmp_path).of_case(case) != key
               for case, key in zip(before.cases, keys, strict=True)]  # fmt: skip
    assert changed == [False, True, False]
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("before", [b"Comment = ElementDataFile = ok.raw\n", b"\n" * (2**20 + 1)])
def test_header_names_no_data_file_elsewhere_by_another_line(tmp_path, before):
    (tmp_path / "a").mkdir()
    (tmp_path / "secret.raw").write_bytes(bytes(240))
    (tmp_path / "a/ok.raw").write_bytes(bytes(240))
    text = b"ObjectType = Image\nNDims = 3\nDimSize = 6 5 4\nElementType = MET_SHORT\n"
    path = tmp_path / "a/a.mhd"
    path.write_bytes(before + text + b"ElementDataFile = ../secret.raw\n")
    with pytest.raises(VolumeError, match="that is no file beside it"):
        read_header(str(path))
