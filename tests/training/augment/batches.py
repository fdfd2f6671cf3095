"""Batches of noise, and a batch augmented with given settings, shared by these tests."""

from __future__ import annotations

from typing import Any

import torch

from imgcls.training.augment.augment import Augment
from imgcls.training.augment.recipe import AugmentConfig


def noise(count: int, side: int, low: int = 0, high: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(low, high, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def augmented(
    pixels: torch.Tensor, size: int, seed: int = 0, classes: int = 4, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment a batch with the labels 0, 1, 2, ... repeated."""
    torch.manual_seed(seed)
    labels = torch.arange(len(pixels)) % classes
    config = AugmentConfig.model_validate({"preset": "none", **settings})
    return Augment(config, size=size, num_classes=classes)(pixels, labels)
