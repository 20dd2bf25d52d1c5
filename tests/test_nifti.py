"""Headers and voxels as this project reads them, against nibabel's own reading."""

import gzip
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_series import write_series

from transforms.load import LoadVolumesd
from transforms.volumes import MAX_TRAILING_BYTES, VolumeError, read_header, read_voxels

SHAPE = (7, 6, 5)
AFFINE = np.array([[0, 1.5, 0, -3], [-1.0, 0, 0, 4], [0, 0, 2.5, 5], [0, 0, 0, 1]])


def voxels_of(dtype="f4", shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(20, 40, shape).clip(0, 120).astype(dtype)


def save(path, voxels, kind=nib.Nifti1Image, *, endian="<", scale=None):
    """Writes with nibabel; `scale` is stored as it is given, unseen by it."""
    image = kind(voxels, AFFINE, kind.header_class(endianness=endian))
    image.set_data_dtype(voxels.dtype)
    image.set_sform(AFFINE, code=1)
    if scale:
        image.header.set_slope_inter(*scale)
    nib.save(image, path)
    return str(path)


def read(path):
    return read_voxels(path, read_header(path))


def edited(folder, change, name="a.nii.gz", **header):
    """A right file with fields of its header set, unchecked, and its bytes changed."""
    raw = bytearray(nib.Nifti1Image(voxels_of(), AFFINE).to_bytes())
    block = np.frombuffer(bytes(raw[:348]), nib.Nifti1Header.template_dtype).copy()
    for field, value in header.items():
        block[0][field] = value
    raw[:348] = block.tobytes()
    path = folder / name
    content = gzip.compress(bytes(raw)) if name.endswith(".gz") else bytes(raw)
    path.write_bytes(change(content))
    return str(path)


def refusal(path):
    with pytest.raises(VolumeError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    before, after = f"expected a readable NIfTI file {Path(path).name}, got ", ". Replace the file."
    assert message.startswith(before)
    assert message.endswith(after)
    return message.removeprefix(before).removesuffix(after)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u8", "f4", "f8"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endian", ["<", ">"])
def test_volumes_are_read_as_nibabel_reads_them(tmp_path, dtype, kind, endian):
    for name in ("a.nii", "a.nii.gz"):
        path = save(tmp_path / name, voxels_of(dtype), kind, endian=endian)
        header, expected = read_header(path), nib.load(path)
        got = read_voxels(path, header)
        assert got.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(got, np.asanyarray(expected.dataobj))
        np.testing.assert_array_equal(header.affine, expected.affine)
        np.testing.assert_allclose(header.zooms_mm, (1, 1.5, 2.5), rtol=1e-6)
        assert (header.shape, header.is_oriented) == (SHAPE, True)
        content = Path(path).read_bytes()
        Path(path).unlink()
        np.testing.assert_array_equal(read_voxels(path, header, content), got)


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4"])
@pytest.mark.parametrize("scale", [(0.5, -1024), (-2, 0), (1, 3), (0.1, 0)])
def test_voxels_are_scaled_as_nibabel_scales(tmp_path, dtype, scale):
    path = save(tmp_path / "a.nii.gz", voxels_of(dtype), scale=scale)
    slope, intercept = (np.float64(np.float32(value)) for value in scale)
    stored = np.asanyarray(nib.load(path).dataobj.get_unscaled()).astype(np.float64)
    got = read(path)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, stored * slope + intercept, rtol=1e-14)
    np.testing.assert_allclose(got, nib.load(path).get_fdata(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("shape", [(*SHAPE, 3), (*SHAPE, 1), (*SHAPE, 1, 1, 1)])
def test_volume_is_read_without_trailing_axes_of_one_voxel(tmp_path, shape):
    path = save(tmp_path / "a.nii.gz", voxels_of(shape=shape))
    expected = nib.load(path).get_fdata()
    expected = expected if shape[3] == 3 else expected.reshape(SHAPE)
    np.testing.assert_array_equal(read(path), expected)
    loaded = LoadVolumesd("image")({"image": path})["image"].numpy()
    np.testing.assert_array_equal(loaded, expected.astype(np.float32))


def test_header_knows_whether_the_file_is_oriented(tmp_path):
    for sform, qform in ((0, 0), (1, 0), (0, 1), (2, 3)):
        path = edited(tmp_path, bytes, sform_code=sform, qform_code=qform)
        assert read_header(path).is_oriented == (sform + qform > 0)


def test_padding_after_the_voxels_is_allowed(tmp_path):
    padded = nib.Nifti1Image(voxels_of(), AFFINE).to_bytes() + bytes(MAX_TRAILING_BYTES)
    for path, write in ((tmp_path / "a.nii", bytes), (tmp_path / "a.nii.gz", gzip.compress)):
        path.write_bytes(write(padded))
        np.testing.assert_array_equal(read(str(path)), voxels_of())
        path.write_bytes(write(padded + b"\0"))
        assert "bytes after the last voxel" in refusal(str(path))


def test_dicom_series_is_read_as_it_is_loaded(tmp_path):
    stored = np.random.default_rng(0).integers(0, 999, (4, 5, 6))
    write_series(tmp_path / "a", stored, np.diag([1.0, 2.0, 3.0, 1.0]))
    path = str(tmp_path / "a")
    loaded = LoadVolumesd("image")({"image": path})["image"]
    affine = loaded.affine.numpy()
    np.testing.assert_array_equal(read(path), loaded)
    np.testing.assert_array_equal(read_header(path).affine, affine)
    np.testing.assert_allclose(read_header(path).zooms_mm, np.linalg.norm(affine[:3, :3], axis=0))


CHANGES = {
    "checksum": (lambda b: b[:-8] + bytes([b[-8] ^ 1]) + b[-7:], {}, "CRC check failed"),
    "cut off": (lambda b: b[: len(b) // 2], {}, "an end before that of its gzip stream"),
    "bytes after the stream": (lambda b: b + b"more", {}, "Not a gzipped file"),
    "no gzip": (gzip.decompress, {}, "Not a gzipped file"),
    "empty": (lambda b: b"", {}, "no NIfTI header"),
    "text": (lambda b: gzip.compress(b"words " * 200), {}, "no NIfTI header"),
    "voxels cut off": (lambda b: gzip.compress(gzip.decompress(b)[:-2]), {},
                       "an end before the last voxel"),
    "more than the file can hold": (bytes, {"dim": [3, 999, 999, 999, 1, 1, 1, 1]},
                                    "in a file that can hold"),
    "axis of no voxel": (bytes, {"dim": [3, 7, 0, 5, 1, 1, 1, 1]}, "a shape of (7, 0, 5)"),
    "offset of NaN": (bytes, {"vox_offset": np.nan}, "NaN"),
    "offset within the header": (bytes, {"vox_offset": 0}, "voxels from byte 0 on"),
    "complex voxels": (bytes, {"datatype": 32}, "voxels of type complex64"),
    "colours": (bytes, {"datatype": 128}, "voxels of type"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "header", "message"), CHANGES.values(), ids=CHANGES)
def test_volume_is_refused(tmp_path, change, header, message):
    assert message in refusal(edited(tmp_path, change, **header))


def test_volume_is_refused_when_it_is_missing_or_a_plain_file_is_cut_off(tmp_path):
    assert refusal(str(tmp_path / "a.nii.gz")) == "No such file or directory"
    path = edited(tmp_path, lambda b: b[:-1], name="a.nii")
    assert "in a file that can hold" in refusal(path)


def test_little_memory_is_taken_by_a_small_file_that_claims_much(tmp_path):
    """64 MB of zeros in 65 kB, behind a header that claims 210 voxels or 2 billion."""

    def with_zeros(content):
        return gzip.compress(gzip.decompress(content) + bytes(2**26))

    for shape in ([3, 7, 6, 5, 1, 1, 1, 1], [3, 2047, 1024, 1023, 1, 1, 1, 1]):
        path = edited(tmp_path, with_zeros, dim=shape)
        tracemalloc.start()
        refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20
