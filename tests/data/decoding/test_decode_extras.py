"""HEIC, JPEG XL and AVIF: pixels, orientation and limits, and the error without their extra."""

from __future__ import annotations

import struct
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcls.data.decoding.decode import decode_image
from imgcls.data.decoding.image_headers import read_jpeg_xl_header
from imgcls.data.decoding.open_image import decode_preview
from imgcls.errors import ImageError, UnsupportedImage
from tests.data.pictures import STORED, difference, drawn, encoded
from tests.data.samples import RGB, SPEC, away

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")


def _extra(format: str, image: Image.Image, **options: Any) -> bytes:
    if format == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    elif format == "JXL":
        pytest.importorskip("pillow_jxl")
    return encoded(image, format, **options)


@pytest.mark.parametrize(
    ("format", "options", "bound"),
    [("HEIF", {"quality": -1, "chroma": 444}, 3), ("JXL", {"lossless": True}, 0)],
)
def test_heic_and_jpeg_xl_are_decoded_with_the_extra(
    format: str, options: dict[str, Any], bound: int
) -> None:
    assert away(_extra(format, Image.fromarray(RGB), **options), RGB) <= bound


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}), ("JXL", {"lossless": True}),
        ("HEIF", {"quality": -1, "chroma": 444}),
    ],
)  # fmt: skip
def test_the_new_formats_are_turned_once(
    format: str, options: dict[str, Any], orientation: int
) -> None:
    upright = drawn(60, 40)
    turn = STORED[orientation]
    assert turn is not None
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _extra(format, upright.transpose(turn), exif=exif.tobytes(), **options)
    seen = decode_preview(data, 100).image
    assert seen.size == (60, 40)
    assert difference(np.asarray(seen), np.asarray(upright)) < 1


def test_the_header_of_a_jpeg_xl_file_gives_its_size_and_orientation() -> None:
    for size in ((60, 40), (300, 200), (1000, 8), (64, 64)):
        assert read_jpeg_xl_header(_extra("JXL", Image.new("RGB", size))) == (*size, 1)
    # 8 x 8 in multiples of 8, the same width, extra fields, orientation 6
    bits = 1 | 0 << 1 | 1 << 6 | 0 << 9 | 1 << 10 | 5 << 11
    bare = b"\xff\x0a" + bits.to_bytes(16, "little")
    assert read_jpeg_xl_header(bare) == (8, 8, 6)
    boxed = b"\0\0\0\x0cJXL \r\n\x87\n" + struct.pack(">I4sI", 12 + len(bare), b"jxlp", 0) + bare
    assert read_jpeg_xl_header(boxed) == (8, 8, 6)


@pytest.mark.parametrize(("format", "limit"), [("HEIF", 1000), ("JXL", 1000)])
def test_their_pixels_are_limited_too(format: str, limit: int) -> None:
    data = _extra(format, drawn(64, 48))
    with pytest.raises(ImageError, match="64x48 is 3,072 pixels"):
        decode_image(data, SPEC, max_pixels=limit)


@pytest.mark.parametrize(
    ("format", "module", "name"),
    [("HEIF", "pillow_heif", "HEIC"), ("JXL", "pillow_jxl", "JPEG XL")],
)
def test_without_the_extra_they_are_unsupported_and_the_remedy_is_named(
    format: str, module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _extra(format, Image.fromarray(RGB))
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(UnsupportedImage, match=rf"{name} .* pip install 'imgcls\[formats\]'"):
        decode_image(data, SPEC)
