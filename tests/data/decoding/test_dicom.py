"""DICOM: files that pydicom brings and files made here, against the standard's formulas."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image, UnidentifiedImageError
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from imgcls.data.decoding.open_image import decode_preview
from imgcls.errors import ImageError, ImageTooLarge, TruncatedImage, UnsupportedImage
from tests.data.samples import Array, gray3

pytestmark = pytest.mark.filterwarnings("ignore:::pydicom")

FILES = Path(os.path.dirname(pydicom.__file__)) / "data" / "test_files"
X = np.arange(256, dtype=np.uint16).reshape(1, 256).repeat(4, 0)


def _decode(data: bytes, side: int = 1000) -> Array:
    return np.asarray(decode_preview(data, side).image)


def _read(name: str) -> bytes:
    return (FILES / name).read_bytes()


def _write(pixels: Array, photometric: str = "MONOCHROME2", **elements: Any) -> bytes:
    """An uncompressed DICOM file of (H, W) or (H, W, 3) samples, with further elements."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, UID("1.2.3")
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset["PixelData"] = pydicom.DataElement(
        0x7FE00010, "OB" if pixels.dtype.itemsize == 1 else "OW", pixels.tobytes()
    )
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("LINEAR", ((X - (100 - 0.5)) / (50 - 1) + 0.5)),
        ("LINEAR_EXACT", (X - 100.0) / 50 + 0.5),
        ("SIGMOID", 1 / (1 + np.exp(-4 * (X - 100.0) / 50))),
    ],
)
def test_the_window_is_mapped_from_black_to_white(function: str, expected: Array) -> None:
    data = _write(X, WindowCenter=[100, 20], WindowWidth=[50, 5], VOILUTFunction=function)
    assert (_decode(data) == gray3(np.round(expected.clip(0, 1) * 255))).all()


def test_the_window_is_of_rescaled_values() -> None:
    values = (X.astype(np.int16) - 128) * 10  # as in a CT, -1280 to 1270
    data = _write(
        values, RescaleSlope=0.5, RescaleIntercept=-100, WindowCenter=-100, WindowWidth=256
    )
    share = ((values * 0.5 - 100) - (-100 - 0.5)) / 255 + 0.5
    assert (_decode(data) == gray3(np.round(share.clip(0, 1) * 255))).all()


def test_without_a_window_all_stored_bits_are_the_range() -> None:
    data = _write(X * 16, BitsStored=12, HighBit=11)
    assert (_decode(data) == gray3(np.round(X * 16 / 4095 * 255))).all()
    inverted = _write(X.astype(np.uint8), "MONOCHROME1")
    assert (_decode(inverted) == gray3(255 - X)).all()


def test_colors_are_kept() -> None:
    rgb = np.dstack([X, 255 - X, X // 2]).astype(np.uint8)
    assert (_decode(_write(rgb, "RGB")) == rgb).all()


def test_a_palette_is_applied() -> None:
    dataset = pydicom.dcmread(FILES / "examples_palette.dcm")
    colors = apply_color_lut(pixel_array(dataset), dataset)
    top = 2 ** (8 * colors.dtype.itemsize) - 1
    assert (_decode(_read("examples_palette.dcm")) == np.round(colors / top * 255)).all()


@pytest.mark.parametrize(
    "name",
    [
        "MR_small_RLE", "MR_small_bigendian", "MR_small_expb", "MR_small_implicit",
        "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless", "MR_small_padded",
    ],
)  # fmt: skip
def test_each_lossless_encoding_of_an_image_gives_the_same_pixels(name: str) -> None:
    values = pixel_array(pydicom.dcmread(FILES / "MR_small.dcm")).astype(float)
    expected = gray3(np.round(((values - 599.5) / 1599 + 0.5).clip(0, 1) * 255))
    assert (_decode(_read("MR_small.dcm")) == expected).all()
    assert (_decode(_read(f"{name}.dcm")) == expected).all()


def test_lossless_jpeg_is_decoded() -> None:
    expected = pixel_array(pydicom.dcmread(FILES / "SC_rgb_rle.dcm"))
    assert (_decode(_read("SC_rgb_rle.dcm")) == expected).all()
    assert np.abs(_decode(_read("SC_rgb_jpeg_gdcm.dcm")).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    "name", ["SC_rgb_dcmtk_+eb+cy+np", "SC_rgb_jpeg_dcmtk", "SC_rgb_dcmtk_+eb+cr"]
)
def test_lossy_jpeg_is_decoded_in_its_color_space(name: str) -> None:
    expected = pixel_array(pydicom.dcmread(FILES / "SC_rgb_rle.dcm")).astype(int)
    apart = np.abs(_decode(_read(f"{name}.dcm")).astype(int) - expected)
    assert apart.mean() < 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SC_rgb_rle_2frame", "a DICOM series of 2 frames; export one of them"),
        ("CT_small", "without a window: the values of black and white"),
        ("rtdose_1frame", "samples of 32 bits"),
        ("rtplan", r"without integer pixels \(modality RTPLAN\)"),
        ("JPGExtended", "12-bit JPEG is not supported"),
        ("image_dfl", "deflated data, of unlimited size"),
    ],
)
def test_what_has_no_certain_pixels_is_unsupported(name: str, message: str) -> None:
    with pytest.raises(UnsupportedImage, match=message):
        _decode(_read(f"{name}.dcm"))


@pytest.mark.parametrize(
    "name",
    [
        "MR_small", "MR_small_RLE", "MR_small_bigendian", "MR_small_jp2klossless",
        "MR_small_jpeg_ls_lossless", "SC_rgb_jpeg", "SC_rgb_jpeg_gdcm", "SC_rgb_small_odd",
        "ExplVR_BigEnd", "SC_ybr_full_422_uncompressed",
    ],
)  # fmt: skip
def test_a_truncated_file_is_an_error_or_has_all_its_pixels(name: str) -> None:
    data = _read(f"{name}.dcm")
    whole = _decode(data)
    kept = 0
    for size in {*range(132, len(data), len(data) // 40), *range(len(data) - 12, len(data))}:
        try:
            found = _decode(data[:size])
        except (ImageError, TruncatedImage):
            continue
        assert (found == whole).all()  # only padding or the end marker is missing
        kept += 1
    assert kept < 20
    with pytest.raises(TruncatedImage, match="truncated"):
        _decode(data[: len(data) * 3 // 5])


def test_pixels_are_limited_before_they_are_decoded() -> None:
    with pytest.raises(ImageTooLarge, match="512x512 is 262,144 pixels"):
        decode_preview(_read("693_J2KI.dcm"), 64, max_pixels=1000)


def test_a_picture_of_another_size_than_the_header_states_is_damaged() -> None:
    dataset = pydicom.dcmread(FILES / "MR_small_jpeg_ls_lossless.dcm")
    dataset.Rows = 32
    stream = io.BytesIO()
    dataset.save_as(stream)
    with pytest.raises(ImageError, match=r"a picture of \(64, 64\) in one of \(64, 32\)"):
        _decode(stream.getvalue())


def test_other_files_are_opened_by_pillow_as_before(tmp_path: Path) -> None:
    _decode(_read("MR_small.dcm"))  # registers the format
    (tmp_path / "x").write_bytes(bytes(1000))
    with pytest.raises(UnidentifiedImageError):
        Image.open(tmp_path / "x")
