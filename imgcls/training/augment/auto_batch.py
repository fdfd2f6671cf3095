"""The operations of RandAugment and TrivialAugment on a batch of images, each with its magnitude.

torchvision's take one image, or one magnitude for all: about ten kernels for each image of a batch.
Here a batch takes some kernels for each kind of operation.
The results are torchvision's; blended colors can differ by one of 255 levels, because a product
and a sum are rounded once or twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from imgcls.training.augment.base import to_uint8

Drawn = tuple[str, float]
"""torchvision's name of an operation, and its magnitude."""


def apply_transform(transform: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Apply torchvision's RandAugment or TrivialAugment to each image of a batch.

    pixels: (N, 3, S, S) uint8
    """
    if pixels.device.type == "cpu":
        return torch.stack([transform(image) for image in pixels])
    drawn = draw_operations(transform, len(pixels), pixels.shape[-2:])
    for each in zip(*drawn, strict=True):
        pixels = apply_drawn(pixels, each)
    return pixels


def draw_operations(transform: Any, count: int, size: Sequence[int]) -> list[list[Drawn]]:
    """The operations that torchvision's transform draws for each of `count` images of a size.

    It draws as it does for images on a CPU, and has its method record an operation instead of
    applying it.
    """
    drawn: list[list[Drawn]] = []

    def record(image: torch.Tensor, name: str, magnitude: float, **_: Any) -> torch.Tensor:
        drawn[-1].append((name, magnitude))
        return image

    transform._apply_image_or_video_transform = record
    image = torch.empty(3, *size, dtype=torch.uint8)
    for _ in range(count):
        drawn.append([])
        transform(image)
    return drawn


def apply_drawn(pixels: torch.Tensor, drawn: Sequence[Drawn]) -> torch.Tensor:
    """Apply to each image the operation that was drawn for it.

    pixels: (N, 3, S, S) uint8
    drawn:  N operations
    """
    out = pixels.clone()
    for name in sorted({name for name, _ in drawn} - {"Identity"}):
        rows = [row for row, (each, _) in enumerate(drawn) if each == name]
        at = torch.tensor(rows).to(pixels.device, non_blocking=True)
        changed = _OPERATIONS[name](pixels[at], [drawn[row][1] for row in rows])
        out.index_copy_(0, at, changed)
    return out


def _to_column(values: Sequence[float], pixels: torch.Tensor) -> torch.Tensor:
    """(N, 1, 1, 1) float32 on the device of the pixels."""
    column = torch.tensor(values, dtype=torch.float32)[:, None, None, None]
    return column.to(pixels.device, non_blocking=True)


# ------------------------------------------------------------------ geometry


def _shear_x(pixels: torch.Tensor, magnitudes: Sequence[float]) -> torch.Tensor:
    middle = pixels.shape[-2] / 2
    return _resample(pixels, [(1, m, m * middle, 0, 1, 0) for m in magnitudes])


def _shear_y(pixels: torch.Tensor, magnitudes: Sequence[float]) -> torch.Tensor:
    middle = pixels.shape[-1] / 2
    return _resample(pixels, [(1, 0, 0, m, 1, m * middle) for m in magnitudes])


def _translate_x(pixels: torch.Tensor, magnitudes: Sequence[float]) -> torch.Tensor:
    return _resample(pixels, [(1, 0, -int(m), 0, 1, 0) for m in magnitudes])


def _translate_y(pixels: torch.Tensor, magnitudes: Sequence[float]) -> torch.Tensor:
    return _resample(pixels, [(1, 0, 0, 0, 1, -int(m)) for m in magnitudes])


def _rotate(pixels: torch.Tensor, magnitudes: Sequence[float]) -> torch.Tensor:
    angles = [math.radians(-(m % 360)) for m in magnitudes]
    return _resample(
        pixels, [(math.cos(a), math.sin(a), 0, -math.sin(a), math.cos(a), 0) for a in angles]
    )


def _resample(pixels: torch.Tensor, matrices: Sequence[tuple[float, ...]]) -> torch.Tensor:
    """The nearest input pixel for each output pixel, black outside of the image.

    matrices: N of six numbers, the rows of the 2x3 matrix from an output position to its input
        position, in pixels from the center
    """
    (height, width), device = pixels.shape[-2:], pixels.device
    matrix = torch.tensor(matrices, dtype=torch.float32).view(-1, 2, 3).mT
    matrix = (matrix / torch.tensor([0.5 * width, 0.5 * height])).to(device, non_blocking=True)
    grid = torch.ones(height, width, 3, device=device)
    grid[..., 0] = torch.linspace((1.0 - width) * 0.5, (width - 1.0) * 0.5, width, device=device)
    rows = torch.linspace((1.0 - height) * 0.5, (height - 1.0) * 0.5, height, device=device)
    grid[..., 1] = rows[:, None]
    places = (grid.view(1, -1, 3).expand(len(matrix), -1, -1) @ matrix).view(-1, height, width, 2)
    return to_uint8(F.grid_sample(pixels.float(), places, mode="nearest", align_corners=False))


# ------------------------------------------------------------------ colors


def _brightness(pixels: torch.Tensor, magnitudes: Sequence[float]) -> torch.Tensor:
    factor = _to_column([1.0 + m for m in magnitudes], pixels)
    return (pixels * factor).clamp_(0, 255).to(torch.uint8)


def _color(pixels: torch.Tensor, magnitudes: Sequence[float]) -> torch.Tensor:
    return _blend(pixels, _compute_luma(pixels), magnitudes)


def _contrast(pixels: torch.Tensor, magnitudes: Sequence[float]) -> torch.Tensor:
    return _blend(pixels, _compute_luma(pixels).mean((1, 2, 3), keepdim=True), magnitudes)


def _sharpness(pixels: torch.Tensor, magnitudes: Sequence[float]) -> torch.Tensor:
    if min(pixels.shape[-2:]) <= 2:
        return pixels
    kernel = torch.full((3, 1, 3, 3), 1 / 13, device=pixels.device)
    kernel[:, :, 1, 1] = 5 / 13
    blurred = pixels.float()
    blurred[..., 1:-1, 1:-1] = F.conv2d(pixels.float(), kernel, groups=3).round_()
    return _blend(pixels, blurred, magnitudes)


def _compute_luma(pixels: torch.Tensor) -> torch.Tensor:
    red, green, blue = pixels.unbind(1)
    luma = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)
    return luma.floor_().unsqueeze(1)


def _blend(pixels: torch.Tensor, other: torch.Tensor, magnitudes: Sequence[float]) -> torch.Tensor:
    """1 + magnitude shares of an image, and minus magnitude of the other."""
    own = _to_column([1.0 + m for m in magnitudes], pixels)
    rest = _to_column([-m for m in magnitudes], pixels)
    return torch.addcmul(pixels * own, other, rest).clamp_(0, 255).to(torch.uint8)


def _posterize(pixels: torch.Tensor, magnitudes: Sequence[float]) -> torch.Tensor:
    masks = torch.tensor([256 - 2 ** (8 - int(m)) for m in magnitudes], dtype=torch.uint8)
    return pixels & masks[:, None, None, None].to(pixels.device, non_blocking=True)


def _solarize(pixels: torch.Tensor, magnitudes: Sequence[float]) -> torch.Tensor:
    return torch.where(pixels >= _to_column([255 * m for m in magnitudes], pixels), ~pixels, pixels)


def _autocontrast(pixels: torch.Tensor, _: Sequence[float]) -> torch.Tensor:
    # imported here: it imports torch's compiler, 2 s of CPU time in every worker
    from torchvision.transforms.v2 import functional as TF

    changed: torch.Tensor = TF.autocontrast(pixels)
    return changed


def _equalize(pixels: torch.Tensor, _: Sequence[float]) -> torch.Tensor:
    from torchvision.transforms.v2 import functional as TF

    changed: torch.Tensor = TF.equalize(pixels)
    return changed


_OPERATIONS: dict[str, Callable[[torch.Tensor, Sequence[float]], torch.Tensor]] = {
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Rotate": _rotate,
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}
