"""Sample format in a file's header, for every decoded format.

`read_sample_format` reads it, and `imgcls.data.decoding.pixels` scales by it. Samples whose range
is not in the header, such as floats, are rejected as `unsupported` and never guessed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from imgcls.data.decoding import png, tiff
from imgcls.data.formats import ImageFormat
from imgcls.errors import UnsupportedImage

SampleKind = Literal["unsigned", "signed", "float", "complex", "undefined"]
AlphaKind = Literal["straight", "associated"]


@dataclass(frozen=True)
class SampleFormat:
    """Format of the samples in a file.

    kind:              number type
    bits:              bits per sample of each band, as stored
    color:             photometric interpretation: gray, RGB, palette, CMYK, YCbCr, Lab, or another
    is_inverted:       the lowest value is white
    is_planar:         one plane per band
    alpha:             straight or associated (multiplied into the colors); None without alpha
    significant_bits:  bits of each band that carry data (PNG's sBIT); None if not stated
    transparent_color: the gray level or color that is transparent (PNG's tRNS), in stored units
    """

    kind: SampleKind = "unsigned"
    bits: tuple[int, ...] = (8,)
    color: str = "RGB"
    is_inverted: bool = False
    is_planar: bool = False
    alpha: AlphaKind | None = None
    significant_bits: tuple[int, ...] | None = None
    transparent_color: tuple[int, ...] | None = None

    def __str__(self) -> str:
        """Such as `32-bit float RGB` or `5 bands of 16-bit unsigned samples`."""
        bits = "/".join(str(n) for n in dict.fromkeys(self.bits))
        count = len(self.bits)
        bands = {"gray": 1, "palette": 1, "CMYK": 4}.get(self.color, 3) + (self.alpha is not None)
        notes = [
            name
            for name, is_so in (("planar", self.is_planar), ("inverted", self.is_inverted))
            if is_so
        ]
        alpha = f" with {self.alpha} alpha" if self.alpha else ""
        if count > bands:
            notes.append(f"{count} bands")
        return f"{bits}-bit {self.kind} {self.color}{alpha}" + (
            f" ({', '.join(notes)})" if notes else ""
        )


DEFAULT_SAMPLE_FORMAT = SampleFormat()


def read_sample_format(format_: ImageFormat, data: bytes) -> SampleFormat:
    """Read the sample format from the header of a file.

    Formats that only have 8-bit unsigned samples give `DEFAULT_SAMPLE_FORMAT`.
    Raises UnsupportedImage for samples that cannot be decoded correctly, and TruncatedImage or
    ImageError for a header that is truncated or inconsistent.
    """
    if format_.name == "PNG":
        return _read_png(data)
    if format_.name == "TIFF":
        return _read_tiff(data)
    if format_.name == "JPEG 2000":
        return _read_jpeg_2000(data)
    return DEFAULT_SAMPLE_FORMAT


def _read_png(data: bytes) -> SampleFormat:
    """Source: Portable Network Graphics specification, third edition, sections 11.2 and 11.3."""
    chunks = png.parse_chunks(data)
    header = png.parse_ihdr(data)
    bodies = {
        chunk.kind: chunk.body(data) for chunk in reversed(chunks) if chunk.kind in _PNG_CHUNKS
    }
    color, bands, alpha = _PNG_COLORS[header.color_type]
    depth = 8 if color == "palette" else header.bit_depth
    significant: tuple[int, ...] | None = tuple(bodies.get(b"sBIT", b"")) or None
    if significant and (len(significant) < bands or not all(1 <= n <= depth for n in significant)):
        significant = None  # ignored if invalid, as in libpng
    key = bodies.get(b"tRNS")
    transparent = None
    if key is not None and color in ("gray", "RGB") and not alpha and len(key) >= 2 * bands:
        # samples of fewer than 16 bits are in the lowest bits
        stored = struct.unpack_from(f">{bands}H", key)
        transparent = tuple(value & (1 << header.bit_depth) - 1 for value in stored)
    return SampleFormat(
        bits=(header.bit_depth,) * bands,
        color=color,
        alpha="straight" if alpha else None,
        significant_bits=significant[:bands] if significant else None,
        transparent_color=transparent,
    )


_PNG_CHUNKS = (b"sBIT", b"tRNS")
_PNG_COLORS = {
    0: ("gray", 1, False),
    2: ("RGB", 3, False),
    3: ("palette", 1, False),
    4: ("gray", 2, True),
    6: ("RGB", 4, True),
}


def _read_tiff(data: bytes) -> SampleFormat:
    """Source: TIFF, revision 6.0, sections 8, 16, 18, 19, 21 and 23."""
    tags = tiff.parse_tags(data)
    raw = tiff.find_raw_format(data, tags)
    if raw:
        raise UnsupportedImage(f"{raw} is not supported; convert it to JPEG, PNG or TIFF")
    photometric = tags.get_first(tiff.PHOTOMETRIC, 0)
    compression = tags.get_first(tiff.COMPRESSION, 1)
    if compression == 6:
        photometric = 6  # old-style JPEG
    count = tags.get_first(tiff.SAMPLES_PER_PIXEL, 3 if compression == 6 else 1)
    bits = tags.get_all(tiff.BITS_PER_SAMPLE) or (1,)
    kinds = {_TIFF_KINDS.get(n, "undefined") for n in tags.get_all(tiff.SAMPLE_FORMAT)} or {
        "unsigned"
    }
    color = _TIFF_COLORS.get(photometric, f"photometric interpretation {photometric}")
    extra = tags.get_all(tiff.EXTRA_SAMPLES)
    alphas: dict[int, AlphaKind] = {1: "associated", 2: "straight", 999: "straight"}
    alpha = next((alphas[n] for n in extra if n in alphas), None)
    if color == "RGB" and count == 4 and not extra:
        alpha = "straight"  # ExtraSamples is missing: assume that the fourth band is alpha
    samples = SampleFormat(
        kind=kinds.pop() if len(kinds) == 1 else "undefined",
        bits=bits * count if len(bits) == 1 and 0 < count <= 64 else bits,
        color=color,
        is_inverted=photometric == 0,
        is_planar=tags.get_first(tiff.PLANAR, 1) == 2 and count > 1,
        alpha=alpha,
    )
    tiff.check_strips(data, tags, samples.bits, planar=samples.is_planar)
    if samples.kind != "unsigned" or max(samples.bits) > 16:
        raise UnsupportedImage(
            f"TIFF: {samples} is not supported: the header does not state the value of white; "
            "convert it to unsigned 8 or 16 bits"
        )
    return samples


_TIFF_KINDS: dict[int, SampleKind] = {
    1: "unsigned", 2: "signed", 3: "float", 5: "complex", 6: "complex",
}  # fmt: skip
_TIFF_COLORS = {
    0: "gray", 1: "gray", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "Lab",
    9: "ICC Lab", 10: "ITU Lab", 32803: "color filter array", 32844: "LogL", 32845: "LogLuv",
    34892: "linear raw",
}  # fmt: skip


def _read_jpeg_2000(data: bytes) -> SampleFormat:
    """Source: ISO/IEC 15444-1, annex A.5.1 (SIZ)."""
    position = data.find(b"\xff\x4f\xff\x51")
    if position < 0 or len(data) < position + 43:
        return DEFAULT_SAMPLE_FORMAT  # the decoder reports the missing data
    (count,) = struct.unpack_from(">H", data, position + 40)
    sizes = data[position + 42 : position + 42 + 3 * count : 3]
    samples = SampleFormat(
        kind="signed" if any(size & 0x80 for size in sizes) else "unsigned",
        bits=tuple((size & 0x7F) + 1 for size in sizes) or (8,),
        color="gray" if count < 3 else "RGB",
        alpha="straight" if count in (2, 4) else None,
    )
    # Pillow rounds bands of more than 8 bits up beyond white, which becomes black
    max_bits = 16 if count == 1 else 8
    if samples.kind == "signed" or max(samples.bits) > max_bits or count > 4:
        raise UnsupportedImage(
            f"JPEG 2000: {samples} is not supported; convert it to unsigned samples, gray of at "
            "most 16 bits or color of 8 bits"
        )
    return samples


def read_jpeg_xl_header(data: bytes) -> tuple[int, int, int] | None:
    """Width, height and orientation in a JPEG XL codestream; None if there is none.

    Its decoder applies the orientation, 1 to 8, that the codestream states.
    Source: ISO/IEC 18181-1, clauses 9.1 (SizeHeader) and 9.3 (ImageMetadata); 18181-2 (boxes).
    """
    stream = data
    if not data.startswith(b"\xff\x0a"):
        first = {b"jxlc": 0, b"jxlp": 4}  # the parts of a stream are numbered
        parts = [
            data[start + first[kind] : stop]
            for kind, start, stop in iterate_boxes(data)
            if kind in first
        ]
        stream = b"".join(parts)
    if not stream.startswith(b"\xff\x0a"):
        return None
    bits = int.from_bytes(stream[2:24], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & (1 << count) - 1, bits >> count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1

    height = side()
    ratio = _JPEG_XL_RATIOS[take(3)]
    width = height * ratio[0] // ratio[1] if ratio else side()
    plain = take(1) or not take(1)
    return width, height, 1 if plain else take(3) + 1


_JPEG_XL_RATIOS = (None, (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def iterate_boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Top-level boxes of an ISO base media file: type, start and end of the body.

    The end of a truncated box exceeds the size of the file.
    """
    position = 0
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        first = position + 8
        if length == 1 and position + 16 <= len(data):
            (length,) = struct.unpack_from(">Q", data, first)
            first = position + 16
        stop = position + length if length else len(data)
        yield kind, first, stop
        if stop <= position:
            return
        position = stop


def is_cut_off(data: bytes) -> bool:
    """Whether a file ends before its own structure does, without decoding it.

    WebP states its length, ISO base media files the lengths of their boxes; a JPEG 2000 codestream
    and a GIF have an end marker.
    """
    if data[:4] == b"RIFF":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data[:4] == b"GIF8":
        return data[-1:] != b";"
    if data[4:8] in (b"ftyp", b"jP  ", b"JXL "):
        boxes = list(iterate_boxes(data))
        if any(stop > len(data) for _, _, stop in boxes):
            return True
        streams = [data[first:stop] for kind, first, stop in boxes if kind == b"jp2c"]
        return any(not stream.endswith(b"\xff\xd9") for stream in streams)
    return data[:4] == b"\xff\x4f\xff\x51" and not data.endswith(b"\xff\xd9")
