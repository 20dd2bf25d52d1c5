import locale
import logging
import tracemalloc

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
from dicom_series import new_file, set_pixels, write_enhanced, write_series
from monai.transforms import LoadImaged
from pydicom import uid
from pydicom.pixels import get_decoder
from scipy.spatial.transform import Rotation

from transforms import dicom
from transforms.dicom import (
    DicomError,
    find_series,
    is_dicom,
    read_geometry,
    read_series,
    read_slices,
)
from transforms.load import LoadVolumesd

# RAS directions of a row, of a column and from slice to slice
AXIAL = [(-1, 0, 0), (0, -1, 0), (0, 0, 1)]  # head first, supine: a row runs to the left
SAGITTAL = [(0, -1, 0), (0, 0, -1), (1, 0, 0)]
SPACING = (0.7, 0.9, 2.5)


def affine_of(axes=AXIAL, degrees=None):
    matrix = np.array(axes, float).T
    if degrees is not None:
        matrix = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() @ matrix
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix * SPACING, (10, -20, 30)
    return affine


@pytest.fixture
def stored():
    return np.random.default_rng(0).integers(-900, 1000, (6, 5, 7))


@pytest.mark.parametrize("degrees", [None, (10, 20, -15)], ids=["straight", "oblique"])
@pytest.mark.parametrize("axes", [AXIAL, SAGITTAL], ids=["axial", "sagittal"])
def test_read_series_gives_voxels_and_affine_that_were_written(tmp_path, stored, axes, degrees):
    affine = affine_of(axes, degrees)
    write_series(tmp_path, stored, affine, slope=0.5, intercept=-1024)
    voxels, got = read_series(tmp_path)
    assert voxels.dtype == np.float32
    np.testing.assert_array_equal(voxels, stored * 0.5 - 1024)
    np.testing.assert_allclose(got, affine, atol=1e-5)


def test_read_series_sorts_along_the_normal_when_written_against_it(tmp_path, stored):
    affine = affine_of()
    affine[:3, 2] *= -1  # slices numbered from head to feet
    write_series(tmp_path, stored, affine)
    voxels, got = read_series(tmp_path)
    np.testing.assert_array_equal(voxels, stored[:, :, ::-1])
    last = affine @ [0, 0, stored.shape[2] - 1, 1]
    np.testing.assert_allclose(got @ [0, 0, 0, 1], last, atol=1e-5)


def test_read_series_rescales_each_slice_by_its_own_slope(tmp_path, stored):
    def change(one, k):
        one.RescaleSlope = 0.25 * (k + 1)

    write_series(tmp_path, stored, affine_of(), intercept=3, change=change)
    np.testing.assert_array_equal(read_series(tmp_path)[0], stored * np.arange(0.25, 2, 0.25) + 3)


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEGLSLossless", "JPEG2000Lossless"])
def test_read_series_decodes_compressed_slices(tmp_path, stored, syntax):
    def change(one, k):
        one.compress(getattr(uid, syntax), generate_instance_uid=False)

    stored = np.tile(stored, (6, 7, 1))  # JPEG 2000 takes no small images
    write_series(tmp_path, stored, affine_of(), change=change)
    np.testing.assert_array_equal(read_series(tmp_path)[0], stored)


@pytest.fixture
def kept_locale():
    """The JPEG codec of SimpleITK leaves the process in the locale C, with ASCII for files."""
    kept = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, kept)


@pytest.mark.usefixtures("kept_locale")
def test_read_series_agrees_with_simpleitk_on_lossless_jpeg(tmp_path, stored):
    write_series(tmp_path, stored, affine_of(degrees=(10, 20, -15)))
    writer = SimpleITK.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG")
    for file in map(str, tmp_path.iterdir()):
        writer.SetFileName(file)
        writer.Execute(SimpleITK.ReadImage(file))
        assert pydicom.dcmread(file).file_meta.TransferSyntaxUID == uid.JPEGLosslessSV1
    voxels, affine = read_series(tmp_path)
    np.testing.assert_array_equal(voxels, stored)
    want = SimpleITK.ReadImage(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path)))
    np.testing.assert_array_equal(voxels, SimpleITK.GetArrayFromImage(want).T)
    for index in ((0, 0, 0), (5, 1, 3), (2, 4, 6)):
        x, y, z = want.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(affine @ [*index, 1], [-x, -y, z, 1], atol=1e-4)


def test_read_series_names_the_extra_when_a_decoder_is_not_installed(tmp_path, stored, monkeypatch):
    def change(one, k):
        one.compress(uid.JPEGLSLossless, generate_instance_uid=False)

    write_series(tmp_path, stored, affine_of(), change=change)
    monkeypatch.setattr(get_decoder(uid.JPEGLSLossless), "_available", {})
    with pytest.raises(DicomError, match=r'Install the extra: pip install "ampseg\[dicom\]"\.$'):
        read_series(tmp_path)


def test_read_series_names_the_file_when_a_decoder_panics(tmp_path, stored, monkeypatch):
    class PanicException(BaseException):  # as of decoders in Rust
        pass

    def panic(*args, **kwargs):
        raise PanicException("index out of bounds")

    write_series(tmp_path, stored, affine_of())
    monkeypatch.setattr(dicom, "pixel_array", panic)
    with pytest.raises(DicomError, match=r"in IM000\d, got: index out of bounds\. Replace"):
        read_series(tmp_path)


def test_read_series_orders_slices_by_place_when_each_has_a_series_of_its_own(tmp_path, stored):
    def change(one, k):
        one.SeriesInstanceUID = uid.generate_uid()

    write_series(tmp_path, stored, affine_of(), change=change)
    voxels, affine = read_series(tmp_path)
    np.testing.assert_array_equal(voxels, stored)
    np.testing.assert_allclose(affine, affine_of(), atol=1e-5)


@pytest.mark.parametrize("syntax", ["ImplicitVRLittleEndian", "ExplicitVRLittleEndian"])
def test_read_series_reads_files_without_preamble(tmp_path, stored, syntax):
    def change(one, k):
        one.file_meta.TransferSyntaxUID = getattr(uid, syntax)

    write_series(tmp_path, stored, affine_of(), bare=True, change=change)
    assert (tmp_path / "IM0000").read_bytes()[:2] == b"\x08\0"
    np.testing.assert_array_equal(read_series(tmp_path)[0], stored)


@pytest.mark.parametrize(
    "content",
    [
        nib.Nifti1Image(np.zeros((9, 9, 9)), np.eye(4)).to_bytes(),
        nib.Nifti2Image(np.zeros((9, 9, 9)), np.eye(4)).to_bytes(),
        b"The UID 1.2.840.10008.1.2 is that of a transfer syntax.",
        b"\x08\0\x05\0" + bytes(range(256)) * 3,
        b"",
    ],
    ids=["nifti", "nifti 2", "text", "bytes", "empty"],
)
def test_is_dicom_is_false_of_other_files(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert not is_dicom(tmp_path / "a")


# ---- several series in a folder, and other files


def two_series(folder, stored):
    """Of seven and four slices, in one folder."""
    write_series(folder, stored, affine_of(), prefix="A", number=3)
    other = affine_of(SAGITTAL)
    return write_series(folder, stored[:, :, :4] + 9, other, prefix="B", number=4), other


def test_read_series_reads_the_series_of_a_file(tmp_path, stored):
    _, other = two_series(tmp_path, stored)
    np.testing.assert_array_equal(read_series(tmp_path / "A0003")[0], stored)
    voxels, affine = read_series(tmp_path / "B0001")
    np.testing.assert_array_equal(voxels, stored[:, :, :4] + 9)
    np.testing.assert_allclose(affine, other, atol=1e-5)
    shape, affine = read_geometry(tmp_path / "B0002")
    assert shape == (6, 5, 4)
    np.testing.assert_allclose(affine, other, atol=1e-5)


def test_read_series_names_the_series_of_a_folder_that_has_several(tmp_path, stored):
    two_series(tmp_path, stored)
    expected = r"got 2, which begin with A0000 \(7 slices\), B0000 \(4 slices\)\. Name such a file"
    with pytest.raises(DicomError, match=expected):
        read_series(tmp_path)


def other_kind(file, modality, sop_class):
    new_file(sop_class, uid.generate_uid(), 9, modality).save_as(file, enforce_file_format=True)


KINDS = {
    "SR": uid.EnhancedSRStorage,
    "PR": uid.GrayscaleSoftcopyPresentationStateStorage,
    "KO": uid.KeyObjectSelectionDocumentStorage,
    "SEG": uid.SegmentationStorage,
    "RTSTRUCT": uid.RTStructureSetStorage,
}


def test_read_series_leaves_out_and_logs_what_is_no_image_of_a_volume(tmp_path, stored, caplog):
    write_series(tmp_path, stored, affine_of())
    for modality, sop_class in KINDS.items():
        other_kind(tmp_path / modality, modality, sop_class)
    scout = new_file(uid.CTImageStorage, uid.generate_uid())
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    screen = new_file(uid.SecondaryCaptureImageStorage, uid.generate_uid())
    index = new_file(uid.MediaStorageDirectoryStorage, None, None, "INDEX")
    for one in scout, screen, index:
        set_pixels(one, stored[:, :, 0])
        one.save_as(tmp_path / one.SOPInstanceUID, enforce_file_format=True)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(read_series(tmp_path)[0], stored)
        read_geometry(tmp_path)  # says it no more
    told = sorted(line.rpartition(", ")[2] for line in caplog.messages)
    kinds = sorted([*KINDS, "LOCALIZER", "secondary capture", "INDEX"])
    assert told == [f"1 of {kind}" for kind in kinds]


@pytest.mark.parametrize("kind", KINDS)
def test_read_series_says_what_a_folder_without_images_has(tmp_path, kind):
    other_kind(tmp_path / "a.dcm", kind, KINDS[kind])
    remedy = "Convert its contours with plastimatch" if kind == "RTSTRUCT" else "Check the path"
    for path in tmp_path, tmp_path / "a.dcm":
        with pytest.raises(DicomError, match=rf"series of images in .*, got {kind}\. {remedy}\.$"):
            read_series(path)


# ---- enhanced multi-frame


@pytest.mark.parametrize("slopes", [(), np.arange(0.25, 2, 0.25)], ids=["stored", "per frame"])
def test_read_series_orders_the_frames_of_an_enhanced_file(tmp_path, stored, slopes):
    affine = affine_of(SAGITTAL, (10, 20, -15))
    file = write_enhanced(tmp_path / "a" / "b", stored, affine, slopes=list(slopes))
    for path in file, file.parent:
        voxels, got = read_series(path)
        np.testing.assert_array_equal(voxels, stored * slopes - 5 if len(slopes) else stored)
        np.testing.assert_allclose(got, affine, atol=1e-5)
        assert read_geometry(path)[0] == stored.shape


def two_stacks(groups, k):
    groups.FrameContentSequence[0].StackID = str(1 + k // 4)


def two_times(groups, k):
    groups.PlanePositionSequence[0].ImagePositionPatient = [0, 0, k % 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [(two_stacks, "one stack of slices, got 2"), (two_times, "got two at one (a series over time")],
)
def test_read_series_refuses_stacks_and_times_of_an_enhanced_file(
    tmp_path, stored, change, message
):
    write_enhanced(tmp_path / "a", stored, affine_of(), change=change)
    with pytest.raises(DicomError, match=r"to NIfTI with dcm2niix\.$") as caught:
        read_series(tmp_path)
    assert message in str(caught.value)


def test_read_slices_gives_datasets_in_the_order_of_the_volume(tmp_path, stored):
    def change(one, k):
        one.AcquisitionNumber = k

    found, _, _ = read_slices(write_series(tmp_path / "a", stored, affine_of(), change=change))
    assert [one.AcquisitionNumber for one in found] == list(range(7))
    assert all("PixelData" not in one and one.file_meta.TransferSyntaxUID for one in found)
    (one,), _, _ = read_slices(write_enhanced(tmp_path / "b", stored, affine_of()))
    assert one.NumberOfFrames == 7


# ---- deflated


def write_deflated(folder, num_bytes):
    """Three slices, with pixels of as many bytes as they say or more."""

    def change(one, k):
        one.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
        one.PixelData = one.PixelData.ljust(num_bytes, b"\0")

    stored = np.random.default_rng(0).integers(-900, 1000, (6, 5, 3))
    write_series(folder, stored, affine_of(), change=change)
    return stored


def test_read_series_reads_deflated_slices(tmp_path):
    stored = write_deflated(tmp_path, 0)
    np.testing.assert_array_equal(read_series(tmp_path)[0], stored)


def test_read_series_weighs_a_deflated_slice_before_it_inflates_it(tmp_path):
    write_deflated(tmp_path, 40_000_000)
    assert (tmp_path / "IM0000").stat().st_size < 50_000
    tracemalloc.start()
    try:
        for read in read_geometry, read_series:
            with pytest.raises(
                DicomError, match=r"expected \d+ bytes at most in IM000\d once infl"
            ):
                read(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("names", [("InstanceNumber",), ("RescaleSlope", "RescaleIntercept")])
def test_read_series_does_without_what_it_does_not_need(tmp_path, stored, names):
    def change(one, k):
        for name in names:
            delattr(one, name)

    write_series(tmp_path, stored, affine_of(), change=change)
    np.testing.assert_array_equal(read_series(tmp_path)[0], stored)


def test_read_series_passes_over_hidden_files_and_dicomdir(tmp_path, stored):
    write_series(tmp_path, stored, affine_of())
    (tmp_path / "._IM0000").write_bytes(b"of macOS")
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    np.testing.assert_array_equal(read_series(tmp_path)[0], stored)


def test_read_series_bears_positions_rounded_to_a_tenth(tmp_path, stored):
    def change(one, k):
        one.ImagePositionPatient = [round(float(x), 1) for x in one.ImagePositionPatient]

    affine = affine_of()
    affine[:3, 2] = (0, 0, 0.625)
    write_series(tmp_path, stored, affine, change=change)
    assert read_series(tmp_path)[1][2, 2] == pytest.approx(0.625, abs=0.02)


def other_series(one, k):
    if k == 3:
        one.SeriesInstanceUID = uid.generate_uid()


def other_orientation(one, k):
    if k == 3:
        one.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]


def skewed(one, k):
    one.ImageOrientationPatient = [1, 0, 0, 0.6, 0.8, 0]


def other_spacing(one, k):
    if k == 3:
        one.PixelSpacing = [1, 1]


def other_shape(one, k):
    if k == 3:
        one.Rows, one.Columns = one.Columns, one.Rows


def same_place(one, k):
    if k == 3:
        one.ImagePositionPatient = [-10, 20, 30]


def uneven(one, k):
    x, y, z = one.ImagePositionPatient
    one.ImagePositionPatient = [x, y, float(z) + 0.2 * k**2]


def tilted(one, k):
    x, y, z = one.ImagePositionPatient
    one.ImagePositionPatient = [x, float(y) + 0.8 * k, z]


def frames(one, k):
    one.NumberOfFrames = 2


def colours(one, k):
    one.SamplesPerPixel = 3


def no_position(one, k):
    if k == 3:
        del one.ImagePositionPatient


def compressed(one, k):
    one.file_meta.TransferSyntaxUID = uid.JPEG2000
    one.PixelData = b"\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    one["PixelData"].is_undefined_length = True


def cut_off(one, k):
    one.PixelData = one.PixelData[:-20]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_series,
            r"expected one DICOM series in .*, got 2, which begin with IM000\d \([16] slices",
        ),
        (other_orientation, r"expected slices of one ImageOrientationPatient, got several"),
        (skewed, r"expected rows at right angles to columns"),
        (other_spacing, r"expected slices of one PixelSpacing, got several"),
        (other_shape, r"expected slices of one Rows, got several"),
        (same_place, r"expected slices at different places, got two at one .* with dcm2niix"),
        (uneven, r"expected slices at even distances, got 2\.700 to 4\.700 mm .* dcm2niix"),
        (tilted, r"got a shift of 4\.800 mm \(a tilted gantry\).* dcm2niix"),
        (
            frames,
            r"expected one slice in IM000\d, or .*, got 2 frames, of which 1 are.* with dcm2niix",
        ),
        (colours, r"expected grey values .* got colours"),
        (no_position, r"expected ImagePositionPatient in IM000\d, got none"),
        (compressed, r"expected pixels that can be decoded in IM000\d, got: "),
        (cut_off, r"expected pixels that can be decoded in IM000\d, got: "),
    ],
)
def test_read_series_refuses_in_one_line(tmp_path, stored, change, message):
    write_series(tmp_path, stored, affine_of(), change=change)
    with pytest.raises(DicomError, match=message) as caught:
        read_series(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("missing", [1, 3, 5])
def test_read_series_refuses_a_missing_slice(tmp_path, stored, missing):
    write_series(tmp_path, stored, affine_of(degrees=(10, 20, -15)), without=[missing])
    with pytest.raises(DicomError, match=r"even distances, got 2\.500 to 5\.000 mm"):
        read_series(tmp_path)


def test_read_series_refuses_a_file_that_is_no_dicom_file(tmp_path, stored):
    write_series(tmp_path, stored, affine_of())
    (tmp_path / "IM0003").write_bytes(b"damaged")
    with pytest.raises(DicomError, match=r"nothing but whole DICOM files in .*, got IM0003\."):
        read_series(tmp_path)


def test_read_series_refuses_a_single_slice(tmp_path, stored):
    write_series(tmp_path, stored[:, :, :1], affine_of())
    with pytest.raises(DicomError, match="expected two DICOM slices or more"):
        read_series(tmp_path)


# ---- volumes


def save(path, voxels, affine):
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return str(path)


def read_volume(source):
    loaded = LoadVolumesd("image")({"image": source})["image"]
    return loaded.numpy(), loaded.affine.numpy()


def test_load_volumes_reads_nifti_and_dicom_alike(tmp_path, stored):
    affine = affine_of(degrees=(10, 20, -15))
    file = save(tmp_path / "a.nii.gz", stored.astype(np.int16), affine)
    folder = write_series(tmp_path / "a", stored, affine)
    for source in (file, str(folder), folder):
        voxels, got = read_volume(source)
        np.testing.assert_array_equal(voxels, stored)
        np.testing.assert_allclose(got, affine, atol=1e-5)


def test_load_volumes_puts_channels_first(tmp_path, stored):
    affine = affine_of()
    file = save(tmp_path / "a.nii.gz", stored.astype(np.int16), affine)
    folder = write_series(tmp_path / "a", stored + 1, affine)
    voxels, got = read_volume([file, str(folder)])
    np.testing.assert_array_equal(voxels, np.stack([stored, stored + 1]))
    np.testing.assert_allclose(got, affine, atol=1e-5)


@pytest.mark.parametrize("name", ["a.mgz", "a.npy", "a.pkl", "a"])
def test_volumes_refuse_what_is_no_nifti_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"^expected a DICOM series or .*, got {name}\. C"):
        read_volume(tmp_path / name)


def test_volumes_have_the_affine_that_nibabel_gives_them_when_header_fields_disagree(
    tmp_path, stored
):
    """MONAI would take the qform, which where its code is 0 is no more than the voxel size."""
    file = nib.Nifti1Image(stored.astype(np.int16), None)
    file.set_sform(np.diag([2, 2, 2, 1]), code=1)
    file.set_qform(affine_of(), code=1)  # and with it the voxel size
    nib.save(file, tmp_path / "a.nii")
    got = LoadVolumesd("image")({"image": str(tmp_path / "a.nii")})["image"].affine
    np.testing.assert_array_equal(got, np.diag([2, 2, 2, 1]))


@pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<f4", "<f8"])
def test_load_volumes_loads_nifti_as_monai_does(tmp_path, stored, channels, dtype):
    affine, paths = affine_of(degrees=(10, 20, -15)), []
    for n in range(channels):
        header = nib.Nifti1Header(endianness=dtype[0])
        header.set_data_dtype(dtype)
        paths.append(str(tmp_path / f"{n}.nii.gz"))
        nib.save(nib.Nifti1Image((stored + n).astype(dtype), affine, header), paths[-1])
        assert nib.load(paths[-1]).header.endianness == dtype[0]
    for case in ({"image": paths}, {"image": paths[0]}):
        want, got = (load(case)["image"] for load in (LoadImaged("image"), LoadVolumesd("image")))
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
        torch.testing.assert_close(got.as_tensor(), want.as_tensor(), rtol=0, atol=0)
        assert got.meta.keys() == want.meta.keys()
        for key, value in want.meta.items():
            most = 1 if "pixdim" in key else 0  # computed from the affine, in float32
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                np.testing.assert_array_max_ulp(got.meta[key], value, most)
            else:
                np.testing.assert_array_equal(got.meta[key], value)


def test_series_in_several_folders_is_told(tmp_path, stored, caplog):
    write_series(tmp_path / "a", stored, affine_of())
    (tmp_path / "b").mkdir()
    for path in sorted((tmp_path / "a").iterdir())[:2]:  # as an export of many files is divided
        path.rename(tmp_path / "b" / path.name)
    with caplog.at_level(logging.WARNING):
        assert len(find_series(tmp_path)) == 2
    assert "one DICOM series lies in several folders, a, b; each is one case" in caplog.text
