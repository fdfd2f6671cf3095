"""TIFF: samples are scaled by the tags, and a kind that is not decoded is named."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from imgcls.data.decoding.decode import decode_image
from imgcls.data.decoding.open_image import decode_preview
from imgcls.errors import TruncatedImage, UnsupportedImage
from tests.data.pictures import encoded
from tests.data.samples import (
    ALPHA,
    GREY,
    GREY16,
    NOISE,
    RGB,
    RGB16,
    SIDE,
    SPEC,
    Array,
    away,
    gray3,
    over_white,
)

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")


def tiff(
    planes: Sequence[Array], photometric: int, bits: int, *, format_: int = 1, bands: int = 1,
    planar: int = 1, endian: str = "<", big: bool = False, **tags: Sequence[int],
) -> bytes:  # fmt: skip
    """An uncompressed TIFF, one strip a plane; tags by number, such as `t338=[2]`."""
    height = planes[0].shape[0]
    strips = [np.ascontiguousarray(p, p.dtype.newbyteorder(endian)).tobytes() for p in planes]
    word, size, head = ("Q", 8, 16) if big else ("I", 4, 8)
    held: dict[int, tuple[str, Sequence[int]]] = {
        256: ("H", [SIDE]), 257: ("H", [height]), 258: ("H", [bits] * bands), 259: ("H", [1]),
        262: ("H", [photometric]), 273: ("I", [0] * len(strips)), 277: ("H", [bands]),
        278: ("H", [height]), 279: ("I", [len(s) for s in strips]), 284: ("H", [planar]),
        339: ("H", [format_] * bands),
    }  # fmt: skip
    held |= {int(name[1:]): ("H", values) for name, values in tags.items()}
    entries = b""
    loose = b""
    after = head + (8 if big else 2) + len(held) * (20 if big else 12) + size
    length = sum(
        n for kind, v in held.values() if (n := struct.calcsize(f"={len(v)}{kind}")) > size
    )
    place = after + length
    for index, strip in enumerate(strips):
        held[273][1][index] = place  # type: ignore[index]
        place += len(strip)
    for tag in sorted(held):
        kind, values = held[tag]
        body = struct.pack(f"{endian}{len(values)}{kind}", *values)
        entries += struct.pack(f"{endian}HH{word}", tag, {"H": 3, "I": 4}[kind], len(values))
        if len(body) > size:
            entries += struct.pack(f"{endian}{word}", after + len(loose))
            loose += body
        else:
            entries += body.ljust(size, b"\0")
    start = struct.pack(f"{endian}HHH", 43, 8, 0) if big else struct.pack(f"{endian}H", 42)
    count = struct.pack(f"{endian}{'Q' if big else 'H'}", len(held))
    order = b"II" if endian == "<" else b"MM"
    first = struct.pack(f"{endian}{word}", head)
    return order + start + first + count + entries + bytes(size) + loose + b"".join(strips)


PREMULTIPLIED = np.round(RGB * (ALPHA[..., None] / 255)).astype(np.uint8)


def _bits12() -> Array:
    values = np.round(GREY / 255 * 4095).astype(int)
    first, second = values[:, 0::2], values[:, 1::2]
    parts = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    return np.stack(parts, -1).astype(np.uint8).reshape(SIDE, -1)


KNOWN = {
    "gray 8": (tiff([GREY], 1, 8), gray3(GREY)),
    "gray 8, white is zero": (tiff([255 - GREY], 0, 8), gray3(GREY)),
    "gray 16": (tiff([GREY16], 1, 16), gray3(GREY)),
    "gray 16, big endian": (tiff([GREY16], 1, 16, endian=">"), gray3(GREY)),
    "gray 16, white is zero": (tiff([65535 - GREY16], 0, 16), gray3(GREY)),
    "gray 12": (tiff([_bits12()], 1, 12), gray3(GREY)),
    "gray 16, BigTIFF": (tiff([GREY16], 1, 16, big=True), gray3(GREY)),
    "RGB 8, BigTIFF": (tiff([RGB], 2, 8, bands=3, big=True), RGB),
    "RGB 16": (tiff([RGB16], 2, 16, bands=3), RGB),
    "RGB 8 planar": (tiff([*np.moveaxis(RGB, 2, 0)], 2, 8, bands=3, planar=2), RGB),
    "RGB 16 planar": (tiff([*np.moveaxis(RGB16, 2, 0)], 2, 16, bands=3, planar=2), RGB),
    "RGB 16 planar, big endian": (
        tiff([*np.moveaxis(RGB16, 2, 0)], 2, 16, bands=3, planar=2, endian=">"), RGB,
    ),
    "RGBA 16 planar": (
        tiff([*np.moveaxis(RGB16, 2, 0), ALPHA.astype(np.uint16) * 257], 2, 16, bands=4, planar=2,
             t338=[2]), over_white(RGB, ALPHA),
    ),
    "RGB with associated alpha": (
        tiff([np.dstack([PREMULTIPLIED, ALPHA])], 2, 8, bands=4, t338=[1]),
        np.clip(PREMULTIPLIED + 255.0 - ALPHA[..., None], 0, 255),
    ),
    "gray with associated alpha": (
        tiff([np.dstack([GREY, np.full_like(GREY, 255)])], 1, 8, bands=2, t338=[1]), gray3(GREY),
    ),
    "RGB with an unspecified band": (
        tiff([np.dstack([RGB, ALPHA])], 2, 8, bands=4, t338=[0]), RGB,
    ),
    "palette": (
        tiff([GREY], 3, 8, t320=[n * 257 for n in (*range(256), *range(255, -1, -1), *[9] * 256)]),
        np.dstack([GREY, 255 - GREY, np.full_like(GREY, 9)]),
    ),
    "palette with entries of 8 bits": (
        tiff([GREY], 3, 8, t320=[*range(256), *range(255, -1, -1), *[9] * 256]),
        np.dstack([GREY, 255 - GREY, np.full_like(GREY, 9)]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_a_tiff_is_scaled_by_its_tags(name: str) -> None:
    data, expected = KNOWN[name]
    assert away(data, expected) <= 2


def test_a_tiff_with_subsampled_colors_is_not_read_as_if_it_had_all() -> None:
    """Two by two gray levels share one pair of color differences: four Y, then Cb and Cr."""
    luma = GREY.reshape(SIDE // 2, 2, SIDE // 2, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
    units = np.hstack([luma, np.full((len(luma), 2), 128, np.uint8)])
    strip = units.reshape(SIDE, -1)
    assert away(tiff([strip], 6, 8, bands=3, t530=[2, 2]), gray3(GREY)) <= 2


UNSUPPORTED = {
    "32-bit float gray": tiff([GREY.astype(np.float32) / 255], 1, 32, format_=3),
    "16-bit float gray": tiff([GREY.astype(np.float16) / 255], 1, 16, format_=3),
    "32-bit float RGB": tiff([RGB.astype(np.float32) / 255], 2, 32, format_=3, bands=3),
    "32-bit signed gray": tiff([GREY.astype(np.int32)], 1, 32, format_=2),
    "16-bit signed gray": tiff([GREY.astype(np.int16)], 1, 16, format_=2),
    "8-bit signed gray": tiff([GREY.astype(np.int8)], 1, 8, format_=2),
    "32-bit unsigned gray": tiff([GREY.astype(np.uint32) << 24], 1, 32),
    "16-bit unsigned gray (5 bands)": tiff(
        [np.dstack([RGB16, RGB16[..., :2]])], 1, 16, bands=5, t338=[0] * 4
    ),
    "8-bit unsigned RGB with associated alpha (planar)": tiff(
        [*np.moveaxis(PREMULTIPLIED, 2, 0), ALPHA], 2, 8, bands=4, planar=2, t338=[1]
    ),
    "big-endian byte order": tiff([GREY], 1, 8, endian=">", big=True),
    "DNG": tiff([GREY], 1, 8, t50706=[1, 4]),
    "thumbnail": tiff([GREY], 1, 8, t254=[1], t330=[8]),
    "camera's raw file": tiff([GREY], 32803, 8),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_sound_tiff_that_is_not_decoded_is_named_and_never_guessed(name: str) -> None:
    data = UNSUPPORTED[name]
    for call in (lambda: decode_image(data, SPEC), lambda: decode_preview(data, 20)):
        with pytest.raises(UnsupportedImage, match="not supported") as caught:
            call()
        assert caught.value.status == "unsupported"
        assert name in str(caught.value)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate"])
def test_a_cut_tiff_is_truncated(compression: str | None) -> None:
    whole = encoded(Image.fromarray(NOISE[..., :3]), "TIFF", compression=compression)
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(TruncatedImage, match="truncated"):
            decode_image(whole[: int(share * len(whole))], SPEC)
