"""PNG: samples of every depth, chunks of any length, and damage in each chunk."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from imgcls.data.decoding.decode import decode_image, preprocess_pil_image
from imgcls.data.decoding.device_decode import prepare_file
from imgcls.data.decoding.image_features import compute_features
from imgcls.data.decoding.open_image import decode_preview
from imgcls.data.decoding.png import decode_8_bit, parse_chunks
from imgcls.errors import ImageError, TruncatedImage
from tests.data.pictures import encoded
from tests.data.samples import ALPHA, GREY, NOISE, RGB, SIDE, SPEC, Array, away, gray3, over_white

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")


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
    calls = (
        lambda: prepare_file(data, SPEC), lambda: decode_image(data, SPEC),
        lambda: decode_preview(data, 20), lambda: compute_features(data),
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


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_libspng_decodes_the_samples_of_an_8_bit_png(mode: str) -> None:
    slopes = np.add.outer(np.arange(61), 3 * np.arange(47)).astype(np.uint8)
    drawn = np.stack([slopes, slopes[::-1], slopes // 2, slopes.T.reshape(61, 47)], axis=-1)
    for values in (NOISE, drawn):
        image = Image.fromarray(values).convert(mode)
        data = encoded(image, "PNG")
        decoded = decode_8_bit(data, parse_chunks(data))
        assert decoded is not None
        np.testing.assert_array_equal(decoded, np.asarray(image))


def repacked(data: bytes, pixel_data: bytes) -> bytes:
    """The PNG with other compressed rows, with the right checksum for their chunk."""
    start = data.index(b"IDAT") - 4
    (length,) = struct.unpack_from(">I", data, start)
    return data[:start] + chunk(b"IDAT", pixel_data) + data[start + 12 + length :]


def unpacked(data: bytes) -> bytes:
    """The rows of a PNG, each with the byte of its filter."""
    return zlib.decompress(b"".join(c.body(data) for c in parse_chunks(data) if c.kind == b"IDAT"))


def _damaged_pixel_data() -> dict[str, tuple[bytes, str]]:
    """Compressed rows of `RGB` with damage that no chunk's checksum shows, and their status."""
    rows = unpacked(png(RGB, 8, 2))
    whole, half = zlib.compress(rows), len(rows) // 2
    stored = bytearray(zlib.compress(rows, 0))  # without compression
    stored[len(stored) // 2] ^= 4
    flipped = rows[:half] + bytes([rows[half] ^ 4]) + rows[half + 1 :]
    return {
        "wrong checksum of the rows": (whole[:-1] + bytes([whole[-1] ^ 1]), "unreadable"),
        "one bit of a row": (bytes(stored), "unreadable"),
        "checksum of other rows": (zlib.compress(flipped)[:-4] + whole[-4:], "unreadable"),
        "cut": (whole[: len(whole) // 2], "truncated"),
        "filter that does not exist": (zlib.compress(b"\x09" + rows[1:]), "unreadable"),
        "not compressed": (rows, "unreadable"),
    }


DAMAGED_PIXEL_DATA = _damaged_pixel_data()


@pytest.mark.parametrize("name", DAMAGED_PIXEL_DATA)
def test_damage_that_the_checksum_of_a_chunk_does_not_show_is_refused(name: str) -> None:
    pixel_data, status = DAMAGED_PIXEL_DATA[name]
    data = repacked(png(RGB, 8, 2), pixel_data)
    assert decode_8_bit(data, parse_chunks(data)) is None
    for call in (lambda: decode_image(data, SPEC), lambda: decode_preview(data, 20)):
        with pytest.raises(ImageError) as caught:
            call()
        assert caught.value.status == status


WHOLE_PNGS = {
    "gray": png(GREY, 8, 0), "RGB": png(RGB, 8, 2), "RGBA": png(NOISE, 8, 6),
    "gray with alpha": png(NOISE[..., :2], 8, 4), "RGB, 16 bits": png(RGB.astype(int), 16, 2),
    "1 bit": png(GREY // 128, 1, 0), "interlaced": png(RGB, 8, 2, interlaced=1),
    "interlaced, 1 bit": png(GREY // 128, 1, 0, interlaced=1),
    "palette": png(GREY // 64, 2, 3, chunk(b"PLTE", bytes(range(12)))),
    "transparent color": png(RGB, 8, 2, chunk(b"tRNS", b"\0\1\0\2\0\3")),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE_PNGS)
def test_a_png_without_its_last_rows_is_truncated(kind: str) -> None:
    whole = WHOLE_PNGS[kind]
    rows = unpacked(whole)
    decode_image(repacked(whole, zlib.compress(rows)), SPEC)
    last = len(rows) // (3 if "interlaced" in kind else SIDE)
    for missing in (1, last):
        data = repacked(whole, zlib.compress(rows[:-missing]))
        with pytest.raises(TruncatedImage):
            decode_image(data, SPEC)
        with pytest.raises(TruncatedImage):
            decode_preview(data, 20)


def test_a_png_that_libspng_refuses_and_pillow_decodes_keeps_its_pixels() -> None:
    whole = png(RGB, 8, 2)
    header = bytearray(whole[16:29])
    header[10] = 1  # a compression method that does not exist
    data = whole[:8] + chunk(b"IHDR", bytes(header)) + whole[33:]
    assert decode_8_bit(data, parse_chunks(data)) is None
    assert away(data, RGB) <= 1
