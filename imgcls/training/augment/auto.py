"""Automatic augmentation: operations drawn from torchvision's lists for each image."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from imgcls.training.augment.base import ImageBatch, Operation

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
        from imgcls.training.augment.auto_batch import apply_transform

        return replace(batch, pixels=apply_transform(self._build_transform(), batch.pixels))

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
