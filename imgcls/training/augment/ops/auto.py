"""Automatic augmentation: operations drawn from torchvision's lists for each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field

from imgcls.training.augment.ops.auto_batch import Drawn, apply_drawn
from imgcls.training.augment.ops.base import ImageBatch, Operation

AutoPolicy = Literal["off", "randaugment", "trivialaugment"]
DEFAULT_NUM_OPS, DEFAULT_MAGNITUDE = 2, 9
"""Of RandAugment, as in torchvision."""


class AutoAugment(Operation):
    """RandAugment or TrivialAugment, as torchvision implements them on uint8 images."""

    # YAML reads the word off as false
    auto: Annotated[AutoPolicy | None, BeforeValidator(lambda v: "off" if v is False else v)] = None
    """Operations drawn from torchvision's list for each image: randaugment, trivialaugment, off."""
    num_ops: Annotated[int, Field(ge=1, le=10)] | None = None
    """Number of operations per image with auto randaugment (default 2)."""
    magnitude: Annotated[int, Field(ge=0, le=30)] | None = None
    """Strength of the operations with auto randaugment, 0 to 30 (default 9)."""

    @property
    def is_active(self) -> bool:
        return self.auto not in (None, "off")

    def describe(self) -> dict[str, object]:
        if self.auto == "randaugment":
            num_ops, magnitude = self._resolve_strength()
            return {"randaugment": f"{num_ops} operations of magnitude {magnitude}"}
        return {"trivialaugment": ""} if self.is_active else {}

    def find_requirements(self) -> dict[str, str]:
        if self.auto == "randaugment":
            return {}
        return {"num_ops": "auto randaugment", "magnitude": "auto randaugment"}

    def apply(self, batch: ImageBatch) -> ImageBatch:
        pixels, transform = batch.pixels, self._build_transform()
        if pixels.device.type == "cpu":
            return replace(batch, pixels=torch.stack([transform(image) for image in pixels]))
        drawn = _draw_operations(transform, len(pixels), pixels.shape[-2:])
        for each in zip(*drawn, strict=True):
            pixels = apply_drawn(pixels, each)
        return replace(batch, pixels=pixels)

    def _build_transform(self) -> Any:
        """torchvision's transform of one uint8 image, drawing from torch's global generator."""
        # imported here: it imports torch's compiler, 2 s of CPU time in every worker
        from torchvision.transforms import v2

        if self.auto == "trivialaugment":
            return v2.TrivialAugmentWide()
        num_ops, magnitude = self._resolve_strength()
        return v2.RandAugment(num_ops=num_ops, magnitude=magnitude)

    def _resolve_strength(self) -> tuple[int, int]:
        return (
            DEFAULT_NUM_OPS if self.num_ops is None else self.num_ops,
            DEFAULT_MAGNITUDE if self.magnitude is None else self.magnitude,
        )


def _draw_operations(transform: Any, count: int, size: Sequence[int]) -> list[list[Drawn]]:
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
