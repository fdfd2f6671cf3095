"""MixUp and CutMix: two images of a batch mixed, and their targets."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from imgcls.training.augment.ops.base import ImageBatch, Operation, Probability

Alpha = Annotated[float, Field(ge=0.0, le=10.0)]


class Mix(Operation):
    """MixUp, CutMix, or both on different images of a batch."""

    mixup: Alpha | None = None
    """Alpha of MixUp: two images and their labels are blended in shares from Beta(alpha, alpha)."""
    cutmix: Alpha | None = None
    """Alpha of CutMix: a rectangle of another image is pasted, its area from Beta(alpha, alpha)."""
    mix_prob: Probability | None = None
    """Share of the images to mix (default 1); with mixup and cutmix, half of them by each."""

    @property
    def is_active(self) -> bool:
        return self._share > 0 and bool(self.mixup or self.cutmix)

    @property
    def mixes_targets(self) -> bool:
        return self.is_active

    def describe(self) -> dict[str, object]:
        if not self.is_active:
            return {}
        shown = {"mixup": self.mixup, "cutmix": self.cutmix, "mix_prob": self._share}
        return {name: value for name, value in shown.items() if value}

    def find_requirements(self) -> dict[str, str]:
        return {} if self.mixup or self.cutmix else {"mix_prob": "mixup or cutmix"}

    def apply(self, batch: ImageBatch) -> ImageBatch:
        from imgcls.training.augment.kernels.mix import mix_images, mix_targets

        pixels, share = mix_images(batch.pixels, self.mixup or 0.0, self.cutmix or 0.0, self._share)
        targets = mix_targets(batch.targets, share, batch.num_classes)
        return replace(batch, pixels=pixels, targets=targets)

    @property
    def _share(self) -> float:
        return 1.0 if self.mix_prob is None else self.mix_prob
