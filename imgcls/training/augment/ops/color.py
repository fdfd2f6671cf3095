"""Color jitter: brightness, contrast, saturation and hue."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from imgcls.training.augment.ops.base import ImageBatch, Operation

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
        from imgcls.training.augment.kernels.color import jitter_color

        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        pixels = jitter_color(batch.pixels, *(strength or 0.0 for strength in strengths))
        return replace(batch, pixels=pixels)
