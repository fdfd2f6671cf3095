"""PNG: checksums, header, EXIF orientation, and a decoder of 8-bit files.

Pillow does not verify the checksums of the pixel data, decodes a PNG to find its EXIF data, and
rejects long texts. This module reads the chunks first and passes those with pixels to Pillow, or
to libspng, which reconstructs rows of pixels by SIMD. libspng verifies the checksum of the pixels,
does not end the process at damage as torchvision's decoder does, and releases the GIL.
Source: Portable Network Graphics specification, third edition, sections 5 and 11.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from imagecodecs import SpngError, deflate_crc32, spng_decode
from PIL import Image

from imgcls.errors import ImageError, TruncatedImage, UnsupportedImage

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_TEXT_BYTES = 16 << 20
"""Maximum decompressed size of a text that is searched for an orientation, in bytes."""
_EXIF_ORIENTATION = 0x0112
_RAW_EXIF = b"Raw profile type exif\0"
_XMP = b"XML:com.adobe.xmp\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])\b')
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_SAFE_CHUNKS = frozenset((*_PIXEL_CHUNKS, b"pHYs", b"gAMA", b"sRGB", b"cHRM", b"tIME", b"bKGD"))


class PngChunk(NamedTuple):
    """Type of a chunk, and start and end of its body in the file."""

    kind: bytes
    start: int
    stop: int

    def body(self, data: bytes) -> bytes:
        return data[self.start : self.stop]


class PngHeader(NamedTuple):
    """IHDR: size in pixels, bits per sample, color type."""

    width: int
    height: int
    bit_depth: int
    color_type: int


def parse_ihdr(data: bytes) -> PngHeader:
    """Parse the header chunk. Raises TruncatedImage or ImageError for a missing or damaged one."""
    if len(data) < 33:
        raise TruncatedImage(f"the PNG is truncated in its header ({len(data):,} bytes)")
    width, height, depth, color = struct.unpack_from(">IIBB", data, 16)
    if depth not in _BIT_DEPTHS.get(color, ()) or not width or not height:
        raise ImageError(f"the PNG's header is damaged: {depth} bits, color type {color}")
    return PngHeader(width, height, depth, color)


_BIT_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def parse_chunks(data: bytes) -> list[PngChunk]:
    """Parse the chunks of a PNG up to IEND.

    A file may end between two chunks; missing pixels are detected when it is decoded. Raises
    TruncatedImage if it ends within a chunk, UnsupportedImage for Apple's variant.
    """
    chunks = []
    position = 8
    end = len(data)
    while position + 8 <= end:
        length, kind = _unpack_length_and_kind(data, position)
        start, position = position + 8, position + 12 + length
        if kind == b"IEND":
            chunks.append(PngChunk(kind, start, start))
            break
        if not kind.isalpha():
            raise ImageError(f"the PNG is damaged: no chunk is called {kind!r}")
        if position > end:
            name = kind.decode()
            raise TruncatedImage(f"the PNG is truncated in its chunk {name} ({end:,} bytes)")
        chunks.append(PngChunk(kind, start, start + length))
    if not chunks and end < 33:
        raise TruncatedImage(f"begins as a PNG does, but its header is truncated ({end:,} bytes)")
    if chunks and chunks[0].kind == b"CgBI":
        raise UnsupportedImage("a PNG in Apple's CgBI variant is not supported; convert it to PNG")
    if all(chunk.kind != b"IDAT" for chunk in chunks) and position + 8 > end:
        raise TruncatedImage(f"the PNG is truncated before its pixels ({end:,} bytes)")
    if not chunks or chunks[0].kind != b"IHDR" or chunks[0].stop - chunks[0].start != 13:
        raise ImageError(f"begins as a PNG does, but its header is damaged ({end:,} bytes)")
    return chunks


_unpack_length_and_kind = struct.Struct(">I4s").unpack_from


def verify_checksums(data: bytes, chunks: list[PngChunk]) -> None:
    """Verify the checksums of all chunks. Raises ImageError for the first mismatch.

    libdeflate computes them ten times as fast as zlib, which took 3 % of the time of decoding.
    """
    view: Any = memoryview(data)  # the stub of `deflate_crc32` does not list it
    for kind, start, stop in chunks:
        if kind == b"IEND":
            continue  # has no body, and truncated files lack its last bytes
        if deflate_crc32(view[start - 4 : stop]) != int.from_bytes(view[stop : stop + 4], "big"):
            raise ImageError(
                f"the PNG is damaged: the checksum of its chunk {kind.decode('latin-1')} at byte "
                f"{start - 8:,} does not match"
            )


def find_orientation(data: bytes, chunks: list[PngChunk]) -> int:
    """The EXIF orientation from eXIf, else from older texts, else from XMP; 1 if there is none."""
    found: dict[str, bytes] = {}
    for chunk in chunks:
        if chunk.kind == b"eXIf":
            found.setdefault("exif", chunk.body(data))
        elif chunk.kind in _TEXT_CHUNKS and data.startswith((_RAW_EXIF, _XMP), chunk.start):
            text = _decompress_text(chunk, data)
            if data.startswith(_XMP, chunk.start):
                found.setdefault("xmp", text)
            else:
                found.setdefault("raw", text)
    try:
        exif = found.get("exif")
        if exif is None and "raw" in found:
            exif = bytes.fromhex(b"".join(found["raw"].split(b"\n")[3:]).decode())
        if exif is not None:
            tags = Image.Exif()
            tags.load(exif)
            if _EXIF_ORIENTATION in tags:
                value = int(tags[_EXIF_ORIENTATION])
                return value if 1 <= value <= 8 else 1
    except Exception:  # noqa: BLE001, S110  damaged EXIF does not affect the pixels
        pass
    match = _XMP_ORIENTATION.search(found.get("xmp", b""))
    return int(match[1]) if match else 1


_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")


def _decompress_text(chunk: PngChunk, data: bytes) -> bytes:
    """Decompress the text of a chunk, up to `_MAX_TEXT_BYTES`; empty if it is damaged."""
    _, _, rest = chunk.body(data).partition(b"\0")
    if chunk.kind == b"tEXt":
        return rest
    if chunk.kind == b"zTXt":
        packed, rest = True, rest[1:]
    else:
        packed = rest[:1] == b"\1"
        rest = rest[2:].split(b"\0", 2)[-1]
    try:
        return zlib.decompressobj().decompress(rest, _MAX_TEXT_BYTES) if packed else rest
    except zlib.error:
        return b""


def strip_metadata(data: bytes, chunks: Sequence[PngChunk]) -> bytes:
    """The PNG without chunks that Pillow may reject: long texts, profiles, animation frames."""
    if all(chunk.kind in _SAFE_CHUNKS for chunk in chunks):
        return data
    parts = [
        data[chunk.start - 8 : chunk.stop + 4] for chunk in chunks if chunk.kind in _PIXEL_CHUNKS
    ]
    return SIGNATURE + b"".join(parts)


def is_plain_png(data: bytes, chunks: list[PngChunk]) -> bool:
    """Whether a PNG has 8 bits, gray or RGB, is not interlaced and upright."""
    if data[24:26] not in (b"\x08\x00", b"\x08\x02") or data[28]:
        return False
    return not any(
        kind in _NOT_PLAIN_CHUNKS
        or (kind in _TEXT_CHUNKS and data.startswith((_RAW_EXIF, _XMP), start))
        for kind, start, _ in chunks
    )


_NOT_PLAIN_CHUNKS = (b"eXIf", b"tRNS", b"acTL", b"iCCP", b"sBIT")
"""Chunks for orientation, transparency, animation, color profile and significant bits."""


def decode_8_bit(data: bytes, chunks: Sequence[PngChunk]) -> npt.NDArray[np.uint8] | None:
    """Decode a gray, RGB or RGBA PNG of 8 bits, whose checksums are verified, by libspng.

    Returns (H, W) or (H, W, 3 or 4) uint8. None for a PNG of another kind, and for one that libspng
    refuses: Pillow decodes some of these, and raises an error for the others.
    """
    if data[24:26] not in _LIBSPNG_KINDS or data[28] or any(kind == b"tRNS" for kind, *_ in chunks):
        return None
    try:
        pixels: npt.NDArray[np.uint8] = spng_decode(strip_metadata(data, chunks))
    except SpngError:
        return None
    return pixels


_LIBSPNG_KINDS = (b"\x08\x00", b"\x08\x02", b"\x08\x06")
"""Bits per sample and color type: gray, RGB and RGBA."""


def verify_rows(data: bytes, chunks: Sequence[PngChunk]) -> None:
    """Raise TruncatedImage if the pixel data end early: Pillow accepts missing rows, as black.

    Other damage is left to the decoder.
    """
    missing = _count_row_bytes(data)
    inflate = zlib.decompressobj()
    for chunk in chunks:
        packed = chunk.body(data) if chunk.kind == b"IDAT" else b""
        while packed and missing > 0:
            try:
                missing -= len(inflate.decompress(packed, _INFLATE_BYTES))
            except zlib.error:
                return
            packed = inflate.unconsumed_tail
    if missing > 0:
        raise TruncatedImage(f"the PNG is truncated: rows are missing ({len(data):,} bytes)")


def _count_row_bytes(data: bytes) -> int:
    """Size of the decompressed rows of a PNG, each with the byte of its filter."""
    width, height, depth, color = parse_ihdr(data)
    steps = _INTERLACE_STEPS if data[28] else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in steps]
    bits = depth * _SAMPLES_PER_PIXEL[color]
    return sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns > 0)


_INFLATE_BYTES = 1 << 20
_SAMPLES_PER_PIXEL = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""By color type: gray, RGB, palette, gray with alpha, RGBA."""
_INTERLACE_STEPS = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)
)  # fmt: skip
"""Adam7: first column, first row, and distance of the columns and rows of each pass."""
