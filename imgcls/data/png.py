"""PNG chunks: checksums, header and EXIF orientation.

Pillow does not verify the checksums of the pixel data, decodes a PNG to find its EXIF data, and
rejects long texts. This module reads the chunks first and passes those with pixels to Pillow.
Source: Portable Network Graphics specification, third edition, sections 5 and 11.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import NamedTuple

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
    """Verify the checksums of all chunks. Raises ImageError for the first mismatch."""
    view = memoryview(data)
    for kind, start, stop in chunks:
        if kind == b"IEND":
            continue  # has no body, and truncated files lack its last bytes
        if zlib.crc32(view[start - 4 : stop]) != int.from_bytes(view[stop : stop + 4], "big"):
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


def strip_metadata(data: bytes, chunks: list[PngChunk]) -> bytes:
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
