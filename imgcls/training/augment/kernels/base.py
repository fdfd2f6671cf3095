"""Random draws and tensor functions that several augmentations use.

Every random number is drawn on the CPU, from torch's global generator, before anything is sent to
the device of the batch, so that a GPU never has to be synchronized.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

CACHED_VALUES = 1 << 19
"""float32 values that stay in the cache of a CPU from one operation to the next (2 MiB)."""


def draw_uniform(count: int, bounds: tuple[float, float]) -> torch.Tensor:
    """(count,) float32, uniform between the bounds."""
    return torch.empty(count).uniform_(*bounds)


def draw_boxes(area: torch.Tensor, ratio: tuple[float, float], side: int) -> torch.Tensor:
    """Boxes of given areas, of random shape and position, in a square of `side` pixels.

    area:  (N,) shares of the square
    ratio: bounds of width / height, drawn uniformly on a log scale; limited to the shapes that fit
           into the square
    Returns (N, 4) int64: top, left, height, width, in pixels.
    """
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
    return values.round_().clamp_(0, 255).to(torch.uint8)
