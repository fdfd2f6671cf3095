"""Bytes to pixels: one specification, several decode routes that agree.

Owns the header check (pixel limit before decoding), the choice of the fastest correct route per
image, EXIF orientation, colour modes and the resize; promises uint8 RGB of a fixed size or a typed
ImageError. Normalising is left to the classifier, on the device.

Routes, all compared in tests with the reference (Pillow decode, `Resize`, `CenterCrop`):
  dct         a JPEG much larger than needed: libjpeg decodes at 1/2, 1/4 or 1/8
  torchvision any other JPEG: decoded whole by libjpeg, resized by torch
  pillow      everything else
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

from imgcls.data import jpeg
from imgcls.data import reduced as reduced_images
from imgcls.data.lean import torchvision
from imgcls.data.preprocess import Preprocess
from imgcls.errors import EmptyImage, ImageError, ImageTooLarge, NotAnImage, TruncatedImage

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 100_000_000
DCT_MARGIN = 2.0
"""The DCT route keeps at least this many times the pixels per side that the resize asks for: the
mean difference from decoding sharp photographs whole is 0.3 to 0.4 of 255; at 1.4 it was 0.8 to
1.2."""
CHROMA_MARGIN = 1.4
"""The same for color samples, where libjpeg makes them coarser than the decoded image (4:2:2)."""
LARGEST_RESIZE = 4_000_000
"""Above this many pixels (a 20,000x1 strip, 256 high after resizing) only the crop is computed."""

# Pillow warns of what is told here as an error, or does no harm. One filter for the process:
# `catch_warnings` around each image would mix up the filters of threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

_JPEG = ("JPEG", "MPO")
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_SIGNATURES = {
    "a JPEG": rb"\xff\xd8\xff",
    "a PNG": rb"\x89PNG",
    "a WebP": rb"RIFF....WEBP",
    "a GIF": rb"GIF8",
    "a TIFF": rb"II[*+]\0|MM\0[*+]",
}
_ORIENTATION = 0x0112
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


def decode(
    data: bytes, spec: Preprocess, *, max_pixels: int = MAX_PIXELS
) -> tuple[Pixels, tuple[int, int]]:
    """Decode one image to the model's input size.

    data: the file's bytes
    Returns (3, crop, crop) uint8 RGB, channels last in memory, and the (width, height) in pixels
    that a viewer would show, before resizing and after EXIF orientation.
    Raises EmptyImage, TruncatedImage, NotAnImage, ImageTooLarge or ImageError.
    """
    image, orientation, shown = _read_header(data, max_pixels)
    try:
        if _is_plain_jpeg(image):
            return _decode_jpeg(data, image, orientation, shown, spec), shown
        if image.format in _JPEG:
            image = _open(jpeg.checked(data))
        rgb = _oriented(_to_rgb(image), orientation)
        if _is_plain_png(image, data) and math.prod(target_size(shown, spec)) <= LARGEST_RESIZE:
            tensor = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
            return _resized_tensor(tensor, shown, spec), shown
        return _resized_pillow(rgb, shown, spec), shown
    except ImageError:
        raise
    except Exception as error:
        raise _image_error(error, data) from error


def prepared(image: Image.Image, spec: Preprocess) -> Pixels:
    """A Pillow image at the model's input size: (3, crop, crop) uint8 RGB, channels last in memory.

    Its EXIF orientation is heeded. Raises an ImageError where it cannot be read.
    """
    orientation = _orientation(image)
    try:
        rgb = _oriented(_to_rgb(_checked_jpeg(image)), orientation)
        return _resized_pillow(rgb, rgb.size, spec)
    except ImageError:
        raise
    except Exception as error:
        raise _image_error(error, b"") from error


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
        try:
            image, orientation, shown = _read_header(data, max_pixels)
        except ImageError as error:
            results[index] = error
            continue
        small = math.prod(target_size(shown, spec)) <= LARGEST_RESIZE
        if _is_plain_jpeg(image) and small and spec.decode == "fast":
            plain.append((index, orientation, shown))
    sound = checked_jpegs([blobs[index] for index, _, _ in plain])
    for (index, _, _), data in zip(plain, sound, strict=True):
        if isinstance(data, ImageError):
            results[index] = data
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
        upright = _oriented_tensor(tensor, orientation)
        results[index] = _resized_on_device(upright, shown, spec), shown
    for index, data in enumerate(blobs):
        if results[index] is None:
            try:
                pixels, shown = decode(data, spec, max_pixels=max_pixels)
                results[index] = torch.from_numpy(pixels).to(device), shown
            except ImageError as error:
                results[index] = error
    return [result for result in results if result is not None]


def checked_jpegs(blobs: Sequence[bytes]) -> list[bytes | ImageError]:
    """Check the image data of JPEGs, on all CPUs that this process may use.

    Returns what `jpeg.checked` returns or raises for each.
    """

    def check(data: bytes) -> bytes | ImageError:
        try:
            return jpeg.checked(data)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(check, blobs))


@dataclass(frozen=True)
class Picture:
    """A small picture of an image file, and what its header says.

    image:       RGB, upright
    format:      as Pillow names it
    shown:       (width, height) in pixels that a viewer would show
    orientation: EXIF, 1 to 8
    """

    image: Image.Image
    format: str
    shown: tuple[int, int]
    orientation: int


def picture(data: bytes, side: int, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """A picture of an image file at most `side` pixels wide and high.

    Raises as `decode` does.
    """
    image, orientation, shown = _read_header(data, max_pixels)
    kind = image.format or ""
    try:
        if _is_plain_jpeg(image):
            factor = _largest_factor(image.size, (side, side))
            rgb = Image.fromarray(jpeg.decode(data, factor))
        else:
            rgb = _to_rgb(_open(jpeg.checked(data)) if kind in _JPEG else image)
        rgb = _oriented(rgb, orientation)
        rgb.thumbnail((side, side))
    except ImageError:
        raise
    except Exception as error:
        raise _image_error(error, data) from error
    return Picture(rgb, kind, shown, orientation)


def target_size(shown: tuple[int, int], spec: Preprocess) -> tuple[int, int]:
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


def _read_header(data: bytes, max_pixels: int) -> tuple[ImageFile.ImageFile, int, tuple[int, int]]:
    """The undecoded image, its EXIF orientation, and the size that a viewer would show."""
    image = _open(data)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"{width}x{height} is {width * height:,} pixels, more than max_pixels {max_pixels:,}"
        )
    orientation = 1 if _is_plain_png(image, data) else _orientation(image)
    return image, orientation, (height, width) if orientation >= 5 else (width, height)


def _is_plain_jpeg(image: ImageFile.ImageFile) -> bool:
    """Whether libjpeg gives the pixels as meant; MPO is a phone's JPEG with a depth map."""
    return image.format in _JPEG and image.mode in ("L", "RGB")


def _checked_jpeg(image: Image.Image) -> Image.Image:
    """The image itself; a JPEG file that Pillow has not decoded yet is checked and opened again."""
    if not isinstance(image, ImageFile.ImageFile) or image.format not in _JPEG:
        return image
    if not image.tile or image.fp is None or image.tell() != 0:
        return image
    image.fp.seek(0)
    return _open(jpeg.checked(image.fp.read()))


def _largest_factor(size: tuple[int, int], needed: tuple[int, int]) -> jpeg.Factor:
    """The largest factor by which an image can be reduced and stay at least `needed` large."""
    possible = min(size[0] // needed[0], size[1] // needed[1])
    return 8 if possible >= 8 else 4 if possible >= 4 else 2 if possible >= 2 else 1


def _is_plain_png(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether a PNG is as it shows: 8 bits, grey or RGB, in one piece, upright.

    Pillow decodes a PNG to see whether EXIF data come after its pixels; here its chunks are walked.
    The pixels are left to Pillow nonetheless: torchvision's decoder ends the whole process at
    damage that libpng notices within them.
    Source: Portable Network Graphics specification, third edition, sections 5.3 and 11.2.
    """
    if image.format != "PNG" or data[24:26] not in (b"\x08\x00", b"\x08\x02") or data[28]:
        return False
    place = 8
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        text = kind in (b"tEXt", b"zTXt", b"iTXt")
        if kind in _PNG_MORE or (text and data.startswith(_PNG_TEXTS, place + 8)):
            return False
        if kind == b"IEND":
            return True
        place += 12 + length
    return False


_PNG_MORE = (b"eXIf", b"tRNS", b"acTL", b"iCCP")
"""Chunks that may turn, see through, move or colour the picture."""
_PNG_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")


def _open(data: bytes) -> ImageFile.ImageFile:
    if not data:
        raise EmptyImage("the file has no bytes")
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        for kind, signature in _SIGNATURES.items():
            if re.match(signature, data, re.DOTALL):
                raise ImageError(
                    f"begins as {kind} does, but its header is damaged or cut off "
                    f"({len(data):,} bytes)"
                ) from None
        raise NotAnImage(
            f"{_looks_like(data)}; JPEG, PNG, WebP, GIF, BMP and TIFF are read"
        ) from None
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(str(error)) from error
    except Exception as error:
        raise _image_error(error, data) from error


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns these itself
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  broken EXIF says nothing about the pixels
        return 1
    return value if value in _TRANSPOSE else 1


def _decode_jpeg(
    data: bytes,
    image: ImageFile.ImageFile,
    orientation: int,
    shown: tuple[int, int],
    spec: Preprocess,
) -> Pixels:
    resized = target_size(shown, spec)
    wanted = (resized[1], resized[0]) if orientation >= 5 else resized
    frame = jpeg.read_frame(data)
    factor: jpeg.Factor = 1
    if spec.decode == "fast" and frame is not None:
        across, down = (
            max(DCT_MARGIN, CHROMA_MARGIN * coarser) for coarser in frame.reduced_chroma
        )
        needed = math.ceil(wanted[0] * across), math.ceil(wanted[1] * down)
        factor = _largest_factor(image.size, needed)
    tensor = torch.from_numpy(jpeg.decode(data, factor, frame=frame)).permute(2, 0, 1)
    upright = _oriented_tensor(tensor, orientation)
    if factor > 1:
        return _resized_reduced(upright, shown, spec, orientation)
    if resized[0] * resized[1] > LARGEST_RESIZE:
        rgb = Image.fromarray(upright.permute(1, 2, 0).contiguous().numpy())
        return _resized_pillow(rgb, shown, spec)
    return _resized_tensor(upright, shown, spec)


def _resized_pillow(image: Image.Image, shown: tuple[int, int], spec: Preprocess) -> Pixels:
    """Resize and crop an upright image in one pass: only the pixels that are kept are computed."""
    resized = target_size(shown, spec)
    (left, top, right, bottom), _ = _window(resized, spec)
    x, y = shown[0] / resized[0], shown[1] / resized[1]
    kept = image.resize(
        (right - left, bottom - top),
        _PILLOW_FILTER[spec.interpolation],
        box=(left * x, top * y, min(shown[0], right * x), min(shown[1], bottom * y)),
    )
    return _placed(np.asarray(kept), resized, spec)


def _resized_reduced(
    tensor: torch.Tensor, shown: tuple[int, int], spec: Preprocess, turned: int
) -> Pixels:
    """The same of an upright image, (3, H, W), that libjpeg decoded at 1/2, 1/4 or 1/8.

    turned: the EXIF orientation that was undone after decoding
    """
    resized = target_size(shown, spec)
    (left, top, right, bottom), _ = _window(resized, spec)
    image = tensor.permute(1, 2, 0).numpy()
    height, width = image.shape[:2]
    x = _span(left, right, resized[0], width, shown[0], mirrored=turned in (2, 3, 6, 7))
    y = _span(top, bottom, resized[1], height, shown[1], mirrored=turned in (3, 4, 7, 8))
    kept = reduced_images.resize(
        image, (right - left, bottom - top), (x[0], y[0], x[1], y[1]),
        spec.interpolation,
    )  # fmt: skip
    return _placed(kept, resized, spec)


def _span(
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


def _resized_tensor(tensor: torch.Tensor, shown: tuple[int, int], spec: Preprocess) -> Pixels:
    resized = target_size(shown, spec)
    (left, top, right, bottom), _ = _window(resized, spec)
    kept = _interpolated(tensor, resized, spec)[:, top:bottom, left:right]
    return _placed(kept.permute(1, 2, 0).numpy(), resized, spec)


def _resized_on_device(
    tensor: torch.Tensor, shown: tuple[int, int], spec: Preprocess
) -> torch.Tensor:
    resized = target_size(shown, spec)
    (left, top, right, bottom), (x, y) = _window(resized, spec)
    canvas = torch.zeros((3, spec.crop, spec.crop), dtype=torch.uint8, device=tensor.device)
    kept = _interpolated(tensor, resized, spec)[:, top:bottom, left:right]
    canvas[:, y : y + kept.shape[1], x : x + kept.shape[2]] = kept
    return canvas


def _interpolated(tensor: torch.Tensor, size: tuple[int, int], spec: Preprocess) -> torch.Tensor:
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


def _window(
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


def _placed(pixels: Pixels, resized: tuple[int, int], spec: Preprocess) -> Pixels:
    """(3, crop, crop), channels last in memory, from (H, W, 3)."""
    if pixels.shape[:2] == (spec.crop, spec.crop):
        return np.array(pixels).transpose(2, 0, 1)
    _, (x, y) = _window(resized, spec)
    canvas = np.zeros((spec.crop, spec.crop, 3), np.uint8)
    canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    return canvas.transpose(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: transparency over white, 16 bits scaled to 8, the first frame."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.float32)
        # Pillow's own conversion clips at 255; 65535 is white in a 16-bit file
        grey = np.clip(np.round(values / 257.0), 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        canvas = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, layered).convert("RGB")
    return image.convert("RGB")


def _oriented(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _oriented_tensor(tensor: torch.Tensor, orientation: int) -> torch.Tensor:
    """(3, H, W) turned as EXIF orientation 1 to 8 asks."""
    if orientation >= 5:
        tensor = tensor.transpose(1, 2)
    if orientation in (3, 4, 7, 8):
        tensor = tensor.flip(1)
    if orientation in (2, 3, 6, 7):
        tensor = tensor.flip(2)
    return tensor


def _image_error(error: Exception, data: bytes) -> ImageError:
    reason = re.sub(r"^\w+, \S+:\d+, ", "", " ".join(str(error).split()))[:300]
    lowered = reason.lower()
    if isinstance(error, Image.DecompressionBombError):
        return ImageTooLarge(reason)
    signs = ("truncated", "incomplete", "eof", "unexpected end")
    if any(sign in lowered for sign in signs) or _ends_early(data):
        return TruncatedImage(f"{reason} ({len(data):,} bytes)")
    return ImageError(reason or type(error).__name__)


def _ends_early(data: bytes) -> bool:
    """Whether a WebP is shorter than it says; its decoder gives no reason."""
    return data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data)


def _looks_like(data: bytes) -> str:
    head = data[:64].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "the bytes are a web page or XML"
    if head.startswith((b"{", b"[")):
        return "the bytes are JSON"
    if head.startswith(b"%pdf"):
        return "the bytes are a PDF"
    return f"the bytes begin with {data[:8]!r}"


def stack(images: Sequence[Pixels]) -> Pixels:
    """(N, 3, crop, crop) uint8, channels last in memory, from N decoded images; N at least 1."""
    return np.stack([pixels.transpose(1, 2, 0) for pixels in images]).transpose(0, 3, 1, 2)
