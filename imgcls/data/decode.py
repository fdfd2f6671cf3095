"""Bytes to pixels: one specification, several decode routes that agree.

Owns the header check (pixel limit before decoding), the choice of the fastest correct route per
image, EXIF orientation, colour modes and the resize; promises uint8 RGB of a fixed size or a typed
ImageError. Normalising is left to the classifier, on the device.

Routes, all compared in tests with the reference (Pillow decode, `Resize`, `CenterCrop`):
  dct     a JPEG much larger than needed, with `decode: fast`: libjpeg decodes at 1/2, 1/4 or 1/8
  whole   any other gray or RGB JPEG: decoded by libjpeg (simplejpeg), resized by torch
  png     a PNG of 8 bits, gray or RGB: decoded by Pillow, resized by torch
  pillow  everything else: decoded and resized by Pillow

The formats are those of `imgcls.data.formats`; samples are scaled by `imgcls.data.pixels`.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

from imgcls.data import dct_resize as reduced_images
from imgcls.data import formats, jpeg, png, tiff
from imgcls.data.formats import ImageFormat
from imgcls.data.image_headers import is_cut_off, read_jpeg_xl_header, read_sample_format
from imgcls.data.lazy_torchvision import torchvision
from imgcls.data.pixels import convert_to_rgb, find_ico_image, load_rgb
from imgcls.data.preprocess import Preprocess
from imgcls.errors import (
    EmptyImage,
    ImageError,
    ImageTooLarge,
    NotAnImage,
    TruncatedImage,
    UnsupportedImage,
)

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 100_000_000
DCT_MARGIN = 2.0
"""The DCT route keeps at least this many times the pixels per side that the resize asks for: the
mean difference from decoding sharp photographs whole is 0.3 to 0.4 of 255; at 1.4 it was 0.8 to
1.2."""
CHROMA_MARGIN = 1.4
"""The same for color samples, where libjpeg makes them coarser than the decoded image (4:2:2)."""
MAX_RESIZE_PIXELS = 4_000_000
"""Above this many pixels (a 20,000x1 strip, 256 high after resizing) only the crop is computed."""

# Pillow warns of what is told here as an error, or does no harm. One filter for the process:
# `catch_warnings` around each image would mix up the filters of threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

_JPEG_FORMATS = ("JPEG", "MPO")
_JPEG_SIGNATURE = b"\xff\xd8\xff"
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
_PILLOW_FILTER = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def decode_image(
    data: bytes, spec: Preprocess, *, max_pixels: int = MAX_PIXELS
) -> tuple[Pixels, tuple[int, int]]:
    """Decode one image to the model's input size.

    data: the file's bytes
    Returns (3, crop, crop) uint8 RGB, channels last in memory, and the (width, height) in pixels
    that a viewer would show, before resizing and after EXIF orientation.
    Raises EmptyImage, TruncatedImage, NotAnImage, UnsupportedImage, ImageTooLarge or ImageError.
    """
    header = _read_header(data, max_pixels)
    try:
        if header.is_plain_jpeg:
            return _decode_and_resize_jpeg(data, header, spec), header.display_size
        # torch could decode a plain PNG as well, but its decoder ends the whole process at damage
        # that libpng notices within the pixels
        rgb = (
            convert_to_rgb(header.image)
            if header.is_plain_png
            else _decode_full_rgb(header.image, data)
        )
        rgb = _apply_orientation(rgb, header.orientation)
        shown = rgb.size
        if (
            header.is_plain_png
            and math.prod(compute_resized_size(shown, spec)) <= MAX_RESIZE_PIXELS
        ):
            tensor = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
            return _resize_tensor(tensor, shown, spec), shown
        return _resize_pillow(rgb, shown, spec), shown
    except ImageError:
        raise
    except Exception as error:
        raise _convert_error(error, data) from error


def preprocess_pil_image(image: Image.Image, spec: Preprocess) -> Pixels:
    """A Pillow image at the model's input size: (3, crop, crop) uint8 RGB, channels last in memory.

    Its EXIF orientation is applied. An image that was opened from a file and not yet decoded is
    read from that file, as `decode` does; of any other, Pillow's mode decides how it is scaled.
    Raises an ImageError where it cannot be read.
    """
    data = None
    try:
        data = _read_undecoded_file(image)
        if data is not None:
            header = _read_header(data, max_pixels=max(MAX_PIXELS, math.prod(image.size)))
            rgb, orientation = _decode_full_rgb(header.image, data), header.orientation
        else:
            image.load()  # before EXIF is looked for: an error of the pixels must not be lost there
            rgb, orientation = convert_to_rgb(image), _read_orientation(image)
        upright = _apply_orientation(rgb, orientation)
        return _resize_pillow(upright, upright.size, spec)
    except ImageError:
        raise
    except Exception as error:
        raise _convert_error(error, data or b"") from error


def _read_undecoded_file(image: Image.Image) -> bytes | None:
    """The file of an image that Pillow has opened and not yet decoded; None for all others."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or image.fp is None:
        return None
    if image.format not in formats.FORMAT_BY_PILLOW_NAME or image.tell() != 0:
        return None
    place = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read()
    image.fp.seek(place)
    return data


def decode_batch(
    blobs: Sequence[bytes],
    spec: Preprocess,
    *,
    device: torch.device,
    max_pixels: int = MAX_PIXELS,
) -> list[tuple[torch.Tensor, tuple[int, int]] | ImageError]:
    """Decode many images on a device that does it in bulk: nvJPEG where `device` is a GPU.

    Returns for each image what `decode` does, the pixels as a uint8 tensor on `device`, or its
    error. JPEGs are decoded and resized on the device, after their image data were checked on CPUs
    (nvJPEG does not report missing data); all else goes through `decode`, and with `decode: exact`
    everything does.
    """
    results: list[tuple[torch.Tensor, tuple[int, int]] | ImageError | None] = [None] * len(blobs)
    plain = []
    for index, data in enumerate(blobs):
        if spec.decode != "fast" or not data.startswith(_JPEG_SIGNATURE):
            continue
        try:
            header = _read_header(data, max_pixels)
        except ImageError as error:
            results[index] = error
            continue
        small = math.prod(compute_resized_size(header.display_size, spec)) <= MAX_RESIZE_PIXELS
        if header.is_plain_jpeg and small:
            plain.append((index, header.orientation, header.display_size))
    sound = check_jpegs([blobs[index] for index, _, _ in plain])
    for (index, _, _), checked in zip(plain, sound, strict=True):
        if isinstance(checked, ImageError):
            results[index] = checked
    plain = [item for item in plain if results[item[0]] is None]
    encoded = [
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for data in sound
        if not isinstance(data, ImageError)
    ]
    try:
        decoded = (
            torchvision.io.decode_jpeg(encoded, torchvision.io.ImageReadMode.RGB, device=device)
            if encoded
            else []
        )
    except RuntimeError:
        decoded, plain = [], []  # one broken file fails the lot: each is then judged by itself
    for (index, orientation, shown), tensor in zip(plain, decoded, strict=True):
        upright = _apply_tensor_orientation(tensor, orientation)
        results[index] = _resize_on_device(upright, shown, spec), shown
    for index, data in enumerate(blobs):
        if results[index] is None:
            try:
                pixels, shown = decode_image(data, spec, max_pixels=max_pixels)
                results[index] = torch.from_numpy(pixels).to(device), shown
            except ImageError as error:
                results[index] = error
    return [result for result in results if result is not None]


def check_jpegs(blobs: Sequence[bytes]) -> list[bytes | ImageError]:
    """Check the image data of JPEGs, on all CPUs that this process may use.

    Returns what `jpeg.checked` returns or raises for each.
    """

    def check(data: bytes) -> bytes | ImageError:
        try:
            return jpeg.verify_jpeg(data)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(check, blobs))


@dataclass(frozen=True)
class ImagePreview:
    """A small picture of an image file, and what its header says.

    image:       RGB, upright
    format:      as Pillow names it
    shown:       (width, height) in pixels that a viewer would show
    orientation: EXIF, 1 to 8
    """

    image: Image.Image
    format: str
    display_size: tuple[int, int]
    orientation: int


def decode_preview(data: bytes, side: int, *, max_pixels: int = MAX_PIXELS) -> ImagePreview:
    """A picture of an image file at most `side` pixels wide and high.

    Raises as `decode` does.
    """
    header = _read_header(data, max_pixels)
    try:
        if header.is_plain_jpeg:
            factor = _choose_scale_factor(header.image.size, (side, side))
            rgb = _apply_orientation(
                Image.fromarray(jpeg.decode_jpeg(data, factor)), header.orientation
            )
            shown = header.display_size
        else:
            rgb = _apply_orientation(_decode_full_rgb(header.image, data), header.orientation)
            shown = rgb.size
        rgb.thumbnail((side, side))
    except ImageError:
        raise
    except Exception as error:
        raise _convert_error(error, data) from error
    return ImagePreview(rgb, header.image.format or "", shown, header.orientation)


def compute_resized_size(shown: tuple[int, int], spec: Preprocess) -> tuple[int, int]:
    """(width, height) to resize to before cropping or padding, rounded as torchvision does."""
    width, height = shown
    if spec.mode == "squash":
        return spec.crop, spec.crop
    if spec.mode == "pad":
        scale = spec.crop / max(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))
    if width <= height:
        return spec.resize, int(spec.resize * height / width)
    return int(spec.resize * width / height), spec.resize


@dataclass(frozen=True)
class _ImageHeader:
    """An image file that was opened and not decoded.

    orientation:  EXIF, 1 to 8
    shown:        (width, height) in pixels that a viewer would show
    is_plain_png: a PNG of 8 bits, gray or RGB, not interlaced, upright
    """

    image: ImageFile.ImageFile
    orientation: int
    display_size: tuple[int, int]
    is_plain_png: bool = False

    @property
    def is_plain_jpeg(self) -> bool:
        """Whether libjpeg gives the pixels as meant; MPO is a phone's JPEG with a depth map."""
        return self.image.format in _JPEG_FORMATS and self.image.mode in ("L", "RGB")


def _read_header(data: bytes, max_pixels: int) -> _ImageHeader:
    image, chunks = _open_image(data, max_pixels)
    width, height = _read_size(image, data)
    _check_pixel_count(width, height, max_pixels)
    if chunks:
        orientation = png.find_orientation(data, chunks)
    elif image.format == "JXL" and _is_oriented_by_decoder(image, data):
        orientation = 1  # Exif data may repeat it
    else:
        orientation = _read_orientation(image)
    shown = (height, width) if orientation >= 5 else (width, height)
    return _ImageHeader(image, orientation, shown, bool(chunks) and png.is_plain_png(data, chunks))


def _is_oriented_by_decoder(image: Any, data: bytes) -> bool:
    """Whether a JPEG XL states an orientation, which its decoder applies if it is no JPEG."""
    header = read_jpeg_xl_header(data)
    return not image.jpeg and header is not None and header[2] != 1


def _check_pixel_count(width: int, height: int, max_pixels: int) -> None:
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


def _choose_scale_factor(size: tuple[int, int], needed: tuple[int, int]) -> jpeg.ScaleFactor:
    """The largest factor by which an image can be reduced and stay at least `needed` large."""
    possible = min(size[0] // needed[0], size[1] // needed[1])
    return 8 if possible >= 8 else 4 if possible >= 4 else 2 if possible >= 2 else 1


def _decode_full_rgb(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """As `rgb_of`, but missing image data of a JPEG are an error: Pillow does not report them."""
    if image.format in _JPEG_FORMATS:
        image = Image.open(io.BytesIO(jpeg.verify_jpeg(data)), formats=["JPEG"])
    return load_rgb(image, data)


def _open_image(data: bytes, max_pixels: int) -> tuple[ImageFile.ImageFile, list[png.PngChunk]]:
    """The image as Pillow opens it, and the chunks of a PNG, whose checksums are compared."""
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
            if header:  # its plugin decodes as soon as it opens
                _check_pixel_count(*header[:2], max_pixels)
        elif format_.name == "ICO":
            picture = find_ico_image(data)
            if picture.startswith(png.SIGNATURE):  # Pillow decodes it as soon as it opens
                _check_pixel_count(*png.parse_ihdr(picture)[:2], max_pixels)
        openers = [name for name in format_.pillow_names if name != "MPO"]
        return Image.open(io.BytesIO(stream), formats=openers), chunks
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise _build_open_error(format_, data) from None
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(str(error)) from error
    except Exception as error:
        raise _convert_error(error, data) from error


def _register_plugin(format_: ImageFormat) -> None:
    """Register a format's package with Pillow. Raises UnsupportedImage where it is missing."""
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
    """Why Pillow does not open a file: of a kind that it does not decode, cut off or damaged."""
    try:
        samples = read_sample_format(format_, data)
    except ImageError as error:
        return error
    if format_.name == "TIFF":
        return UnsupportedImage(f"TIFF: {samples} is not supported{tiff.describe_encoding(data)}")
    article = "an" if format_.name[0] in "AI" else "a"
    text = f"begins as {article} {format_.name} does, but its header is damaged or cut off"
    return _convert_error(ValueError(text), data)


def _read_orientation(image: Image.Image) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns these itself
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  broken EXIF says nothing about the pixels
        return 1
    return value if value in _TRANSPOSE else 1


def _decode_and_resize_jpeg(data: bytes, header: _ImageHeader, spec: Preprocess) -> Pixels:
    orientation, shown = header.orientation, header.display_size
    resized = compute_resized_size(shown, spec)
    wanted = (resized[1], resized[0]) if orientation >= 5 else resized
    frame = jpeg.read_frame_header(data)
    factor: jpeg.ScaleFactor = 1
    if spec.decode == "fast" and frame is not None:
        across, down = (max(DCT_MARGIN, CHROMA_MARGIN * coarser) for coarser in frame.chroma_spans)
        needed = math.ceil(wanted[0] * across), math.ceil(wanted[1] * down)
        factor = _choose_scale_factor(header.image.size, needed)
    tensor = torch.from_numpy(jpeg.decode_jpeg(data, factor, frame=frame)).permute(2, 0, 1)
    upright = _apply_tensor_orientation(tensor, orientation)
    if factor > 1:
        return _resize_scaled_jpeg(upright, shown, spec, orientation)
    if resized[0] * resized[1] > MAX_RESIZE_PIXELS:
        rgb = Image.fromarray(upright.permute(1, 2, 0).contiguous().numpy())
        return _resize_pillow(rgb, shown, spec)
    return _resize_tensor(upright, shown, spec)


def _resize_pillow(image: Image.Image, shown: tuple[int, int], spec: Preprocess) -> Pixels:
    """Resize and crop an upright image in one pass: only the pixels that are kept are computed."""
    resized = compute_resized_size(shown, spec)
    (left, top, right, bottom), _ = _compute_crop_window(resized, spec)
    x, y = shown[0] / resized[0], shown[1] / resized[1]
    kept = image.resize(
        (right - left, bottom - top),
        _PILLOW_FILTER[spec.interpolation],
        box=(left * x, top * y, min(shown[0], right * x), min(shown[1], bottom * y)),
    )
    return _place_on_canvas(np.asarray(kept), resized, spec)


def _resize_scaled_jpeg(
    tensor: torch.Tensor, shown: tuple[int, int], spec: Preprocess, turned: int
) -> Pixels:
    """The same of an upright image, (3, H, W), that libjpeg decoded at 1/2, 1/4 or 1/8.

    turned: the EXIF orientation that was undone after decoding
    """
    resized = compute_resized_size(shown, spec)
    (left, top, right, bottom), _ = _compute_crop_window(resized, spec)
    image = tensor.permute(1, 2, 0).numpy()
    height, width = image.shape[:2]
    x = _map_span(left, right, resized[0], width, shown[0], mirrored=turned in (2, 3, 6, 7))
    y = _map_span(top, bottom, resized[1], height, shown[1], mirrored=turned in (3, 4, 7, 8))
    kept = reduced_images.resize_dct_scaled(
        image, (right - left, bottom - top), (x[0], y[0], x[1], y[1]),
        spec.interpolation,
    )  # fmt: skip
    return _place_on_canvas(kept, resized, spec)


def _map_span(
    start: int, stop: int, resized: int, held: int, shown: int, *, mirrored: bool
) -> tuple[float, float]:
    """Where [start, stop) of `resized` pixels lies in an image of which `held` were decoded.

    At 1/8, 1001 pixels become 126, and the last of them is an eighth inside the picture: taking
    126 for the whole of it would shift everything.
    """
    factor = next((f for f in (1, 2, 4, 8) if -(-shown // f) == held), shown / held)
    first = held - shown / factor if mirrored else 0.0
    return (
        first + start * shown / (resized * factor),
        min(held, first + stop * shown / (resized * factor)),
    )


def _resize_tensor(tensor: torch.Tensor, shown: tuple[int, int], spec: Preprocess) -> Pixels:
    resized = compute_resized_size(shown, spec)
    (left, top, right, bottom), _ = _compute_crop_window(resized, spec)
    kept = _interpolate(tensor, resized, spec)[:, top:bottom, left:right]
    return _place_on_canvas(kept.permute(1, 2, 0).numpy(), resized, spec)


def _resize_on_device(
    tensor: torch.Tensor, shown: tuple[int, int], spec: Preprocess
) -> torch.Tensor:
    resized = compute_resized_size(shown, spec)
    (left, top, right, bottom), (x, y) = _compute_crop_window(resized, spec)
    canvas = torch.zeros((3, spec.crop, spec.crop), dtype=torch.uint8, device=tensor.device)
    kept = _interpolate(tensor, resized, spec)[:, top:bottom, left:right]
    canvas[:, y : y + kept.shape[1], x : x + kept.shape[2]] = kept
    return canvas


def _interpolate(tensor: torch.Tensor, size: tuple[int, int], spec: Preprocess) -> torch.Tensor:
    """(3, H, W) uint8 resized to (width, height), antialiased."""
    width, height = size
    if tuple(tensor.shape[1:]) == (height, width):
        return tensor
    # CPUs resize bytes as they are; CUDA has the antialiased kernel for floats only
    source = tensor if tensor.device.type == "cpu" else tensor.float()
    # the first dimension is made where torch sees by its stride that channels are last
    source = source.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        source, (height, width), mode=spec.interpolation, antialias=True, align_corners=False
    )[0]
    return resized if resized.dtype == torch.uint8 else resized.round().clamp(0, 255).byte()


def _compute_crop_window(
    resized: tuple[int, int], spec: Preprocess
) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """The box of the resized image that is kept, and where it goes on the square canvas.

    The centre crop rounds as torchvision's CenterCrop does.
    """
    width, height = resized
    left = max(0, round((width - spec.crop) / 2))
    top = max(0, round((height - spec.crop) / 2))
    right, bottom = min(width, left + spec.crop), min(height, top + spec.crop)
    place = ((spec.crop - (right - left)) // 2, (spec.crop - (bottom - top)) // 2)
    return (left, top, right, bottom), place


def _place_on_canvas(pixels: Pixels, resized: tuple[int, int], spec: Preprocess) -> Pixels:
    """(3, crop, crop), channels last in memory, from (H, W, 3)."""
    if pixels.shape[:2] == (spec.crop, spec.crop):
        return np.array(pixels).transpose(2, 0, 1)
    _, (x, y) = _compute_crop_window(resized, spec)
    canvas = np.zeros((spec.crop, spec.crop, 3), np.uint8)
    canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    return canvas.transpose(2, 0, 1)


def _apply_orientation(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _apply_tensor_orientation(tensor: torch.Tensor, orientation: int) -> torch.Tensor:
    """(3, H, W) turned as EXIF orientation 1 to 8 asks."""
    if orientation >= 5:
        tensor = tensor.transpose(1, 2)
    if orientation in (3, 4, 7, 8):
        tensor = tensor.flip(1)
    if orientation in (2, 3, 6, 7):
        tensor = tensor.flip(2)
    return tensor


def _convert_error(error: Exception, data: bytes) -> ImageError:
    reason = re.sub(r"^\w+, \S+:\d+, ", "", " ".join(str(error).split()))[:300]
    lowered = reason.lower()
    if isinstance(error, Image.DecompressionBombError):
        return ImageTooLarge(reason)
    refusal = jpeg.find_unsupported_process(data) if data.startswith(_JPEG_SIGNATURE) else None
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


def stack_images(images: Sequence[Pixels]) -> Pixels:
    """(N, 3, crop, crop) uint8, channels last in memory, from N decoded images; N at least 1."""
    return np.stack([pixels.transpose(1, 2, 0) for pixels in images]).transpose(0, 3, 1, 2)
