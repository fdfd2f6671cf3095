"""Table of image formats: names, suffixes, media types, signatures and decoders.

File listing, decoding, data checks and serving all use this table. It imports neither torch nor
Pillow, so that listing files starts fast.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

LISTING_FILE, LISTING_DONE_FILE = "_listing.json", "_SUCCESS"
"""Files that `imgcls manifest build` writes next to a manifest: its content, and its success."""

Decoder = Literal["simplejpeg", "libspng", "pillow", "extra"]
FORMATS_EXTRA = "formats"
"""Extra of `imgcls` that installs the packages for formats whose decoder is `extra`."""


@dataclass(frozen=True)
class ImageFormat:
    """An image format that is decoded.

    name:           name in messages and docs
    pillow_names:   Pillow's names for it; MPO is opened as JPEG
    suffixes:       lower case, with the dot; the usual one first
    mime_types:     media types, the registered one first
    signature:      regular expression for the first bytes; None if `identify_format` decides
    decoder:        simplejpeg or libspng (Pillow for files that these do not decode), pillow or
        extra
    plugin_package: module that registers the format with Pillow, for `extra`
    """

    name: str
    pillow_names: tuple[str, ...]
    suffixes: tuple[str, ...]
    mime_types: tuple[str, ...]
    signature: bytes | None
    decoder: Decoder = "pillow"
    plugin_package: str | None = None


IMAGE_FORMATS = (
    ImageFormat(
        "JPEG", ("JPEG", "MPO"), (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
        ("image/jpeg", "image/pjpeg", "image/mpo"), rb"\xff\xd8\xff", "simplejpeg",
    ),
    ImageFormat(
        "PNG", ("PNG",), (".png", ".apng"), ("image/png", "image/apng"), rb"\x89PNG", "libspng"
    ),
    ImageFormat("WebP", ("WEBP",), (".webp",), ("image/webp",), rb"RIFF....WEBP"),
    ImageFormat("GIF", ("GIF",), (".gif",), ("image/gif",), rb"GIF8"),
    ImageFormat(
        "BMP", ("BMP", "DIB"), (".bmp", ".dib"), ("image/bmp", "image/x-ms-bmp"),
        rb"BM|[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0.{8}\x01\0",
    ),
    ImageFormat(
        "TIFF", ("TIFF",), (".tif", ".tiff"), ("image/tiff",),
        rb"II[*+]\0|MM\0[*+]|II\0\*|MM\*\0",
    ),
    ImageFormat("AVIF", ("AVIF",), (".avif", ".avifs"), ("image/avif",), None),
    ImageFormat(
        "JPEG 2000", ("JPEG2000",), (".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc"),
        ("image/jp2", "image/jpx", "image/j2c"), rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    ),
    ImageFormat(
        "PPM", ("PPM",), (".ppm", ".pgm", ".pbm", ".pnm"),
        ("image/x-portable-pixmap", "image/x-portable-graymap", "image/x-portable-bitmap",
         "image/x-portable-anymap"), rb"P[1-6][ \t\r\n\v\f#]",
    ),
    ImageFormat(
        "ICO", ("ICO",), (".ico",), ("image/vnd.microsoft.icon", "image/x-icon"),
        rb"\0\0\x01\0(?!\0\0)..(?s:.{3})\0",
    ),
    ImageFormat(
        "TGA", ("TGA",), (".tga", ".icb", ".vda", ".vst"), ("image/x-tga", "image/x-targa"), None
    ),
    ImageFormat(
        "HEIC", ("HEIF",), (".heic", ".heif", ".hif"), ("image/heic", "image/heif"), None,
        "extra", "pillow_heif",
    ),
    ImageFormat(
        "JPEG XL", ("JXL",), (".jxl",), ("image/jxl",),
        rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", "extra", "pillow_jxl",
    ),
    ImageFormat(
        "DICOM", ("DICOM",), (".dcm", ".dicom"), ("application/dicom",), rb".{128}DICM",
        "extra", "imgcls.data.decoding.dicom",
    ),
)  # fmt: skip

IMAGE_SUFFIXES = frozenset(suffix for format_ in IMAGE_FORMATS for suffix in format_.suffixes)
MIME_TYPES = tuple(mime for format_ in IMAGE_FORMATS for mime in format_.mime_types)
FORMAT_BY_PILLOW_NAME = {
    name: format_ for format_ in IMAGE_FORMATS for name in format_.pillow_names
}
"""Formats by Pillow's name."""

_BUILT_IN_NAMES = [format_.name for format_ in IMAGE_FORMATS if format_.decoder != "extra"]
_EXTRA_NAMES = [format_.name for format_ in IMAGE_FORMATS if format_.decoder == "extra"]
DECODED_FORMATS_TEXT = (
    f"{', '.join(_BUILT_IN_NAMES[:-1])} and {_BUILT_IN_NAMES[-1]} are decoded, "
    f"{' and '.join(_EXTRA_NAMES)} with "
    f"imgcls[{FORMATS_EXTRA}]"
)
"""List of the formats, for messages."""

_HEVC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")

_UNSUPPORTED_FORMATS = (
    ("a Photoshop document (PSD)", rb"8BPS"),
    ("an OpenEXR image", rb"\x76\x2f\x31\x01"),
    ("a Radiance HDR image", rb"#\?(RADIANCE|RGBE)"),
    ("an SVG drawing", rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg[\s>]"),
    ("a PDF", rb"\s*%PDF"),
    ("an Encapsulated PostScript file", rb"%!PS|\xc5\xd0\xd3\xc6"),
    ("an Apple icon (ICNS)", rb"icns"),
    ("a Windows cursor (CUR)", rb"\0\0\x02\0(?!\0\0)..(?s:.{3})\0"),
    ("a DirectDraw surface (DDS)", rb"DDS "),
    ("a FITS image", rb"SIMPLE  ="),
    ("a NIfTI volume", rb".{344}(n\+1|ni1)\0"),
    ("a Canon CR3 raw file", rb"....ftypcrx "),
    ("a Fujifilm RAF raw file", rb"FUJIFILMCCD-RAW"),
    ("an Olympus ORF raw file", rb"IIR[OS]|MMOR"),
    ("a Panasonic RW2 raw file", rb"IIU\0"),
    ("a Sigma X3F raw file", rb"FOVb"),
    ("a Minolta MRW raw file", rb"\0MRM"),
    ("a JPEG XR image", rb"II\xbc"),
    ("a PAM image (P7)", rb"P7\n"),
    ("a floating-point PFM image", rb"P[Ff]\s"),
    ("a GIMP image (XCF)", rb"gimp xcf"),
    ("a QOI image", rb"qoif"),
    ("a PCX image", rb"\x0a[\0\x02-\x05]\x01[\x01\x02\x04\x08]"),
    ("an SGI image", rb"\x01\xda[\0\x01][\x01\x02]\0[\x01-\x03]"),
    ("a Sun raster image", rb"\x59\xa6\x6a\x95"),
    ("a Windows metafile", rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF"),
    ("an XPM image", rb"/\* XPM \*/"),
    ("an XBM image", rb"#define \S+_width "),
    ("a BPG image", rb"BPG\xfb"),
    ("a FLIF image", rb"FLIF"),
    ("a DjVu document", rb"AT&TFORM"),
    ("an MNG animation", rb"\x8aMNG"),
    ("a JNG image", rb"\x8bJNG"),
    ("a KTX texture", rb"\xabKTX "),
)
"""Image formats that are recognized but not decoded: name with its article, first bytes."""


def has_image_suffix(path: str) -> bool:
    """Whether the suffix of a path or URL is that of a format in the table."""
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


EXPLANATIONS_FOLDER = "_explanations"
"""Folder of the pictures of `predict --explain`, which no listing of images has."""
SYSTEM_FOLDERS = frozenset((
    "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "lost+found", "__macosx",
    "$recycle.bin", "system volume information", EXPLANATIONS_FOLDER,
))  # fmt: skip
"""Folders that file systems, NAS devices, archivers and imgcls create, in lower case."""


def is_hidden_name(name: str) -> bool:
    """Whether a file or folder is hidden, or created by the system."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def identify_format(data: bytes) -> ImageFormat | None:
    """Identify the format of a file by its first bytes; None if it is not in the table."""
    head = data[:132]
    for format_, signature in _SIGNATURES:
        if signature.match(head):
            return format_
    if head[4:8] == b"ftyp":
        brands = _read_brands(data)
        if b"avif" in brands or b"avis" in brands:
            return _FORMAT_BY_NAME["AVIF"]
        if any(brand in brands for brand in _HEVC_BRANDS):
            return _FORMAT_BY_NAME["HEIC"]
        if brands and brands[0] in (b"mif1", b"msf1"):
            return _FORMAT_BY_NAME["HEIC"]
        return None
    return _FORMAT_BY_NAME["TGA"] if _is_tga(data) else None


def identify_unsupported_format(data: bytes) -> str | None:
    """Name, with its article, of an image format that is recognized but not decoded."""
    head = data[:1024]
    return next(
        (name for name, signature in _UNSUPPORTED_SIGNATURES if signature.match(head)), None
    )


def _read_brands(data: bytes) -> list[bytes]:
    """The major and compatible brands of an ISO base media file."""
    length = min(int.from_bytes(data[:4], "big"), 256)
    return [data[8:12], *(data[i : i + 4] for i in range(16, length, 4))]


def _is_tga(data: bytes) -> bool:
    """TGA has no signature: each field of its header must hold one of the few valid values.

    Source: Truevision TGA File Format Specification, version 2.0, 1991.
    """
    if len(data) < 18:
        return False
    map_type, kind, map_bits, depth, flags = data[1], data[2], data[7], data[16], data[17]
    if not any(data[12:14]) or not any(data[14:16]) or flags & 0xC0:
        return False
    mapped = kind in (1, 9)
    depths = {1: (8,), 9: (8,), 2: (16, 24, 32), 10: (16, 24, 32), 3: (8, 16), 11: (8, 16)}
    if depth not in depths.get(kind, ()):
        return False
    if mapped or map_type:
        return map_type == 1 and map_bits in (15, 16, 24, 32) and any(data[5:7])
    return map_type == 0 and not any(data[3:8])


_SIGNATURES = [
    (format_, re.compile(format_.signature, re.DOTALL))
    for format_ in reversed(IMAGE_FORMATS)  # the header of a DICOM file may begin with one of TIFF
    if format_.signature
]
_UNSUPPORTED_SIGNATURES = [
    (name, re.compile(signature, re.DOTALL | re.IGNORECASE if b"svg" in signature else re.DOTALL))
    for name, signature in _UNSUPPORTED_FORMATS
]
_FORMAT_BY_NAME = {format_.name: format_ for format_ in IMAGE_FORMATS}
