"""Decode images: file bytes to uint8 RGB pixels of the model's input size.

Checks the header (pixel limit before decoding), chooses the fastest correct route per image, and
applies EXIF orientation, color modes and the resize. Returns pixels of a fixed size or raises a
typed ImageError. Normalization is left to the classifier, on its device.

Routes, all compared in tests with the reference (Pillow decode, `Resize`, `CenterCrop`):
  dct     with `decode: fast`, a JPEG much larger than the input: libjpeg decodes at 1/2, 1/4 or 1/8
  whole   any other gray or RGB JPEG: decoded by libjpeg (simplejpeg), resized by torch
  png     a PNG of 8 bits, gray or RGB: decoded by libspng (imagecodecs), resized by torch
  pillow  everything else: decoded and resized by Pillow

`data.formats` lists the formats; `data.pixels` scales samples; `data.resize` has the geometry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageFile

from imgcls.data import formats
from imgcls.data.decoding import jpeg, png
from imgcls.data.decoding.open_image import (
    JPEG_SIGNATURE,
    MAX_PIXELS,
    apply_orientation,
    check_pixel_count,
    choose_scale_factor,
    convert_error,
    decode_full_rgb,
    read_header,
    read_orientation,
)
from imgcls.data.decoding.pixels import Pixels as Pixels
from imgcls.data.decoding.pixels import convert_to_rgb
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.decoding.resize import (
    MAX_RESIZE_PIXELS,
    apply_tensor_orientation,
    compute_resized_size,
    resize_pillow,
    resize_scaled_jpeg,
    resize_tensor,
)
from imgcls.errors import (
    ImageError,
)

DCT_MARGIN = 2.0
"""Minimum size that the dct route decodes to, relative to the size after the resize, per side. The
mean difference from decoding sharp photographs whole is 0.3 to 0.4 of 255; at 1.4 it was 0.8 to
1.2."""
CHROMA_MARGIN = 1.4
"""The same for color samples that libjpeg makes coarser than the decoded image (4:2:2)."""


def decode_image(
    data: bytes, spec: Preprocess, *, max_pixels: int = MAX_PIXELS
) -> tuple[Pixels, tuple[int, int]]:
    """Decode one image to the model's input size.

    data: bytes of the file
    Returns (3, crop, crop) uint8 RGB, channels last in memory, and the display size: (width,
    height) in pixels before the resize and after EXIF orientation.
    Raises EmptyImage, TruncatedImage, NotAnImage, UnsupportedImage, ImageTooLarge or ImageError.
    """
    frame = jpeg.read_frame_header(data) if data.startswith(JPEG_SIGNATURE) else None
    try:
        if frame is not None and frame.is_plain:
            # without Pillow, whose parser takes 7 % of the time of decoding a small photograph
            check_pixel_count(*frame.size, max_pixels)
            return _decode_and_resize_jpeg(data, frame, 1, frame.size, spec), frame.size
        header = read_header(data, max_pixels)
        size = header.display_size
        if header.is_plain_jpeg:
            return _decode_and_resize_jpeg(data, frame, header.orientation, size, spec), size
        if header.is_plain_png:
            pixels = png.decode_8_bit(data, header.png_chunks)
            if pixels is None:
                pixels = np.array(decode_full_rgb(header.image, data))
            elif pixels.ndim == 2:
                pixels = np.dstack((pixels, pixels, pixels))
            tensor = torch.from_numpy(pixels).permute(2, 0, 1)
            return _resize_whole(tensor, size, spec), size
        rgb = apply_orientation(decode_full_rgb(header.image, data), header.orientation)
        return resize_pillow(rgb, rgb.size, spec), rgb.size
    except ImageError:
        raise
    except Exception as error:
        raise convert_error(error, data) from error


def preprocess_pil_image(image: Image.Image, spec: Preprocess) -> Pixels:
    """Resize a Pillow image to the model's input size.

    Applies its EXIF orientation. An image that was opened from a file and not yet decoded is read
    again from that file, as `decode_image` does; any other image is scaled by its Pillow mode.
    Returns (3, crop, crop) uint8 RGB, channels last in memory. Raises ImageError.
    """
    data = None
    try:
        data = _read_undecoded_file(image)
        if data is not None:
            header = read_header(data, max_pixels=max(MAX_PIXELS, math.prod(image.size)))
            rgb, orientation = decode_full_rgb(header.image, data), header.orientation
        else:
            image.load()  # first, since reading EXIF would swallow an error in the pixels
            rgb, orientation = convert_to_rgb(image), read_orientation(image)
        upright = apply_orientation(rgb, orientation)
        return resize_pillow(upright, upright.size, spec)
    except ImageError:
        raise
    except Exception as error:
        raise convert_error(error, data or b"") from error


def _read_undecoded_file(image: Image.Image) -> bytes | None:
    """Bytes of the file that Pillow opened and has not decoded yet; None for any other image."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or image.fp is None:
        return None
    if image.format not in formats.FORMAT_BY_PILLOW_NAME or image.tell() != 0:
        return None
    position = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read()
    image.fp.seek(position)
    return data


def choose_jpeg_factor(frame: jpeg.FrameHeader, wanted: tuple[int, int]) -> jpeg.ScaleFactor:
    """The factor by which `decode: fast` reduces a JPEG before its resize to `wanted`."""
    across, down = (max(DCT_MARGIN, CHROMA_MARGIN * coarser) for coarser in frame.chroma_spans)
    needed = math.ceil(wanted[0] * across), math.ceil(wanted[1] * down)
    return choose_scale_factor(frame.size, needed)


def _decode_and_resize_jpeg(
    data: bytes,
    frame: jpeg.FrameHeader | None,
    orientation: int,
    display_size: tuple[int, int],
    spec: Preprocess,
) -> Pixels:
    resized = compute_resized_size(display_size, spec)
    wanted = (resized[1], resized[0]) if orientation >= 5 else resized
    factor: jpeg.ScaleFactor = 1
    if spec.decode == "fast" and frame is not None:
        factor = choose_jpeg_factor(frame, wanted)
    tensor = torch.from_numpy(jpeg.decode_jpeg(data, factor, frame=frame)).permute(2, 0, 1)
    upright = apply_tensor_orientation(tensor, orientation)
    if factor > 1:
        return resize_scaled_jpeg(upright, display_size, spec, orientation)
    return _resize_whole(upright, display_size, spec)


def _resize_whole(tensor: torch.Tensor, display_size: tuple[int, int], spec: Preprocess) -> Pixels:
    """Resize an upright image, (3, H, W), that was decoded at full size."""
    if math.prod(compute_resized_size(display_size, spec)) > MAX_RESIZE_PIXELS:
        rgb = Image.fromarray(tensor.permute(1, 2, 0).contiguous().numpy())
        return resize_pillow(rgb, display_size, spec)
    return resize_tensor(tensor, display_size, spec)


def stack_images(images: Sequence[Pixels]) -> Pixels:
    """Stack N >= 1 decoded images: (N, 3, crop, crop) uint8, channels last in memory."""
    return np.stack([pixels.transpose(1, 2, 0) for pixels in images]).transpose(0, 3, 1, 2)
