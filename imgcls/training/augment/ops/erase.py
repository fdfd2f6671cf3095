"""Random erasing: a random rectangle of one color over some images."""

from __future__ import annotations

from dataclasses import replace

from imgcls.training.augment.ops.base import ImageBatch, Operation, Probability


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
        from imgcls.training.augment.kernels.erase import erase_rectangles

        return replace(batch, pixels=erase_rectangles(batch.pixels, self.erase or 0.0))
