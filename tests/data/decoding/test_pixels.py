"""Samples are scaled by what a file's header states: each picture has pixels known beforehand."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcls.data.decoding.decode import decode_image, preprocess_pil_image
from imgcls.errors import ImageError, TruncatedImage, UnsupportedImage
from tests.data.pictures import encoded
from tests.data.samples import (
    ALPHA,
    GREY,
    GREY16,
    NOISE,
    RGB,
    SIDE,
    SPEC,
    Array,
    away,
    gray3,
    over_white,
)

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_pillow_image_of_unknown_range_is_refused(mode: str) -> None:
    with pytest.raises(UnsupportedImage, match="32-bit"):
        preprocess_pil_image(Image.fromarray(GREY).convert(mode), SPEC)


def _gif(first: tuple[int, int, int, int], index: int) -> bytes:
    """A GIF whose only frame, of one palette entry, covers (left, top, width, height)."""
    left, top, width, height = first
    palette = bytes([255, 0, 0, 0, 255, 0]) + bytes(254 * 3)
    codes = [256]
    for place in range(width * height):
        codes += [index] if place % 250 else [256, index]
    number = sum(code << 9 * place for place, code in enumerate([*codes, 257]))
    body = number.to_bytes((9 * len(codes) + 16) // 8, "little")
    blocks = b"".join(
        bytes([len(part)]) + part for i in range(0, len(body), 255) if (part := body[i : i + 255])
    )
    frame = b"\x2c" + struct.pack("<HHHHB", left, top, width, height, 0) + b"\x08" + blocks
    return b"GIF89a" + struct.pack("<HHBBB", SIDE, SIDE, 0xF7, 0, 0) + palette + frame + b"\0;"


def test_what_the_first_frame_of_a_gif_leaves_uncovered_is_white() -> None:
    expected = np.full((SIDE, SIDE, 3), 255)
    expected[8:24, 4:28] = (0, 255, 0)
    assert away(_gif((4, 8, 24, 16), 1), expected) == 0


def _tga(kind: int, depth: int, body: bytes, *, flags: int = 0x20) -> bytes:
    head = struct.pack("<BBBHHBHHHHBB", 0, 0, kind, 0, 0, 0, 0, 0, SIDE, SIDE, depth, flags)
    return head + body


def _netpbm(magic: str, values: Array, top: int | None = None) -> bytes:
    head = f"{magic}\n{SIDE} {SIDE}\n" + (f"{top}\n" if top else "")
    return head.encode() + values.tobytes()


def _saved(format: str, image: Array = RGB, **options: Any) -> bytes:
    return encoded(Image.fromarray(image), format, **options)


OTHERS = {
    "PPM": (_netpbm("P6", RGB, 255), RGB),
    "PPM 10 bit": (_netpbm("P6", np.round(RGB / 255 * 1023).astype(">u2"), 1023), RGB),
    "PGM 12 bit": (_netpbm("P5", np.round(GREY / 255 * 4095).astype(">u2"), 4095), gray3(GREY)),
    "PGM 16 bit": (_netpbm("P5", GREY.astype(">u2") * 257, 65535), gray3(GREY)),
    "PBM": (_netpbm("P4", np.packbits(GREY < 128, axis=1)), gray3(255 * (GREY >= 128))),
    "TGA": (_tga(2, 24, RGB[..., ::-1].tobytes()), RGB),
    "TGA bottom up": (_tga(2, 24, RGB[::-1, :, ::-1].tobytes(), flags=0), RGB),
    "TGA gray": (_tga(3, 8, GREY.tobytes()), gray3(GREY)),
    "TGA with alpha": (
        _tga(2, 32, np.dstack([RGB[..., ::-1], ALPHA]).tobytes(), flags=0x28),
        over_white(RGB, ALPHA),
    ),
    "ICO": (_saved("ICO", sizes=[(SIDE, SIDE)]), RGB),
    "ICO of bitmaps": (_saved("ICO", sizes=[(SIDE, SIDE)], bitmap_format="bmp"), RGB),
    "DIB": (_saved("DIB"), RGB),
    "JPEG 2000": (_saved("JPEG2000"), RGB),
    "JPEG 2000 codestream": (_saved("JPEG2000", no_jp2=True), RGB),
    "JPEG 2000 gray 16": (_saved("JPEG2000", GREY16), gray3(GREY)),
    "AVIF": (_saved("AVIF", quality=100, subsampling="4:4:4"), RGB),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_formats_have_their_pixels(name: str) -> None:
    data, expected = OTHERS[name]
    assert away(data, expected) <= (6 if name == "AVIF" else 1)


def test_a_damaged_png_within_an_icon_is_refused() -> None:
    data = bytearray(encoded(Image.fromarray(NOISE), "ICO", sizes=[(SIDE, SIDE)]))
    data[data.index(b"IDAT") + 500] ^= 255
    with pytest.raises(ImageError) as caught:
        decode_image(bytes(data), SPEC)
    assert caught.value.status == "unreadable"
    with pytest.raises(TruncatedImage, match="truncated"):
        decode_image(bytes(data[:600]), SPEC)


@pytest.mark.parametrize(
    ("frame", "name"),
    [
        ((0xC1, 12, 1), "12-bit JPEG"), ((0xC3, 16, 1), "16-bit lossless JPEG"),
        ((0xF7, 8, 1), "JPEG-LS"), ((0xC5, 8, 3), "hierarchical JPEG"),
    ],
)  # fmt: skip
def test_a_jpeg_process_that_is_not_decoded_is_named(
    frame: tuple[int, int, int], name: str
) -> None:
    marker, precision, count = frame
    body = struct.pack(">BHHB", precision, SIDE, SIDE, count) + b"\1\x11\0" * count
    data = b"\xff\xd8\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body
    with pytest.raises(UnsupportedImage, match=name):
        decode_image(data + b"\xff\xda\0\x08\1\1\0\0\0\0" + bytes(64) + b"\xff\xd9", SPEC)


def test_jpeg_2000_samples_with_signs_are_refused() -> None:
    data = bytearray(_saved("JPEG2000", GREY, no_jp2=True))
    data[data.index(b"\xff\x4f\xff\x51") + 42] |= 0x80
    with pytest.raises(UnsupportedImage, match="8-bit signed"):
        decode_image(bytes(data), SPEC)
