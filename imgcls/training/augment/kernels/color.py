"""Color jitter: brightness, contrast, saturation and hue in one matrix product per image."""

from __future__ import annotations

import math

import torch

from imgcls.training.augment.kernels.base import draw_uniform, iter_slices, to_uint8

# YIQ, the colors of NTSC television: Y is the luma, I and Q span the plane in which a hue rotates.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_LUMA = _YIQ[0]


def jitter_color(
    pixels: torch.Tensor, brightness: float, contrast: float, saturation: float, hue: float
) -> torch.Tensor:
    """Change the colors of each image, all four at once, by one matrix per image.

    Factors are drawn uniformly from 1 ± strength (at least 0) and hues from ± hue of a full turn,
    as in torchvision's ColorJitter. A hue rotates in the YIQ plane instead of HSV, which keeps the
    luma and is linear (P. Haeberli, Matrix Operations for Image Processing, 1993); so all four
    commute and no order needs to be drawn. Values are clipped once, at the end.
    """
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
    matrix, gray, luma = (t.to(pixels.device, non_blocking=True) for t in (matrix, gray, _LUMA))
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
    angle = 2 * math.pi * hue
    across, along = saturation * angle.cos(), saturation * angle.sin()
    rotated = torch.zeros(len(hue), 3, 3)
    rotated[:, 0, 0] = 1
    rotated[:, 1, 1] = rotated[:, 2, 2] = across
    rotated[:, 1, 2], rotated[:, 2, 1] = -along, along
    matrix: torch.Tensor = torch.linalg.inv(_YIQ) @ rotated @ _YIQ
    return matrix
