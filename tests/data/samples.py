"""A picture with known samples, and the difference of a file's pixels from those expected."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from imgcls.data.decoding.decode import decode_image, preprocess_pil_image
from imgcls.data.decoding.preprocess import Preprocess

SIDE = 32
SPEC = Preprocess(resize=SIDE, crop=SIDE, mode="squash")
Y, X = np.mgrid[:SIDE, :SIDE]
RGB = np.stack([X * 8, Y * 8, (X + Y) * 4], -1).astype(np.uint8)
GREY = RGB[..., 0].copy()
ALPHA = RGB[..., 1].copy()
NOISE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4)).astype(np.uint8)
GREY16, RGB16 = GREY.astype(np.uint16) * 257, RGB.astype(np.uint16) * 257
Array = npt.NDArray[Any]


def gray3(gray: Array) -> Array:
    return np.dstack([gray] * 3)


def over_white(color: Array, alpha: Array) -> Array:
    opacity = alpha[..., None] / 255
    return np.round(color * opacity + 255 * (1 - opacity))


def away(data: bytes, expected: Array) -> int:
    """The largest difference of a file's pixels from those that it must have, on two routes."""
    pixels, shown = decode_image(data, SPEC)
    assert shown == (SIDE, SIDE)
    apart = np.abs(pixels.transpose(1, 2, 0).astype(int) - expected).max()
    again = preprocess_pil_image(Image.open(io.BytesIO(data)), SPEC)
    return int(max(apart, np.abs(again.transpose(1, 2, 0).astype(int) - expected).max()))
