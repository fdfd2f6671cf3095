"""Resize, crop, pad and rotate decoded images to the model's input size.

The functions for Pillow images, CPU tensors, GPU tensors and JPEGs decoded at a fraction of their
size share one geometry: the size and the crop window round as torchvision's Resize and CenterCrop.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from imgcls.data.decoding import dct_resize
from imgcls.data.decoding.pixels import Pixels
from imgcls.data.decoding.preprocess import Preprocess

MAX_RESIZE_PIXELS = 4_000_000
"""Number of pixels after the resize above which only the crop is computed (a 20,000x1 strip)."""

_PILLOW_FILTER = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image on a device.

    pixels:       (3, H, W) uint8, as stored
    orientation:  its EXIF orientation, 1 to 8, which is still to be undone
    display_size: (width, height) of the upright image
    """

    pixels: torch.Tensor
    orientation: int
    display_size: tuple[int, int]


def compute_resized_size(display_size: tuple[int, int], spec: Preprocess) -> tuple[int, int]:
    """(width, height) to resize to before cropping or padding, rounded as torchvision does."""
    width, height = display_size
    if spec.mode == "squash":
        return spec.crop, spec.crop
    if spec.mode == "pad":
        scale = spec.crop / max(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))
    if width <= height:
        return spec.resize, int(spec.resize * height / width)
    return int(spec.resize * width / height), spec.resize


def resize_pillow(image: Image.Image, display_size: tuple[int, int], spec: Preprocess) -> Pixels:
    """Resize and crop an upright image in one pass; only the pixels that are kept are computed.

    display_size: (width, height) that determines the size after the resize
    Returns (3, crop, crop) uint8, channels last in memory.
    """
    resized = compute_resized_size(display_size, spec)
    (left, top, right, bottom), _ = compute_crop_window(resized, spec)
    x, y = display_size[0] / resized[0], display_size[1] / resized[1]
    kept = image.resize(
        (right - left, bottom - top),
        _PILLOW_FILTER[spec.interpolation],
        box=(left * x, top * y, min(display_size[0], right * x), min(display_size[1], bottom * y)),
    )
    return _place_on_canvas(np.asarray(kept), resized, spec)


def resize_scaled_jpeg(
    tensor: torch.Tensor, display_size: tuple[int, int], spec: Preprocess, orientation: int
) -> Pixels:
    """The same for an upright image, (3, H, W), that libjpeg decoded at 1/2, 1/4 or 1/8.

    orientation: the EXIF orientation that was undone after decoding
    """
    resized = compute_resized_size(display_size, spec)
    (left, top, right, bottom), _ = compute_crop_window(resized, spec)
    image = tensor.permute(1, 2, 0).numpy()
    height, width = image.shape[:2]
    x = _map_span(
        left, right, resized[0], width, display_size[0], mirrored=orientation in (2, 3, 6, 7)
    )
    y = _map_span(
        top, bottom, resized[1], height, display_size[1], mirrored=orientation in (3, 4, 7, 8)
    )
    kept = dct_resize.resize_dct_scaled(
        image, (right - left, bottom - top), (x[0], y[0], x[1], y[1]), spec.interpolation
    )
    return _place_on_canvas(kept, resized, spec)


def _map_span(
    start: int, stop: int, resized: int, decoded: int, full_size: int, *, mirrored: bool
) -> tuple[float, float]:
    """Map the span [start, stop) of `resized` pixels to the `decoded` pixels of a scaled JPEG.

    full_size: pixels of the whole image
    At 1/8, 1001 pixels become 126, and only an eighth of the last one is inside the image: a span
    scaled by 126/1001 would be shifted.
    """
    factor = next((f for f in (1, 2, 4, 8) if -(-full_size // f) == decoded), full_size / decoded)
    first = decoded - full_size / factor if mirrored else 0.0
    return (
        first + start * full_size / (resized * factor),
        min(decoded, first + stop * full_size / (resized * factor)),
    )


def resize_tensor(tensor: torch.Tensor, display_size: tuple[int, int], spec: Preprocess) -> Pixels:
    """The same for an upright image, (3, H, W) uint8, on the CPU."""
    resized = compute_resized_size(display_size, spec)
    (left, top, right, bottom), _ = compute_crop_window(resized, spec)
    kept = _interpolate(tensor, resized, spec)[:, top:bottom, left:right]
    return _place_on_canvas(kept.permute(1, 2, 0).numpy(), resized, spec)


def resize_on_device(
    tensor: torch.Tensor, display_size: tuple[int, int], spec: Preprocess
) -> torch.Tensor:
    """The same on the tensor's device; returns (3, crop, crop) uint8."""
    resized = compute_resized_size(display_size, spec)
    (left, top, right, bottom), (x, y) = compute_crop_window(resized, spec)
    canvas = torch.zeros((3, spec.crop, spec.crop), dtype=torch.uint8, device=tensor.device)
    kept = _interpolate(tensor, resized, spec)[:, top:bottom, left:right]
    canvas[:, y : y + kept.shape[1], x : x + kept.shape[2]] = kept
    return canvas


def _interpolate(tensor: torch.Tensor, size: tuple[int, int], spec: Preprocess) -> torch.Tensor:
    """(3, H, W) uint8 resized to (width, height), antialiased."""
    width, height = size
    if tuple(tensor.shape[1:]) == (height, width):
        return tensor
    # on the CPU, torch resizes uint8; on CUDA, its antialiased kernel takes floats only
    source = tensor if tensor.device.type == "cpu" else tensor.float()
    # add the batch dimension such that the strides show torch that channels are last
    source = source.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        source, (height, width), mode=spec.interpolation, antialias=True, align_corners=False
    )[0]
    return resized if resized.dtype == torch.uint8 else resized.round().clamp(0, 255).byte()


def compute_crop_window(
    resized: tuple[int, int], spec: Preprocess
) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """The box of the resized image that is kept, and its (x, y) on the square canvas.

    The center crop rounds as torchvision's CenterCrop does.
    """
    width, height = resized
    left = max(0, round((width - spec.crop) / 2))
    top = max(0, round((height - spec.crop) / 2))
    right, bottom = min(width, left + spec.crop), min(height, top + spec.crop)
    offset = ((spec.crop - (right - left)) // 2, (spec.crop - (bottom - top)) // 2)
    return (left, top, right, bottom), offset


def _place_on_canvas(pixels: Pixels, resized: tuple[int, int], spec: Preprocess) -> Pixels:
    """Center (H, W, 3) on black: (3, crop, crop), channels last in memory."""
    if pixels.shape[:2] == (spec.crop, spec.crop):
        return np.array(pixels).transpose(2, 0, 1)
    _, (x, y) = compute_crop_window(resized, spec)
    canvas = np.zeros((spec.crop, spec.crop, 3), np.uint8)
    canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    return canvas.transpose(2, 0, 1)


def apply_tensor_orientation(tensor: torch.Tensor, orientation: int) -> torch.Tensor:
    """Rotate or mirror (3, H, W) as an EXIF orientation, 1 to 8, requires."""
    if orientation >= 5:
        tensor = tensor.transpose(1, 2)
    if orientation in (3, 4, 7, 8):
        tensor = tensor.flip(1)
    if orientation in (2, 3, 6, 7):
        tensor = tensor.flip(2)
    return tensor
