"""PNG files as chunks: checksums, the header, the EXIF orientation.

Pillow checks no checksum of the pixel data, decodes a PNG to look for EXIF data, and refuses long
texts. Here the chunks are read first; Pillow gets those that hold pixels.
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
"""Bytes to which a compressed text is expanded, in search of an orientation."""
_EXIF_ORIENTATION = 0x0112
_RAW_EXIF = b"Raw profile type exif\0"
_XMP = b"XML:com.adobe.xmp\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])\b')
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_SAFE_CHUNKS = frozenset((*_PIXEL_CHUNKS, b"pHYs", b"gAMA", b"sRGB", b"cHRM", b"tIME", b"bKGD"))


class PngChunk(NamedTuple):
    """A chunk: its type, and where its body begins and ends in the file."""

    kind: bytes
    start: int
    stop: int

    def body(self, data: bytes) -> bytes:
        return data[self.start : self.stop]


class PngHeader(NamedTuple):
    """IHDR: size in pixels, bits per sample, color type, interlace method."""

    width: int
    height: int
    bit_depth: int
    color_type: int
    interlace_method: int


def parse_ihdr(data: bytes) -> PngHeader:
    """Raises TruncatedImage or ImageError when it is cut off or not the first chunk."""
    if len(data) < 33:
        raise TruncatedImage(f"the PNG is truncated in its header ({len(data):,} bytes)")
    width, height, depth, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if depth not in _BIT_DEPTHS.get(color, ()) or not width or not height:
        raise ImageError(f"the PNG's header is damaged: {depth} bits, color type {color}")
    return PngHeader(width, height, depth, color, interlaced)


_BIT_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def parse_chunks(data: bytes) -> list[PngChunk]:
    """The chunks of a PNG up to IEND.

    A file that ends between two chunks is given as far as it goes: whether its pixels are whole is
    seen when they are decoded. Raises TruncatedImage where it ends within a chunk, UnsupportedImage
    for Apple's variant.
    """
    chunks = []
    place = 8
    end = len(data)
    while place + 8 <= end:
        length, kind = _unpack_length_and_kind(data, place)
        start, place = place + 8, place + 12 + length
        if kind == b"IEND":
            chunks.append(PngChunk(kind, start, start))
            break
        if not kind.isalpha():
            raise ImageError(f"the PNG is damaged: no chunk is called {kind!r}")
        if place > end:
            name = kind.decode()
            raise TruncatedImage(f"the PNG is truncated in its chunk {name} ({end:,} bytes)")
        chunks.append(PngChunk(kind, start, start + length))
    if not chunks and end < 33:
        raise TruncatedImage(f"begins as a PNG does, but its header is truncated ({end:,} bytes)")
    if chunks and chunks[0].kind == b"CgBI":
        raise UnsupportedImage("a PNG in Apple's CgBI variant is not supported; convert it to PNG")
    if all(chunk.kind != b"IDAT" for chunk in chunks) and place + 8 > end:
        raise TruncatedImage(f"the PNG is truncated before its pixels ({end:,} bytes)")
    if not chunks or chunks[0].kind != b"IHDR" or chunks[0].stop - chunks[0].start != 13:
        raise ImageError(f"begins as a PNG does, but its header is damaged ({end:,} bytes)")
    return chunks


_unpack_length_and_kind = struct.Struct(">I4s").unpack_from


def verify_checksums(data: bytes, chunks: list[PngChunk]) -> None:
    """Compare the checksums of all chunks. Raises ImageError for the first that does not match."""
    view = memoryview(data)
    for kind, start, stop in chunks:
        if kind == b"IEND":
            continue  # has no body, and is where files lack their last bytes
        if zlib.crc32(view[start - 4 : stop]) != int.from_bytes(view[stop : stop + 4], "big"):
            raise ImageError(
                f"the PNG is damaged: the checksum of its chunk {kind.decode('latin-1')} at byte "
                f"{start - 8:,} does not match"
            )


def find_orientation(data: bytes, chunks: list[PngChunk]) -> int:
    """The EXIF orientation, 1 where there is none: of eXIf, else of older texts, else of XMP."""
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
    except Exception:  # noqa: BLE001, S110  damaged EXIF does not concern the pixels
        pass
    match = _XMP_ORIENTATION.search(found.get("xmp", b""))
    return int(match[1]) if match else 1


_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")


def _decompress_text(chunk: PngChunk, data: bytes) -> bytes:
    """The text of a chunk, expanded as far as `_MOST_TEXT`; empty where that fails."""
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
    """The PNG without what Pillow may refuse: long texts and profiles, frames of an animation."""
    if all(chunk.kind in _SAFE_CHUNKS for chunk in chunks):
        return data
    parts = [
        data[chunk.start - 8 : chunk.stop + 4] for chunk in chunks if chunk.kind in _PIXEL_CHUNKS
    ]
    return SIGNATURE + b"".join(parts)


def is_plain_png(data: bytes, chunks: list[PngChunk]) -> bool:
    """Whether a PNG is as it shows: 8 bits, gray or RGB, not interlaced, upright."""
    if data[24:26] not in (b"\x08\x00", b"\x08\x02") or data[28]:
        return False
    return not any(
        kind in _NOT_PLAIN_CHUNKS
        or (kind in _TEXT_CHUNKS and data.startswith((_RAW_EXIF, _XMP), start))
        for kind, start, _ in chunks
    )


_NOT_PLAIN_CHUNKS = (b"eXIf", b"tRNS", b"acTL", b"iCCP", b"sBIT")
"""Chunks that rotate, make transparent, animate, color or scale the picture."""
