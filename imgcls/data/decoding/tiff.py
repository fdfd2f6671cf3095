"""First directory of a TIFF or BigTIFF: its tags, and a check of the strips against the file size.

Pillow opens a TIFF only if it can decode it. The tags are read here to name an unsupported kind of
TIFF, and to distinguish a truncated file from a damaged one.
Source: TIFF, revision 6.0, section 2; Technical Note "BigTIFF", Aware Systems.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from imgcls.errors import ImageError, TruncatedImage, UnsupportedImage

SUBFILE_TYPE, WIDTH, HEIGHT = 254, 256, 257
BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC = 258, 259, 262
STRIP_OFFSETS, SAMPLES_PER_PIXEL, ROWS_PER_STRIP, STRIP_BYTES = 273, 277, 278, 279
PLANAR, COLOR_MAP = 284, 320
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 322, 323, 324, 325
SUB_IFDS, EXTRA_SAMPLES, SAMPLE_FORMAT = 330, 338, 339
SUBSAMPLING = 530
_MAKE, _CFA_PATTERN, _DNG_VERSION = 271, 33422, 50706

_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
          16: 8, 17: 8, 18: 8}  # fmt: skip
_INTEGER_CODES = {
    1: "B",
    3: "H",
    4: "I",
    6: "b",
    8: "h",
    9: "i",
    13: "I",
    16: "Q",
    17: "q",
    18: "Q",
}


@dataclass(frozen=True)
class TiffTags:
    """Integer tags of a directory, and the numbers of its other tags.

    values:   by tag
    make:     camera maker, empty if not stated
    has_next: whether another directory follows
    is_big:   BigTIFF
    endian:   < or >
    offset:   position of the directory in the file
    """

    values: dict[int, tuple[int, ...]]
    make: str
    has_next: bool
    is_big: bool
    endian: str
    offset: int

    def __contains__(self, tag: int) -> bool:
        return tag in self.values

    def get_all(self, tag: int) -> tuple[int, ...]:
        """All values of a tag; empty if it is absent."""
        return self.values.get(tag, ())

    def get_first(self, tag: int, default: int) -> int:
        """The first value of a tag, or the default if it is absent."""
        return self.get_all(tag)[0] if self.get_all(tag) else default


def parse_tags(data: bytes) -> TiffTags:
    """Parse the tags of the first directory.

    Raises TruncatedImage if it lies beyond the end of the file, ImageError if it is damaged.
    """
    endian = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    count_code, entry, code = ("Q", 20, "Q") if big else ("H", 12, "I")
    (offset,) = _unpack(f"{endian}{code}", data, 8 if big else 4)
    if not offset:
        raise ImageError("the TIFF is damaged: it has no directory")
    (count,) = _unpack(f"{endian}{count_code}", data, offset)
    if not 0 < count <= 4096:
        raise ImageError(f"the TIFF is damaged: its directory has {count:,} entries")
    start = offset + struct.calcsize(count_code)
    values: dict[int, tuple[int, ...]] = {}
    make = ""
    for position in range(start, start + count * entry, entry):
        tag, kind = _unpack(f"{endian}HH", data, position)
        (length,) = _unpack(f"{endian}{code}", data, position + 4)
        value_at = position + 4 + struct.calcsize(code)
        size = _TYPE_SIZES.get(kind, 0) * length
        if size > struct.calcsize(code):
            (value_at,) = _unpack(f"{endian}{code}", data, value_at)
        if tag == _MAKE:
            make = (
                data[value_at : value_at + min(size, 64)].split(b"\0")[0].decode("latin-1").strip()
            )
        if kind not in _INTEGER_CODES:
            values.setdefault(tag, ())
            continue
        needed = tag in _REQUIRED_TAGS
        if needed and value_at + size > len(data):
            raise TruncatedImage(
                f"the TIFF is truncated before the values of its tag {tag} ({len(data):,} bytes)"
            )
        values[tag] = (
            struct.unpack_from(f"{endian}{length}{_INTEGER_CODES[kind]}", data, value_at)
            if needed
            else ()
        )
    following = start + count * entry
    after = data[following : following + struct.calcsize(code)]
    return TiffTags(values, make, any(after), big, endian, offset)


_REQUIRED_TAGS = frozenset((
    SUBFILE_TYPE, WIDTH, HEIGHT, BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC, STRIP_OFFSETS,
    SAMPLES_PER_PIXEL, ROWS_PER_STRIP, STRIP_BYTES, PLANAR, COLOR_MAP, TILE_WIDTH, TILE_HEIGHT,
    TILE_OFFSETS, TILE_BYTES, EXTRA_SAMPLES, SAMPLE_FORMAT, SUBSAMPLING,
))  # fmt: skip


def _unpack(layout: str, data: bytes, offset: int) -> tuple[int, ...]:
    if offset + struct.calcsize(layout) > len(data):
        raise TruncatedImage(
            f"the TIFF is truncated before its directory, at byte {offset:,} ({len(data):,} bytes)"
        )
    return struct.unpack_from(layout, data, offset)


def find_raw_format(data: bytes, tags: TiffTags) -> str | None:
    """Name of a camera's raw format, or of a file that begins with a preview; None for others.

    Their first directory is a thumbnail, which must not be used as the image.
    """
    make = f" ({tags.make})" if tags.make else ""
    if data[8:10] == b"CR" and not tags.is_big:
        return f"a Canon CR2 raw file{make}"
    if _DNG_VERSION in tags:
        return f"a DNG raw file{make}"
    if tags.get_first(PHOTOMETRIC, 0) in (32803, 34892) or _CFA_PATTERN in tags:
        return f"a camera's raw file{make}"
    if tags.get_first(SUBFILE_TYPE, 0) & 1 and SUB_IFDS in tags:
        return f"a camera's raw file{make}" if make else "a TIFF that begins with a thumbnail"
    if tags.get_first(SUBFILE_TYPE, 0) & 1 and tags.has_next:
        return "a TIFF that begins with a thumbnail"
    return None


def describe_encoding(data: bytes) -> str:
    """Byte order and compression, for the message about a TIFF that is not decoded."""
    tags = parse_tags(data)
    order = "little" if tags.endian == "<" else "big"
    kind = "BigTIFF" if tags.is_big else "TIFF"
    compression = tags.get_first(COMPRESSION, 1)
    return f" in a {kind} with {order}-endian byte order and compression {compression}"


def check_strips(data: bytes, tags: TiffTags, bits: tuple[int, ...], *, planar: bool) -> None:
    """Compare the strips or tiles with the size of the file.

    bits: bits per sample of each band
    Raises TruncatedImage if the file ends before one of them, ImageError if their number does not
    match the image size, UnsupportedImage if some are left out.
    """
    width, height = tags.get_first(WIDTH, 0), tags.get_first(HEIGHT, 0)
    if not width or not height:
        raise ImageError("the TIFF is damaged: its directory states no size")
    tiled = TILE_OFFSETS in tags
    offsets = tags.get_all(TILE_OFFSETS if tiled else STRIP_OFFSETS)
    lengths = tags.get_all(TILE_BYTES if tiled else STRIP_BYTES)
    if tiled:
        across, down = tags.get_first(TILE_WIDTH, 0), tags.get_first(TILE_HEIGHT, 0)
    else:
        across, down = width, min(tags.get_first(ROWS_PER_STRIP, height), height)
    if tags.get_first(COMPRESSION, 1) == 6:
        return  # old-style JPEG stores its stream elsewhere
    if not across or not down or not offsets:
        raise ImageError("the TIFF is damaged: its directory states no strips or tiles")
    expected = -(-width // across) * -(-height // down) * (len(bits) if planar else 1)
    if len(offsets) < expected:
        raise ImageError(
            f"the TIFF is damaged: {len(offsets):,} strips or tiles for a picture of {expected:,}"
        )
    if tags.get_first(COMPRESSION, 1) == 1:
        lengths = _compute_strip_sizes(
            tags, bits, width, height, across, down, tiled=tiled, planar=planar
        )
    if any(not offset for offset in offsets[:expected]) or any(
        not length for length in lengths[:expected]
    ):
        raise UnsupportedImage("a sparse TIFF, which leaves out empty tiles, is not supported")
    for offset, length in zip(offsets[:expected], lengths, strict=False):
        if offset + length > len(data):
            raise TruncatedImage(
                f"the TIFF is truncated in its pixels, at byte {len(data):,} of {offset + length:,}"
            )


def _compute_strip_sizes(
    tags: TiffTags, bits: tuple[int, ...], width: int, height: int, across: int, down: int, *,
    tiled: bool, planar: bool,
) -> tuple[int, ...]:  # fmt: skip
    """Bytes of each strip or tile by its size; some writers state other numbers."""
    if tags.get_first(PHOTOMETRIC, 0) == 6 and tags.get_all(SUBSAMPLING) != (1, 1):
        return tags.get_all(TILE_BYTES if tiled else STRIP_BYTES)  # subsampled: fewer bytes
    lengths: list[int] = []
    for per_pixel in bits if planar else (sum(bits),):
        row = -(-across * per_pixel // 8)
        if tiled:
            lengths += [row * down] * (-(-width // across) * -(-height // down))
        else:
            full, rest = divmod(height, down)
            lengths += [row * down] * full + [row * rest] * (rest > 0)
    return tuple(lengths)
