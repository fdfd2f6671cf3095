"""Random erasing: a random rectangle of one color over some images."""

from __future__ import annotations

import torch

from imgcls.training.augment.kernels.base import draw_boxes, draw_uniform, paste_boxes

ERASE_AREA = (0.02, 0.33)
ERASE_RATIO = (0.3, 3.3)
"""Of the rectangles, as in Zhong et al., AAAI 2020, and torchvision's RandomErasing."""


def erase_rectangles(pixels: torch.Tensor, probability: float) -> torch.Tensor:
    """Cover a rectangle of some images, each with a random color; returns a copy."""
    count, side = len(pixels), pixels.shape[-1]
    chosen = torch.rand(count) < probability
    boxes = draw_boxes(draw_uniform(count, ERASE_AREA), ERASE_RATIO, side)
    colors = torch.randint(0, 256, (count, 3, 1, 1), dtype=torch.uint8)
    return paste_boxes(pixels, colors.to(pixels.device, non_blocking=True), boxes, chosen)
