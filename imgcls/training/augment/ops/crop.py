"""Random crop and mirroring; the center crop of evaluation when off."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo

from imgcls.training.augment.ops.base import ImageBatch, Operation, Probability

DEFAULT_RATIO = (3 / 4, 4 / 3)
"""Bounds of width / height, as in torchvision's RandomResizedCrop."""

AreaFraction = Annotated[float, Field(gt=0.0, le=1.0)]
AspectRatio = Annotated[float, Field(ge=0.1, le=10.0)]


def _check_order(bounds: tuple[float, float] | None, info: ValidationInfo) -> object:
    if bounds is not None and bounds[0] > bounds[1]:
        raise ValueError(f"{info.field_name} {list(bounds)}: pass the smaller number first")
    return bounds


class CropAndFlip(Operation):
    """Cut out a random part of each image, mirror some, and resize to the network's input."""

    crop_scale: Annotated[
        tuple[AreaFraction, AreaFraction] | None, AfterValidator(_check_order)
    ] = None
    """Minimum and maximum share of the area that a random crop keeps, e.g. [0.5, 1]."""
    crop_ratio: Annotated[tuple[AspectRatio, AspectRatio] | None, AfterValidator(_check_order)] = (
        None
    )
    """Minimum and maximum aspect ratio (width / height) of a random crop, e.g. [0.75, 1.33]."""
    hflip: Probability | None = None
    """Probability of a horizontal flip; use 0 if a mirror image is another class (text)."""
    vflip: Probability | None = None
    """Probability of a vertical flip; 0.5 suits images without an up (aerial, microscope)."""

    @property
    def is_active(self) -> bool:
        return True  # without any key, the center crop of evaluation

    def describe(self) -> dict[str, object]:
        shown: dict[str, object] = {}
        if self.crop_scale is not None:
            low, high = (100 * share for share in self.crop_scale)
            shown["crop"] = f"{low:.3g}-{high:.3g} % of the area"
        return shown | {
            name: probability
            for name, probability in (("hflip", self.hflip), ("vflip", self.vflip))
            if probability
        }

    def find_requirements(self) -> dict[str, str]:
        return {"crop_ratio": "crop_scale"} if self.crop_scale is None else {}

    def apply(self, batch: ImageBatch) -> ImageBatch:
        from imgcls.training.augment.kernels.crop import draw_crops

        pixels = draw_crops(
            batch.pixels,
            batch.size,
            scale=self.crop_scale,
            ratio=self.crop_ratio or DEFAULT_RATIO,
            flips=(self.hflip or 0.0, self.vflip or 0.0),
        )
        return replace(batch, pixels=pixels)
