"""Endings of volume files, and NRRD and MetaImage files, which SimpleITK reads.

Some headers name another file for their voxels. It has to lie beside the header, so that a file
from elsewhere can make nobody read what lies outside its folder.
"""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMATS = {
    ".nii.gz": "NIfTI", ".nii": "NIfTI", ".hdr": "NIfTI or Analyze", ".seg.nrrd": "NRRD",
    ".nrrd": "NRRD", ".nhdr": "NRRD", ".mha": "MetaImage", ".mhd": "MetaImage",
}  # fmt: skip
READERS = {"NRRD": "NrrdImageIO", "MetaImage": "MetaImageIO"}
MAX_HEADER_BYTES = 2**20
MAX_INFLATION = 1032  # bytes that DEFLATE can make of one
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
PIECE_BYTES = 2**14  # of a compressed file


class TextHeader(NamedTuple):
    """The facts that the text of an NRRD or MetaImage header states about where its voxels are."""

    data_file: str  # the name of the file that holds the voxels, or empty: the header's own
    num_bytes: int  # of the header
    encoding: str  # raw, compressed or text
    is_oriented: bool


def find_ending(path: str | Path) -> str:
    """Return the ending of a volume's file name in small letters; it is empty for other files."""
    name = Path(path).name.lower()
    return next((ending for ending in FORMATS if name.endswith(ending)), "")


def list_files(path: str | Path) -> list[Path]:
    """Return the file of a volume and, if the voxels are in another file beside it, that one."""
    path, other = Path(path), None
    kind = FORMATS.get(find_ending(path))
    if find_ending(path) == ".hdr":
        images = [path.with_suffix(ending) for ending in (".img", ".IMG")]
        other = next((image for image in images if image.is_file()), images[0])
    elif kind in READERS and path.is_file():
        name = read_text(path).data_file
        other = path.with_name(name) if name and _is_plain(name) else None
    return [path, other] if other and other.is_file() else [path]


def _is_plain(name: str) -> bool:
    """Return whether a header's text is the name of one file beside it."""
    is_list = name.upper().startswith("LIST") or "%" in name  # names, or a pattern of names
    return not is_list and name == os.path.basename(name) and "\\" not in name and name[:1] != "."


def read_text(path: Path) -> TextHeader:
    """Read what SimpleITK does not tell about the header of an NRRD or MetaImage file."""
    with open(path, "rb") as file:
        text = file.read(MAX_HEADER_BYTES)
    if is_nrrd := FORMATS[find_ending(path)] == "NRRD":
        end = re.search(rb"\r?\n\r?\n", text)
        # after the header too, where its end is a matter of opinion
        names = re.findall(rb"(?i)[\r\n][ \t]*data ?file:([^\r\n]*)", text)
        found = re.search(rb"(?i)[\r\n]encoding:[ \t]*(\w+)", text)
        encodings = {b"raw": "raw", b"gzip": "compressed", b"gz": "compressed"}
        encoding = encodings.get(found[1].lower() if found else b"", "text")
        is_oriented = bool(re.search(rb"(?i)[\r\n]space:[ \t]*(left|right|[lr][ap]s)", text))
    else:
        end = re.search(rb"(?:^|[\r\n])[ \t]*ElementDataFile([^\r\n]*)(\r?\n|$)", text)
        names = [end[1].strip(b" \t=:")] if end else []
        names = [name for name in names if name.upper() != b"LOCAL"]  # in the file itself
        facts = text[: end.start() if end else 0]
        is_packed = re.search(rb"CompressedData\s*[=:]\s*[Tt1]", facts)
        is_text = re.search(rb"BinaryData\s*[=:]\s*[Ff0]", facts)
        encoding = "compressed" if is_packed else "text" if is_text else "raw"
        is_oriented = b"TransformMatrix" in facts or b"Orientation" in facts
    if end is None and (len(text) == MAX_HEADER_BYTES or not is_nrrd):
        names = [b"that is not named in the header"]
    data_file = b" and ".join(name.strip() for name in names).decode("utf-8", "replace")
    return TextHeader(data_file, end.end() if end else len(text), encoding, is_oriented)


def read_itk_header(path: Path) -> tuple[tuple[int, ...], np.ndarray, np.dtype, bool]:
    """Read the header of an NRRD or MetaImage file, without room for voxels.

    Returns:
        Shape, the first axis fastest and components last; affine `(4, 4)` to RAS mm; type of the
        voxels; whether the file states an orientation.

    Raises:
        ValueError: If it names a file elsewhere, is not valid, or claims more voxels than its file
            can hold.
    """
    import SimpleITK

    text, files = read_text(path), list_files(path)
    if text.data_file and len(files) == 1:
        raise ValueError(f"a data file {text.data_file!r} that is no file beside it")
    reader = _make_reader(path)
    _run(reader.ReadImageInformation)
    num_axes, channels = reader.GetDimension(), reader.GetNumberOfComponents()
    voxel = SimpleITK.Image([1] * num_axes, reader.GetPixelID(), channels)
    dtype = SimpleITK.GetArrayViewFromImage(voxel).dtype
    shape = (*map(int, reader.GetSize()), *([channels] if channels > 1 else []))
    directions = np.reshape(reader.GetDirection(), (num_axes, num_axes)) * reader.GetSpacing()
    affine, n = np.eye(4), min(num_axes, 3)
    affine[:n, :n], affine[:n, 3] = directions[:n, :n], reader.GetOrigin()[:n]
    most = os.path.getsize(files[-1]) - (0 if text.data_file else text.num_bytes)
    most *= 1 if text.encoding == "raw" else MAX_INFLATION
    claim = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if claim > most:
        got = f"a header that claims {claim} bytes of voxels, in a file that can hold {most}"
        raise ValueError(f"{got} at most")
    return shape, LPS_TO_RAS @ affine, dtype, text.is_oriented


def read_itk_voxels(path: Path, num_bytes: int) -> np.ndarray:
    """Read the voxels of a file whose header is valid and claims `num_bytes` of them."""
    import SimpleITK

    if FORMATS[find_ending(path)] == "MetaImage" and read_text(path).encoding == "compressed":
        _require_whole(path, num_bytes)
    image = _run(_make_reader(path).Execute)
    voxels = SimpleITK.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        voxels = np.moveaxis(voxels, -1, 0)
    return np.asfortranarray(voxels.T)


def _require_whole(path: Path, num_bytes: int) -> None:
    """Inflate the voxels of a MetaImage file: SimpleITK returns what it gets of a damaged one."""
    text, inflater, count = read_text(path), zlib.decompressobj(47), 0  # zlib or gzip
    with open(list_files(path)[-1], "rb") as file:
        file.seek(0 if text.data_file else text.num_bytes)
        while count <= num_bytes and not inflater.eof and (piece := file.read(PIECE_BYTES)):
            count += len(inflater.decompress(piece))
    if not inflater.eof or count != num_bytes:
        raise ValueError(f"{count} bytes of voxels instead of {num_bytes}")


def _make_reader(path: Path) -> Any:
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # ITK writes to stderr by itself
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(READERS[FORMATS[find_ending(path)]])
    return reader


def _run(call: Any) -> Any:
    try:
        return call()
    except RuntimeError as error:  # several lines, the cause in the last
        said = re.sub(r"\s*Reason: Success\s*$", "", str(error))
        said = re.sub(r"ITK ERROR: \w+\(0x\w+\): ", "", said)
        lines = said.strip().splitlines() or [""]
        raise ValueError(lines[-1].removeprefix("[nrrd] ").strip()) from error
