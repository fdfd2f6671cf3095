"""JPEG files: frame header, and a decoder that reports missing and damaged image data.

Pillow and torchvision ignore libjpeg's warnings: missing image data become gray, without an error.
This module decodes by simplejpeg, which also runs libjpeg-turbo, but reports its warnings. The same
rules hold on every decode route:

- All image data are present: the file is valid. Its end marker (EOI) may be missing, and padding
  (bytes of 0x00 or 0xFF) may follow the image data.
- Image data are missing: TruncatedImage, whether or not an end marker follows. In a progressive
  file every coefficient must be present down to its last bit.
- libjpeg finds the image data corrupt: ImageError.

Sources: ITU-T T.81, annexes B (markers) and G (progression); libjpeg-turbo, jerror.h (warnings).
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image

from imgcls.data.decoding.pixels import Pixels
from imgcls.errors import ImageError, TruncatedImage, UnsupportedImage

ScaleFactor = Literal[1, 2, 4, 8]

MAX_UNUSED_BYTES = 2
"""Maximum number of unused bytes between the image data and the end marker, as libjpeg counts them;
some cameras write them. Of 1,336 photographs with one wrong bit, 13 % end with unused bytes, 0.6 %
with at most two."""

_EOI, _SOS, _RESTART_INTERVAL, _COMMENT = 0xD9, 0xDA, 0xDD, 0xFE
_APP1, _APP14 = 0xE1, 0xEE
_SOI_BYTES, _EOI_BYTES = b"\xff\xd8", b"\xff\xd9"
_APP_MARKERS = range(0xE0, 0xF0)
_MAX_WIDTH = 65_500
"""Largest width that libjpeg decodes."""
_STANDALONE_MARKERS = (0x01, *range(0xD0, 0xD9))
"""Markers without a length: TEM, restart and start of image."""
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_LS = 0xF7
_HUFFMAN_MARKERS = (0xC0, 0xC1, 0xC2)
_PROGRESSIVE_MARKERS = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_ANY_MARKER = re.compile(rb"\xff[^\x00\xff]")
_SCAN_END = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""A marker that ends entropy-coded data: neither a stuffed 0xFF00 nor a restart marker."""
_STUFFED = re.compile(rb"(?:\xff\x00)*")
_SEQUENTIAL_SPECTRUM = b"\x00\x3f\x00"
"""Spectral selection and approximation of a sequential scan."""
_RESTART_MARKER = re.compile(rb"\xff[\xd0-\xd7]")
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0xd([0-79])")
_MISSING_DATA = re.compile(r"premature end|found marker 0xd9 instead of RST", re.IGNORECASE)
_UNSUPPORTED_SAMPLING = "subsampling level"
_READ_AHEAD_BYTES = 8
"""Size of libjpeg's bit buffer, in bytes."""


@dataclass(frozen=True)
class FrameHeader:
    """The frame header of a JPEG, and the size of its first scan.

    process:   marker code, 0xC0 to 0xCF: 0xC0 baseline, 0xC1 extended, 0xC2 progressive, 0xC3
               lossless; from 0xC9 on arithmetic coding
    precision: bits per sample
    size:      (width, height) in pixels
    sampling:  (horizontal, vertical) sampling factors by component identifier
    scanned:   number of components in the first scan
    has_app1:  whether a segment with EXIF or XMP data precedes the scan
    """

    process: int
    precision: int
    size: tuple[int, int]
    sampling_factors: dict[int, tuple[int, int]]
    first_scan_components: int
    has_app1: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether libjpeg decodes it, upright: baseline to progressive, 8 bits, gray or color."""
        return (
            self.process in _HUFFMAN_MARKERS
            and self.precision == 8
            and len(self.sampling_factors) in (1, 3)
            and min(self.size) > 0
            and not self.has_app1
        )

    @property
    def has_multiple_scans(self) -> bool:
        return self.process in _PROGRESSIVE_MARKERS or self.first_scan_components < len(
            self.sampling_factors
        )

    @property
    def chroma_spans(self) -> tuple[float, float]:
        """Pixels of a reduced image that its coarsest component spans, across and down.

        libjpeg reduces a subsampled component less than the others if both of its sampling factors
        allow it: 1, 1 for 4:4:4 and 4:2:0, 2, 1 for 4:2:2 and 1, 2 for 4:4:0.
        Source: libjpeg-turbo, jdmaster.c, jpeg_calc_output_dimensions.
        """
        # a damaged file may have factors of 0
        max_across = max(1, *(across for across, _ in self.sampling_factors.values()))
        max_down = max(1, *(down for _, down in self.sampling_factors.values()))
        spans = []
        for across, down in self.sampling_factors.values():
            across, down = max(1, across), max(1, down)
            while max_across % (2 * across) == 0 and max_down % (2 * down) == 0:
                across, down = 2 * across, 2 * down
            spans.append((max_across / across, max_down / down))
        return max(span for span, _ in spans), max(span for _, span in spans)


def read_frame_header(data: bytes) -> FrameHeader | None:
    """Read the frame header; None if it is damaged, or no scan follows."""
    frame, has_app1 = b"", False
    for marker, start, stop in _iterate_segments(data, first_scan=True):
        if marker == _APP1:
            has_app1 = True
        elif marker in _FRAME_MARKERS:
            frame = data[start:stop]
        elif marker == _SOS and len(frame) > 10 and len(frame) >= 10 + 3 * frame[9] > 10:
            sampling = {
                frame[at]: (frame[at + 1] >> 4, frame[at + 1] & 15)
                for at in range(10, 10 + 3 * frame[9], 3)
            }
            size = int.from_bytes(frame[7:9], "big"), int.from_bytes(frame[5:7], "big")
            return FrameHeader(frame[1], frame[4], size, sampling, data[start + 4], has_app1)
    return None


def read_frame_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in the frame header of a JPEG of any process, or of a JPEG-LS."""
    for marker, start, stop in _iterate_segments(data, first_scan=True):
        if (marker in _FRAME_MARKERS or marker == _JPEG_LS) and stop - start > 9:
            height, width = struct.unpack_from(">HH", data, start + 5)
            return width, height
    return None


def find_unsupported_process(data: bytes) -> UnsupportedImage | None:
    """The error for a JPEG process that is not decoded, such as 12-bit; None for a supported one.

    Needs no scan, so it also works for a truncated file. Source: ITU-T T.81, table B.1 (markers).
    """
    for marker, start, stop in _iterate_segments(data, first_scan=True):
        if (marker in _FRAME_MARKERS or marker == _JPEG_LS) and stop - start > 9:
            kind = _name_unsupported_process(
                marker, precision=data[start + 4], count=data[start + 9]
            )
            text = f"{kind} is not supported; convert it to 8-bit baseline JPEG"
            return UnsupportedImage(text) if kind else None
    return None


def _name_unsupported_process(marker: int, *, precision: int, count: int) -> str | None:
    if marker == _JPEG_LS:
        return "JPEG-LS"
    lossless = "lossless " if marker in (0xC3, 0xC7, 0xCB, 0xCF) else ""
    if marker in (0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF):
        return "hierarchical JPEG"
    if precision != 8:
        return f"{precision}-bit {lossless}JPEG"
    if marker == 0xCB:
        return "lossless JPEG with arithmetic coding"
    return f"JPEG with {count} components" if count not in (1, 3, 4) else None


def may_store_rgb(data: bytes) -> bool:
    """Whether a JPEG may hold RGB, not YCbCr: by an Adobe marker or by its component identifiers.

    libjpeg decides between the two by its own rules, which other decoders do not share.
    Source: libjpeg-turbo, jdapimin.c, default_decompress_parms.
    """
    for marker, start, stop in _iterate_segments(data, first_scan=True):
        segment = data[start:stop]
        if marker == _APP14 and segment[4:9] == b"Adobe" and segment[15:16] == b"\0":
            return True
        if marker in _FRAME_MARKERS and segment[9:10] == b"\3" and segment[10:19:3] == b"RGB":
            return True
    return False


def decode_jpeg(
    data: bytes, factor: ScaleFactor = 1, *, frame: FrameHeader | None = None
) -> Pixels:
    """Decode a grayscale, YCbCr or RGB JPEG.

    factor: decode at 1/factor of the size, rounded up; each pixel is the mean of a square
    frame:  frame header of `data`, if it was already read
    Returns (H, W, 3) uint8 RGB. Raises TruncatedImage or ImageError.
    """
    frame = frame or read_frame_header(data)
    size = frame.size if frame else (0, 0)
    min_size = dict(
        zip(("min_width", "min_height"), (-(-side // factor) for side in size), strict=True)
    )
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", **(min_size if factor > 1 else {}))
    except ValueError as error:
        data = _verify_after_error(data, frame, error)
        pixels = _decode_with_pillow(data, factor)
    _check_scans(data, frame)
    return pixels


def verify_jpeg(data: bytes) -> bytes:
    """Check the image data, for a decoder that ignores libjpeg's warnings.

    Returns the file with an end marker right after the image data. Raises as `decode_jpeg` does.
    Takes about half the time of decoding, and releases the GIL.
    """
    frame = read_frame_header(data)
    try:
        _check_entropy_data(data)
    except ValueError as error:
        data = _verify_after_error(data, frame, error)
    _check_scans(data, frame)
    return data


def _verify_after_error(data: bytes, frame: FrameHeader | None, error: ValueError) -> bytes:
    """As `verify_jpeg`, for a file on which simplejpeg raised `error`."""
    refusal = find_unsupported_process(data)
    if refusal:
        raise refusal
    if _UNSUPPORTED_SAMPLING not in str(error):
        return _verify_without_padding(data)
    return data if frame is None or frame.has_multiple_scans else _verify_with_pillow(data)


def _verify_with_pillow(data: bytes) -> bytes:
    """A JPEG of one scan, with an end marker; raises TruncatedImage if image data are missing.

    Pillow reports missing data only if no end marker follows. The check replaces the marker by as
    many bytes as libjpeg reads ahead of the last block.
    """
    scan = next(stop for marker, _, stop in _iterate_segments(data) if marker == _SOS)
    try:
        image = Image.open(io.BytesIO(data[:scan] + bytes(_READ_AHEAD_BYTES)), formats=["JPEG"])
        image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
    except OSError as error:
        if "truncated" not in str(error):
            raise ImageError(f"the JPEG image data are corrupt: {error}") from error
        raise TruncatedImage(
            f"the JPEG is truncated: image data are missing ({len(data):,} bytes)"
        ) from error
    return data if data.startswith(_EOI_BYTES, scan) else data[:scan] + _EOI_BYTES


def _decode_with_pillow(data: bytes, factor: ScaleFactor) -> Pixels:
    """Decode a verified JPEG, or one with sampling factors that simplejpeg rejects."""
    image = Image.open(io.BytesIO(data), formats=["JPEG"])
    if factor > 1:
        image.draft("RGB", (max(1, image.width // factor), max(1, image.height // factor)))
    return np.array(image.convert("RGB"))


def _check_entropy_data(data: bytes, max_unused: int = 0) -> None:
    """Decode at 1/8: all entropy-coded data are read. Raises ValueError on a libjpeg warning.

    max_unused: accepted number of unused bytes before the end marker
    """
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_width=1, min_height=1)
    except ValueError as error:
        unused = _EXTRANEOUS.search(str(error))
        if unused is None or unused[2] != "9" or int(unused[1]) > max_unused:
            raise


def _verify_without_padding(data: bytes) -> bytes:
    """The file with an end marker right after its image data, if these are complete.

    For a file that libjpeg warns about: the first warning can hide others.
    Raises TruncatedImage or ImageError.
    """
    coding, whole = _strip_padding(data)
    try:
        try:
            _check_entropy_data(coding, MAX_UNUSED_BYTES)
        except ValueError as error:
            if not _EXTRANEOUS.search(str(error)):
                raise
            for interval in _split_restart_intervals(coding, str(error)):
                _check_entropy_data(interval, MAX_UNUSED_BYTES)
    except ValueError as error:
        if _MISSING_DATA.search(str(error)):
            raise TruncatedImage(
                f"the JPEG is truncated: image data are missing ({len(data):,} bytes)"
            ) from error
        raise ImageError(f"the JPEG image data are corrupt: {error}") from error
    return whole


def _split_restart_intervals(coding: bytes, warning: str) -> Iterator[bytes]:
    """The restart intervals of a sequential JPEG, each as a JPEG of one row of blocks.

    Webcams write an unused byte before every restart marker. libjpeg counts them and warns once,
    which hides its other warnings; hence each interval is checked by itself.
    Raises ValueError for missing intervals, and with `warning` for a file of another kind.
    """
    frame = read_frame_header(coding)
    parts = {marker: (start, stop) for marker, start, stop in _iterate_segments(coding)}
    if frame is None or frame.has_multiple_scans or _RESTART_INTERVAL not in parts:
        raise ValueError(warning)
    alone = len(frame.sampling_factors) == 1
    width = 8 * (1 if alone else max(across for across, _ in frame.sampling_factors.values()))
    height = 8 * (1 if alone else max(down for _, down in frame.sampling_factors.values()))
    units = math.prod(
        -(-size // unit) for size, unit in zip(frame.size, (width, height), strict=True)
    )
    at = parts[_RESTART_INTERVAL][0]
    each = int.from_bytes(coding[at + 4 : at + 6], "big")
    if width * each > _MAX_WIDTH:
        raise ValueError(warning)
    start, stop = parts[_SOS]
    scan = start + 2 + int.from_bytes(coding[start + 2 : start + 4], "big")
    found = _RESTART_MARKER.split(coding[scan:stop])
    if each == 0 or len(found) < -(-units // each):
        raise ValueError("premature end: restart intervals are missing")
    size = parts[frame.process][0] + 5
    for index, interval in enumerate(found[: -(-units // each)]):
        across = width * min(each, units - index * each)
        head = coding[:size] + struct.pack(">HH", height, across) + coding[size + 4 : scan]
        yield head + interval + _EOI_BYTES


def _strip_padding(data: bytes) -> tuple[bytes, bytes]:
    """A JPEG without the padding after its scans: its entropy-coded data alone, and the whole file.

    The first one has no application data and comments, about which libjpeg may warn, too.
    """
    coding, whole = [_SOI_BYTES], data
    progressive = False
    for marker, start, stop in _iterate_segments(data):
        if marker in _APP_MARKERS or marker in (_EOI, _COMMENT):
            continue
        progressive |= marker in _PROGRESSIVE_MARKERS
        segment = data[start:stop]
        if marker == _SOS:
            header = 2 + int.from_bytes(segment[2:4], "big")
            coded = _strip_scan_padding(segment[header:])
            whole = data[: start + header] + coded + _EOI_BYTES
            # libjpeg ignores these three bytes in a sequential file, but warns if they are wrong
            selection = segment[header - 3 : header] if progressive else _SEQUENTIAL_SPECTRUM
            segment = segment[: header - 3] + selection + coded
        coding.append(segment)
    return b"".join([*coding, _EOI_BYTES]), whole


def _strip_scan_padding(coded: bytes) -> bytes:
    """Entropy-coded data without trailing padding: bytes of 0x00 and 0xFF.

    A single such byte counts as data. More of them can be data as well, if an image ends in a flat
    color: without its end marker such a file counts as truncated, because a file that was cut and
    filled with zeros can consist of the same bytes.
    """
    kept = len(coded.rstrip(b"\x00\xff"))
    stuffed = _STUFFED.match(coded, kept)
    kept = stuffed.end() if stuffed else kept
    return coded[:kept] if len(coded) > kept + 1 or coded[kept:] == b"\xff" else coded


def _check_scans(data: bytes, frame: FrameHeader | None) -> None:
    """Raise TruncatedImage if a scan is missing, about which libjpeg does not warn."""
    if frame is None or not frame.has_multiple_scans:
        return
    missing_bits = {component: bytearray(b"\xff" * 64) for component in frame.sampling_factors}
    for marker, start, _ in _iterate_segments(data):
        if marker != _SOS:
            continue
        count = data[start + 4]
        first, last, approximation = data[start + 5 + 2 * count : start + 8 + 2 * count]
        if frame.process not in _PROGRESSIVE_MARKERS:
            first, last, approximation = _SEQUENTIAL_SPECTRUM
        bits = bytes([approximation & 15]) * (last + 1 - first)
        for component in data[start + 5 : start + 5 + 2 * count : 2]:
            if component in missing_bits:
                missing_bits[component][first : last + 1] = bits
    if any(any(bits) for bits in missing_bits.values()):
        raise TruncatedImage(f"the JPEG is truncated: scans are missing ({len(data):,} bytes)")


def _iterate_segments(data: bytes, *, first_scan: bool = False) -> Iterator[tuple[int, int, int]]:
    """(marker code, start, stop) of each marker segment after the start of the image.

    A scan's segment includes its entropy-coded data. Stops at the end marker, at damage, and with
    `first_scan` at the header of the first scan.
    """
    stop = 2
    while (found := _ANY_MARKER.search(data, stop)) is not None:
        at, marker = found.start(), data[found.start() + 1]
        if marker in _STANDALONE_MARKERS:
            stop = at + 2
            continue
        if marker == _EOI:
            yield marker, at, at + 2
            return
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        stop = at + 2 + length
        if length < 2 or stop > len(data):
            return
        if marker == _SOS:
            if length < 6 or length < 6 + 2 * data[at + 4]:
                return
            if not first_scan:
                after = _SCAN_END.search(data, stop)
                stop = after.start() if after else len(data)
        yield marker, at, stop
        if marker == _SOS and first_scan:
            return
