"""Specification of the preprocessing: size, crop, interpolation and normalization.

Separate from `decode`, so that reading a bundle's description does not import torch.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import PositiveInt, model_validator

from imgcls.config import Section

Interpolation = Literal["bilinear", "bicubic"]
ResizeMode = Literal["crop", "pad", "squash"]
DecodeMode = Literal["exact", "fast"]


class Preprocess(Section):
    """Preprocessing of an image to the model's input; stored in the bundle."""

    resize: PositiveInt = 256
    """Length of the shorter side after resizing, in pixels (mode crop)."""
    crop: PositiveInt = 224
    """Side of the model's square input, in pixels."""
    interpolation: Interpolation = "bilinear"
    """Resampling filter, antialiased."""
    mode: ResizeMode = "crop"
    """crop: resize, then center crop. pad: fit whole, black bars. squash: stretch to fit."""
    decode: DecodeMode = "exact"
    """exact: decode JPEGs at full size. fast: decode large JPEGs at 1/2, 1/4 or 1/8."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean per channel (RGB) of pixels in [0, 1], subtracted on the device."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation per channel, divided by on the device."""

    @model_validator(mode="after")
    def _check(self) -> Preprocess:
        if self.resize < self.crop:
            raise ValueError(f"resize ({self.resize}) must be at least crop ({self.crop})")
        if not (min(self.std) > 0 and all(map(math.isfinite, (*self.mean, *self.std)))):
            raise ValueError(
                f"mean {self.mean} and std {self.std} must be finite numbers, std above 0"
            )
        return self
