"""Color jitter: brightness, contrast, saturation and hue in one matrix product per image."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from imgcls.training.augment.base import ImageBatch, Operation, draw_uniform, iter_slices, to_uint8

if TYPE_CHECKING:
    import torch

# YIQ, the colors of NTSC television: Y is the luma, I and Q span the plane in which a hue rotates.
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))

Strength = Annotated[float, Field(ge=0.0, le=1.0)]


class ColorJitter(Operation):
    """Change the colors of each image, like torchvision's ColorJitter."""

    brightness: Strength | None = None
    """Maximum change of the brightness: the factor is drawn from 1 ± this."""
    contrast: Strength | None = None
    """Maximum change of the contrast: the factor is drawn from 1 ± this."""
    saturation: Strength | None = None
    """Maximum change of the saturation: the factor is drawn from 1 ± this."""
    hue: Annotated[float, Field(ge=0.0, le=0.5)] | None = None
    """Maximum rotation of the hue, as ± a share of the color wheel."""

    @property
    def is_active(self) -> bool:
        return bool(self.describe())

    def describe(self) -> dict[str, object]:
        return {name: strength for name, strength in self if strength}

    def apply(self, batch: ImageBatch) -> ImageBatch:
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        pixels = jitter_color(batch.pixels, *(strength or 0.0 for strength in strengths))
        return replace(batch, pixels=pixels)


def jitter_color(
    pixels: torch.Tensor, brightness: float, contrast: float, saturation: float, hue: float
) -> torch.Tensor:
    """Change the colors of each image, all four at once, by one matrix per image.

    Factors are drawn uniformly from 1 ± strength (at least 0) and hues from ± hue of a full turn,
    as in torchvision's ColorJitter. A hue rotates in the YIQ plane instead of HSV, which keeps the
    luma and is linear (P. Haeberli, Matrix Operations for Image Processing, 1993); so all four
    commute and no order needs to be drawn. Values are clipped once, at the end.
    """
    import torch

    count = len(pixels)
    bright, contrasts, saturations = (
        draw_uniform(count, (max(0.0, 1 - strength), 1 + strength))
        for strength in (brightness, contrast, saturation)
    )
    matrix = (
        bright[:, None, None]
        * contrasts[:, None, None]
        * build_color_matrix(saturations, draw_uniform(count, (-hue, hue)))
    )
    gray = bright * (1 - contrasts)  # share of the image's mean luma that contrast mixes in
    matrix, gray, luma = (
        t.to(pixels.device, non_blocking=True) for t in (matrix, gray, torch.tensor(_YIQ[0]))
    )
    parts = []
    for part in iter_slices(pixels):
        values = pixels[part].flatten(2).float()
        offset = (values.mean(2) @ luma) * gray[part]
        offset = offset[:, None, None].expand(-1, 3, 1)
        parts.append(to_uint8(torch.baddbmm(offset, matrix[part], values)))
    return torch.cat(parts).view_as(pixels)


def build_color_matrix(saturation: torch.Tensor, hue: torch.Tensor) -> torch.Tensor:
    """(N, 3, 3) float32 on RGB columns: chroma scaled and rotated, luma kept.

    saturation: (N,) factors
    hue:        (N,) in turns
    """
    import torch

    angle = 2 * math.pi * hue
    across, along = saturation * angle.cos(), saturation * angle.sin()
    rotated = torch.zeros(len(hue), 3, 3)
    rotated[:, 0, 0] = 1
    rotated[:, 1, 1] = rotated[:, 2, 2] = across
    rotated[:, 1, 2], rotated[:, 2, 1] = -along, along
    yiq = torch.tensor(_YIQ)
    matrix: torch.Tensor = torch.linalg.inv(yiq) @ rotated @ yiq
    return matrix
