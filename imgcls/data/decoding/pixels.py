"""Convert decoded samples to 8-bit RGB, scaled by the sample format in the file's header.

Transparency is composited over white. Pillow decodes. Where its modes lose information of the
header (bits below the eighth, a transparent 16-bit color, planes, an inverted scale), the stored
samples are read and scaled here.
"""

from __future__ import annotations

import io
import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from imgcls.data import formats
from imgcls.data.decoding import png, tiff
from imgcls.data.decoding.image_headers import SampleFormat, read_sample_format
from imgcls.errors import EmptyImage, ImageError, TruncatedImage, UnsupportedImage

Pixels = npt.NDArray[np.uint8]
SampleArray = npt.NDArray[Any]


def load_rgb(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """Decode the first frame or page of a file to RGB; EXIF orientation is applied in TIFFs only.

    image: the file, opened and not decoded
    data:  its bytes
    Raises UnsupportedImage, or Pillow's error for damaged pixels.
    """
    format_ = formats.FORMAT_BY_PILLOW_NAME[image.format or ""]
    samples = read_sample_format(format_, data)
    if format_.name == "PNG":
        return _load_png(image, data, samples)
    if format_.name == "TIFF":
        return _load_tiff(image, data, samples)
    if format_.name == "GIF":
        return _load_gif(image)
    if format_.name == "ICO":
        return _load_ico(image, data)
    if format_.name == "PPM" and image.mode == "I":
        return _convert_gray(np.asarray(image), 65535)  # to which Pillow scales any larger maximum
    if format_.name == "JPEG 2000":
        return _load_jpeg_2000(image, samples)
    return convert_to_rgb(image)


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert a Pillow image of any mode to RGB: transparency over white, 16 bits scaled to 8.

    Raises UnsupportedImage for modes whose range is unknown, EmptyImage without pixels.
    """
    image.load()
    if 0 in image.size:
        raise EmptyImage(f"the image has no pixels: {image.width} x {image.height}")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})  # of a TIFF
        bits = tags.get(tiff.BITS_PER_SAMPLE, (16,))[0]
        return _convert_gray(
            np.asarray(image), 2**bits - 1, inverted=tags.get(tiff.PHOTOMETRIC) == 0
        )
    if image.mode in ("I", "F"):
        kind = {"I": "signed 32-bit integer", "F": "32-bit float"}[image.mode]
        raise UnsupportedImage(
            f"{kind} samples are not supported: the value of white is unknown; convert them to "
            "unsigned 8 or 16 bits"
        )
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        canvas = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, layered).convert("RGB")
    return image.convert("RGB")


def _convert_gray(values: SampleArray, top: int, *, inverted: bool = False) -> Image.Image:
    """(H, W) samples from 0 to `top` to RGB; `top` is white, or black if inverted."""
    gray = _scale_to_8_bits(values, top)
    return Image.fromarray(255 - gray if inverted else gray).convert("RGB")


def _scale_to_8_bits(values: SampleArray, top: int) -> npt.NDArray[np.uint8]:
    """Scale samples from 0 to `top` to 8 bits."""
    if top == 255:
        return values.astype(np.uint8)
    scaled = np.round(values.astype(np.float32) * np.float32(255 / top))
    return np.minimum(scaled, 255).astype(np.uint8)


# ------------------------------------------------------------------ PNG


def _load_png(image: ImageFile.ImageFile, data: bytes, samples: SampleFormat) -> Image.Image:
    chunks = png.parse_chunks(data)
    decoded = png.decode_8_bit(data, chunks)
    if decoded is None:
        png.verify_rows(data, chunks)
    if samples.color != "palette":
        image.info.pop("transparency", None)  # Pillow compares it with scaled samples
    stated = samples.significant_bits or samples.bits
    narrow = any(n < depth for n, depth in zip(stated, samples.bits, strict=True))
    if samples.color == "palette" or not (narrow or samples.transparent_color):
        return convert_to_rgb(image if decoded is None else Image.fromarray(decoded))
    if decoded is None:
        values = _read_png_samples(image, data, samples)
    else:
        values = np.atleast_3d(decoded).astype(np.uint16)
    colors = values.shape[2] - (samples.alpha is not None)
    tops = _find_white_levels(values, samples)
    rgb = np.dstack([_scale_to_8_bits(values[..., band], tops[band]) for band in range(colors)])
    if samples.transparent_color:
        rgb[(values == np.array(samples.transparent_color, values.dtype)).all(-1)] = 255
    if samples.alpha:
        opacity = values[..., -1:].astype(np.float32) / tops[-1]
        rgb = np.round(rgb * opacity + 255 * (1 - opacity)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(rgb[..., 0] if colors == 1 else rgb).convert("RGB")


def _read_png_samples(
    image: ImageFile.ImageFile, data: bytes, samples: SampleFormat
) -> SampleArray:
    """(H, W, bands) stored samples of a gray or RGB PNG."""
    depth, bands = samples.bits[0], len(samples.bits)
    if depth < 16 or bands == 1:
        image.load()
        values = np.asarray(image)
        if 1 < depth < 8:
            values = values // (255 // (2**depth - 1))  # undo Pillow's scaling
        return np.atleast_3d(values).astype(np.uint16)
    # Pillow keeps one byte of each 16-bit sample. Reading twice, once in each byte order, gives
    # both; gray with alpha is read once, as four bands of bytes.
    if bands == 2:
        whole = _read_as(image, "RGBA", "RGBA").astype(np.uint16)
        return whole[..., 0::2] << 8 | whole[..., 1::2]
    mode = "RGB" if bands == 3 else "RGBA"
    low = _read_as(_reopen(image, data), mode, f"{mode};16L").astype(np.uint16)
    return _read_as(image, mode, f"{mode};16B").astype(np.uint16) << 8 | low


def _reopen(image: ImageFile.ImageFile, data: bytes) -> ImageFile.ImageFile:
    stream = io.BytesIO(png.strip_metadata(data, png.parse_chunks(data)))
    return Image.open(stream, formats=[image.format or ""])


def _read_as(image: ImageFile.ImageFile, mode: str, raw_mode: str) -> SampleArray:
    image.info.pop("transparency", None)
    image._mode = mode
    image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
    image.load()
    return np.asarray(image)


def _find_white_levels(values: SampleArray, samples: SampleFormat) -> list[int]:
    """The value of white, or of opaque, in each band.

    By the specification, samples of n significant bits are scaled to all bits of the PNG, so that
    the maximum is white whatever sBIT states. Some files leave them unscaled in the low bits. These
    are detected by their samples: none exceeds n bits, and some have low bits that none of the
    specification's ways to scale n bits produces.
    Source: Portable Network Graphics specification, third edition, sections 11.3.2.7 and 12.4.
    """
    depth = samples.bits[0]
    full = 2**depth - 1
    significant = samples.significant_bits or samples.bits
    colors = len(significant) - (samples.alpha is not None)
    bands = [(values[..., band].astype(np.int64), significant[band]) for band in range(colors)]
    low = all(band.max(initial=0) < 2**n for band, n in bands)
    if not low or any(
        all((scale(band, n, depth) == band).all() for band, n in bands) for scale in _SCALINGS
    ):
        return [full] * len(significant)
    tops = [2**n - 1 for n in significant]
    if samples.alpha and values[..., -1].max(initial=0) > tops[-1]:
        tops[-1] = full
    return tops


def _shift(values: SampleArray, bits: int, depth: int) -> SampleArray:
    return values >> depth - bits << depth - bits


def _replicate(values: SampleArray, bits: int, depth: int) -> SampleArray:
    high = values >> depth - bits
    result = np.zeros_like(values)
    for shift in range(depth - bits, -bits, -bits):
        result |= high << shift if shift >= 0 else high >> -shift
    return result


def _scale_linearly(values: SampleArray, bits: int, depth: int) -> SampleArray:
    top, full = 2**bits - 1, 2**depth - 1
    rounded: SampleArray = np.round(np.round(values * (top / full)) * (full / top))
    return rounded.astype(values.dtype)


_SCALINGS = (_shift, _replicate, _scale_linearly)
"""Ways to scale samples of n bits: each recomputes values from their n highest bits."""


# ------------------------------------------------------------------ TIFF


def _load_tiff(image: ImageFile.ImageFile, data: bytes, samples: SampleFormat) -> Image.Image:
    tags = tiff.parse_tags(data)
    if samples.is_planar:
        if not (
            samples.color in ("RGB", "CMYK")
            and samples.alpha != "associated"
            and set(samples.bits) <= {8, 16}
        ):
            raise UnsupportedImage(f"TIFF: {samples} is not supported; store it with one plane")
        _use_libtiff(
            image, tags, image.mode, image.mode + (";16N" if samples.bits[0] == 16 else "")
        )
    elif (
        samples.color == "YCbCr"
        and tags.get_first(tiff.COMPRESSION, 1) == 1
        and len(samples.bits) == 3
    ):
        _use_libtiff(image, tags, "RGB", "RGBX")  # it handles subsampling and reference levels
    elif samples.color == "palette":
        return _load_tiff_palette(image, tags)
    return convert_to_rgb(image)


def _use_libtiff(image: ImageFile.ImageFile, tags: tiff.TiffTags, mode: str, raw_mode: str) -> None:
    """Let libtiff decode an uncompressed file, too; Pillow's own reader mixes up the planes."""
    image._mode = mode
    image.use_load_libtiff = True  # type: ignore[attr-defined]
    size = (0, 0, tags.get_first(tiff.WIDTH, 0), tags.get_first(tiff.HEIGHT, 0))
    image.tile = [ImageFile._Tile("libtiff", size, 0, (raw_mode, False, tags.offset))]


def _load_tiff_palette(image: ImageFile.ImageFile, tags: tiff.TiffTags) -> Image.Image:
    """Decode a palette TIFF; as in libtiff, a palette without an entry above 255 has 8 bits."""
    image.load()
    colors = tags.get_all(tiff.COLOR_MAP)
    if colors and max(colors) < 256 and image.mode == "P":
        entries = np.array(colors, np.uint8).reshape(3, -1).T
        image.putpalette(entries.tobytes())
    return convert_to_rgb(image)


# ------------------------------------------------------------------ JPEG 2000, GIF and ICO


def _load_jpeg_2000(image: ImageFile.ImageFile, samples: SampleFormat) -> Image.Image:
    """Undo Pillow's shift of samples to the high bits of 8 or 16, which makes white too dark."""
    bits = set(samples.bits)
    if image.mode in ("L", "I;16") and bits != {8}:
        image.load()
        depth = samples.bits[0]
        return _convert_gray(np.asarray(image) >> (8 if depth < 8 else 16) - depth, 2**depth - 1)
    if bits != {8}:
        raise UnsupportedImage(f"JPEG 2000: {samples} is not supported; convert it to 8 bits")
    return convert_to_rgb(image)


def _load_gif(image: ImageFile.ImageFile) -> Image.Image:
    """A first frame smaller than the image leaves the rest transparent, hence white."""
    covered = image.tile[0].extents if image.tile else None
    rgb = convert_to_rgb(image)
    if covered is None or covered == (0, 0, *rgb.size):
        return rgb
    canvas = Image.new("RGB", rgb.size, (255, 255, 255))
    canvas.paste(rgb.crop(covered), covered[:2])
    return canvas


def _load_ico(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """Decode the largest image of an icon, which can be a PNG."""
    picture = find_ico_image(data)
    if not picture.startswith(png.SIGNATURE):
        return convert_to_rgb(image)
    chunks = png.parse_chunks(picture)
    png.verify_checksums(picture, chunks)
    inner = Image.open(io.BytesIO(png.strip_metadata(picture, chunks)), formats=["PNG"])
    return load_rgb(inner, picture)


def find_ico_image(data: bytes) -> bytes:
    """Bytes of the image that Pillow decodes from an icon, the largest one.

    It is a PNG, or a BMP without its file header. Raises TruncatedImage if the file ends before it,
    ImageError if it has no bytes.
    """
    (count,) = struct.unpack_from("<H", data, 4)
    if 6 + 16 * count > len(data):
        raise TruncatedImage(f"the icon is truncated in its directory ({len(data):,} bytes)")
    entries = [struct.unpack_from("<BBBBHHII", data, 6 + 16 * i) for i in range(count)]

    def rank(entry: tuple[int, ...]) -> tuple[int, int]:
        width, height, colors, _, _, bits, _, _ = entry
        depth = bits or (math.ceil(math.log2(colors)) if colors else 0) or 256
        return -(width or 256) * (height or 256), depth

    *_, size, offset = min(entries, key=rank)
    if offset + size > len(data):
        raise TruncatedImage(f"the icon is truncated in its image ({len(data):,} bytes)")
    if not size:
        raise ImageError("the icon is damaged: its image has no bytes")
    return data[offset : offset + size]
