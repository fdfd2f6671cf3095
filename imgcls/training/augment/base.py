"""Base class of all augmentations, the batch that they augment, and what several of them need.

The configuration is checked without torch: each function of this package imports torch when it is
called. Every random number is drawn on the CPU, from torch's global generator, before anything is
sent to the device of the batch, so that a GPU never has to be synchronized.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from imgcls.config import Section

if TYPE_CHECKING:
    import torch

Probability = Annotated[float, Field(ge=0.0, le=1.0)]

CACHED_VALUES = 1 << 19
"""float32 values that stay in the cache of a CPU from one operation to the next (2 MiB)."""


@dataclass(frozen=True)
class ImageBatch:
    """A batch on its way through the augmentations.

    pixels:      (N, 3, S, S) uint8; S is `size` from the crop on
    targets:     (N,) int64 class indices; (N, num_classes) float32 shares once images are mixed,
                 and for multilabel
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


def draw_uniform(count: int, bounds: tuple[float, float]) -> torch.Tensor:
    """(count,) float32, uniform between the bounds."""
    import torch

    return torch.empty(count).uniform_(*bounds)


def draw_boxes(area: torch.Tensor, ratio: tuple[float, float], side: int) -> torch.Tensor:
    """Boxes of given areas, of random shape and position, in a square of `side` pixels.

    area:  (N,) shares of the square
    ratio: bounds of width / height, drawn uniformly on a log scale; limited to the shapes that fit
           into the square
    Returns (N, 4) int64: top, left, height, width, in pixels.
    """
    import torch

    room = -area.log()
    low, high = (torch.full_like(area, math.log(bound)).clamp(-room, room) for bound in ratio)
    shape = torch.lerp(low, high, torch.rand(len(area))).exp()
    sizes = side * torch.stack([area / shape, area * shape], 1).sqrt()
    sizes = sizes.round().clamp(1, side).long()
    corners = (torch.rand(len(area), 2) * (side - sizes + 1)).long()
    return torch.cat([corners, sizes], 1)


def paste_boxes(
    pixels: torch.Tensor, source: torch.Tensor, boxes: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """A copy in which the chosen images take their box from `source`.

    pixels: (N, 3, S, S) uint8
    source: like `pixels`, or (N, 3, 1, 1): one color per image
    boxes:  (N, 4) int64 as `draw_boxes` returns them
    chosen: (N,) bool on the CPU
    One slice per chosen image: on a CPU, a mask over the whole batch took ten times as long.
    """
    out = pixels.clone()
    for at in chosen.nonzero().flatten().tolist():
        top, left, height, width = boxes[at].tolist()
        area = (at, slice(None), slice(top, top + height), slice(left, left + width))
        out[area] = source[area] if source.shape == pixels.shape else source[at]
    return out


def iter_slices(pixels: torch.Tensor, count: int | None = None) -> Iterator[slice]:
    """Slices over a batch, or over `count` of its images: the whole on a GPU, parts that fit the
    cache on a CPU."""
    count = len(pixels) if count is None else count
    step = max(1, CACHED_VALUES // pixels[0].numel()) if pixels.device.type == "cpu" else count
    return (slice(start, start + step) for start in range(0, count, max(1, step)))


def to_uint8(values: torch.Tensor) -> torch.Tensor:
    """Round and clip; overwrites its argument."""
    return values.round_().clamp_(0, 255).byte()
