"""Open an image file: its limits, checksums and header, and its thumbnail. Imports no torch."""

from __future__ import annotations

import importlib
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageFile, UnidentifiedImageError

from imgcls.data import formats
from imgcls.data.decoding import jpeg, png, tiff
from imgcls.data.decoding.image_headers import is_cut_off, read_jpeg_xl_header, read_sample_format
from imgcls.data.decoding.pixels import find_ico_image, load_rgb
from imgcls.data.formats import ImageFormat
from imgcls.errors import (
    EmptyImage,
    ImageError,
    ImageTooLarge,
    NotAnImage,
    TruncatedImage,
    UnsupportedImage,
)

MAX_PIXELS = 100_000_000
JPEG_SIGNATURE = b"\xff\xd8\xff"
_JPEG_FORMATS = ("JPEG", "MPO")
_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's warnings are raised as errors here, or are harmless. One filter for the process, because
# `catch_warnings` around each image would mix up the filters of threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class ImagePreview:
    """Thumbnail of an image file, with facts from its header.

    image:        RGB, upright
    format:       Pillow's name of the format
    display_size: (width, height) in pixels, after EXIF orientation
    orientation:  EXIF, 1 to 8
    """

    image: Image.Image
    format: str
    display_size: tuple[int, int]
    orientation: int


def decode_preview(data: bytes, side: int, *, max_pixels: int = MAX_PIXELS) -> ImagePreview:
    """Thumbnail of an image file, at most `side` pixels wide and high.

    Raises as `decode_image` does.
    """
    header = read_header(data, max_pixels)
    try:
        if header.is_plain_jpeg:
            factor = choose_scale_factor(header.image.size, (side, side))
            rgb = apply_orientation(
                Image.fromarray(jpeg.decode_jpeg(data, factor)), header.orientation
            )
            display_size = header.display_size
        else:
            rgb = apply_orientation(decode_full_rgb(header.image, data), header.orientation)
            display_size = rgb.size
        rgb.thumbnail((side, side))
    except ImageError:
        raise
    except Exception as error:
        raise convert_error(error, data) from error
    return ImagePreview(rgb, header.image.format or "", display_size, header.orientation)


@dataclass(frozen=True)
class ImageHeader:
    """Header of an image file that is opened and not decoded.

    orientation:  EXIF, 1 to 8
    display_size: (width, height) in pixels, after EXIF orientation
    png_chunks:   chunks of a PNG
    is_plain_png: a PNG of 8 bits, gray or RGB, not interlaced, upright
    """

    image: ImageFile.ImageFile
    orientation: int
    display_size: tuple[int, int]
    png_chunks: Sequence[png.PngChunk] = ()
    is_plain_png: bool = False

    @property
    def is_plain_jpeg(self) -> bool:
        """Whether libjpeg decodes it; MPO is a phone's JPEG with a depth map."""
        return self.image.format in _JPEG_FORMATS and self.image.mode in ("L", "RGB")


def read_header(data: bytes, max_pixels: int) -> ImageHeader:
    """Read the header of an image file. Raises as `decode_image` does."""
    image, chunks = _open_image(data, max_pixels)
    width, height = _read_size(image, data)
    check_pixel_count(width, height, max_pixels)
    if chunks:
        orientation = png.find_orientation(data, chunks)
    elif image.format == "JXL" and _is_oriented_by_decoder(image, data):
        orientation = 1  # EXIF may repeat the orientation that the decoder applies
    else:
        orientation = read_orientation(image)
    display_size = (height, width) if orientation >= 5 else (width, height)
    is_plain_png = bool(chunks) and png.is_plain_png(data, chunks)
    return ImageHeader(image, orientation, display_size, chunks, is_plain_png)


def _is_oriented_by_decoder(image: Any, data: bytes) -> bool:
    """Whether a JPEG XL states an orientation; its decoder applies it unless it holds a JPEG."""
    header = read_jpeg_xl_header(data)
    return not image.jpeg and header is not None and header[2] != 1


def check_pixel_count(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"{width}x{height} is {width * height:,} pixels, more than max_pixels {max_pixels:,}"
        )


def _read_size(image: ImageFile.ImageFile, data: bytes) -> tuple[int, int]:
    if image.format == "ICO":
        picture = find_ico_image(data)
        if picture.startswith(png.SIGNATURE):
            return png.parse_ihdr(picture)[:2]
    return image.size


def choose_scale_factor(size: tuple[int, int], min_size: tuple[int, int]) -> jpeg.ScaleFactor:
    """The largest factor by which an image can be reduced and have at least `min_size`."""
    possible = min(size[0] // min_size[0], size[1] // min_size[1])
    return 8 if possible >= 8 else 4 if possible >= 4 else 2 if possible >= 2 else 1


def decode_full_rgb(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """As `load_rgb`, with an error for missing image data of a JPEG, which Pillow ignores."""
    if image.format in _JPEG_FORMATS:
        image = Image.open(io.BytesIO(jpeg.verify_jpeg(data)), formats=["JPEG"])
    return load_rgb(image, data)


def _open_image(data: bytes, max_pixels: int) -> tuple[ImageFile.ImageFile, list[png.PngChunk]]:
    """Open an image with Pillow, after limits and checksums; returns the chunks of a PNG, too."""
    if not data:
        raise EmptyImage("the file has no bytes")
    format_ = formats.identify_format(data)
    if format_ is None:
        foreign = formats.identify_unsupported_format(data)
        if foreign:
            raise UnsupportedImage(f"{foreign} is not supported; {formats.DECODED_FORMATS_TEXT}")
        raise NotAnImage(f"{_describe_unknown_bytes(data)}; {formats.DECODED_FORMATS_TEXT}")
    if format_.plugin_package:
        _register_plugin(format_)
    stream, chunks = data, []
    try:
        if format_.name == "PNG":
            chunks = png.parse_chunks(data)
            png.verify_checksums(data, chunks)
            stream = png.strip_metadata(data, chunks)
        elif format_.name == "JPEG XL":
            header = read_jpeg_xl_header(data)
            if header:  # its plugin decodes when it opens
                check_pixel_count(*header[:2], max_pixels)
        elif format_.name == "ICO":
            picture = find_ico_image(data)
            if picture.startswith(png.SIGNATURE):  # Pillow decodes it when it opens
                check_pixel_count(*png.parse_ihdr(picture)[:2], max_pixels)
        openers = [name for name in format_.pillow_names if name != "MPO"]
        return Image.open(io.BytesIO(stream), formats=openers), chunks
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise _build_open_error(format_, data) from None
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(str(error)) from error
    except Exception as error:
        raise convert_error(error, data) from error


def _register_plugin(format_: ImageFormat) -> None:
    """Register a format's package with Pillow. Raises UnsupportedImage if it is not installed."""
    try:
        package = importlib.import_module(format_.plugin_package or "")
    except ImportError:
        raise UnsupportedImage(
            f"{format_.name} needs a package that is not installed; "
            f"run: pip install 'imgcls[{formats.FORMATS_EXTRA}]'"
        ) from None
    if format_.name == "HEIC" and "HEIF" not in Image.OPEN:
        package.register_heif_opener()


def _build_open_error(format_: ImageFormat, data: bytes) -> ImageError:
    """The error for a file that Pillow does not open: unsupported, truncated or damaged."""
    try:
        samples = read_sample_format(format_, data)
    except ImageError as error:
        return error
    if format_.name == "TIFF":
        return UnsupportedImage(f"TIFF: {samples} is not supported{tiff.describe_encoding(data)}")
    article = "an" if format_.name[0] in "AI" else "a"
    text = f"begins as {article} {format_.name} does, but its header is damaged or cut off"
    return convert_error(ValueError(text), data)


def apply_orientation(image: Image.Image, orientation: int) -> Image.Image:
    """Rotate or mirror an image as its EXIF orientation, 1 to 8, requires."""
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def read_orientation(image: Image.Image) -> int:
    if image.format == "TIFF":
        return 1  # Pillow applies it
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  broken EXIF does not affect the pixels
        return 1
    return value if value in range(1, 9) else 1


def convert_error(error: Exception, data: bytes) -> ImageError:
    reason = re.sub(r"^\w+, \S+:\d+, ", "", " ".join(str(error).split()))[:300]
    lowered = reason.lower()
    if isinstance(error, Image.DecompressionBombError):
        return ImageTooLarge(reason)
    refusal = jpeg.find_unsupported_process(data) if data.startswith(JPEG_SIGNATURE) else None
    if refusal:
        return refusal
    signs = ("truncated", "incomplete", "eof", "unexpected end", "not enough image data")
    if any(sign in lowered for sign in signs) or is_cut_off(data):
        return TruncatedImage(f"{reason} ({len(data):,} bytes)")
    return ImageError(reason or type(error).__name__)


def _describe_unknown_bytes(data: bytes) -> str:
    head = data[:64].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "the bytes are a web page or XML"
    if head.startswith((b"{", b"[")):
        return "the bytes are JSON"
    if head.startswith(b"%pdf"):
        return "the bytes are a PDF"
    return f"the bytes begin with {data[:8]!r}"
