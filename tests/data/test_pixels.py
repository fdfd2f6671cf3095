"""Samples are scaled by what a file's header states: each picture has pixels known beforehand."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from imgcls.data.decode import decode_image, decode_preview, preprocess_pil_image
from imgcls.data.device_decode import decode_batch
from imgcls.data.image_features import compute_features
from imgcls.data.image_headers import read_jpeg_xl_header
from imgcls.data.preprocess import Preprocess
from imgcls.errors import ImageError, TruncatedImage, UnsupportedImage
from tests.data.pictures import STORED, difference, drawn, encoded

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

SIDE = 32
SPEC = Preprocess(resize=SIDE, crop=SIDE, mode="squash")
Y, X = np.mgrid[:SIDE, :SIDE]
RGB = np.stack([X * 8, Y * 8, (X + Y) * 4], -1).astype(np.uint8)
GREY = RGB[..., 0].copy()
ALPHA = RGB[..., 1].copy()
NOISE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4)).astype(np.uint8)
Array = npt.NDArray[Any]


def gray3(gray: Array) -> Array:
    return np.dstack([gray] * 3)


def over_white(color: Array, alpha: Array) -> Array:
    opacity = alpha[..., None] / 255
    return np.round(color * opacity + 255 * (1 - opacity))


def away(data: bytes, expected: Array) -> int:
    """The largest difference of a file's pixels from those that it must have, on two routes."""
    pixels, shown = decode_image(data, SPEC)
    assert shown == (SIDE, SIDE)
    apart = np.abs(pixels.transpose(1, 2, 0).astype(int) - expected).max()
    again = preprocess_pil_image(Image.open(io.BytesIO(data)), SPEC)
    return int(max(apart, np.abs(again.transpose(1, 2, 0).astype(int) - expected).max()))


# ------------------------------------------------------------------ PNG


def chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png(
    values: Array, depth: int, color: int, *chunks: bytes, after: bytes = b"", interlaced: int = 0
) -> bytes:
    """A PNG of (H, W) or (H, W, bands) samples, without filters."""
    height, width = values.shape[:2]
    steps = ((0, 0, 1, 1),)
    if interlaced:
        steps = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4),
                 (1, 0, 2, 2), (0, 1, 1, 2))  # type: ignore[assignment]  # fmt: skip
    rows = b"".join(
        b"\0" + packed(row, depth) for x, y, dx, dy in steps for row in values[y::dy, x::dx]
    )
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks)
        + chunk(b"IDAT", zlib.compress(rows)) + after + chunk(b"IEND", b"")
    )  # fmt: skip


def packed(row: Array, depth: int) -> bytes:
    if depth == 16:
        return row.astype(">u2").tobytes()
    bits = row.reshape(-1, 1) >> np.arange(depth - 1, -1, -1) & 1
    return np.packbits(bits.astype(np.uint8).ravel()).tobytes()


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_gray_of_every_depth_and_its_transparent_level(depth: int, interlaced: int) -> None:
    top = 2**depth - 1
    stored = np.round(GREY / 255 * top).astype(int)
    expected = np.round(stored * 255 / top)
    assert away(png(stored, depth, 0, interlaced=interlaced), gray3(expected)) <= 1
    level = int(stored[SIDE // 2, SIDE // 2])
    key = chunk(b"tRNS", struct.pack(">H", level))
    expected[stored == level] = 255
    assert away(png(stored, depth, 0, key, interlaced=interlaced), gray3(expected)) <= 1


@pytest.mark.parametrize("depth", [8, 16])
def test_one_transparent_color_is_white_and_its_neighbors_are_not(depth: int) -> None:
    stored = RGB.astype(int) * (257 if depth == 16 else 1)
    color = stored[SIDE // 2, SIDE // 2].copy()
    stored[0, 0] = color ^ 1  # differs in the lowest bits alone
    expected = np.round(stored / (257 if depth == 16 else 1))
    expected[(stored == color).all(-1)] = 255
    key = chunk(b"tRNS", struct.pack(">HHH", *color))
    assert away(png(stored, depth, 2, key), expected) <= 1


@pytest.mark.parametrize(("color", "bands"), [(0, 1), (2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_significant_bits_in_a_png_scale_it_wherever_they_lie(
    bits: int, color: int, bands: int
) -> None:
    """12-bit data in a 16-bit PNG: scaled as the specification asks, or left in the low bits."""
    colors = GREY[..., None] if bands < 3 else RGB
    values = np.dstack([colors, ALPHA]) if color in (4, 6) else colors
    top = 2**bits - 1
    low = np.round(values / 255 * top).astype(int)
    expected = over_white(colors, ALPHA) if color in (4, 6) else colors
    expected = gray3(expected[..., 0]) if bands < 3 else expected
    ways = (low, low << 16 - bits, low << 16 - bits | low >> 2 * bits - 16,
            np.round(low * 65535 / top).astype(int))  # fmt: skip
    for stored in ways:
        data = png(stored, 16, color, chunk(b"sBIT", bytes([bits] * bands)))
        assert away(data, expected) <= 1


def test_a_dark_16_bit_png_without_such_a_statement_stays_dark() -> None:
    assert away(png(GREY.astype(int) * 16, 16, 0), gray3(np.round(GREY * (16 / 257)))) <= 1


def test_texts_and_profiles_of_any_length_do_not_refuse_a_png() -> None:
    long = zlib.compress(b"a" * 3_000_000)
    chunks = (
        chunk(b"zTXt", b"workflow\0\0" + long), chunk(b"iTXt", b"prompt\0\1\0\0\0" + long),
        chunk(b"iCCP", b"profile\0\0" + long),
    )  # fmt: skip
    for data in (png(RGB, 8, 2, *chunks), png(RGB, 8, 2, after=chunks[0])):
        pixels, _ = decode_image(data, SPEC)
        assert (pixels.transpose(1, 2, 0) == RGB).all()


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"eXIf", b"tEXt"])
@pytest.mark.parametrize("behind", [False, True])
def test_an_orientation_in_any_chunk_turns_a_png(kind: bytes, behind: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    if kind == b"eXIf":
        body = exif.tobytes()[6:]
    elif kind == b"iTXt":
        body = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="3"/>'
    else:
        text = b"\nexif\n  99\n" + exif.tobytes().hex().encode()
        body = b"Raw profile type exif\0" + (
            b"\0" + zlib.compress(text) if kind == b"zTXt" else text
        )
    held = chunk(kind, body)
    data = png(RGB, 8, 2, after=held) if behind else png(RGB, 8, 2, held)
    assert away(data, RGB[::-1, ::-1]) <= 1


def _damaged_pngs() -> dict[str, bytes]:
    """PNGs whose pixel data have four bytes changed in the middle; the checksum shows it."""
    noise = Image.fromarray(NOISE)
    whole = {
        "rgb": encoded(noise.convert("RGB"), "PNG"), "rgba": encoded(noise, "PNG"),
        "palette": encoded(noise.convert("RGB").quantize(200), "PNG"),
        "gray with alpha": encoded(noise.convert("LA"), "PNG"),
        "1 bit": encoded(noise.convert("1"), "PNG"),
        "16 bit": png(NOISE[..., 0].astype(int) * 257, 16, 0),
        "profile": encoded(noise.convert("RGB"), "PNG", icc_profile=b"p" * 200),
        "transparent color": encoded(noise.convert("RGB"), "PNG", transparency=(1, 2, 3)),
        "interlaced": png(NOISE[..., :3], 8, 2, interlaced=1),
    }  # fmt: skip
    damaged = {}
    for name, data in whole.items():
        place = data.index(b"IDAT") + 4
        place += int.from_bytes(data[place - 8 : place - 4], "big") // 2
        damaged[name] = (
            data[:place] + bytes(b ^ 255 for b in data[place : place + 4]) + (data[place + 4 :])
        )
    return damaged


DAMAGED = _damaged_pngs()


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_png_is_refused_on_every_route(name: str) -> None:
    data = DAMAGED[name]
    (batched,) = decode_batch([data], SPEC, device=torch.device("cpu"))
    assert isinstance(batched, ImageError)
    assert batched.status == "unreadable"
    calls = (
        lambda: decode_image(data, SPEC), lambda: decode_preview(data, 20),
        lambda: compute_features(data),
        lambda: preprocess_pil_image(Image.open(io.BytesIO(data)), SPEC),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(ImageError, match="checksum of its chunk IDAT") as caught:
            call()
        assert caught.value.status == "unreadable"


def test_a_png_whose_tail_is_zeros_is_damaged_and_a_cut_one_truncated() -> None:
    whole = png(NOISE[..., :3], 8, 2, interlaced=1)
    with pytest.raises(ImageError, match="damaged") as caught:
        decode_image(whole[:2000] + bytes(len(whole) - 2000), SPEC)
    assert caught.value.status == "unreadable"
    with pytest.raises(TruncatedImage, match="truncated in its chunk IDAT"):
        decode_image(whole[:2000], SPEC)


@pytest.mark.parametrize("kind", [b"tRNS", b"PLTE", b"sBIT", b"eXIf"])
def test_damage_in_other_chunks_of_a_png_is_seen(kind: bytes) -> None:
    held = bytearray(chunk(kind, bytes(6)))
    held[9] ^= 1
    with pytest.raises(ImageError, match=f"checksum of its chunk {kind.decode()}"):
        decode_image(png(RGB, 8, 2, bytes(held)), SPEC)


# ------------------------------------------------------------------ TIFF


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


GREY16, RGB16 = GREY.astype(np.uint16) * 257, RGB.astype(np.uint16) * 257
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


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_pillow_image_of_unknown_range_is_refused(mode: str) -> None:
    with pytest.raises(UnsupportedImage, match="32-bit"):
        preprocess_pil_image(Image.fromarray(GREY).convert(mode), SPEC)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate"])
def test_a_cut_tiff_is_truncated(compression: str | None) -> None:
    whole = encoded(Image.fromarray(NOISE[..., :3]), "TIFF", compression=compression)
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(TruncatedImage, match="truncated"):
            decode_image(whole[: int(share * len(whole))], SPEC)


# ------------------------------------------------------------------ other formats


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
