"""Random erasing: a random rectangle of one color over some images."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from imgcls.training.augment.base import (
    ImageBatch,
    Operation,
    Probability,
    draw_boxes,
    draw_uniform,
    paste_boxes,
)

if TYPE_CHECKING:
    import torch

ERASE_AREA = (0.02, 0.33)
ERASE_RATIO = (0.3, 3.3)
"""Of the rectangles, as in Zhong et al., AAAI 2020, and torchvision's RandomErasing."""


class RandomErase(Operation):
    """Cover a random rectangle of some images with a random color."""

    erase: Probability | None = None
    """Probability of covering a random rectangle with one color."""

    @property
    def is_active(self) -> bool:
        return bool(self.erase)

    def describe(self) -> dict[str, object]:
        return {"erase": self.erase} if self.is_active else {}

    def apply(self, batch: ImageBatch) -> ImageBatch:
        return replace(batch, pixels=erase_rectangles(batch.pixels, self.erase or 0.0))


def erase_rectangles(pixels: torch.Tensor, probability: float) -> torch.Tensor:
    """Cover a rectangle of some images, each with a random color; returns a copy."""
    import torch

    count, side = len(pixels), pixels.shape[-1]
    chosen = torch.rand(count) < probability
    boxes = draw_boxes(draw_uniform(count, ERASE_AREA), ERASE_RATIO, side)
    colors = torch.randint(0, 256, (count, 3, 1, 1), dtype=torch.uint8)
    return paste_boxes(pixels, colors.to(pixels.device, non_blocking=True), boxes, chosen)
