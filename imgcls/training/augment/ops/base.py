"""Base class of all augmentations, and the batch that they augment.

The configuration is checked without torch: an operation imports its tensor functions, in `kernels`,
when it is applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from imgcls.config import Section

if TYPE_CHECKING:
    import torch

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True)
class ImageBatch:
    """A batch on its way through the augmentations.

    pixels:      (N, 3, S, S) uint8; S is `size` from the crop on
    targets:     (N,) int64 class indices; (N, num_classes) float32 shares once images are mixed
    size:        side of the square that the network takes, in pixels
    num_classes: length of the network's output
    """

    pixels: torch.Tensor
    targets: torch.Tensor
    size: int
    num_classes: int


class Operation(Section):
    """One augmentation: its keys below `augment`, and what it does to a batch.

    Every key is None by default; with all of them None, the operation is off.
    """

    @property
    def is_active(self) -> bool:
        """Whether `apply` has anything to do."""
        raise NotImplementedError

    @property
    def mixes_targets(self) -> bool:
        """Whether targets become shares of classes."""
        return False

    def describe(self) -> Mapping[str, object]:
        """The settings in effect, by key, for logs and pictures."""
        raise NotImplementedError

    def find_requirements(self) -> Mapping[str, str]:
        """Keys that have no effect unless another one is set: key -> the setting that it needs."""
        return {}

    def apply(self, batch: ImageBatch) -> ImageBatch:
        """Augment each image with a random draw of its own; the argument stays as it is."""
        raise NotImplementedError
